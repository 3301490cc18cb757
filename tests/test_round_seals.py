"""What a strategy cannot do: reach updates before the noise, train what nobody was charged for, keep a failed round."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam as FlowersFedAdam
from flwr.serverapp.strategy import FedAvgM as FlowersFedAvgM

import bract
from bract.clients.training import reproducible
from bract.core import flower
from bract.core.errors import InputError, RunError
from bract.core.parameters import Layout, record_of
from bract.privacy.client_level import ClientLevelPlan
from bract.server.accounts import Accounts
from bract.server.cohort import CohortSampler
from bract.server.private_aggregation import PrivateAggregation
from bract.server.progress import Progress, Rules
from bract.server.rounds import RoundLoop
from bract.strategies.fedavg import FedAvg
from bract.strategies.feddyn import FedDyn
from bract.strategies.fedprox import FedProx
from bract.strategies.registry import take_whole_cohorts
from bract.strategies.scaffold import Scaffold
from bract.strategies.server_rules import FedAdagrad, FedAdam, FedAvgM, FedYogi
from bract.strategies.state import strategy_state

from .federated import KEY, Quadratics, federation_of

CLIENT = {"privacy.unit": "client", "privacy.noise_multiplier": 4.0, "clients.sampling": "all"}
RECORD = {"privacy.unit": "record", "privacy.noise_multiplier": 4.0}


class Curious(FedAvg):
    """Sends train messages of its own while it configures a round, and keeps what comes back."""

    seen: ClassVar[list[Any]] = []

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self.ask(grid, [Message(message.content, message.metadata.dst_node_id, "train") for message in messages])
        return messages

    def ask(self, grid, messages):
        self.seen.extend(grid.send_and_receive(messages))


class Pushing(Curious):
    def ask(self, grid, messages):
        self.seen.extend(grid.pull_messages(grid.push_messages(messages)))


class Exchanging(Curious):
    def ask(self, grid, messages):
        exchange = grid.exchange(messages, fold=self.fold())
        self.seen.extend([*exchange, exchange.total])


class Measuring(Curious):
    def ask(self, grid, messages):
        content = messages[0].content
        self.seen.extend(
            grid.send_and_receive([Message(content, each.metadata.dst_node_id, "evaluate") for each in messages])
        )


class Asking(Curious):
    def ask(self, grid, messages):
        self.seen.extend(grid.send_and_receive([Message(RecordDict(), messages[0].metadata.dst_node_id, "query")]))


class Twice(FedAvg):
    """Sends one client two messages, so that it would add two clipped updates to one sum."""

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        return [*messages, Message(messages[0].content, messages[0].metadata.dst_node_id, "train")]


class Beyond(FedAvg):
    """Sends a client a message that was not drawn."""

    def configure_train(self, server_round, arrays, config, grid):
        messages = list(super().configure_train(server_round, arrays, config, grid))
        others = sorted({flower.node_id(f"client-{k:04d}") for k in range(4)} - set(grid.get_node_ids()))
        return [*messages, *(Message(messages[0].content, node, "train") for node in others)]


@pytest.mark.parametrize("strategy", [Curious, Pushing, Exchanging, Measuring, Asking, Twice])
def test_where_the_server_noises_a_strategy_sends_nothing_of_its_own(tiny, tmp_path, strategy):
    Curious.seen.clear()
    with pytest.raises(RunError) as caught:
        bract.simulate(tiny(**CLIENT), strategy=strategy(), out=tmp_path / "run")
    assert caught.value.code == "strategy-failed" and f"strategy {strategy.__name__} sends" in caught.value.sentence
    assert Curious.seen == []


@pytest.mark.parametrize("strategy", [Curious, Pushing, Exchanging, Measuring, Asking, Twice])
def test_where_clients_noise_each_is_trained_once_a_round_and_asked_nothing_else(tiny, tmp_path, strategy):
    """Each further train message is a round that no account counts, and each evaluation a release beyond the plan."""
    Curious.seen.clear()
    with pytest.raises(RunError) as caught:
        bract.simulate(tiny(**RECORD), strategy=strategy(), out=tmp_path / "run")
    assert caught.value.code == "strategy-failed" and "privacy does not account for" in caught.value.sentence
    assert not Curious.seen or strategy in (Curious, Pushing, Exchanging)


@pytest.mark.parametrize("keys", [CLIENT, RECORD], ids=["client", "record"])
def test_nobody_outside_of_the_cohort_is_trained(tiny, tmp_path, keys):
    keys = keys | {"clients.sampling": "fixed", "clients.per_round": 2}
    with pytest.raises(RunError) as caught:
        bract.simulate(tiny(**keys), strategy=Beyond(), out=tmp_path / "run")
    assert "not in the round's cohort" in caught.value.sentence


class Waiting(FedAvg):
    """An asynchronous strategy that says nothing of units."""

    buffer = 2

    def draw(self, server_round, nodes):
        return list(nodes)

    def skip_train(self, server_round, replies):
        Curious.seen.extend(replies)


def test_an_asynchronous_strategy_gets_no_noised_sum(tiny, tmp_path):
    with pytest.raises(InputError, match="Waiting is asynchronous"):
        bract.simulate(tiny(**CLIENT), strategy=Waiting(), out=tmp_path / "run")


@pytest.mark.parametrize("strategy", [Curious, Twice])
def test_without_privacy_a_strategy_may_send_what_it_likes(tiny, tmp_path, strategy):
    Curious.seen.clear()
    keys = {"experiment.rounds": 1, "server.quorum": 0.1}
    assert bract.simulate(tiny(**keys), strategy=strategy(), out=tmp_path / "run").status == "completed"
    assert len(Curious.seen) == (4 if strategy is Curious else 0)


# --- a round that fails half-way leaves no trace in the strategy


class InPlace(FedAvg):
    """Momentum that is written into the array that it keeps, as Python users do; no state_dict."""

    def __init__(self):
        super().__init__()
        self.velocity = np.zeros(2)
        self.history: list[float] = []

    def aggregate_total(self, server_round, total):
        mean = total.mean()
        self.velocity *= 0.5
        self.velocity += mean
        self.history.append(float(mean[0]))
        self.last = mean
        return record_of(self.layout.unflatten(self.velocity.copy())), MetricRecord()


class WithDict(InPlace):
    """The same, and it hands its own arrays over as its state."""

    def state_dict(self):
        return {"velocity": self.velocity, "history": self.history}

    def load_state_dict(self, state):
        self.velocity, self.history = state["velocity"], list(state["history"])


STRATEGIES = {
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedadagrad": FedAdagrad,
    "fedyogi": FedYogi,
    "feddyn": FedDyn,
    "scaffold": Scaffold,
    "fedprox": FedProx,
    "in place": InPlace,
    "with state_dict": WithDict,
    "Flower's FedAdam": FlowersFedAdam,
    "Flower's FedAvgM": lambda: FlowersFedAvgM(server_momentum=0.9),
}


def loop_of(strategy, **changes):
    """Return a loop over two quadratics, and its progress before the first round."""
    take_whole_cohorts(strategy)
    _, federation, grid, _ = federation_of(Quadratics((1.0, 2.0, 4), (0.5, -1.0, 4)), strategy, rounds=3)
    known: dict[str, Any] = {
        "strategy": strategy,
        "grid": grid,
        "clients": grid.names,
        "sampler": CohortSampler(sampling="all", per_round=None, key=KEY),
        "budget": Accounts({}),
        "rules": Rules(rounds=3, quorum=0.0),
        "evaluation": None,
        "emit": lambda event: None,
        "remember_clients": grid.remember,
    }
    return RoundLoop(**known | changes), Progress(round=0, arrays=dict(federation.initial))


def failing(strategy, how, round):
    """Have a strategy fail in a round after it has aggregated, once."""
    aggregate = "aggregate_total" if hasattr(strategy, "aggregate_total") else "aggregate_train"
    before, left = getattr(strategy, aggregate), [1]

    def spoilt(server_round, replies):
        found = before(server_round, replies)
        if server_round == round and left:
            left.clear()
            if how == "interrupted":
                raise KeyboardInterrupt
            if how == "raises":
                raise ZeroDivisionError("a user's mistake")
            return ArrayRecord(), MetricRecord()
        return found

    setattr(strategy, aggregate, spoilt)
    return strategy


@pytest.mark.parametrize("how", ["interrupted", "raises", "of another form"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_round_that_fails_after_the_aggregate_is_repeated_on_the_same_state(name, how):
    with reproducible(), flower.quiet():
        loop, whole = loop_of(STRATEGIES[name]())
        loop.run(whole)
        loop, progress = loop_of(failing(STRATEGIES[name](), how, 2))
        with pytest.raises(KeyboardInterrupt if how == "interrupted" else RunError):
            loop.run(progress)
        assert progress.round == 1
        # As a resumed run does: the checkpoint is of the strategy as it is now.
        saved = loop.checkpoint(progress)
        resumed, _ = loop_of(
            STRATEGIES[name](), grid=loop.grid, clients=loop.clients, remember_clients=loop.grid.remember
        )
        again = resumed.restore(saved)
        resumed.run(again)
    assert bytes_of(again.arrays) == bytes_of(whole.arrays)


def bytes_of(arrays):
    return {name: array.tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedadagrad", "fedyogi", "feddyn", "scaffold", "fedprox"])
def test_bracts_own_strategies_never_write_into_an_array_that_they_keep(name):
    """So a round's start is remembered by reference, without a copy of a state as large as the model."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def after_round(progress, make):
        state = strategy_state(loop.strategy)
        kept.append((state, {key: np.array(value) for key, value in state.items() if isinstance(value, np.ndarray)}))

    loop, progress = loop_of(STRATEGIES[name](), after_round=after_round)
    with reproducible():
        loop.run(progress)
    assert len(kept) == 3
    for state, copied in kept:
        assert all(np.array_equal(state[key], copied[key]) for key in copied)


def test_a_failed_round_leaves_the_clipping_norm_as_it_was():
    strategy = failing(FedAvg(), "raises", 1)
    loop, progress = loop_of(strategy)
    layout = Layout.of(progress.arrays)
    plan = ClientLevelPlan(
        clients=2, cohort=2, sampling="all", rounds=3, clipping_norm=0.5, noise_multiplier=0.1, delta=1e-5,
        coordinates=layout.size, adaptive_clipping=True,
    )  # fmt: skip
    loop.aggregation = PrivateAggregation(plan, layout=layout, key=KEY)
    with reproducible(), pytest.raises(RunError):
        loop.run(progress)
    assert loop.aggregation.clipping_norm == 0.5
    with reproducible():
        loop.run(progress)
    assert loop.aggregation.clipping_norm != 0.5
