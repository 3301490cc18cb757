"""core/parameters.py: flat vectors and Flower records hold the same numbers as the named arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bract.core.errors import RunError
from bract.core.parameters import Layout, arrays_of, digest, record_of

SHAPES = st.lists(st.sampled_from([(), (1,), (3,), (2, 4), (1, 2, 3)]), min_size=1, max_size=5)


@given(
    SHAPES.flatmap(
        lambda shapes: st.tuples(*[arrays(np.float32, s, elements=st.floats(-9, 9, width=32)) for s in shapes])
    )
)
def test_flatten_and_unflatten_are_inverse(values):
    named = {f"layer.{index}": value for index, value in enumerate(values)}
    layout = Layout.of(named)
    vector = layout.flatten(dict(reversed(named.items())))
    assert vector.shape == (layout.size,)
    for name, array in layout.unflatten(vector).items():
        assert array.dtype == named[name].dtype
        np.testing.assert_array_equal(array, named[name])


def test_integer_tensors_come_back_rounded_not_truncated():
    layout = Layout.of({"count": np.array([3, -3], np.int64)})
    np.testing.assert_array_equal(layout.unflatten(np.array([2.6, -2.6]))["count"], [3, -3])


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"a": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)},
        {"a": np.zeros(3, np.float32)},
        {"a": np.zeros((2, 1), np.float32)},
        {"a": np.zeros(2, np.float64)},
        {"b": np.zeros(2, np.float32)},
    ],
)
def test_arrays_of_another_form_are_refused(arrays):
    layout = Layout.of({"a": np.zeros(2, np.float32)})
    with pytest.raises(RunError) as caught:
        layout.flatten(arrays)
    assert caught.value.code == "reply-invalid"


def test_flower_records_hold_the_same_bytes():
    named = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "scalar": np.array(2.5, np.float64)}
    found = arrays_of(record_of(named))
    assert list(found) == list(named)
    assert digest(found) == digest(named)


def test_digest_tells_value_shape_type_and_name_apart():
    base = {"a": np.zeros(4, np.float32)}
    others = [
        {"a": np.array([0, 0, 0, 1e-45], np.float32)},
        {"a": np.zeros((2, 2), np.float32)},
        {"a": np.zeros(2, np.float64)},
        {"b": np.zeros(4, np.float32)},
        {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)},
    ]
    assert len({digest(item) for item in [base, *others]}) == 6
