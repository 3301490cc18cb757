"""The accounted evaluation: every client releases one histogram of its test records, and metrics follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from ..clients.gate import histogram_of
from ..core import flower
from ..core.errors import BractError
from ..privacy.release import EvaluationPlan, metrics_from
from .grid import RoundGrid

LISTED_SITES = 100
EVERYONE = ""
"""No client's name: that of the sum of all."""
# So many clients are asked at once: messages for a whole large population would take more memory than its records.
_ASKED = 2**12


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was released: one histogram a client, or that of `EVERYONE`, and the metrics that follow from their sum."""

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
        if EVERYONE not in self.histograms:
            result["per_site"] = {
                name: {"histogram": counts.tolist()} | _scalars(metrics_from(counts))
                for name, counts in self.histograms.items()
            }
        return result


def evaluate(
    grid: RoundGrid, names: Mapping[int, str], arrays: ArrayRecord, plan: EvaluationPlan, config: Mapping[str, Any]
) -> Evaluation | None:
    """Ask every client for its histogram; None if none answered. One that fails is left out.

    Of more than `LISTED_SITES` clients only the sum is kept.
    """
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(dict(config))})
    histograms: dict[str, NDArray[np.int64]] = {}
    asked = iter(names)
    while some := list(islice(asked, _ASKED)):
        for reply in grid.exchange(flower.instructions(content, some, "evaluate")):
            if not reply.has_content():
                continue
            try:
                counts = histogram_of(reply.content, plan.shape)
            except BractError:
                continue
            name = names[reply.metadata.src_node_id] if len(names) <= LISTED_SITES else EVERYONE
            histograms[name] = histograms[name] + counts if name in histograms else counts
    if not histograms:
        return None
    # Replies come in any order.
    order = [EVERYONE] if EVERYONE in histograms else [name for name in names.values() if name in histograms]
    return Evaluation(histograms={name: histograms[name] for name in order})


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in metrics.items() if value is None or isinstance(value, float)}
