"""Coordinate by coordinate: the median and the trimmed mean of the clients' models.

Yin, Chen, Ramchandran & Bartlett, "Byzantine-robust distributed learning: towards optimal statistical rates", ICML
2018, Definitions 1 and 2, Algorithm 1.
"""

from __future__ import annotations

import numpy as np

from .robust import Matrix, Robust
from .values import number
from .whole_replies import Vector


class FedMedian(Robust):
    """The median of each coordinate: within what honest clients sent while these are more than half."""

    def aggregate(self, rows: Matrix) -> Vector:
        """Return the median; of an even number of rows the mean of the middle two."""
        return np.median(rows, axis=0)


class FedTrimmedAvg(Robust):
    """The mean of each coordinate without the ⌊beta · n⌋ largest and as many smallest of n values.

    `beta` must be at least the share of clients that may be byzantine, and below one half.
    """

    def __init__(self, *, beta: float = 0.2) -> None:
        super().__init__()
        self.beta = number("beta", beta, least=0)
        if self.beta >= 0.5:
            raise ValueError(f"beta = {beta!r}: must be below 0.5, or nothing is left")

    def aggregate(self, rows: Matrix) -> Vector:
        """Return the trimmed mean."""
        # 0.29 · 100 is 28.999…, and means 29.
        cut = int(self.beta * len(rows) + 1e-9)
        mean: Vector = np.sort(rows, axis=0)[cut : len(rows) - cut].mean(axis=0)
        return mean
