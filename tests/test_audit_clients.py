"""The audit at the client level: sound servers and clients pass, and each mutation fails the check that it should.

As in test_audit.py the key is fresh: a sound build fails with a probability of about 1e-6 at most.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import replace

import numpy as np
import pytest

from bract.cli.main import main
from bract.clients import app as client_app
from bract.clients.gate import Gate
from bract.clients.owner import Site
from bract.clients.training import reproducible
from bract.core.keys import Key
from bract.core.parameters import arrays_of
from bract.core.ring import Ring
from bract.experiment import Experiment
from bract.privacy import accounting, discrete_gaussian
from bract.privacy.adaptive_clipping import AdaptiveClippingPlan
from bract.privacy.client_level import ClientLevelPlan
from bract.privacy.local import LocalPlan
from bract.privacy.matrix_factorization import CorrelatedNoise, MatrixFactorizationPlan
from bract.privacy.mechanism import RecordLevelPlan
from bract.server import private_aggregation, rounds
from bract.server.accounts import PopulationAccount
from bract.server.cohort import CohortSampler
from bract.server.private_aggregation import PrivateAggregation, ReleasedMean
from bract.simulations import federation
from bract.simulations.audit.clients.subject import client_subject_of
from bract.simulations.audit.run import CHECKS, checks_of, quick
from bract.strategies.clipped_sum import ClippedSum
from bract.strategies.fold import weight_of

SERVER = {"privacy.unit": "client", "privacy.noise_multiplier": 1.5}
POISSON = SERVER | {"clients.sampling": "poisson", "clients.per_round": 20, "task.clients": 60}
# Everybody is in every round, so that accounting is quick.
ADAPTIVE = SERVER | {"task.clients": 40, "privacy.adaptive_clipping": True}
CYCLIC = SERVER | {"clients.sampling": "cyclic", "clients.per_round": 2, "task.clients": 8, "experiment.rounds": 12}
BANDS = CYCLIC | {"privacy.bands": 3}
NOBODY = SERVER | {"privacy.trust": "nobody"}
COUNTED = SERVER | {"strategy.weights": "counted", "strategy.weight_cap": 20}
TWO_LEVELS = {"privacy.record": {"noise_multiplier": 3.0}, "task.clients": 2, "train.batch_size": 100}

ALL, ALL_OF_SITES = list(CHECKS["client"]), list(CHECKS["client, trusting nobody"])


def failing(experiment, *checks):
    """Return the names of the checks that fail, and their sentences; of the given checks or of all."""
    if checks:
        unit = "client" if experiment.privacy.trust == "server" else "client, trusting nobody"
        with reproducible():
            subject = client_subject_of(experiment)
            found = [CHECKS[unit][name](subject) for name in checks]
    else:
        found = list(quick(experiment))
        assert [finding.name for finding in found] == checks_of(experiment)
    return {finding.name: finding.sentence for finding in found if finding.passed is False}


@pytest.mark.parametrize(
    "keys",
    [
        ADAPTIVE,
        BANDS,
        NOBODY,
        COUNTED,
        pytest.param(SERVER | {"task.clients": 1}, marks=pytest.mark.soak),
        pytest.param(POISSON, marks=pytest.mark.soak),
        pytest.param(POISSON | {"privacy.adaptive_clipping": True}, marks=pytest.mark.soak),
        pytest.param(POISSON | {"clients.sampling": "fixed"}, marks=pytest.mark.soak),
        pytest.param(CYCLIC | {"strategy.name": "fedadam"}, marks=pytest.mark.soak),
        pytest.param(CYCLIC | {"privacy.trust": "nobody"}, marks=pytest.mark.soak),
        pytest.param(SERVER | {"experiment.rounds": 1}, marks=pytest.mark.soak),
        pytest.param(SERVER | {"compression.top_k": 0.5, "compression.bits": 8}, marks=pytest.mark.soak),
        pytest.param(NOBODY | {"compression.top_k": 0.5, "compression.bits": 8}, marks=pytest.mark.soak),
        pytest.param(NOBODY | {"strategy.name": "ditto"}, marks=pytest.mark.soak),
        pytest.param(SERVER | {"train.model": "mlp"}, marks=pytest.mark.soak),
        pytest.param(NOBODY | TWO_LEVELS, marks=pytest.mark.soak),
    ],
    ids=lambda keys: ", ".join(f"{name} {value}" for name, value in keys.items() if name not in SERVER),
)
def test_sound_experiments_pass(tiny, keys):
    assert failing(tiny(**keys)) == {}


@pytest.mark.soak
@pytest.mark.parametrize("trust", ["server", "nobody"])
def test_heart_disease_passes_within_a_minute(trust, capsys):
    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        main(["audit", "quick", "--set", "privacy.unit=client", "--set", f"privacy.trust={trust}", "--json"])
    assert ended.value.code == 0 and time.monotonic() - started < 60
    told = json.loads(capsys.readouterr().out)
    assert told["unit"] == "client" and all(check["passed"] for check in told["checks"])


@pytest.mark.soak
def test_sound_programs_pass_again_and_again(tiny):
    """Thirty fresh keys: a test of chance whose significance is not what it says would fail some of them."""
    for keys in (ADAPTIVE, BANDS, NOBODY):
        chances = ("noise", "fresh-noise", "canary", *(() if keys is NOBODY else ("sampling",)))
        assert [failing(tiny(**keys), *chances) for _ in range(30)] == [{}] * 30


def test_both_levels_are_audited_and_each_is_named(tiny, monkeypatch):
    experiment = tiny(**SERVER | TWO_LEVELS)
    assert checks_of(experiment)[: len(ALL)] == ALL
    assert "record.noise" in checks_of(experiment) and "record.weights" not in checks_of(experiment)
    halve = property(lambda plan: plan.noise_multiplier * plan.clipping_norm / 2)
    monkeypatch.setattr(RecordLevelPlan, "noise_deviation", halve)
    assert set(failing(experiment)) == {"record.bad-records", "record.noise", "record.canary"}


# Mutations of the server's noise.


def halved(name):
    real = getattr(ClientLevelPlan, name)
    return lambda plan, *given: real(plan, *given) / 2


def test_halved_noise_of_the_server_fails(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ClientLevelPlan, "sigma_units", halved("sigma_units"))
    path = tmp_path / "clients.toml"
    path.write_text(tiny(**SERVER).to_toml())
    with pytest.raises(SystemExit) as ended:
        main(["audit", "quick", str(path), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1 and told["error"]["code"] == "audit-failed"
    failed = {check["name"]: check["sentence"] for check in told["checks"] if check["passed"] is False}
    # Epsilon follows the same figure, but where nothing hangs on rounding it does not move.
    assert {"noise", "canary"} <= set(failed) <= {"noise", "canary", "bad-updates"}
    assert 0.4 < float(failed["noise"].split(" has ")[1].split()[0]) < 0.6
    assert [check["name"] for check in told["checks"]] == ALL


def drawing(monkeypatch, draw):
    """Let the server draw its noise by `draw(stream, sigma, count)`."""
    fake = type("Sampler", (), {"sample": staticmethod(draw), "__getattr__": lambda _, name: getattr(real, name)})()
    real = discrete_gaussian
    monkeypatch.setattr(private_aggregation, "discrete_gaussian", fake)


def test_noise_reused_between_rounds_fails(tiny, monkeypatch):
    real = discrete_gaussian.sample
    drawing(monkeypatch, lambda stream, sigma, count: real(Key.from_seed(1).stream(), sigma, count))
    assert "noise is used twice" in failing(tiny(**SERVER), "fresh-noise")["fresh-noise"]


def test_noise_that_forgets_the_sum_or_the_model_fails(tiny, monkeypatch):
    for forgotten, words in ((slice(4, None), "two sums"), (slice(2, 3), "two models")):
        child = Key.child

        def forgetful(key, *path, child=child, forgotten=forgotten):
            parts = list(path)
            if parts[0] == "aggregate":
                parts[forgotten if forgotten.start == 2 else slice(3, 5)] = []
            return child(key, *parts)

        with monkeypatch.context() as patch:
            patch.setattr(Key, "child", forgetful)
            assert words in failing(tiny(**SERVER), "fresh-noise")["fresh-noise"]


def test_a_forgotten_tensor_fails(tiny, monkeypatch):
    def forgetful(stream, sigma, count):
        noise = discrete_gaussian.sample(stream, sigma, count)
        noise[-1:] = 0
        return noise

    drawing(monkeypatch, forgetful)
    assert "has 0 times" in failing(tiny(**SERVER), "noise")["noise"]


def test_a_repeated_round_with_other_noise_fails(tiny, monkeypatch):
    real = discrete_gaussian.sample
    drawing(monkeypatch, lambda stream, sigma, count: real(Key(secrets.token_bytes(32)).stream(), sigma, count))
    assert "repeated with the same updates" in failing(tiny(**SERVER), "fresh-noise")["fresh-noise"]


def test_halved_noise_on_the_votes_fails(tiny, monkeypatch):
    real = AdaptiveClippingPlan.votes_units.fget
    monkeypatch.setattr(AdaptiveClippingPlan, "votes_units", property(lambda plan: real(plan) / 2))
    assert "votes" in failing(tiny(**ADAPTIVE), "noise")["noise"]


def test_noise_that_does_not_pay_for_the_votes_fails(tiny, monkeypatch):
    monkeypatch.setattr(AdaptiveClippingPlan, "update_noise_multiplier", property(lambda plan: plan.noise_multiplier))
    keys = ADAPTIVE | {"privacy.noise_multiplier": 3.5, "task.features": 20}
    assert set(failing(tiny(**keys), "noise", "accountants")) == {"noise", "accountants"}


def test_correlated_noise_that_forgets_earlier_rounds_fails(tiny, monkeypatch):
    real = CorrelatedNoise.noise

    def forgetful(self, round, draw):
        self.recent = []
        return real(self, round, draw)

    monkeypatch.setattr(CorrelatedNoise, "noise", forgetful)
    assert "noise" in failing(tiny(**BANDS | {"task.features": 60}), "noise")


def test_correlated_noise_that_starts_anew_when_a_run_is_resumed_fails(tiny, monkeypatch):
    def from_here(self, round, fold, total):
        if self._noise is None:
            self._noise = CorrelatedNoise(plan=self.plan.correlation(), size=len(total.total), next_round=round - 1)
        return fold.ring.decode(total.total) + self._noise.noise(round - 1, self._draw)

    monkeypatch.setattr(PrivateAggregation, "_correlated", from_here)
    assert "was resumed" in failing(tiny(**BANDS), "fresh-noise")["fresh-noise"]


def test_a_sensitivity_of_correlated_sums_that_is_too_small_fails(tiny, monkeypatch):
    monkeypatch.setattr(MatrixFactorizationPlan, "sensitivity", lambda plan, rounds=None: 1.0)
    assert set(failing(tiny(**BANDS), "noise", "accountants", "canary")) == {"noise", "accountants", "canary"}


# Mutations of clipping, weights and denominator.


def adding(monkeypatch, change):
    """Let the fold add `change(fold, delta, content)` of each update."""

    def add(self, total, content):
        delta = self.layout.flatten(arrays_of(content.array_records["arrays"])) - self.model
        total.add(np.asarray(change(self, delta, content)))
        total.votes += 1 if np.linalg.norm(delta) <= self.clipping_norm else -1

    monkeypatch.setattr(ClippedSum, "add", add)


def clipped(fold, delta):
    return delta * min(1.0, fold.clipping_norm / max(np.linalg.norm(delta), 1e-12)) * (1 - 1e-9)


def test_clipping_that_is_off_fails(tiny, monkeypatch):
    real = ClientLevelPlan.ring
    # The ring refuses what does not fit it, so it is made wide, too.
    monkeypatch.setattr(ClientLevelPlan, "ring", lambda plan, norm: replace(real(plan, norm), bound=1e6 * norm))
    adding(monkeypatch, lambda fold, delta, content: delta)
    found = failing(tiny(**SERVER), "sensitivity", "weights", "canary")
    assert {"sensitivity", "canary"} <= set(found) and "which may be at most C" in found["sensitivity"]


def test_clipping_each_value_or_all_tensors_but_one_fails(tiny, monkeypatch):
    def but_one(fold, delta, content):
        rest = delta.copy()
        rest[-1:] = 0
        return clipped(fold, rest) + np.clip(delta - rest, -fold.clipping_norm, fold.clipping_norm)

    for change in (lambda fold, delta, content: np.clip(delta, -fold.clipping_norm, fold.clipping_norm), but_one):
        with monkeypatch.context() as patch:
            adding(patch, change)
            assert "sensitivity" in failing(tiny(**SERVER), "sensitivity")


def test_a_nan_that_counts_fails(tiny, monkeypatch):
    adding(monkeypatch, lambda fold, delta, content: clipped(fold, np.nan_to_num(delta, posinf=9.0, neginf=-9.0)))
    assert set(failing(tiny(**SERVER), "sensitivity", "independence", "bad-updates")) == {"bad-updates"}


def test_a_sum_that_leaves_less_to_those_who_come_later_fails(tiny, monkeypatch):
    share = ClippedSum._share
    added = []

    def later(self, content):
        added.append(content)
        return share(self, content) / len(added)

    start = ClippedSum.start
    monkeypatch.setattr(ClippedSum, "_share", later)
    monkeypatch.setattr(ClippedSum, "start", lambda self: added.clear() or start(self))
    assert "what the others add" in failing(tiny(**SERVER), "independence")["independence"]


def test_weights_by_count_fail(tiny, monkeypatch):
    monkeypatch.setattr(ClippedSum, "_share", lambda self, content: min(1.0, weight_of(content, "num-examples") / 50))
    assert "weights" in failing(tiny(**SERVER), "weights")


def test_a_weight_cap_that_is_not_held_fails(tiny, monkeypatch):
    real = ClientLevelPlan.ring
    monkeypatch.setattr(ClientLevelPlan, "ring", lambda plan, norm: replace(real(plan, norm), bound=1e9 * norm))
    monkeypatch.setattr(ClippedSum, "_share", lambda self, content: weight_of(content, "num-examples") / self.cap)
    assert {"sensitivity", "weights"} == set(failing(tiny(**COUNTED), "sensitivity", "weights"))


def test_a_denominator_of_those_that_replied_fails(tiny, monkeypatch):
    real = PrivateAggregation.release

    def release(self, round, fold, total):
        found = real(self, round, fold, total)
        shift = (found.released - fold.model) * self.plan.cohort / max(1, total.count)
        return ReleasedMean(**{**found.__dict__, "released": fold.model + shift})

    monkeypatch.setattr(PrivateAggregation, "release", release)
    assert "and not by the planned 4" in failing(tiny(**SERVER), "denominator")["denominator"]


# Mutations of cohorts, accounts and files.


def test_a_sampler_that_draws_more_than_is_accounted_fails(tiny, monkeypatch):
    rate = ClientLevelPlan.sampling_rate.fget
    monkeypatch.setattr(ClientLevelPlan, "sampling_rate", property(lambda plan: rate(plan) * 0.75))
    found = failing(tiny(**POISSON | {"experiment.rounds": 2}), "sampling", "accountants")
    assert set(found) == {"sampling", "accountants"} and "is accounted for" in found["sampling"]


@pytest.mark.soak
@pytest.mark.parametrize("words", ["take turns", "one size", "same clients", "twice"])
def test_cohorts_that_are_no_poisson_sample_fail(tiny, monkeypatch, words):
    def draw(self, round, population):
        nodes, stream = list(population), self.key.child(round).stream()
        if words == "take turns":
            # Of three clients one, by a die: each comes once in three rounds, and cohorts are of many sizes.
            shifts = Key.from_seed((round - 1) // 3).stream().words(len(nodes)) % np.uint64(3)
            return [node for node, shift in zip(nodes, shifts, strict=True) if int(shift) == round % 3]
        if words == "one size":
            return [nodes[place] for place in stream.permutation(len(nodes))[: self.per_round]]
        if words == "same clients":
            return [
                node for node, there in zip(nodes, self.key.stream().bernoulli(len(nodes), 1 / 3), strict=True) if there
            ]
        return [nodes[0], *nodes]

    monkeypatch.setattr(CohortSampler, "draw", draw)
    assert words in failing(tiny(**POISSON), "sampling")["sampling"]


def test_cyclic_cohorts_that_are_shuffled_again_fail(tiny, monkeypatch):
    def draw(self, round, population):
        period = -(-len(population) // self.per_round)
        order = self.key.child((round - 1) // period).stream().permutation(len(population))
        first = (round - 1) % period * self.per_round
        return [population[place] for place in order[first : first + self.per_round]]

    monkeypatch.setattr(CohortSampler, "draw", draw)
    assert "comes again after" in failing(tiny(**CYCLIC), "sampling")["sampling"]


def test_rounds_that_are_not_charged_fail(tiny, monkeypatch):
    monkeypatch.setattr(PopulationAccount, "charge", lambda accounts, cohort: None)
    assert "0 were charged" in failing(tiny(**SERVER), "ledger")["ledger"]


@pytest.mark.parametrize("factor", [0.9, pytest.param(1.1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("keys", [SERVER, NOBODY, BANDS], ids=["server", "nobody", "bands"])
def test_an_accountant_that_shows_another_epsilon_fails(tiny, monkeypatch, factor, keys):
    real = accounting.epsilon
    monkeypatch.setattr(accounting, "epsilon", lambda **known: factor * real(**known))
    assert set(failing(tiny(**keys), "accountants")) == {"accountants"}


def test_files_that_tell_the_size_of_a_cohort_or_a_name_fail(tiny, monkeypatch):
    monkeypatch.setattr(rounds, "_TELLING", ("seconds",))
    assert "metrics.jsonl" in failing(tiny(**SERVER), "release")["release"]


@pytest.mark.soak
def test_files_that_tell_a_number_that_a_client_sent_fail(tiny, monkeypatch):
    real = rounds.RoundLoop.train

    def telling(self, *given):
        arrays, record = real(self, *given)
        return arrays, {**record, "loss": 0.57721566}

    monkeypatch.setattr(rounds.RoundLoop, "train", telling)
    assert "a number that a client sent" in failing(tiny(**SERVER), "release")["release"]


# Mutations of clients that noise their own updates.


def test_halved_noise_of_clients_fails(tiny, monkeypatch):
    real = LocalPlan.sigma_units.fget
    monkeypatch.setattr(LocalPlan, "sigma_units", property(lambda plan: real(plan) / 2))
    assert set(failing(tiny(**NOBODY), "noise", "canary")) == {"noise", "canary"}


def test_clients_that_send_what_they_trained_fail(tiny, monkeypatch):
    monkeypatch.setattr(client_app, "_noised", lambda plan, gate, received, update, key: update)
    found = failing(tiny(**NOBODY), "sensitivity", "noise", "release")
    assert set(found) == {"sensitivity", "noise", "release"}


def test_noise_of_clients_reused_between_rounds_fails(tiny, monkeypatch):
    monkeypatch.setattr(Site, "message_key", lambda site, *rest: site.key.child("train"))
    found = failing(tiny(**NOBODY), "fresh-noise")["fresh-noise"]
    assert "two rounds of client-" in found or "two models" in found


def test_a_nan_of_a_client_that_fails_or_counts_is_found(tiny, monkeypatch):
    real = LocalPlan.release

    def filled(plan, update, stream):
        return real(plan, np.nan_to_num(update, nan=1.0), stream)

    def raising(plan, update, stream):
        Ring(bound=1.0, capacity=2).encode(update / 1e9)
        return real(plan, update, stream)

    for release, words in ((filled, "where it should be zero"), (raising, "ends in an error")):
        with monkeypatch.context() as patch:
            patch.setattr(LocalPlan, "release", release)
            assert words in failing(tiny(**NOBODY), "bad-updates")["bad-updates"]


def test_a_clients_clipping_that_is_off_fails(tiny, monkeypatch):
    def release(plan, update, stream):
        return np.nan_to_num(update, posinf=0, neginf=0) + stream.normals(len(update)) * plan.noise_multiplier

    monkeypatch.setattr(LocalPlan, "release", release)
    assert "which may be at most C" in failing(tiny(**NOBODY), "sensitivity")["sensitivity"]


def test_weights_of_clients_by_count_fail(tiny, monkeypatch):
    monkeypatch.setattr(federation, "Gate", lambda **known: Gate(**known | {"withhold_counts": False}))
    assert "; all weigh 1" in failing(tiny(**NOBODY), "weights")["weights"]


def test_a_client_that_remembers_another_fails(tiny, monkeypatch):
    real = client_app._noised
    last = []

    def remembering(plan, gate, received, update, key):
        sent = real(plan, gate, received, update, key)
        found = {name: array + np.float32(len(last) * 1e-3) for name, array in sent.items()}
        last.append(1)
        return found

    monkeypatch.setattr(client_app, "_noised", remembering)
    assert "what other clients do" in failing(tiny(**NOBODY), "independence")["independence"]


def test_without_what_is_to_be_audited_it_says_so(tiny):
    assert checks_of(tiny(**SERVER)) == ALL and checks_of(tiny(**NOBODY)) == ALL_OF_SITES
    assert "denominator" not in ALL_OF_SITES


def test_a_flower_app_is_audited_on_the_servers_side(tmp_path):
    (tmp_path / "flower_side.py").write_text(
        "from flwr.clientapp import ClientApp\nfrom torch import nn\n\n"
        "app = ClientApp()\n\n\ndef net():\n    return nn.Linear(3, 2)\n"
    )
    tables = {
        "experiment": {"rounds": 3},
        "task": {"model": "flower_side:net"},
        "clients": {"app": "flower_side:app", "count": 4},
        "privacy": {"unit": "client", "noise_multiplier": 2.0},
    }
    assert failing(Experiment.of(tables, folder=tmp_path)) == {}
