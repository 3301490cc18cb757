"""What robust rules share: a matrix of whole replies, one row each, of which some may hold anything at all.

Models that clients noised stay as private as they came: under record-level privacy a rule is post-processing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from numpy.typing import NDArray

from ..core.parameters import record_of
from .whole_replies import Vector, WholeReplies

Matrix = NDArray[np.float64]


class Robust(WholeReplies):
    """A rule over the rows of a matrix, in the order of node ids.

    Below `least_replies` replies that fit, the model stays as it was, and `remarks` says so. Whole numbers, such as a
    count of batches, take their median: no distance is made of them.
    """

    @property
    def least_replies(self) -> int:
        """The fewest replies for which the rule holds what it promises."""
        return 1

    @abstractmethod
    def aggregate(self, rows: Matrix) -> Vector:
        """Return the aggregate [size] of rows [replies, size]."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the rule's model of whole replies, or None where they are too few."""
        fitting = self.fitting(replies)
        if len(fitting) < self.least_replies:
            name = type(self).__name__
            self.remarks.append(f"{name} needs {self.least_replies} replies, not {len(fitting)}; the model stays")
            return None, None
        rows, whole = np.stack(list(fitting.values())), self.layout.whole
        new = np.empty(self.layout.size)
        new[whole] = np.median(rows[:, whole], axis=0)
        # What a client sends may be as large as its type allows: squares and sums of that are infinite, as they should.
        with np.errstate(over="ignore", invalid="ignore"):
            new[~whole] = self.aggregate(rows[:, ~whole])
        return record_of(self.layout.unflatten(new)), MetricRecord()
