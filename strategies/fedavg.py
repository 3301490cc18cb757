"""Federated averaging: the mean of the clients' models after local training.

McMahan, Moore, Ramage, Hampson & y Arcas, "Communication-efficient learning of deep networks from decentralized
data", AISTATS 2017, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..core import flower
from ..core.errors import BractError
from ..core.parameters import Layout, arrays_of, record_of
from ..core.ring import Ring
from .fold import Fold, Total, WeightedSum

# 67 million records: with the default bound a unit of the sum is then 2^-21, spread over all its records.
COUNTED_CAPACITY = 2**26
COUNT_KEY = "num-examples"


class FedAvg(Strategy):
    """Average the clients' models, with equal weights or weighted by their counts of examples.

    `weights = "counted"` needs counts in the replies, which a client under record-level privacy withholds (its weight
    is 1); a count above `weight_cap` counts as that, so that nobody can weigh more.
    The sum is exact: the order in which replies arrive does not change a bit.
    """

    def __init__(self, *, weights: Literal["equal", "counted"] = "equal", weight_cap: int | None = None) -> None:
        if weights not in ("equal", "counted"):
            raise ValueError(f'weights = "{weights}": must be "equal" or "counted"')
        if weight_cap is not None and (weights != "counted" or weight_cap < 1):
            raise ValueError(f'weight_cap = {weight_cap}: must be at least 1, and goes with weights = "counted"')
        self.weights, self.weight_cap = weights, weight_cap
        self._layout: Layout | None = None
        self._cohort = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model to every client that the grid shows."""
        nodes = list(grid.get_node_ids())
        self._layout, self._cohort = Layout.of(arrays_of(arrays)), len(nodes)
        config["server-round"] = server_round
        content = RecordDict({"arrays": arrays, "config": config})
        return flower.instructions(content, nodes, "train")

    @property
    def layout(self) -> Layout:
        """The model's layout, known since `configure_train`."""
        if self._layout is None:
            raise RuntimeError("configure_train comes first")
        return self._layout

    def fold(self) -> Fold:
        """Return how the replies of the configured round are summed."""
        counted = self.weights == "counted"
        return WeightedSum(
            layout=self.layout,
            ring=Ring(capacity=COUNTED_CAPACITY if counted else max(1, self._cohort)),
            weighted_by=COUNT_KEY if counted else None,
            cap=self.weight_cap,
        )

    def aggregate_total(self, server_round: int, total: Total) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the mean of what was folded, or None when nothing was."""
        if not total.weight or self._layout is None:
            return None, None
        return record_of(self._layout.unflatten_by(total.mean_between)), MetricRecord()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold whole replies: for a Grid that does not fold them itself. A reply that does not fit is left out."""
        fold = self.fold()
        total = fold.start()
        for reply in replies:
            if reply.has_content():
                try:
                    fold.add(total, reply.content)
                except BractError:
                    continue
        return self.aggregate_total(server_round, total)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model to every client that the grid shows."""
        config["server-round"] = server_round
        content = RecordDict({"arrays": arrays, "config": config})
        return flower.instructions(content, grid.get_node_ids(), "evaluate")

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the metrics' mean, weighted by the counts of examples where clients give them."""
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for reply in replies:
            for metrics in reply.content.metric_records.values() if reply.has_content() else ():
                weight = float(metrics.get(COUNT_KEY, 1.0))  # type: ignore[arg-type]
                for name, value in metrics.items():
                    if name != COUNT_KEY and isinstance(value, int | float):
                        sums[name] = sums.get(name, 0.0) + weight * value
                        weights[name] = weights.get(name, 0.0) + weight
        means: dict[str, int | float | list[int] | list[float]] = {
            name: total / weights[name] for name, total in sums.items() if weights[name] > 0
        }
        return MetricRecord(means) if means else None

    def summary(self) -> None:
        """Say nothing: bract's report and progress show the configuration."""
