"""Robust rules: byzantine clients break the mean and not them; they are what brute force finds, in any order."""

from __future__ import annotations

import functools
import random
import statistics

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import bract
from bract.core import flower
from bract.core.errors import InputError
from bract.core.parameters import arrays_of, record_of
from bract.server.events import Notice
from bract.server.plan import refuse_what_is_not_offered
from bract.strategies.coordinatewise import FedMedian, FedTrimmedAvg
from bract.strategies.fedavg import FedAvg
from bract.strategies.geometric_median import GeometricMedian
from bract.strategies.krum import Bulyan, Krum, MultiKrum
from bract.strategies.registry import load_strategy

from .numpy_clients import descent, grid_of, start

NAMES = ["fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan", "geometricmedian"]
KEYS = {"krum": {"byzantine": 2}, "multikrum": {"byzantine": 2}, "bulyan": {"byzantine": 2}}
ZEROS = {"w": np.zeros(3, np.float32)}


def load(name):
    return load_strategy(name, KEYS.get(name, {}))


def all_of(value):
    return lambda model, number: {"w": np.full(3, value, np.float32)}


def backwards(model, number):
    """Go ten times as far, the other way."""
    honest = descent(np.ones(3))(model, number)["w"]
    return {"w": (model["w"] - 10 * (honest - model["w"])).astype(honest.dtype)}


ATTACKS = {"sign flip": backwards, "huge": all_of(3e4)}
UNFIT = {
    "NaN": all_of(np.nan),
    "infinite": all_of(np.inf),
    "beyond any bound": all_of(1e38),
    "another shape": lambda model, number: {"w": np.zeros(7, np.float32)},
    "another type": lambda model, number: {"w": np.zeros(3, np.int64)},
    "other tensors": lambda model, number: {"v": np.zeros(3, np.float32)},
    "an error": lambda model, number: 1 / 0,
}


def cohort(attack, byzantine=2, honest=9):
    """Clients who know the target 1 up to 0.2, and byzantine ones."""
    offsets = np.random.default_rng(0).uniform(-0.2, 0.2, (honest, 3))
    many = {f"honest-{k}": descent(1 + offset, 0.5) for k, offset in enumerate(offsets)}
    return grid_of(many | {f"byzantine-{k}": attack for k in range(byzantine)})


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", ["fedavg", *NAMES])
def test_byzantine_clients_break_the_mean_and_not_the_rule(name, attack):
    found = start(load(name), cohort(ATTACKS[attack]), ZEROS, rounds=12)["w"]
    error = np.abs(found - 1).max()
    assert error > 1 if name == "fedavg" else error < 0.25, error


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_never_fatal(name):
    for attack, client in UNFIT.items():
        found = start(load(name), cohort(client, honest=11), ZEROS, rounds=8)["w"]
        np.testing.assert_allclose(found, 1, atol=0.25, err_msg=attack)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_that_are_no_array_are_never_fatal(name):
    """np.load meets a damaged header, a zip archive, a pickle, a shape that no memory holds, or nothing."""
    grid, strategy = grid_of({f"client-{k}": descent(np.ones(3)) for k in range(12)}), load(name)
    whole = record_of(ZEROS)["w"].data
    damaged = [
        b"",
        whole[:20],
        whole[:-3],
        b"PK\x03\x04" + whole,
        b"\x80\x04" + whole,
        whole.replace(b"(3,)", b"(3**"),
        whole.replace(b"(3,), }         ", b"(9999999999999,)"),
        whole.replace(b"<f4", b"|O4"),
    ]
    draws = random.Random(1)
    for _ in range(40):
        flipped = bytearray(whole)
        flipped[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        damaged.append(bytes(flipped))
    for data in damaged:
        messages = list(strategy.configure_train(1, record_of(ZEROS), ConfigRecord(), grid))
        replies = list(grid.exchange(messages))
        bad = ArrayRecord({"w": Array(dtype="float32", shape=(3,), stype="numpy.ndarray", data=data)})
        replies[0] = Message(RecordDict({"arrays": bad}), reply_to=messages[0])
        found, _ = strategy.aggregate_train(1, replies)
        # One flipped bit may leave an array that fits; one of 12 clients then says something else.
        np.testing.assert_allclose(arrays_of(found)["w"], 1, atol=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_replies_does_not_change_a_bit(name):
    strategy = load(name)
    grid = cohort(backwards)
    # float64, where the order of a sum shows in the last bits.
    initial = record_of({"w": np.linspace(0, 2, 300).reshape(100, 3)})
    replies = list(grid.exchange(list(strategy.configure_train(1, initial, ConfigRecord(), grid))))
    found = set()
    for seed in range(6):
        random.Random(seed).shuffle(replies)
        model, _ = strategy.aggregate_train(1, replies)
        found.add(arrays_of(model)["w"].tobytes())
    assert len(found) == 1


def test_ties_go_to_the_lower_node_id():
    by_id = sorted((f"client-{k}" for k in range(6)), key=flower.node_id)
    names = by_id[::-1]
    for ones in (by_id[:3], by_id[3:]):
        found = start(Krum(), grid_of({name: all_of(float(name in ones)) for name in names}), ZEROS, rounds=1)
        assert found["w"][0] == float(by_id[0] in ones)


# Whole numbers make ties, and sums that are exact: brute force must then agree on who ranks first.
def matrices(least, most=11):
    return st.integers(least, most).flatmap(
        lambda rows: arrays(np.float64, (rows, 3), elements=st.integers(-4, 4).map(float))
    )


def scores(rows, members, f):
    result = {}
    for i in members:
        others = sorted(sum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)) for j in members if j != i)
        result[i] = sum(others[: max(1, len(members) - f - 2)])
    return result


