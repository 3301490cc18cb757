"""The accounted evaluation: every client releases one histogram of its test records, and metrics follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from ..clients.gate import histogram_of
from ..core.errors import BractError
from ..privacy.release import EvaluationPlan, metrics_from
from .grid import RoundGrid

LISTED_SITES = 100


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was released: one histogram a client, and the metrics that follow from their sum."""

    histograms: Mapping[str, NDArray[np.int64]]

    @cached_property
    def total(self) -> NDArray[np.int64]:
        """The sum of the clients' histograms."""
        return np.sum(list(self.histograms.values()), axis=0)  # type: ignore[no-any-return]

    @cached_property
    def metrics(self) -> dict[str, float | None]:
        """The metrics of all clients together; None where the counts do not support one."""
        return _scalars(metrics_from(self.total))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of result.json's key `released`; sites are listed up to 100."""
        roc = metrics_from(self.total).get("roc") or []
        result: dict[str, Any] = {"histogram": self.total.tolist(), "roc": [list(point) for point in roc]}
        if len(self.histograms) <= LISTED_SITES:
            result["per_site"] = {
                name: {"histogram": counts.tolist()} | _scalars(metrics_from(counts))
                for name, counts in self.histograms.items()
            }
        return result


def evaluate(
    grid: RoundGrid, names: Mapping[int, str], arrays: ArrayRecord, plan: EvaluationPlan, config: Mapping[str, Any]
) -> Evaluation | None:
    """Ask every client for its histogram; None if none answered. One that fails is left out."""
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(dict(config))})
    histograms: dict[str, NDArray[np.int64]] = {}
    for reply in grid.exchange([Message(content, node, "evaluate") for node in names]):
        if not reply.has_content():
            continue
        try:
            histograms[names[reply.metadata.src_node_id]] = histogram_of(reply.content, plan.shape)
        except BractError:
            continue
    if not histograms:
        return None
    return Evaluation(histograms={name: histograms[name] for name in names.values() if name in histograms})


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in metrics.items() if value is None or isinstance(value, float)}
