"""RFA: the point whose distances to the clients' models have the least sum.

Pillutla, Kakade & Harchaoui, "Robust aggregation for federated learning", IEEE Transactions on Signal Processing 2022,
Algorithm 2 (smoothed Weiszfeld). Less than half of the models, however far away, move it by a bounded distance.
"""

from __future__ import annotations

import numpy as np

from .robust import Matrix, Robust
from .values import number, whole_number
from .whole_replies import Vector

# A step shorter than this share of a typical distance no longer matters.
_STILL = 1e-10


class GeometricMedian(Robust):
    """The smoothed geometric median: z ← Σ w_i · x_i / Σ w_i with w_i = 1 / max(smoothing, ‖z − x_i‖).

    z starts at the median of each coordinate, which lies among the honest models: from a mean that one model at 1e30
    carried away it would take a hundred steps to come back. It stops when it stands still, or after `iterations`.
    """

    def __init__(self, *, smoothing: float = 1e-6, iterations: int = 100) -> None:
        super().__init__()
        self.smoothing = number("smoothing", smoothing, above=0)
        self.iterations = whole_number("iterations", iterations, least=1)

    def aggregate(self, rows: Matrix) -> Vector:
        """Return the smoothed geometric median."""
        z = np.median(rows, axis=0)
        for _ in range(self.iterations):
            distances = np.linalg.norm(rows - z, axis=1)
            weights = 1 / np.maximum(self.smoothing, distances)
            before, z = z, (weights[:, None] * rows).sum(axis=0) / weights.sum()
            if np.linalg.norm(z - before) <= _STILL * np.median(distances):
                break
        return z