def ranked(rows, members, f):
    found = scores(rows, members, f)
    return sorted(members, key=lambda i: (found[i], i))


@settings(max_examples=60, deadline=None)
@given(rows=matrices(1))
def test_the_median_by_brute_force(rows):
    expected = [statistics.median(column) for column in rows.T.tolist()]
    np.testing.assert_array_equal(FedMedian().aggregate(rows), expected)


@settings(max_examples=60, deadline=None)
@given(rows=matrices(1), percent=st.integers(0, 49))
def test_the_trimmed_mean_by_brute_force(rows, percent):
    cut = percent * len(rows) // 100
    expected = [statistics.fmean(sorted(column)[cut : len(rows) - cut]) for column in rows.T.tolist()]
    np.testing.assert_allclose(FedTrimmedAvg(beta=percent / 100).aggregate(rows), expected, atol=1e-12)


def test_a_share_of_a_hundred_is_that_many():
    """0.29 of 100 is 28.999… in floating point."""
    rows = np.arange(100.0)[:, None] ** 3
    expected = (np.arange(29, 71.0) ** 3).mean()
    np.testing.assert_allclose(FedTrimmedAvg(beta=0.29).aggregate(rows), expected, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(rows=matrices(7), f=st.integers(0, 2))
def test_krum_by_brute_force(rows, f):
    order = ranked(rows.tolist(), range(len(rows)), f)
    np.testing.assert_array_equal(Krum(byzantine=f).aggregate(rows), rows[order[0]])
    for strategy, count in ((MultiKrum(byzantine=f), len(rows) - f - 2), (MultiKrum(byzantine=f, selected=2), 2)):
        np.testing.assert_allclose(strategy.aggregate(rows), rows[order[:count]].mean(axis=0), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(rows=matrices(11, 13), f=st.integers(0, 2))
def test_bulyan_by_brute_force(rows, f):
    left, chosen = list(range(len(rows))), []
    while len(chosen) < len(rows) - 2 * f:
        chosen.append(ranked(rows.tolist(), left, f)[0] if len(left) > 1 else left[0])
        left.remove(chosen[-1])
    expected = []
    for column in rows[chosen].T.tolist():
        middle = statistics.median(column)
        near = sorted(column, key=lambda value: (abs(value - middle), value))
        expected.append(statistics.fmean(near[: len(chosen) - 2 * f]))
    np.testing.assert_allclose(Bulyan(byzantine=f).aggregate(rows), expected, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(rows=arrays(np.float64, (7, 3), elements=st.floats(-4, 4)), seed=st.integers(0, 99))
def test_nothing_near_or_far_beats_the_geometric_median(rows, seed):
    def total(z):
        return np.linalg.norm(rows - z, axis=1).sum()

    found = GeometricMedian(iterations=2000).aggregate(rows)
    draws = np.random.default_rng(seed)
    others = [*rows, rows.mean(axis=0), np.median(rows, axis=0)]
    others += [found + scale * draws.normal(size=3) for scale in (1e-4, 1e-2, 1, 4) for _ in range(20)]
    assert total(found) <= min(map(total, others)) + 1e-5


def test_geometric_medians_that_are_known():
    line = np.array([[0.0], [1.0], [5.0], [6.0], [100.0]])
    np.testing.assert_allclose(GeometricMedian().aggregate(line), 5, atol=1e-6)
    square = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]])
    np.testing.assert_allclose(GeometricMedian().aggregate(square), 1, atol=1e-9)
    # Fermat's point of an equilateral triangle.
    triangle = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]])
    np.testing.assert_allclose(GeometricMedian().aggregate(triangle), triangle.mean(axis=0), atol=1e-7)
    np.testing.assert_array_equal(GeometricMedian().aggregate(np.ones((5, 2))), 1)


@pytest.mark.parametrize("far", [1e4, 1e30, 1e200])
@pytest.mark.parametrize("name", NAMES)
def test_however_far_they_move_it_no_further(name, far):
    rows = np.random.default_rng(3).normal(size=(11, 4))
    rows[:2] = far
    found = load(name).aggregate(rows) if far < 1e100 else quiet_aggregate(name, rows)
    assert (rows[2:].min(axis=0) <= found).all() and (found <= rows[2:].max(axis=0)).all()


