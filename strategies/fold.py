"""Fold: how replies become one total while they arrive, so that nothing ever holds all updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from ..core.errors import RunError
from ..core.parameters import Layout, arrays_of
from ..core.ring import ExactSum, Ring

Total = ExactSum
Numbers = Mapping[str, Any]


class Fold(Protocol):
    """Frozen and picklable: workers fold on their own, and their totals merge."""

    def start(self) -> Total:
        """Return the empty total."""

    def add(self, total: Total, content: RecordDict) -> None:
        """Add one reply; raises RunError and leaves the total as it was."""


@runtime_checkable
class SumFold(Fold, Protocol):
    """A fold that also takes updates which were never put into a reply, as whoever trains many clients holds them.

    `numbers` are what the reply would hold beside the arrays. Each comes to the same as `add`.
    """

    def add_pieces(self, total: Total, pieces: Sequence[NDArray[Any]], numbers: Numbers) -> None:
        """Add one model, in flat pieces in the layout's order; raises RunError and leaves the total as it was."""

    def add_rows(
        self, total: Total, rows: NDArray[np.floating[Any]], numbers: Sequence[Numbers]
    ) -> list[RunError | None]:
        """Add models, the rows [n, size]; return for each what refused it, or None."""


@dataclass(frozen=True, kw_only=True)
class WeightedSum:
    """Σ weight·arrays on an exact ring; the weight is 1, or the whole number that a reply's metrics hold, capped."""

    layout: Layout
    ring: Ring
    weighted_by: str | None = None
    cap: int | None = None

    def start(self) -> Total:
        """Return the empty sum."""
        return ExactSum.zero(self.ring, self.layout.size)

    def add(self, total: Total, content: RecordDict) -> None:
        """Add one reply; raises RunError `reply-invalid` or `value-out-of-range`."""
        arrays = only(content, ArrayRecord)
        numbers = {} if self.weighted_by is None else only(content, MetricRecord)
        self.add_pieces(total, self.layout.pieces(arrays_of(arrays)), numbers)

    def add_pieces(self, total: Total, pieces: Sequence[NDArray[Any]], numbers: Numbers) -> None:
        """Add one model; raises RunError `reply-invalid` or `value-out-of-range`."""
        total.add(*pieces, weight=self._weight(numbers))

    def add_rows(
        self, total: Total, rows: NDArray[np.floating[Any]], numbers: Sequence[Numbers]
    ) -> list[RunError | None]:
        """Add models, the rows [n, size]; return for each what refused it, or None."""
        return total.add_rows(rows, [self._weight(each) for each in numbers])

    def _weight(self, numbers: Numbers) -> int:
        weight = weight_of(numbers, self.weighted_by)
        return weight if self.cap is None else min(weight, self.cap)


def weight_of(numbers: Numbers, weighted_by: str | None) -> int:
    """Return the weight that a reply's numbers hold, 1 if it is not asked for; raises RunError `reply-invalid`."""
    if weighted_by is None:
        return 1
    weight = numbers.get(weighted_by)
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0 or weight != int(weight):
        raise RunError("reply-invalid", f"the weight {weighted_by!r} must be a whole number of at least 0")
    return int(weight)


def only(content: RecordDict, kind: type[Any]) -> Any:
    """Return the one record of a kind that a reply holds; raises RunError `reply-invalid`."""
    found = [record for record in content.values() if isinstance(record, kind)]
    if len(found) != 1:
        raise RunError("reply-invalid", f"a reply must hold one {kind.__name__}, this one holds {len(found)}")
    return found[0]
