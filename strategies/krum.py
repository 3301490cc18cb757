"""Krum and what is built on it: the models that lie near most others.

Blanchard, El Mhamdi, Guerraoui & Stainer, "Machine learning with adversaries: byzantine tolerant gradient descent",
NeurIPS 2017: Krum and Multi-Krum. El Mhamdi, Guerraoui & Rouault, "The hidden vulnerability of distributed learning in
Byzantium", ICML 2018, section 4: Bulyan, which also bounds what one coordinate may hide in a near model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .robust import Matrix, Robust
from .values import whole_number
from .whole_replies import Vector


class Krum(Robust):
    """The one model whose n − f − 2 nearest others are nearest, for n ≥ 2f + 3 replies of which f are byzantine."""

    def __init__(self, *, byzantine: int = 1) -> None:
        super().__init__()
        self.byzantine = whole_number("byzantine", byzantine, least=0)

    @property
    def least_replies(self) -> int:
        """2f + 3."""
        return 2 * self.byzantine + 3

    def aggregate(self, rows: Matrix) -> Vector:
        """Return the row that ranks first."""
        first: Vector = rows[ranking(squared_distances(rows), self.byzantine)[0]]
        return first


class MultiKrum(Krum):
    """The mean of the `selected` models that Krum ranks first, by default n − f − 2 of n."""

    def __init__(self, *, byzantine: int = 1, selected: int | None = None) -> None:
        super().__init__(byzantine=byzantine)
        self.selected = None if selected is None else whole_number("selected", selected, least=1)

    @property
    def least_replies(self) -> int:
        """2f + 3, and enough that n − f − 2 may be selected."""
        return max(super().least_replies, (self.selected or 0) + self.byzantine + 2)

    def aggregate(self, rows: Matrix) -> Vector:
        """Return the mean of the rows that rank first."""
        count = self.selected or len(rows) - self.byzantine - 2
        # In the order of node ids again: a sum of floats depends on its order.
        mean: Vector = rows[np.sort(ranking(squared_distances(rows), self.byzantine)[:count])].mean(axis=0)
        return mean


class Bulyan(Krum):
    """θ = n − 2f models that Krum chooses one after the other; of each coordinate the mean of θ − 2f near the median.

    For n ≥ 4f + 3 replies.
    """

    @property
    def least_replies(self) -> int:
        """4f + 3."""
        return 4 * self.byzantine + 3

    def aggregate(self, rows: Matrix) -> Vector:
        """Return, for each coordinate, the mean of the θ − 2f chosen values that lie nearest to their median."""
        distances = squared_distances(rows)
        left = np.arange(len(rows))
        chosen: list[int] = []
        for _ in range(len(rows) - 2 * self.byzantine):
            first = ranking(distances[np.ix_(left, left)], self.byzantine)[0]
            chosen.append(int(left[first]))
            left = np.delete(left, first)
        values = np.sort(rows[chosen], axis=0)
        nearest = np.argsort(np.abs(values - np.median(values, axis=0)), axis=0, kind="stable")
        kept = np.sort(nearest[: len(values) - 2 * self.byzantine], axis=0)
        mean: Vector = np.take_along_axis(values, kept, axis=0).mean(axis=0)
        return mean


def squared_distances(rows: Matrix) -> NDArray[np.float64]:
    """Return ‖x_i − x_j‖² [replies, replies], of differences: a product of large rows would lose the small ones."""
    distances = np.zeros((len(rows), len(rows)))
    for index in range(len(rows) - 1):
        differences = rows[index + 1 :] - rows[index]
        distances[index, index + 1 :] = np.einsum("ij,ij->i", differences, differences)
    return distances + distances.T


def ranking(distances: NDArray[np.float64], byzantine: int) -> NDArray[np.intp]:
    """Return the rows by score, the sum of squared distances to the n − f − 2 nearest others; ties by place.

    Bulyan comes down to fewer rows than that; one neighbour then counts.
    """
    neighbours = max(1, len(distances) - byzantine - 2)
    # The first of each sorted row is the distance to itself, 0.
    scores = np.sort(distances, axis=1)[:, 1 : neighbours + 1].sum(axis=1)
    return np.argsort(scores, kind="stable")
