"""core/ring.py: sums that no order changes, and that refuse instead of wrapping."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bract.core.errors import RunError
from bract.core.ring import ExactSum, Ring


@given(
    st.lists(st.tuples(st.lists(st.floats(-100, 100), min_size=3, max_size=3), st.integers(0, 50)), max_size=12),
    st.randoms(use_true_random=False),
)
def test_order_and_grouping_do_not_change_a_bit(pairs, random):
    ring = Ring(bound=100, capacity=1000)
    straight = ExactSum.zero(ring, 3)
    for values, weight in pairs:
        straight.add(np.array(values), weight=weight)
    shuffled = list(pairs)
    random.shuffle(shuffled)
    halves = [ExactSum.zero(ring, 3), ExactSum.zero(ring, 3)]
    for index, (values, weight) in enumerate(shuffled):
        halves[index % 2].add(np.array(values), weight=weight)
    halves[1].merge(halves[0])
    np.testing.assert_array_equal(straight.total, halves[1].total)
    assert (straight.weight, straight.count) == (halves[1].weight, halves[1].count)


@given(st.lists(st.floats(-(2.0**15), 2.0**15), min_size=1, max_size=20), st.integers(1, 1000))
def test_encoding_is_within_a_step_and_never_grows(values, capacity):
    ring = Ring(capacity=capacity)
    array = np.array(values)
    decoded = ring.decode(ring.encode(array))
    assert np.abs(decoded - array).max() <= ring.step
    assert (np.abs(decoded) <= np.abs(array)).all()


def test_the_largest_total_fits():
    ring = Ring(capacity=1000)
    total = ExactSum.zero(ring, 1)
    for _ in range(1000):
        total.add(np.array([2.0**15]))
    assert total.mean() == pytest.approx(2.0**15, rel=1e-12)
    with pytest.raises(RunError):
        total.add(np.array([2.0**15]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**15 + 1])
def test_a_value_outside_fails_and_leaves_the_sum(value):
    total = ExactSum.zero(Ring(capacity=4), 2)
    total.add(np.array([1.0, 2.0]))
    before = total.total.copy()
    with pytest.raises(RunError) as caught:
        total.add(np.array([0.0, value]))
    assert caught.value.code == "value-out-of-range"
    np.testing.assert_array_equal(total.total, before)
    assert total.weight == total.count == 1


@pytest.mark.parametrize("weight", [-1, 2**40])
def test_a_weight_outside_fails(weight):
    with pytest.raises(RunError):
        ExactSum.zero(Ring(capacity=2**26), 1).add(np.zeros(1), weight=weight)


def test_no_weight_has_no_mean():
    total = ExactSum.zero(Ring(capacity=4), 1)
    total.add(np.ones(1), weight=0)
    assert total.mean() is None


@given(
    st.lists(st.integers(-(2**24), 2**24), min_size=1, max_size=20),
    st.integers(-60, -9),
    st.integers(1, 2**20),
)
def test_values_become_the_whole_numbers_of_exact_arithmetic(mantissas, exponent, weight):
    """The products are exact in float64 here; small ones take another way to whole numbers than large ones."""
    ring = Ring(capacity=2**20)
    values = [Fraction(mantissa) * Fraction(2) ** exponent for mantissa in mantissas]
    found = ring.encode(np.array([float(value) for value in values], np.float32), weight)
    assert found.tolist() == [math.trunc(value * weight / Fraction(ring.step)) for value in values]


@given(
    st.lists(st.lists(st.floats(-150, 150, width=32) | st.just(math.nan), min_size=3, max_size=3), max_size=9),
    st.data(),
    st.sampled_from([np.float32, np.float64]),
)
def test_rows_add_as_one_by_one(rows, data, kind):
    """Also what is refused: numbers out of range, weights that are none, and more than there is room for."""
    weights = [data.draw(st.integers(-1, 30)) for _ in rows]
    ring = Ring(bound=100, capacity=100)
    alone, together = ExactSum.zero(ring, 3), ExactSum.zero(ring, 3)
    expected = []
    for row, weight in zip(rows, weights, strict=True):
        try:
            expected.append(alone.add(np.array(row, kind), weight=weight))
        except RunError as error:
            expected.append(error.sentence)
    found = together.add_rows(np.array(rows, kind).reshape(-1, 3), weights)
    assert [each and each.sentence for each in found] == expected
    np.testing.assert_array_equal(together.total, alone.total)
    assert (together.weight, together.count) == (alone.weight, alone.count)


def test_long_rows_add_as_one_by_one():
    ring, rows = Ring(capacity=9), np.random.default_rng(1).normal(size=(3, 20_000))
    alone, together = ExactSum.zero(ring, 20_000), ExactSum.zero(ring, 20_000)
    for row in rows:
        alone.add(row, weight=3)
    assert together.add_rows(rows, [3, 3, 3]) == [None] * 3
    np.testing.assert_array_equal(together.total, alone.total)
