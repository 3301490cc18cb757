"""What strategies share that need each reply by itself and not only a sum: FedAvg's clients, each reply checked.

Replies come in the order of node ids: neither the order in which they arrive nor a tie depends on chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from ..core.parameters import Layout, arrays_of
from .fedavg import FedAvg
from .fold import only

Vector = NDArray[np.float64]


class WholeReplies(Strategy):
    """Clients of FedAvg that count alike. It has no fold, so it does not go with noise on a sum.

    A reply that does not fit the model or is not finite is left out; `remarks` says so after `aggregate_train`.
    """

    allowed_units: ClassVar[frozenset[str]] = frozenset({"none", "record"})

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self._average = FedAvg()

    @property
    def layout(self) -> Layout:
        """The model's layout, known since `configure_train`."""
        return self._average.layout

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model to every client that the grid shows."""
        return self._average.configure_train(server_round, arrays, config, grid)

    def fitting(self, replies: Iterable[Message]) -> dict[int, Vector]:
        """Return the flat vectors [size] of replies that fit, by node id, in its order; begin the remarks anew."""
        arrived = {reply.metadata.src_node_id: reply for reply in replies if reply.has_content()}
        rows = {node: self._vector(arrived[node]) for node in sorted(arrived)}
        fitting = {node: row for node, row in rows.items() if row is not None}
        left_out = len(arrived) - len(fitting)
        self.remarks = []
        if left_out:
            self.remarks.append(f"{left_out} of {len(arrived)} replies did not fit the model and were left out")
        return fitting

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model to every client that the grid shows."""
        return self._average.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the metrics' mean, as clients give them."""
        return self._average.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """Say nothing: bract's report and progress show the configuration."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: nothing is kept between rounds."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up nothing."""

    def _vector(self, reply: Message) -> Vector | None:
        try:
            vector = self.layout.flatten(arrays_of(only(reply.content, ArrayRecord)))
        except Exception:  # bytes that are no array fail in whatever part of their reader they meet first
            return None
        return vector if np.isfinite(vector).all() else None
