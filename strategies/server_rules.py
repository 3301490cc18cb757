"""Server optimizers: the mean of the clients' changes is a pseudo-gradient, and the server takes a step along it.

Hsu, Qi & Brown, "Measuring the effects of non-identical data distribution for federated visual classification", 2019:
FedAvgM. Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar & McMahan, "Adaptive federated optimization", ICLR 2021,
Algorithm 2: FedAdagrad, FedYogi and FedAdam. They see nothing but the exact mean of FedAvg, so under privacy they are
post-processing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray

from ..core.parameters import Layout, arrays_of, record_of
from .fedavg import FedAvg
from .fold import Total
from .local_rule import statistics_of
from .values import fraction, number

Vector = NDArray[np.float64]


class ServerRule(FedAvg):
    """x ← x + step(Δ) with Δ = mean − x, in float64.

    Running statistics and whole numbers take their mean: a momentum would carry a variance below zero.
    """

    allowed_units: ClassVar[frozenset[str]] = frozenset({"none", "record", "client"})

    def __init__(self, *, server_learning_rate: float, weights: Literal["equal", "counted"] = "equal") -> None:
        super().__init__(weights=weights)
        self.server_learning_rate = number("server_learning_rate", server_learning_rate, above=0)
        self._model = np.zeros(0)
        self._moments: dict[str, Vector] = {}

    @abstractmethod
    def step(self, delta: Vector) -> Vector:
        """Return what to add to the model, and take up Δ into the moments."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model to every client that the grid shows."""
        messages = super().configure_train(server_round, arrays, config, grid)
        self._model = self.layout.flatten(arrays_of(arrays))
        return messages

    def aggregate_total(self, server_round: int, total: Total) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the model after the server's step, or None when nothing was folded: then no moment changes."""
        mean = total.mean()
        if mean is None:
            return None, None
        stepped = self._model + self.step(mean - self._model)
        new = np.where(averaged(self.layout), mean, stepped)
        return record_of(self.layout.unflatten(new)), MetricRecord()

    def moment(self, name: str) -> Vector:
        """Return a moment by name [size], zero before the first step."""
        return self._moments.get(name, np.zeros_like(self._model))

    def remember(self, **moments: Vector) -> None:
        """Keep moments for the next round."""
        self._moments.update(moments)

    def state_dict(self) -> dict[str, Any]:
        """Return the moments."""
        return dict(self._moments)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the moments."""
        self._moments = dict(state)


class FedAvgM(ServerRule):
    """Server momentum: v ← β·v + Δ, x ← x + η·v."""

    def __init__(
        self,
        *,
        server_learning_rate: float = 1.0,
        server_momentum: float = 0.9,
        weights: Literal["equal", "counted"] = "equal",
    ) -> None:
        super().__init__(server_learning_rate=server_learning_rate, weights=weights)
        self.server_momentum = fraction("server_momentum", server_momentum)

    def step(self, delta: Vector) -> Vector:
        """Return η·v."""
        v = self.server_momentum * self.moment("v") + delta
        self.remember(v=v)
        return self.server_learning_rate * v


class Adaptive(ServerRule):
    """m ← β₁·m + (1 − β₁)·Δ, x ← x + η·m / (√v + τ); the rules differ in v alone.

    As in Algorithm 2 there is no bias correction. Other than there, where v starts at τ² or more, it starts at 0, as
    Flower's does.
    """

    def __init__(
        self,
        *,
        server_learning_rate: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        weights: Literal["equal", "counted"] = "equal",
    ) -> None:
        super().__init__(server_learning_rate=server_learning_rate, weights=weights)
        self.beta_1 = fraction("beta_1", beta_1)
        self.beta_2 = fraction("beta_2", beta_2)
        self.tau = number("tau", tau, above=0)

    @abstractmethod
    def second_moment(self, v: Vector, squared: Vector) -> Vector:
        """Return v after the squared Δ."""

    def step(self, delta: Vector) -> Vector:
        """Return η·m / (√v + τ)."""
        m = self.beta_1 * self.moment("m") + (1 - self.beta_1) * delta
        v = self.second_moment(self.moment("v"), delta**2)
        self.remember(m=m, v=v)
        return self.server_learning_rate * m / (np.sqrt(v) + self.tau)


class FedAdagrad(Adaptive):
    """v ← v + Δ²: coordinates that seldom move keep a high rate."""

    def __init__(
        self,
        *,
        server_learning_rate: float = 0.1,
        beta_1: float = 0.0,
        tau: float = 1e-3,
        weights: Literal["equal", "counted"] = "equal",
    ) -> None:
        super().__init__(server_learning_rate=server_learning_rate, beta_1=beta_1, tau=tau, weights=weights)

    def second_moment(self, v: Vector, squared: Vector) -> Vector:
        """Return v + Δ²."""
        return v + squared


class FedAdam(Adaptive):
    """v ← β₂·v + (1 − β₂)·Δ²."""

    def second_moment(self, v: Vector, squared: Vector) -> Vector:
        """Return β₂·v + (1 − β₂)·Δ²."""
        return self.beta_2 * v + (1 - self.beta_2) * squared


class FedYogi(Adaptive):
    """v ← v − (1 − β₂)·Δ²·sign(v − Δ²): v comes down by what Δ² is now, not by what v once was."""

    def second_moment(self, v: Vector, squared: Vector) -> Vector:
        """Return v − (1 − β₂)·Δ²·sign(v − Δ²)."""
        return v - (1 - self.beta_2) * squared * np.sign(v - squared)


def averaged(layout: Layout) -> NDArray[np.bool_]:
    """Return which values of the flat vector no optimizer moves: running statistics and whole numbers."""
    return statistics_of(layout) | layout.whole
