"""Client-level privacy: what one client can move, what is released, and what the shareable files must not tell."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

import bract
from bract.clients.kernels import sequential
from bract.core.errors import BractError, InputError, RunError
from bract.core.keys import Key
from bract.core.parameters import Layout, record_of
from bract.privacy import discrete_gaussian
from bract.privacy.client_guarantee import client_level
from bract.privacy.client_level import ClientLevelPlan
from bract.server.cohort import CohortSampler
from bract.server.events import RoundFinished
from bract.server.private_aggregation import PrivateAggregation
from bract.strategies.fold import WeightedSum
from bract.strategies.scaffold import ModelAndVariate
from bract.tasks.partition import client_names

SIZE = 40
MODEL = {"w": np.linspace(-1, 1, SIZE - 1, dtype=np.float32), "b": np.zeros((), np.float32)}
LAYOUT = Layout.of(MODEL)
KEY = Key.from_seed(3)


def plan(**changes):
    known = {
        "clients": 50,
        "cohort": 10,
        "sampling": "poisson",
        "rounds": 5,
        "clipping_norm": 0.5,
        "noise_multiplier": 1.2,
        "delta": 1e-5,
        "coordinates": SIZE,
    }
    return ClientLevelPlan(**known | changes)


def aggregation(key=KEY, **changes):
    return PrivateAggregation(plan(**changes), layout=LAYOUT, key=key)


def fold_of(each):
    return each.fold(MODEL, object(), WeightedSum(layout=LAYOUT, ring=each.plan.ring(1.0)))


def reply(vector):
    arrays = {"w": vector[:-1].astype(np.float32), "b": np.float32(vector[-1]).reshape(())}
    return RecordDict({"arrays": record_of(arrays), "metrics": MetricRecord({"num-examples": 1})})


def summed(fold, vectors):
    total, refused = fold.start(), 0
    for vector in vectors:
        try:
            fold.add(total, reply(vector))
        except RunError:
            refused += 1
    return total, refused


WORST = [math.nan, math.inf, -math.inf, 3e38, 1e4, 1e-30, 0.0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(WORST) | st.floats(-3, 3), min_size=SIZE, max_size=SIZE), st.floats(1e-6, 1e6))
def test_no_update_moves_the_sum_by_more_than_the_clipping_norm(values, clipping_norm):
    each = aggregation(clipping_norm=clipping_norm)
    fold = fold_of(each)
    others = [np.full(SIZE, 0.3), np.linspace(-2, 2, SIZE)]
    without, _ = summed(fold, others)
    with_it, _ = summed(fold, [*others, np.array(values)])
    moved = [int(value) for value in with_it.total - without.total]
    limit = clipping_norm / fold.ring.step
    assert math.isqrt(sum(value * value for value in moved)) <= limit
    assert abs(with_it.votes - without.votes) <= 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(WORST) | st.floats(-3, 3), min_size=SIZE, max_size=SIZE), min_size=1, max_size=4),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
)
def test_rows_are_clipped_and_counted_as_replies_are(vectors, counts):
    fold = replace(fold_of(aggregation()), weighted_by="num-examples", cap=5)
    rows = np.array(vectors, np.float32)
    numbers = [{"num-examples": count} for count, _ in zip(counts, rows, strict=False)]
    together, alone, expected = fold.start(), fold.start(), []
    found = fold.add_rows(together, rows, numbers)
    for row, known in zip(rows, numbers, strict=True):
        content = reply(row)
        content["metrics"] = MetricRecord(known)
        try:
            expected.append(fold.add(alone, content))
        except RunError as error:
            expected.append(error.sentence)
    assert [each and each.sentence for each in found] == expected
    assert (together.total == alone.total).all()
    assert (together.count, together.weight, together.votes) == (alone.count, alone.weight, alone.votes)


def test_an_update_within_the_norm_is_not_changed_and_zero_is_fine():
    fold = fold_of(aggregation())
    x = LAYOUT.flatten(MODEL)
    step = np.full(SIZE, 0.01)
    total, _ = summed(fold, [x + step, x])
    np.testing.assert_allclose(fold.ring.decode(total.total), (x + step).astype(np.float32) - x, rtol=1e-6, atol=1e-12)
    assert (total.count, total.votes) == (2, 1)


def test_a_client_that_changes_nothing_has_no_vote_so_no_neighbour_moves_the_votes_by_a_whole_client():
    fold, x = fold_of(aggregation()), LAYOUT.flatten(MODEL)
    votes = {
        name: summed(fold, [update])[0].votes for name, update in (("none", x), ("long", x + 9), ("short", x + 0.01))
    }
    assert votes == {"none": 0, "long": -1, "short": 1}


def test_all_tensors_are_clipped_together_and_scalars_too():
    fold = fold_of(aggregation())
    x = LAYOUT.flatten(MODEL)
    far = x.copy()
    far[-1] += 1e6
    total, _ = summed(fold, [far])
    moved = fold.ring.decode(total.total)
    assert moved[-1] == pytest.approx(0.5, rel=1e-6) and np.linalg.norm(moved) <= 0.5


def released(each, vectors, round=1):
    fold = fold_of(each)
    total, _ = summed(fold, vectors)
    return each.release(round, fold, total).mean()


def test_the_denominator_is_the_expected_cohort_whoever_came():
    x = LAYOUT.flatten(MODEL)
    quiet = aggregation(noise_multiplier=0.0)
    for count in (0, 1, 4, 25):
        moved = released(quiet, [x + 0.01] * count) - x
        np.testing.assert_allclose(moved, count * 0.01 / 10, rtol=1e-4, atol=1e-12)


def test_the_noise_has_the_planned_deviation_and_is_fresh_each_round():
    """200 rounds of 40 coordinates: the variance of 8,000 normals is within 6 standard errors, but once in 1e9."""
    x = LAYOUT.flatten(MODEL)
    each = aggregation(rounds=200)
    noise = np.array([released(each, [], round) - x for round in range(1, 201)]) / (1.2 * 0.5 / 10)
    assert abs(noise.var() - 1) < 6 * math.sqrt(2 / noise.size)
    assert abs(noise.mean()) < 6 / math.sqrt(noise.size)
    neighbours = (noise[1:] * noise[:-1]).mean() * math.sqrt(noise[1:].size)
    tensors = (noise[:, :20] * noise[:, 20:]).mean() * math.sqrt(noise[:, 20:].size)
    assert abs(neighbours) < 6 and abs(tensors) < 6


def test_a_repeated_round_draws_the_same_noise_only_for_the_same_sum():
    x = LAYOUT.flatten(MODEL)
    once, again = released(aggregation(), [x + 0.01]), released(aggregation(), [x + 0.01])
    np.testing.assert_array_equal(once, again)
    other = released(aggregation(), [x + 0.02])
    # Were the noise the same, the difference would be that of the clients.
    assert np.abs((other - once) - 0.01 / 10).max() > 0.01
    assert np.abs(released(aggregation(), [x + 0.01], round=2) - once).max() > 0.01


def test_the_mechanism_refuses_sums_whose_sensitivity_it_does_not_know():
    each = aggregation()
    ring = each.plan.ring(1.0)
    for fold in (
        None,
        WeightedSum(layout=LAYOUT, ring=ring, weighted_by="num-examples"),
        ModelAndVariate(layout=LAYOUT, ring=ring),
    ):
        with pytest.raises(RunError, match="sensitivity"):
            each.fold(MODEL, object(), fold)


@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 40.0, 3000.0])
def test_sum_and_noise_fit_the_ring(noise_multiplier):
    for clipping_norm in (1e-6, 0.7, 1e6):
        each = plan(noise_multiplier=noise_multiplier, clients=100_000, cohort=1000)
        ring = each.ring(clipping_norm)
        most = each.clients * clipping_norm / ring.step
        assert most + discrete_gaussian.largest(each.sigma_units(clipping_norm)) < 2**63
        assert each.sigma_units(clipping_norm) >= min(each.sigma_units(1.0), 2**10) / 2


def test_the_accountant_amplifies_secret_poisson_cohorts_alone():
    many = {"clients": 10_000, "cohort": 100, "rounds": 1000, "noise_multiplier": 1.0}
    # FACTS of the field: q = 0.01, sigma 1, 1,000 steps, delta 1e-5.
    assert plan(**many).epsilon() == pytest.approx(1.828, rel=5e-3)
    fixed = plan(**many | {"sampling": "fixed"}).epsilon()
    assert fixed > 100
    assert fixed == pytest.approx(plan(**many | {"sampling": "all", "cohort": 10_000}).epsilon())


def test_calibration_keeps_the_epsilon():
    calibrated = ClientLevelPlan.calibrate(
        epsilon=2.0,
        clients=1000,
        cohort=50,
        sampling="poisson",
        rounds=40,
        clipping_norm=1.0,
        delta=1e-6,
        coordinates=10_000,
    )
    assert 1.97 < calibrated.epsilon() <= 2.0


def test_the_guarantee_says_what_the_plan_does():
    sentences = {
        client_level(plan(**changes), rounds, randomness=randomness).sentence
        for changes, rounds, randomness in [
            ({}, 5, "secret"),
            ({}, 4, "secret"),
            ({}, 5, "seed"),
            ({"noise_multiplier": 1.3}, 5, "secret"),
            ({"delta": 1e-6}, 5, "secret"),
            ({"clients": 60}, 5, "secret"),
            ({"cohort": 11}, 5, "secret"),
            ({"sampling": "fixed"}, 5, "secret"),
        ]
    }
    assert len(sentences) == 8
    assert all("any one client" in sentence and "metrics" not in sentence for sentence in sentences)


CLIENT = {
    "task.clients": 24,
    "privacy.unit": "client",
    "privacy.noise_multiplier": 0.7,
    "privacy.clipping_norm": 0.4,
    "privacy.adaptive_clipping": True,
    "clients.sampling": "poisson",
    "clients.per_round": 8,
    "experiment.rounds": 4,
}


def test_workers_and_a_resume_do_not_change_a_byte(tiny, tmp_path):
    keys = CLIENT | {"privacy.randomness": "seed"}
    one = bract.simulate(tiny(**keys), out=tmp_path / "one")
    two = bract.simulate(tiny(**keys, **{"simulation.workers": 2}), out=tmp_path / "two")
    assert one.model_sha256 == two.model_sha256
    script = (
        "import sys, os, signal, bract\n"
        "from bract.experiment import Experiment\n"
        "from bract.server.events import Checkpointed\n"
        "def kill(event):\n"
        "    if isinstance(event, Checkpointed) and event.round == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "bract.simulate(Experiment.load(sys.argv[1]), out=sys.argv[2], listeners=[kill])\n"
    )
    file = tmp_path / "experiment.toml"
    file.write_text(tiny(**keys, **{"server.checkpoint_every": 0.0}).to_toml())
    done = subprocess.run([sys.executable, "-c", script, str(file), str(tmp_path / "killed")])
    assert done.returncode == -signal.SIGKILL
    resumed = bract.simulate(resume=tmp_path / "killed")
    assert resumed.model_sha256 == one.model_sha256
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("one", "two", "killed")]
    assert lines[0] == lines[1] == lines[2] and len(lines[0].splitlines()) == 4


def test_the_shareable_files_name_no_client_and_no_cohort(tiny, tmp_path):
    run = tmp_path / "run"
    bract.simulate(tiny(**CLIENT), out=run)
    subprocess.run([sys.executable, "-m", "bract", "report", str(run), "--released"], check=True, capture_output=True)
    shareable = [run / name for name in ("metrics.jsonl", "manifest.json", "result.json", "report-released.html")]
    for path in shareable:
        assert not [name for name in client_names(24) if name in path.read_text()], path
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == {"round", "clipping_norm", "epsilon"}
    assert json.loads((run / "result.json").read_text())["metrics"] == {}


def test_a_failing_client_is_one_that_adds_nothing(tiny, tmp_path, monkeypatch):
    """Else a client's records would decide by its failure whether a round counts."""
    train = sequential.train
    keys = CLIENT | {"clients.sampling": "all", "task.clients": 6, "privacy.adaptive_clipping": False}
    keys = {name: value for name, value in keys.items() if name != "clients.per_round"}

    def failing(model, *args, **others):
        raise ValueError("a record that cannot be read")

    def resting(model, *args, **others):
        model.load({name: np.full_like(array, np.nan) for name, array in model.shared_arrays().items()})

    hashes = []
    for each in (failing, resting):
        calls = iter(range(10**6))

        def some(*args, call=each, turns=calls, **others):
            # Never all of them: a run in which nobody ever trained is an error.
            return train(*args, **others) if next(turns) % 6 == 0 else call(*args, **others)

        monkeypatch.setattr(sequential, "train", some)
        hashes.append(bract.simulate(tiny(**keys), out=tmp_path / each.__name__).model_sha256)
    assert hashes[0] == hashes[1]


