"""Exact sums: values become integers on a grid that a public bound fixes, so no order of adding changes a bit.

A value v with |v| ≤ bound and weight w is stored as the integer v·w / step, rounded toward zero (so that a norm
never grows). The step is the power of two for which the largest weighted total still fits 62 bits; it depends on
public numbers alone. int64 addition is associative: workers may add in any order and merge in any tree.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RunError

DEFAULT_BOUND = 2.0**15
_BITS = 62
_BLOCK = 2**14
_EXACT = 2.0**51
_SHIFT = 1.5 * 2.0**52
_SHIFT_BITS = np.float64(_SHIFT).view(np.int64)


class _Scratch(threading.local):
    """A thread's room for one block: made anew for each sum, it would have to be paged in again."""

    def __init__(self) -> None:
        self._products, self._integers = np.empty(_BLOCK), np.empty(_BLOCK, np.int64)

    def integers(self, block: NDArray[Any], scale: float, *, small: bool) -> NDArray[np.int64]:
        """Return the integers of scale · values, toward zero, until the next call; `small`: all are below 2^51.

        Small ones have 1.5 · 2^52 added, after which a float64's lower bits are the integer: numpy does that to many
        numbers at a time, and converts one by one.
        """
        products = self._products[: len(block)]
        np.copyto(products, block)
        np.multiply(products, scale, out=products)
        if small:
            np.trunc(products, out=products)
            np.add(products, _SHIFT, out=products)
            shifted = products.view(np.int64)
            np.subtract(shifted, _SHIFT_BITS, out=shifted)
            return shifted
        integers = self._integers[: len(block)]
        np.copyto(integers, products, casting="unsafe")
        return integers


_scratch = _Scratch()


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

    def encode(self, values: NDArray[np.generic], weight: int = 1) -> NDArray[np.int64]:
        """Return the integers of `weight * values`; raises RunError `value-out-of-range`, never wraps."""
        total = np.zeros(values.size, np.int64)
        self.add_to(total, [values.reshape(-1)], weight)
        return total

    def add_to(self, total: NDArray[np.int64], pieces: Sequence[NDArray[Any]], weight: int = 1) -> None:
        """Add the integers of `weight * values` to a vector, the values being flat pieces of it end to end.

        Raises RunError `value-out-of-range` before anything is added; never wraps.
        """
        if not 0 <= weight <= self.capacity:
            raise RunError("value-out-of-range", f"the weight {weight} is outside 0 to {self.capacity}")
        largest = 0.0
        for piece in pieces:
            if piece.size:
                high, low = float(piece.max()), float(piece.min())
                # NaN fails these comparisons too.
                if not (high <= self.bound and low >= -self.bound):
                    raise RunError(
                        "value-out-of-range", f"the update holds a number that is not within ±{self.bound:g}"
                    )
                largest = max(largest, high, -low)
        # In blocks that stay in the processor's cache: four times as fast for a large model.
        scale, start = weight / self.step, 0
        small = largest * scale < _EXACT
        for piece in pieces:
            for first in range(0, piece.size, _BLOCK):
                block = piece[first : first + _BLOCK]
                size = len(block)
                total[start : start + size] += _scratch.integers(block, scale, small=small)
                start += size

    def integers(self, rows: NDArray[np.floating[Any]], weights: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the integers of weighted rows [n, size]; those of a row outside the bound, or NaN, mean nothing."""
        products = rows * (weights / self.step)[:, None]
        with np.errstate(invalid="ignore"):
            return products.astype(np.int64)

    def holds(self, rows: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """Return which rows [n, size] lie within the bound."""
        # NaN fails these comparisons too.
        low, high = rows.min(axis=1, initial=0.0), rows.max(axis=1, initial=0.0)
        return (high <= self.bound) & (low >= -self.bound)  # type: ignore[no-any-return]

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

    def add(self, *pieces: NDArray[Any], weight: int = 1) -> None:
        """Add a vector [size], given in flat pieces, with an integer weight; raises RunError, the sum as it was."""
        self._check_room(weight)
        self.ring.add_to(self.total, pieces, weight)
        self.weight += weight
        self.count += 1

    def add_rows(self, rows: NDArray[np.floating[Any]], weights: Sequence[int]) -> list[RunError | None]:
        """Add vectors, the rows [n, size], each as `add` would; return for each what refused it, or None.

        Meant for short ones: the integers of all of them are there at once.
        """
        fits = min(weights, default=0) >= 0 and self.weight + sum(weights) <= self.ring.capacity
        if rows.shape[1] > _BLOCK or not fits:
            return [self._refusal(row, weight) for row, weight in zip(rows, weights, strict=True)]
        holds = self.ring.holds(rows)
        factors = np.array(weights, np.int64) * holds
        self.total += self.ring.integers(np.where(holds[:, None], rows, 0.0), factors).sum(axis=0)
        self.weight += int(factors.sum())
        self.count += int(holds.sum())
        return [None if held else self._refusal(row, 1) for held, row in zip(holds, rows, strict=True)]

    def _refusal(self, row: NDArray[Any], weight: int) -> RunError | None:
        try:
            self.add(row, weight=weight)
        except RunError as error:
            return error
        return None

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
        return self.mean_between(0, self.total.size) if self.weight else None

    def mean_between(self, start: int, stop: int) -> NDArray[np.float64]:
        """Return a stretch of the mean, whose whole would take as much memory as the sum; the weight is not zero."""
        return self.ring.decode(self.total[start:stop]) / self.weight

    def _check_room(self, weight: int) -> None:
        if self.weight + weight > self.ring.capacity:
            raise RunError("value-out-of-range", f"the total weight exceeds {self.ring.capacity}")