def quiet_aggregate(name, rows):
    with np.errstate(over="ignore", invalid="ignore"):
        return load(name).aggregate(rows)


def test_one_coordinate_may_hide_in_a_near_model_but_not_from_bulyan():
    """The hidden vulnerability: near the honest mean, and far away in one of 400 coordinates."""
    rows = np.random.default_rng(0).normal(size=(11, 400))
    rows[:2] = rows[2:].mean(axis=0)
    rows[:2, 0] += 15
    assert Krum(byzantine=2).aggregate(rows)[0] > 10
    assert abs(Bulyan(byzantine=2).aggregate(rows)[0]) < 3


def test_whole_numbers_take_their_median_and_make_no_distance():
    """A counter of batches would outweigh every parameter: whoever has the middle count would be chosen."""
    initial = {"w": np.zeros(2, np.float32), "seen": np.array(0, np.int64)}

    def client(w, seen):
        return lambda model, number: {"w": np.full(2, w, np.float32), "seen": np.array(seen, np.int64)}

    clients = {f"client-{k}": client(1 + k / 100, 10_000 * k) for k in range(6)} | {"middle": client(50, 25_000)}
    found = start(Krum(), grid_of(clients), initial, rounds=1)
    assert found["w"][0] < 1.1
    assert found["seen"].dtype == np.int64 and found["seen"] == 25_000


@pytest.mark.parametrize(
    ("strategy", "needed"),
    [
        (Krum(byzantine=1), 5),
        (MultiKrum(byzantine=1, selected=4), 7),
        (MultiKrum(byzantine=1), 5),
        (Bulyan(byzantine=1), 7),
        (FedMedian(), 1),
    ],
)
def test_too_few_replies_leave_the_model(strategy, needed):
    assert strategy.least_replies == needed
    for count in (needed, needed - 1):
        if not count:
            continue
        clients = {f"client-{k}": all_of(2.0) for k in range(count)} | {"broken": all_of(np.nan)}
        found = start(strategy, grid_of(clients), ZEROS, rounds=1)["w"]
        assert (found == (2 if count == needed else 0)).all()
        assert strategy.remarks[0] == f"1 of {count + 1} replies did not fit the model and were left out"
        assert len(strategy.remarks) == (1 if count == needed else 2)
    if needed > 1:
        name = type(strategy).__name__
        assert strategy.remarks[1] == f"{name} needs {needed} replies, not {needed - 1}; the model stays"


def test_a_run_says_when_a_cohort_is_too_small(tiny, tmp_path):
    events = []
    keys = {"strategy.name": "krum", "experiment.rounds": 2}
    result = bract.simulate(tiny(**keys), out=tmp_path / "run", listeners=[events.append])
    untouched = bract.simulate(tiny(**keys | {"strategy.name": "bulyan"}), out=tmp_path / "none")
    said = [event.text for event in events if isinstance(event, Notice)]
    assert said == [f"round {number}: Krum needs 5 replies, not 4; the model stays" for number in (1, 2)]
    assert result.status == "completed" and result.model_sha256 == untouched.model_sha256


@pytest.fixture(scope="module")
def private(tiny, tmp_path_factory):
    """Return a function: the run of a strategy by name under record-level privacy."""
    keys = {"experiment.rounds": 2, "task.clients": 7, "privacy.unit": "record", "privacy.noise_multiplier": 4.0}
    return functools.cache(
        lambda name: bract.simulate(tiny(**keys, **{"strategy.name": name}), out=tmp_path_factory.mktemp(name) / "run")
    )


@pytest.mark.parametrize("name", NAMES)
def test_under_record_level_privacy_it_is_post_processing(private, name):
    mean, robust = private("fedavg"), private(name)
    assert robust.status == "completed" and robust.model_sha256 != mean.model_sha256
    # What the server does with noised models costs nothing.
    assert robust.guarantee.epsilon == mean.guarantee.epsilon > 0


def test_under_client_level_privacy_it_is_refused(tiny):
    experiment = tiny(**{"privacy.unit": "client", "privacy.noise_multiplier": 1.0})
    for name in NAMES:
        strategy = load(name)
        assert not hasattr(strategy, "fold")
        with pytest.raises(InputError) as caught:
            refuse_what_is_not_offered(experiment, strategy)
        assert f"{type(strategy).__name__} goes with none or record only" in caught.value.sentence
    assert hasattr(FedAvg(), "fold")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("krum", "byzantine", -1),
        ("bulyan", "byzantine", 1.5),
        ("multikrum", "selected", 0),
        ("fedtrimmedavg", "beta", 0.5),
        ("fedtrimmedavg", "beta", -0.1),
        ("geometricmedian", "smoothing", 0),
        ("geometricmedian", "iterations", 0),
    ],
)
def test_a_bad_key_is_named(name, key, value):
    with pytest.raises(InputError) as caught:
        load_strategy(name, {key: value})
    assert key in caught.value.sentence
