"""Clipped sums: what one client adds to the sum of updates is bounded, whatever it sends."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from numpy.typing import NDArray

from ..core.parameters import Layout, arrays_of
from ..core.ring import ExactSum, Ring
from .fold import only, weight_of

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
        delta = self.layout.flatten(arrays_of(only(content, ArrayRecord)))
        delta -= self.model
        # A count of batches moves far further than C, and would leave nothing of the rest.
        delta[self.layout.whole] = 0.0
        norm = float(np.linalg.norm(delta))
        within = norm <= self.clipping_norm
        if not within and math.isfinite(norm):
            delta *= self.clipping_norm / norm
        # A NaN or an infinity is refused here, and the sum stays as it was.
        delta *= (1 - _MARGIN) * self._share(content)
        total.add(delta)
        if isinstance(total, ClippedTotal):
            total.votes += 0 if norm == 0 else 1 if within else -1

    def _share(self, content: RecordDict) -> float:
        if self.weighted_by is None or self.cap is None:
            return 1.0
        return min(1.0, weight_of(content, self.weighted_by) / self.cap)
