"""Strategies with a client half: each beats FedAvg where its paper says so, and nothing undeclared leaves a client."""

from __future__ import annotations

import os
import pickle
import signal
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedProx as FlowerFedProx
from torch import nn

import bract
from bract.clients.app import client_app
from bract.clients.gate import Gate
from bract.clients.kernels import sequential
from bract.clients.local_model import LocalModel
from bract.clients.owner import Site
from bract.clients.training import LocalTraining
from bract.core import flower
from bract.core.errors import InputError, RunError
from bract.core.keys import Key
from bract.core.parameters import arrays_of, record_of
from bract.privacy.mechanism import RecordLevelPlan
from bract.privacy.release import EvaluationPlan
from bract.server.events import ClientReplied, RoundFinished
from bract.strategies.fedavg import FedAvg
from bract.strategies.feddyn import GRADIENT, FedDyn
from bract.strategies.fednova import STEPS_KEY, FedNova
from bract.strategies.fedprox import MU_KEY, FedProx, Proximal
from bract.strategies.fold import weight_of
from bract.strategies.local_rule import LocalRound, LocalRule, Sent, Untouched
from bract.strategies.qfedavg import QFedAvg
from bract.strategies.registry import load_strategy
from bract.strategies.scaffold import VARIATE, Scaffold
from bract.strategies.state import load_strategy_state, strategy_state
from bract.tasks.task import Examples, SiteData

from .federated import Quadratics, train, train_under_flower

# Two clients that disagree, one of them steep: local training runs to its own optimum, and averages forget steepness.
UNLIKE = Quadratics((1.0, 1.0, 4), (8.0, 0.0, 4))
LONG = {"train.epochs": 10, "train.learning_rate": 0.05, "train.batch_size": 4}
RULED = ["fedprox", "scaffold", "fednova", "feddyn", "qfedavg"]


@pytest.fixture(scope="module")
def averaged():
    """Return FedAvg's result where the others must be better."""
    return train(UNLIKE, FedAvg(), **LONG)


def test_fedprox_ends_where_its_fixed_point_is_nearer_to_the_optimum(averaged):
    mu = 5.0
    found = train(UNLIKE, FedProx(mu=mu), **LONG, rounds=60)
    assert abs(found.w - UNLIKE.optimum) < 0.6 * abs(averaged.w - UNLIKE.optimum)
    # Where K steps of size η on a/2·(w − b)² + mu/2·(w − w_t)², averaged over clients, lead back to w_t.
    weight = {a: a / (a + mu) * (1 - (1 - 0.05 * (a + mu)) ** 10) for a, _, _ in UNLIKE.clients}
    fixed = sum(weight[a] * b for a, b, _ in UNLIKE.clients) / sum(weight.values())
    assert found.w == pytest.approx(fixed, abs=1e-4)


def test_fedprox_sends_mu_as_flowers_does():
    messages = FedProx(mu=0.25).configure_train(1, record_of({"w": np.zeros(1)}), ConfigRecord(), Nodes())
    theirs = FlowerFedProx(proximal_mu=0.25, min_train_nodes=1, min_available_nodes=1, fraction_train=1.0)
    other = theirs.configure_train(1, record_of({"w": np.zeros(1)}), ConfigRecord(), Nodes())
    assert next(iter(messages)).content["config"][MU_KEY] == next(iter(other)).content["config"][MU_KEY] == 0.25


def test_fedprox_with_mu_zero_is_fedavg(averaged):
    np.testing.assert_array_equal(train(UNLIKE, FedProx(mu=0.0), **LONG).arrays["w"], averaged.arrays["w"])


def test_scaffold_ends_at_the_optimum(averaged):
    found = train(UNLIKE, Scaffold(), **LONG, rounds=40)
    assert found.w == pytest.approx(UNLIKE.optimum, abs=1e-4)
    assert abs(averaged.w - UNLIKE.optimum) > 0.15