CYCLIC = {
    "task.clients": 24,
    "privacy.unit": "client",
    "privacy.epsilon": 6.0,
    "privacy.clipping_norm": 0.4,
    "privacy.bands": 3,
    "clients.sampling": "cyclic",
    "clients.per_round": 8,
    "experiment.rounds": 7,
}


def test_cyclic_cohorts_keep_the_separation_that_the_plan_counts_on(tiny):
    sampler = CohortSampler(sampling="cyclic", per_round=8, key=KEY)
    rounds = [sampler.draw(round, range(20)) for round in range(1, 8)]
    for first, second, third in zip(rounds, rounds[1:], rounds[2:], strict=False):
        assert sorted(first + second + third) == list(range(20))
    assert rounds[0] == rounds[3] == rounds[6]
    cyclic = plan(sampling="cyclic", clients=20, cohort=8, rounds=7, bands=3)
    assert (cyclic.period, cyclic.participations) == (3, 3)
    with pytest.raises(InputError, match="separation"):
        plan(sampling="cyclic", clients=20, cohort=8, rounds=7, bands=4)


def test_correlated_noise_is_what_the_factorization_says():
    """C times the noises of the rounds is the independent noise that the accountant counts."""
    x = LAYOUT.flatten(MODEL)
    known = {"sampling": "cyclic", "clients": 20, "cohort": 10, "rounds": 60, "bands": 2}
    each = aggregation(**known)
    noises = np.array([(released(each, [], round) - x) * 10 for round in range(1, 61)])
    correlation = each.plan.correlation()
    independent = noises.copy()
    independent[1:] += correlation.coefficients[1] * noises[:-1]
    scaled = independent / correlation.noise_deviation
    assert abs(scaled.var() - 1) < 6 * math.sqrt(2 / scaled.size)
    assert abs((scaled[1:] * scaled[:-1]).mean()) < 6 / math.sqrt(scaled[1:].size)
    # And the noises themselves are not independent: the test can tell.
    assert abs((noises[1:] * noises[:-1]).mean() / noises.var()) > 6 / math.sqrt(scaled[1:].size)


