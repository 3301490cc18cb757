"""Clipped sums: what one client adds to the sum of updates is bounded, whatever it sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from ..core.errors import RunError
from ..core.parameters import Layout, arrays_of
from ..core.ring import ExactSum, Ring
from .fold import Numbers, only, weight_of

# The norm, the factor and the products are float64: none of their roundings may make a vector longer than the bound.
_MARGIN = 1e-9


@dataclass(kw_only=True)
class ClippedTotal(ExactSum):
    """Σ clip(Δ_k, C) on a ring, and the sum of the votes: 1 of each client that was not clipped, -1 of the others.

    An update of zero has no vote: whoever contributes nothing to the one sum contributes nothing to the other.
    """

    votes: int = 0

    def merge(self, other: ExactSum) -> None:
        """Add another total of the same exchange."""
        super().merge(other)
        self.votes += other.votes if isinstance(other, ClippedTotal) else 0


@dataclass(frozen=True, kw_only=True)
class ClippedSum:
    """The fold of model replies into Σ clip(y_k - x, C), with the norm over all tensors together.

    Sensitivity: each reply adds integers whose Euclidean norm is at most C / step: the factor min(1, C / |y - x|) is
    rounded down, and the ring rounds toward zero. An update that is not finite adds nothing, nor do tensors of whole
    numbers. `model` is x, float64.
    With `weighted_by` and `cap` a reply's update is multiplied by min(1, count / cap) after it was clipped.
    """

    layout: Layout
    ring: Ring
    model: NDArray[np.float64] = field(repr=False)
    clipping_norm: float
    weighted_by: str | None = None
    cap: int | None = None

    def start(self) -> ClippedTotal:
        """Return the empty sum."""
        return ClippedTotal(ring=self.ring, total=np.zeros(self.layout.size, np.int64))

    def add(self, total: ExactSum, content: RecordDict) -> None:
        """Add one reply; raises RunError `reply-invalid`, or `value-out-of-range` if it is not finite."""
        arrays = arrays_of(only(content, ArrayRecord))
        numbers = {} if self.weighted_by is None else only(content, MetricRecord)
        self.add_pieces(total, self.layout.pieces(arrays), numbers)

    def add_pieces(self, total: ExactSum, pieces: Sequence[NDArray[Any]], numbers: Numbers) -> None:
        """Add one model; raises RunError as `add` does."""
        (refused,) = self.add_rows(total, np.concatenate(pieces, dtype=np.float64)[None], [numbers])
        if refused:
            raise refused

    def add_rows(
        self, total: ExactSum, rows: NDArray[np.floating[Any]], numbers: Sequence[Numbers]
    ) -> list[RunError | None]:
        """Add models, the rows [n, size]; return for each what refused it, or None."""
        shares = np.array([self._share(each) for each in numbers])
        deltas = np.subtract(rows, self.model, dtype=np.float64)
        # A count of batches moves far further than C, and would leave nothing of the rest.
        deltas[:, self.layout.whole] = 0.0
        norms = np.sqrt(np.einsum("ij,ij->i", deltas, deltas))
        within = norms <= self.clipping_norm
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = np.where(within | ~np.isfinite(norms), 1.0, self.clipping_norm / norms)
        with np.errstate(invalid="ignore"):
            deltas *= (factors * ((1 - _MARGIN) * shares))[:, None]
        # A NaN or an infinity is refused here, and the sum stays as it was.
        refused = total.add_rows(deltas, [1] * len(deltas))
        if isinstance(total, ClippedTotal):
            votes = np.where(norms == 0, 0, np.where(within, 1, -1))
            total.votes += int(votes[[each is None for each in refused]].sum())
        return refused

    def _share(self, numbers: Numbers) -> float:
        if self.weighted_by is None or self.cap is None:
            return 1.0
        return min(1.0, weight_of(numbers, self.weighted_by) / self.cap)