def test_scaffolds_variates_end_at_the_gradients():
    """Option II: at the optimum c_i is client i's gradient there, and their mean c is zero."""
    found = train(UNLIKE, Scaffold(), **LONG, rounds=40)
    for (a, b, _), state in zip(UNLIKE.clients, found.states.values(), strict=True):
        np.testing.assert_allclose(state[VARIATE]["w"], a * (UNLIKE.optimum - b), atol=1e-3)
    np.testing.assert_allclose(found.strategy.state_dict()[VARIATE], 0, atol=1e-3)


@pytest.mark.parametrize(
    ("strategy", "record", "server"), [(Scaffold(), VARIATE, VARIATE), (FedDyn(alpha=2.0), GRADIENT, "h")]
)
def test_with_a_cohort_the_servers_state_is_the_mean_over_all_clients(strategy, record, server):
    task = Quadratics((1.0, 1.0, 4), (2.0, 0.0, 4), (1.0, -1.0, 4), (3.0, 0.5, 4), (1.0, 2.0, 4))
    keys = LONG | {"clients.sampling": "fixed", "clients.per_round": 2}
    found = train(task, strategy, **keys, rounds=4)
    kept = [state[record]["w"] for state in found.states.values()]
    assert 2 < len(kept) <= 5
    np.testing.assert_allclose(strategy.state_dict()[server], np.sum(kept, axis=0) / 5, atol=1e-5)
    longer = train(task, type(strategy)(), **keys, rounds=300)
    assert longer.w == pytest.approx(task.optimum, abs=0.02)


def test_scaffolds_server_learning_rate():
    """One round from zero variates is FedAvg's round, taken so many times."""
    step = train(UNLIKE, FedAvg(), **LONG, rounds=1).w - 3.0
    assert train(UNLIKE, Scaffold(server_learning_rate=0.5), **LONG, rounds=1).w == pytest.approx(3.0 + step / 2)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_fednova_does_not_favour_who_takes_more_steps(momentum):
    task = Quadratics((1.0, 1.0, 2), (1.0, 0.0, 16))
    keys = {"train.batch_size": 2, "train.learning_rate": 0.01, "train.epochs": 2, "train.momentum": momentum}
    plain, found = (train(task, strategy, **keys, rounds=80).w for strategy in (FedAvg(), FedNova()))
    assert plain < 0.2
    assert found == pytest.approx(task.optimum, abs=0.05)


def test_fednova_with_equal_steps_is_fedavg(averaged):
    np.testing.assert_allclose(train(UNLIKE, FedNova(), **LONG).arrays["w"], averaged.arrays["w"], atol=1e-6)


def test_feddyn_ends_at_the_optimum(averaged):
    found = train(UNLIKE, FedDyn(alpha=2.0), **LONG, rounds=80)
    assert found.w == pytest.approx(UNLIKE.optimum, abs=1e-3)


def worst(task, w):
    return max(a / 2 * (w - b) ** 2 for a, b, _ in task.clients)


def test_qfedavg_serves_the_worst_client_better():
    task = Quadratics((1.0, 1.0, 4), (1.0, 0.0, 4), (1.0, 0.0, 4), (1.0, 0.0, 4))
    once = {"train.learning_rate": 0.5, "train.batch_size": 4, "rounds": 60}
    plain = train(task, FedAvg(), **once)
    np.testing.assert_allclose(train(task, QFedAvg(q=0.0), **once).arrays["w"], plain.arrays["w"], atol=1e-6)
    losses = [worst(task, plain.w)]
    for q in (1.0, 5.0):
        found = train(task, QFedAvg(q=q), **once)
        losses.append(worst(task, found.w))
        # The minimum of Σ F_k^(q+1) is where (1 − w)^(2q+1) = 3 w^(2q+1).
        assert found.w == pytest.approx(1 / (1 + 3 ** (1 / (2 * q + 1))), abs=1e-4)
    assert losses[0] > 1.5 * losses[1] > 1.5 * 1.2 * losses[2]


