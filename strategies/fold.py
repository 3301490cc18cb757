"""Fold: how replies become one total while they arrive, so that nothing ever holds all updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from flwr.app import ArrayRecord, MetricRecord, RecordDict

from ..core.errors import RunError
from ..core.parameters import Layout, arrays_of
from ..core.ring import ExactSum, Ring

Total = ExactSum


class Fold(Protocol):
    """Frozen and picklable: workers fold on their own, and their totals merge."""

    def start(self) -> Total:
        """Return the empty total."""

    def add(self, total: Total, content: RecordDict) -> None:
        """Add one reply; raises RunError and leaves the total as it was."""


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
        weight = weight_of(content, self.weighted_by)
        capped = weight if self.cap is None else min(weight, self.cap)
        total.add(*self.layout.pieces(arrays_of(arrays)), weight=capped)


def weight_of(content: RecordDict, weighted_by: str | None) -> int:
    """Return the weight that a reply's metrics hold, 1 if it is not asked for; raises RunError `reply-invalid`."""
    if weighted_by is None:
        return 1
    weight = only(content, MetricRecord).get(weighted_by)
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0 or weight != int(weight):
        raise RunError("reply-invalid", f"the weight {weighted_by!r} must be a whole number of at least 0")
    return int(weight)


def only(content: RecordDict, kind: type[Any]) -> Any:
    """Return the one record of a kind that a reply holds; raises RunError `reply-invalid`."""
    found = [record for record in content.values() if isinstance(record, kind)]
    if len(found) != 1:
        raise RunError("reply-invalid", f"a reply must hold one {kind.__name__}, this one holds {len(found)}")
    return found[0]
