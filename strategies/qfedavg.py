"""q-FedAvg: clients that the model serves badly count for more.

Li, Sanjabi, Beirami & Smith, "Fair resource allocation in federated learning", ICLR 2020: minimise q-FFL,
Σ F_k(w)^(q+1) / (q + 1) (equation 2), by Algorithm 2 with the Lipschitz constant L estimated as 1 / learning rate.
Clients give away the exact loss of their records, so it is refused under any privacy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from ..core.errors import RunError
from ..core.parameters import Layout, arrays_of, record_of
from ..core.ring import ExactSum, Ring
from .fedavg import FedAvg
from .fold import Fold, Total, only
from .local_rule import LocalRound, LocalRule, Sent, needs_sgd, statistics_of
from .values import number

LOSS_KEY = "received-loss"
RATE_KEY = "learning-rate"
# A loss of zero has no weight for q > 0, and no power below zero.
LEAST_LOSS = 1e-10
BOUND = 2.0**20


class Measured:
    """A client's round of plain training, which reports F_k(w_t): its records' mean loss at the received model."""

    def __init__(self, round: LocalRound) -> None:
        self._loss = round.loss()
        self._rate = round.learning_rate

    def correct(self) -> None:
        """Leave the gradients as they are."""

    def finish(self) -> Sent:
        """Report the loss, and the learning rate from which L is estimated."""
        return Sent(numbers={LOSS_KEY: self._loss, RATE_KEY: self._rate})


@dataclass(frozen=True, kw_only=True, eq=False)
class FairSum:
    """The fold Σ (F^q · (w − w_k), F^q, h_k / L) with h_k / L = q · F^(q−1) · L · ‖w − w_k‖² + F^q."""

    layout: Layout
    ring: Ring
    model: NDArray[np.float64]
    q: float

    def start(self) -> Total:
        """Return the empty sum."""
        return ExactSum.zero(self.ring, self.layout.size + 1)

    def add(self, total: Total, content: RecordDict) -> None:
        """Add one reply; raises RunError `reply-invalid` or `value-out-of-range`."""
        metrics = only(content, MetricRecord)
        loss = max(_number(metrics, LOSS_KEY), LEAST_LOSS)
        lipschitz = 1 / max(_number(metrics, RATE_KEY), LEAST_LOSS)
        step = self.model - self.layout.flatten(arrays_of(only(content, ArrayRecord)))
        weight = loss**self.q
        moved = step[~statistics_of(self.layout)]
        h = self.q * loss ** (self.q - 1) * lipschitz * float(moved @ moved) + weight
        total.add(weight * step, np.array([h]))


class QFedAvg(FedAvg):
    """w ← w − Σ Δ_k / Σ h_k over the replies; `q` 0 is FedAvg, a larger one evens the clients' losses out more."""

    allowed_units: ClassVar[frozenset[str]] = frozenset({"none"})
    needs_metrics: ClassVar[bool] = True

    def __init__(self, *, q: float = 1.0) -> None:
        super().__init__()
        self.q = number("q", q, least=0)
        self.local_rule = LocalRule(session=Measured, reports=(LOSS_KEY, RATE_KEY), conflict=needs_sgd)
        self._model = np.zeros(0)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model to every client that the grid shows."""
        messages = super().configure_train(server_round, arrays, config, grid)
        self._model = self.layout.flatten(arrays_of(arrays))
        return messages

    def fold(self) -> Fold:
        """Return how the replies of the configured round are summed."""
        ring = Ring(bound=BOUND, capacity=max(1, self._cohort))
        return FairSum(layout=self.layout, ring=ring, model=self._model, q=self.q)

    def aggregate_total(self, server_round: int, total: Total) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new model, or None when nothing was folded or every loss is zero."""
        mean = total.mean()
        if mean is None or mean[-1] <= 0:
            return None, None
        return record_of(self.layout.unflatten(self._model - mean[:-1] / mean[-1])), MetricRecord()

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: q-FedAvg keeps nothing between rounds."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up nothing."""


def _number(metrics: MetricRecord, key: str) -> float:
    value = metrics.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise RunError("reply-invalid", f"the number {key!r} must be finite and at least 0")
    return float(value)