@pytest.mark.parametrize("name", RULED)
def test_flowers_own_loop_gets_the_same_model(name):
    """Over a grid that does not fold, and through messages that Flower's loop configured."""
    mine = train(UNLIKE, load_strategy(name, {}), **LONG, rounds=5)
    other = train_under_flower(UNLIKE, load_strategy(name, {}), **LONG, rounds=5)
    assert not mine.failures
    assert mine.arrays["w"].tobytes() == other["w"].tobytes()


@pytest.mark.parametrize("name", RULED)
def test_running_statistics_are_averaged_and_never_extrapolated(name):
    flower.identify_process(1)
    own = {"server_learning_rate": 3.0} if name == "scaffold" else {}
    strategy = load_strategy(name, own)
    for round in (1, 2):
        model = {"n.running_var": np.ones(2, np.float32), "n.weight": np.ones(2, np.float32)}
        replies = []
        messages = strategy.configure_train(round, record_of(model), ConfigRecord(), Nodes(2))
        for message, value, steps in zip(messages, (0.1, 0.3), (1.0, 10.0), strict=True):
            sent = {name: np.full(2, value, np.float32) for name in model}
            numbers = {STEPS_KEY: steps, "received-loss": 1.0, "learning-rate": 0.1}
            content = RecordDict({"arrays": record_of(sent), "metrics": MetricRecord(numbers)})
            if name == "scaffold":
                content[VARIATE] = record_of({name: np.zeros(2, np.float32) for name in model})
            replies.append(Message(content, reply_to=message))
        arrays, _ = strategy.aggregate_train(round, replies)
        statistic = arrays_of(arrays)["n.running_var"]
        assert (statistic >= 0.1).all() and (statistic <= 1).all()
        if name != "qfedavg":
            np.testing.assert_allclose(statistic, 0.2, rtol=1e-5)


class Nodes:
    """The part of a Grid that configure_train asks."""

    def __init__(self, count=1):
        self.count = count

    def get_node_ids(self):
        return list(range(1, self.count + 1))


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_server_state_goes_and_comes_back(name):
    strategy, again = load_strategy(name, {}), load_strategy(name, {})
    empty = strategy_state(strategy)
    load_strategy_state(again, empty)
    train(UNLIKE, strategy, **LONG, rounds=2)
    load_strategy_state(again, strategy_state(strategy))
    for key, value in strategy.state_dict().items():
        assert np.abs(value).max() > 0
        np.testing.assert_array_equal(again.state_dict()[key], value)


def interrupt_within_round_two(event):
    """A real SIGINT between two clients of the second round."""
    if isinstance(event, ClientReplied) and event.round == 2 and event.client == "client-0002":
        os.kill(os.getpid(), signal.SIGINT)


def interrupt_after_round_two(event):
    if isinstance(event, RoundFinished) and event.round == 2:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy.name": "scaffold"},
        {"strategy.name": "scaffold", "privacy.unit": "record", "privacy.noise_multiplier": 4.0},
        {"strategy.name": "feddyn"},
    ],
    ids=["scaffold", "scaffold, private", "feddyn"],
)
def test_state_survives_an_interrupt_with_the_same_bytes(tiny, tmp_path, keys):
    """Also in the middle of a round: the clients that were done with it begin it again from where they were."""
    whole = bract.simulate(tiny(**keys), out=tmp_path / "whole")
    interrupts = [interrupt_within_round_two] + [interrupt_after_round_two] * ("privacy.unit" not in keys)
    for interrupt in interrupts:
        out = tmp_path / interrupt.__name__
        first = bract.simulate(tiny(**keys), out=out, listeners=[interrupt])
        assert first.status == "interrupted" and first.record["rounds"] in (1, 2)
        second = bract.simulate(resume=out)
        assert (second.model_sha256, second.guarantee) == (whole.model_sha256, whole.guarantee)


