"""Exact sums: values become integers on a grid that a public bound fixes, so no order of adding changes a bit.

A value v with |v| ≤ bound and weight w is stored as the integer v·w / step, rounded toward zero (so that a norm
never grows). The step is the power of two for which the largest weighted total still fits 62 bits; it depends on
public numbers alone. int64 addition is associative: workers may add in any order and merge in any tree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .errors import RunError

DEFAULT_BOUND = 2.0**15
_BITS = 62


@dataclass(frozen=True, kw_only=True)
class Ring:
    """The integers that sums of weighted values live in: |value| ≤ bound, total weight ≤ capacity."""

    bound: float = DEFAULT_BOUND
    capacity: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bound) and self.bound > 0 and self.capacity >= 1):
            raise ValueError("a ring needs a positive finite bound and a capacity of at least 1")

    @cached_property
    def step(self) -> float:
        """The value of one unit: a power of two."""
        return 2.0 ** (math.ceil(math.log2(self.bound * self.capacity)) - _BITS)

    def encode(self, values: NDArray[np.float64], weight: int = 1) -> NDArray[np.int64]:
        """Return the integers of `weight * values`; raises RunError `value-out-of-range`, never wraps."""
        if not 0 <= weight <= self.capacity:
            raise RunError("value-out-of-range", f"the weight {weight} is outside 0 to {self.capacity}")
        # NaN fails this comparison too.
        if values.size and not np.abs(values).max() <= self.bound:
            raise RunError("value-out-of-range", f"the update holds a number that is not within ±{self.bound:g}")
        return np.trunc(values * (weight / self.step)).astype(np.int64)

    def decode(self, total: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the float64 values of integers."""
        return total.astype(np.float64) * self.step


@dataclass(kw_only=True)
class ExactSum:
    """A running weighted sum on a ring: integers [size], their total weight, and how many were added."""

    ring: Ring
    total: NDArray[np.int64]
    weight: int = 0
    count: int = 0

    @classmethod
    def zero(cls, ring: Ring, size: int) -> ExactSum:
        """Return the empty sum of vectors [size]."""
        return cls(ring=ring, total=np.zeros(size, np.int64))

    def add(self, values: NDArray[np.float64], weight: int = 1) -> None:
        """Add a vector [size] with an integer weight; raises RunError and leaves the sum as it was."""
        self._check_room(weight)
        self.total += self.ring.encode(values, weight)
        self.weight += weight
        self.count += 1

    def merge(self, other: ExactSum) -> None:
        """Add another sum on the same ring."""
        if other.ring != self.ring:
            raise ValueError("sums on different rings do not add")
        self._check_room(other.weight)
        self.total += other.total
        self.weight += other.weight
        self.count += other.count

    def mean(self) -> NDArray[np.float64] | None:
        """Return the weighted mean [size] as float64, or None while the total weight is zero."""
        return self.ring.decode(self.total) / self.weight if self.weight else None

    def _check_room(self, weight: int) -> None:
        if self.weight + weight > self.ring.capacity:
            raise RunError("value-out-of-range", f"the total weight exceeds {self.ring.capacity}")
