"""FedNova: each client's change is divided by its number of local steps before it is averaged.

Wang, Liu, Liang, Joshi & Poor, "Tackling the objective inconsistency problem in heterogeneous federated optimization",
NeurIPS 2020, sections 4.1 and 5: x ← x + τ_eff · Σ p_i (y_i − x) / ‖a_i‖₁ with τ_eff = Σ p_i ‖a_i‖₁, where ‖a_i‖₁ is
the number of steps τ_i for SGD, and (τ_i − m(1 − m^τ_i)/(1 − m)) / (1 − m) with momentum m. FedAvg favours clients
that take more steps; with a small learning rate this has the optimum of Σ p_i F_i. Steps are planned, so they are
public under privacy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from ..core.errors import RunError
from ..core.parameters import Layout, arrays_of, record_of
from ..core.ring import ExactSum, Ring
from .fedavg import COUNT_KEY, COUNTED_CAPACITY, FedAvg
from .fold import Fold, Total, only, weight_of
from .local_rule import LocalRound, LocalRule, Sent, needs_sgd, statistics_of

STEPS_KEY = "effective-steps"
MOST_STEPS = 2.0**15


class Counting:
    """A client's round of plain training, which reports ‖a_i‖₁."""

    def __init__(self, round: LocalRound) -> None:
        self._steps = effective_steps(round.steps, round.momentum)

    def correct(self) -> None:
        """Leave the gradients as they are."""

    def finish(self) -> Sent:
        """Report ‖a_i‖₁, a function of the plan alone."""
        return Sent(numbers={STEPS_KEY: self._steps})


def effective_steps(steps: int, momentum: float) -> float:
    """Return ‖a‖₁: by how much a constant gradient moves the model in so many steps, in learning rates.

    >>> effective_steps(4, 0.0), effective_steps(2, 0.5)
    (4.0, 2.5)
    """
    if momentum == 0:
        return float(steps)
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


@dataclass(frozen=True, kw_only=True)
class NormalizedSum:
    """The fold Σ w_i · (y_i / τ_i, 1 / τ_i, τ_i); running statistics are not divided."""

    layout: Layout
    ring: Ring
    weighted_by: str | None = None

    def start(self) -> Total:
        """Return the empty sum."""
        return ExactSum.zero(self.ring, self.layout.size + 2)

    def add(self, total: Total, content: RecordDict) -> None:
        """Add one reply; raises RunError `reply-invalid` or `value-out-of-range`."""
        steps = only(content, MetricRecord).get(STEPS_KEY)
        if not isinstance(steps, int | float) or not (math.isfinite(steps) and 1 <= steps <= MOST_STEPS):
            raise RunError("reply-invalid", f"the number {STEPS_KEY!r} must lie between 1 and {MOST_STEPS:g}")
        model = self.layout.flatten(arrays_of(only(content, ArrayRecord)))
        model = np.where(statistics_of(self.layout), model, model / steps)
        weight = 1 if self.weighted_by is None else weight_of(only(content, MetricRecord), self.weighted_by)
        total.add(model, np.array([1 / steps, steps]), weight=weight)


class FedNova(FedAvg):
    """Normalised averaging; `weights` are the p_i: equal, or by the clients' counts of examples."""

    # Dividing by a client's steps changes what one client can move: no client-level sensitivity is proven here.
    allowed_units: ClassVar[frozenset[str]] = frozenset({"none", "record"})

    def __init__(self, *, weights: Literal["equal", "counted"] = "equal") -> None:
        super().__init__(weights=weights)
        self.local_rule = LocalRule(session=Counting, reports=(STEPS_KEY,), conflict=needs_sgd)
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
        counted = self.weights == "counted"
        return NormalizedSum(
            layout=self.layout,
            ring=Ring(capacity=COUNTED_CAPACITY if counted else max(1, self._cohort)),
            weighted_by=COUNT_KEY if counted else None,
        )

    def aggregate_total(self, server_round: int, total: Total) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return x + τ_eff · (mean(y/τ) − x · mean(1/τ)), or None when nothing was folded."""
        mean = total.mean()
        if mean is None:
            return None, None
        layout, x = self.layout, self._model
        normalized, inverse_steps, steps = mean[:-2], mean[-2], mean[-1]
        new = np.where(statistics_of(layout), normalized, x + steps * (normalized - x * inverse_steps))
        return record_of(layout.unflatten(new)), MetricRecord()

    def state_dict(self) -> dict[str, float]:
        """Return nothing: FedNova keeps nothing between rounds."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up nothing."""