def test_workers_give_the_same_bytes(tiny, tmp_path):
    """Variates travel to a worker and back, and each worker folds models and variates."""
    keys = {"strategy.name": "scaffold", "strategy.server_learning_rate": 0.9}
    one = bract.simulate(tiny(**keys, **{"simulation.workers": 1}), out=tmp_path / "one")
    two = bract.simulate(tiny(**keys, **{"simulation.workers": 2}), out=tmp_path / "two")
    assert one.model_sha256 == two.model_sha256
    assert not (tmp_path / "two" / "private" / "clients.log").exists()


def test_a_given_strategy_brings_its_client_half(tiny, tmp_path):
    named = bract.simulate(tiny(**{"strategy.name": "fedprox", "strategy.mu": 2.0}), out=tmp_path / "named")
    given = bract.simulate(tiny(), strategy=FedProx(mu=2.0), out=tmp_path / "given")
    plain = bract.simulate(tiny(), out=tmp_path / "plain")
    assert named.model_sha256 == given.model_sha256 != plain.model_sha256


@pytest.mark.parametrize("name", [*RULED, "fedper", "fedrep", "fedbn", "ditto"])
def test_client_halves_are_picklable(name):
    rule = load_strategy(name, {}).local_rule
    again = pickle.loads(pickle.dumps(rule))
    assert (again.sends, again.keeps, again.reports) == (rule.sends, rule.keeps, rule.reports)


# Under record-level privacy


PLAN = RecordLevelPlan(
    records=50, batch_size=50, epochs=1, rounds=1, clipping_norm=1e-6, noise_multiplier=1e-6, delta=1e-5
)


def test_fedproxs_term_acts_after_clipping_and_noise():
    """Without a learning signal the weights shrink by lr·mu towards the anchor, however small the clipping norm."""
    module = nn.Linear(4, 3)
    nn.init.constant_(module.weight, 5.0)
    training = LocalTraining(learning_rate=0.1)
    model = LocalModel(module, training)
    anchor = {name: torch.zeros_like(tensor) for name, tensor in model.trained.items()}
    session = Proximal(round_of(model), mu=1.0, anchor=anchor)
    sequential.train(model, cross_entropy, records(50), training, plan=PLAN, key=Key.from_seed(1), session=session)
    torch.testing.assert_close(module.weight, torch.full_like(module.weight, 4.5), atol=1e-4, rtol=0)


