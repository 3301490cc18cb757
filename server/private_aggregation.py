"""Client-level privacy on the server: clipped sums in place of a linear strategy's, and noise before it sees them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import RunError
from ..core.keys import Key
from ..core.parameters import Arrays, Layout
from ..core.ring import ExactSum
from ..privacy import discrete_gaussian
from ..privacy.adaptive_clipping import ClippingState
from ..privacy.client_level import ClientLevelPlan
from ..privacy.matrix_factorization import CorrelatedNoise
from ..strategies.clipped_sum import ClippedSum, ClippedTotal
from ..strategies.fold import WeightedSum


@dataclass(kw_only=True)
class ReleasedMean(ExactSum):
    """What a strategy gets in place of its total: only the noised mean model, over the fixed denominator."""

    released: NDArray[np.float64]

    def mean(self) -> NDArray[np.float64]:
        """Return x + (Σ clip(Δ_k) + noise) / (q·N), float64 [size]."""
        return self.released

    def mean_between(self, start: int, stop: int) -> NDArray[np.float64]:
        """Return a stretch of it."""
        return self.released[start:stop]


class PrivateAggregation:
    """One run's client-level mechanism: `fold` before a round's replies, `release` after them.

    `key` and `noise_key()`, that of correlated noise, must be secret. Independent noise follows from the round, the
    model and the sum: a repeated round with the same sum draws the same noise, one with another sum unrelated noise (as
    a deterministic signature does with its nonce). Correlated noise follows from the round alone, so no round may be
    released twice with two sums.
    """

    def __init__(
        self, plan: ClientLevelPlan, *, layout: Layout, key: Key, noise_key: Callable[[], Key] | None = None
    ) -> None:
        self.plan = plan
        self._layout, self._key = layout, key
        self._noise_key = noise_key or (lambda: key.child("correlated"))
        self.clipping_norm = plan.clipping_norm
        self._noise: CorrelatedNoise | None = None

    def fold(self, arrays: Arrays, strategy: object, fold: object) -> ClippedSum:
        """Return how the replies to this model are clipped and summed, in place of the strategy's own fold.

        Raises RunError unless that is the plain sum of models for which a clipped one can stand.
        """
        if not isinstance(fold, WeightedSum) or (fold.weighted_by is not None and fold.cap is None):
            raise RunError(
                "strategy-failed",
                f"strategy {type(strategy).__name__} asks for another sum than that of models with equal or capped "
                "weights, whose sensitivity is not known",
            )
        return ClippedSum(
            layout=self._layout,
            ring=self.plan.ring(self.clipping_norm),
            model=self._layout.flatten(arrays),
            clipping_norm=self.clipping_norm,
            weighted_by=fold.weighted_by,
            cap=fold.cap,
        )

    def release(self, round: int, fold: ClippedSum, total: ExactSum | None) -> ReleasedMean:
        """Return the noised mean of a round, which may be of noise alone, and adapt the clipping norm."""
        plan = self.plan
        if not isinstance(total, ClippedTotal):
            raise ValueError("the total is not that of the round's fold")
        key = self._key.child("aggregate", round, _digest(fold.model), _digest(total.total), total.votes)
        noised = self._correlated(round, fold, total) if plan.bands else self._independent(key, fold, total)
        mean = fold.model + noised / plan.cohort
        adaptive = plan.clipping()
        if adaptive is not None:
            state = ClippingState(plan=adaptive, clipping_norm=fold.clipping_norm)
            self.clipping_norm = state.following([total.votes], key.child("votes").stream()).clipping_norm
        return ReleasedMean(
            ring=fold.ring, total=np.zeros(0, np.int64), weight=plan.cohort, count=plan.cohort, released=mean
        )

    def _independent(self, key: Key, fold: ClippedSum, total: ClippedTotal) -> NDArray[np.float64]:
        """Return the sum with exact integer noise on it."""
        noised, sigma = total.total, self.plan.sigma_units(fold.clipping_norm)
        if sigma:
            noised = noised + discrete_gaussian.sample(key.child("noise").stream(), sigma, len(noised))
        return fold.ring.decode(noised)

    def _correlated(self, round: int, fold: ClippedSum, total: ClippedTotal) -> NDArray[np.float64]:
        """Return the sum with the round's row of the correlated noise on it.

        Rounds before it are drawn again from the key where a resumed run needs them: nothing of them is on disk.
        """
        correlation = self.plan.correlation()
        if correlation is None:
            raise ValueError("the plan's noise is independent")
        if self._noise is None or self._noise.next_round >= round:
            self._noise = CorrelatedNoise(plan=correlation, size=len(total.total))
        for number in range(self._noise.next_round, round):
            row = self._noise.noise(number, self._draw)
        return fold.ring.decode(total.total) + row

    def _draw(self, number: int) -> NDArray[np.float64]:
        return self._noise_key().child(number).stream().normals(self._layout.size)

    def state_dict(self) -> dict[str, Any]:
        """Return the clipping norm of the next round."""
        return {"clipping_norm": self.clipping_norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the clipping norm."""
        self.clipping_norm = float(state["clipping_norm"])


def _digest(vector: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(vector).tobytes()).hexdigest()