def test_a_resumed_run_goes_on_with_the_same_correlated_noise(tiny, tmp_path):
    def stop_after(round):
        def stop(event):
            if isinstance(event, RoundFinished) and event.round == round:
                os.kill(os.getpid(), signal.SIGINT)

        return stop

    keys = CYCLIC | {"privacy.randomness": "secret"}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    bract.simulate(tiny(**keys), out=stopped, listeners=[stop_after(4)])
    # The same secrets in a run that goes through.
    bract.simulate(tiny(**keys), out=straight, listeners=[stop_after(1)])
    keyless = json.loads((stopped / "result.json").read_text())["model_sha256"]
    assert (stopped / "private" / "noise_key").stat().st_mode & 0o777 == 0o600
    copy = tmp_path / "copy"
    shutil.copytree(stopped, copy)
    first, second = bract.simulate(resume=stopped), bract.simulate(resume=copy)
    assert first.model_sha256 == second.model_sha256 != keyless
    assert not (stopped / "private" / "noise_key").exists()
    (straight / "private" / "noise_key").unlink()
    with pytest.raises(RunError, match="noise_key"):
        bract.simulate(resume=straight)


def test_the_budget_stops_the_run(tiny, tmp_path):
    keys = CLIENT | {"privacy.noise_multiplier": 0.7, "privacy.epsilon_budget": 7.0, "experiment.rounds": 50}
    result = bract.simulate(tiny(**keys), out=tmp_path / "run")
    assert result.status == "budget-exhausted" and 1 <= result.record["rounds"] < 50
    assert result.guarantee.epsilon <= 7.0


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"strategy.name": "krum"}, "krum|Krum"),
        ({"strategy.name": "scaffold"}, "Scaffold"),
        ({"strategy.weights": "counted"}, "equal"),
        ({"server.evaluate_every": 1}, "withheld"),
        ({"privacy.noise_multiplier": 30.0}, "adaptive clipping"),
    ],
)
def test_what_has_no_bound_is_refused_at_the_start(tiny, tmp_path, keys, words):
    with pytest.raises(InputError, match=words):
        bract.simulate(tiny(**CLIENT | keys), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adaptive_clipping_is_for_clients_alone(tiny):
    with pytest.raises(BractError, match="adaptive_clipping"):
        tiny(**{"privacy.unit": "record", "privacy.epsilon": 3.0, "privacy.adaptive_clipping": True})


def test_it_learns(tiny, tmp_path):
    keys = CLIENT | {"task.clients": 300, "clients.per_round": 100, "experiment.rounds": 12, "train.learning_rate": 0.5}
    bract.simulate(tiny(**keys, **{"simulation.curves": True}), out=tmp_path / "run")
    curve = [json.loads(line) for line in (tmp_path / "run" / "private" / "curves.jsonl").read_text().splitlines()]
    assert curve[-1]["accuracy"] > 0.8


@pytest.mark.parametrize("noise", [1e-6, 0.1, 0.15])
def test_next_to_no_noise_ends_in_a_whole_run_that_promises_nothing(tiny, tmp_path, noise):
    keys = {"privacy.unit": "client", "privacy.noise_multiplier": noise, "experiment.rounds": 1}
    done = bract.simulate(tiny(**keys), out=tmp_path / "run")
    assert done.status == "completed"
    given = done.record["guarantee"]
    assert given["epsilon"] is None or given["epsilon"] > 40
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert "Infinity" not in line