def cross_entropy(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def records(count):
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return Examples(inputs, (inputs[:, 0] > 0).long())


def round_of(model, **changed):
    def nothing(*arguments):
        raise AssertionError("not in this test")

    known = {"received": {}, "state": {}, "steps": 1, "epochs": 1, "learning_rate": 0.1, "momentum": 0.0}
    tensors = {"shared": model.shared, "parameters": model.trained, "personal": model.personal}
    return LocalRound(**{**tensors, **known, "loss": nothing, "train": nothing, **changed})


class Loss:
    classes = ("a", "b", "c")
    loss = staticmethod(cross_entropy)


@pytest.fixture
def client():
    """Return what makes (model, ask): a client under a rule, its train handler and its context."""

    def make(rule, *, plan):
        training = LocalTraining(batch_size=10, learning_rate=0.5, buffers=())
        model = LocalModel(nn.Linear(4, 3), training)
        evaluation = EvaluationPlan(epsilon=None, releases=1, classes=3)
        data = SiteData(train=records(50), test=records(10))
        site = Site(name="a", data=data, key=Key.from_seed(1), plan=plan, evaluation=evaluation)
        gate = Gate(layout=model.layout, withhold_counts=plan is not None, rule=rule)
        app = client_app({"a": site}, Loss(), training, model, gate)
        context = Context(run_id=1, node_id=5, node_config={"name": "a"}, state=RecordDict(), run_config={})
        flower.identify_process(1)

        def ask(arrays, **beside):
            config = ConfigRecord({"server-round": 1, "model-version": "x"})
            content = {"arrays": record_of(arrays), "config": config}
            content |= {name: record_of(record) for name, record in beside.items()}
            return app(Message(RecordDict(content), 5, "train"), context)

        return model, ask, context

    return make


NOISY = RecordLevelPlan(
    records=50, batch_size=10, epochs=1, rounds=1, clipping_norm=1.0, noise_multiplier=1.0, delta=1e-5
)


def test_scaffolds_variate_tells_no_more_than_the_model_beside_it(client):
    """Option II: whoever knows x, c and the released y computes Δc_i, so it costs no privacy."""
    model, ask, _ = client(Scaffold().local_rule, plan=NOISY)
    x = model.shared_arrays()
    c = {name: np.random.default_rng(0).normal(size=array.shape).astype(np.float32) for name, array in x.items()}
    content = ask(x, variate=c).content
    y, change = arrays_of(content["arrays"]), arrays_of(content[VARIATE])
    for name in x:
        # 5 planned steps of learning rate 0.5.
        np.testing.assert_allclose(change[name], (x[name] - y[name]) / 2.5 - c[name], atol=1e-5)
    assert dict(content["metrics"]) == {"num-examples": 1}


def test_the_noise_depends_on_all_that_a_round_starts_from(client):
    """The same noise under two corrections would reveal the difference of two sums of gradients."""
    model, ask, context = client(Scaffold().local_rule, plan=NOISY)
    x = model.shared_arrays()
    zero = {name: np.zeros_like(array) for name, array in x.items()}

    def noise(c):
        # Beside the correction, which is the same in each step, what is left is gradients and noise.
        content = ask(x, variate=c).content
        return np.concatenate([(arrays_of(content[VARIATE])[name] + c[name]).ravel() for name in x])

    first = noise(zero)
    context.state.clear()
    np.testing.assert_array_equal(noise(zero), first)
    context.state.clear()
    assert np.abs(noise({name: array + 1e-6 for name, array in zero.items()}) - first).max() > 1e-2
    # Now it keeps a variate of its own, and starts from another place.
    assert np.abs(noise(zero) - first).max() > 1e-2


class Sender:
    """A session that sends what it is told to."""

    def __init__(self, round, *, sent, state=None):
        self.sent = sent
        round.state.update(state or {})

    def correct(self):
        pass

    def finish(self):
        return self.sent


FITS = {"weight": np.zeros((3, 4), np.float32), "bias": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    ("sent", "state"),
    [
        (Sent(arrays={"declared": FITS, "other": FITS}, numbers={"n": 1.0}), {}),
        (Sent(arrays={}, numbers={"n": 1.0}), {}),
        (Sent(arrays={"declared": FITS}, numbers={"n": 1.0, "loss": 0.3}), {}),
        (Sent(arrays={"declared": FITS}), {}),
        (Sent(arrays={"declared": FITS | {"weight": np.zeros(7, np.float32)}}, numbers={"n": 1.0}), {}),
        (Sent(arrays={"declared": FITS | {"records": np.zeros(7, np.float32)}}, numbers={"n": 1.0}), {}),
        (Sent(arrays={"declared": {"bias": np.full(3, np.nan, np.float32)}}, numbers={"n": 1.0}), {}),
        (Sent(arrays={"declared": FITS}, numbers={"n": float("inf")}), {}),
        (Sent(arrays={"declared": FITS}, numbers={"n": 1.0}), {"undeclared": FITS}),
    ],
)
def test_nothing_undeclared_leaves_the_gate(client, sent, state):
    declared = {"sends": ("declared",), "reports": ("n",), "keeps": ("mine",)}
    good = Sent(arrays={"declared": FITS}, numbers={"n": 1.0})
    model, ask, _ = client(LocalRule(session=partial(Sender, sent=good), **declared), plan=None)
    content = ask(model.shared_arrays()).content
    assert set(content) == {"arrays", "declared", "metrics"}
    assert dict(content["metrics"]) == {"num-examples": 50, "n": 1.0}
    model, ask, context = client(LocalRule(session=partial(Sender, sent=sent, state=state), **declared), plan=None)
    with pytest.raises(RunError):
        ask(model.shared_arrays())
    assert not context.state


def test_what_comes_beside_the_model_is_checked(client):
    model, ask, _ = client(Scaffold().local_rule, plan=None)
    x = model.shared_arrays()
    ask(x, variate={name: np.zeros_like(array) for name, array in x.items()})
    for beside in ({}, {"variate": {"weight": x["weight"]}}, {"variate": x | {"bias": np.full(3, np.inf, np.float32)}}):
        with pytest.raises(RunError):
            ask(x, **beside)


class Curious(Untouched):
    """A session that asks for what no plan accounts for."""

    def __init__(self, round, *, what):
        round.loss() if what == "loss" else round.train(Untouched(round))


@pytest.mark.parametrize("what", ["loss", "train"])
def test_a_client_under_privacy_refuses_what_no_plan_accounts_for(client, what):
    rule = LocalRule(session=partial(Curious, what=what))
    model, ask, _ = client(rule, plan=None)
    assert ask(model.shared_arrays()).has_content()
    model, ask, _ = client(rule, plan=NOISY)
    with pytest.raises(RunError) as caught:
        ask(model.shared_arrays())
    assert "withholds" in caught.value.sentence


def test_a_rule_must_not_take_bracts_own_names():
    with pytest.raises(ValueError, match="bract's own"):
        LocalRule(keeps=("personal",))


@pytest.mark.parametrize("steps", [0.5, float("nan"), 1e9, "many", None])
def test_fednova_leaves_out_steps_that_lie(steps):
    strategy = FedNova()
    flower.identify_process(1)
    arrays = record_of({"w": np.zeros(2, np.float32)})
    message = next(iter(strategy.configure_train(1, arrays, ConfigRecord(), Nodes())))
    metrics = {} if steps is None else {STEPS_KEY: [1.0] if steps == "many" else steps}
    reply = Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)
    assert strategy.aggregate_train(1, [reply]) == (None, None)
    assert weight_of(reply.content, None) == 1


PRIVATE = {"privacy.unit": "record", "privacy.noise_multiplier": 4.0}
APP = {"clients.app": "app:app", "clients.count": 2, "task.model": "app:net"}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"strategy.name": "fedprox", "strategy.mu": -1.0}, "mu = -1.0: must be at least 0"),
        ({"strategy.name": "fedprox", "strategy.mu": float("nan")}, "must be a finite number"),
        ({"strategy.name": "scaffold", "strategy.server_learning_rate": 0}, "must be above 0"),
        ({"strategy.name": "feddyn", "strategy.alpha": True}, "alpha"),
        ({"strategy.name": "scaffold", "train.optimizer": "adam"}, 'train.optimizer = "adam"'),
        ({"strategy.name": "scaffold", "train.momentum": 0.9}, "train.momentum = 0.9"),
        ({"strategy.name": "fednova", "train.optimizer": "adagrad"}, "train.optimizer"),
        ({"strategy.name": "qfedavg", **PRIVATE}, "metrics, which are withheld"),
        ({"strategy.name": "ditto", **PRIVATE}, "client or none only"),
        ({"strategy.name": "scaffold", **APP}, "which a Flower ClientApp does not run"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tiny, tmp_path, keys, says):
    (tmp_path / "app.py").write_text("from flwr.clientapp import ClientApp\napp = ClientApp()\ndef net(): pass\n")
    with pytest.raises(InputError) as caught:
        bract.simulate(tiny(tmp_path, **keys), out=tmp_path / "run")
    assert says in caught.value.sentence and "\n" not in caught.value.sentence
