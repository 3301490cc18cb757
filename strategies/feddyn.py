"""FedDyn: each client's objective is bent so that its own optimum becomes a stationary point of them all.

Acar, Zhao, Matas Navarro, Mattina, Whatmough & Saligrama, "Federated learning based on dynamic regularization", ICLR
2021, Algorithm 1. A client's gradient state λ_k and the server's h are functions of received and returned models:
post-processing under privacy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray

from ..core.parameters import arrays_of, record_of
from .fedavg import FedAvg
from .fold import Total
from .local_rule import LocalRound, LocalRule, Sent, population_of, statistics_of
from .tensors import add_to_gradient, arrays_like, copies, tensors_like
from .values import number

GRADIENT = "gradient-state"


class Dynamic:
    """A client's round: minimise L_k(θ) − ⟨λ_k, θ⟩ + alpha/2 · ‖θ − θ_t‖², then λ_k ← λ_k − alpha · (θ_k − θ_t)."""

    def __init__(self, round: LocalRound, *, alpha: float) -> None:
        self._round = round
        self._alpha = alpha
        self._received = copies(round.parameters)
        self._gradient = tensors_like(round.state.get(GRADIENT, {}), round.parameters)

    def correct(self) -> None:
        """Add alpha · (θ − θ_t) − λ_k to the gradient."""
        for name, parameter in self._round.parameters.items():
            add_to_gradient(parameter, self._moved(name), self._alpha)
            add_to_gradient(parameter, self._gradient[name], -1.0)

    def finish(self) -> Sent:
        """Keep the new λ_k, and send nothing beside the model."""
        new = {name: self._gradient[name] - self._alpha * self._moved(name) for name in self._round.parameters}
        self._round.state[GRADIENT] = arrays_like(new)
        return Sent()

    def _moved(self, name: str) -> Any:
        return self._round.parameters[name].detach() - self._received[name]


class FedDyn(FedAvg):
    """h ← h − alpha/N · Σ (θ_k − θ_t) and θ ← mean(θ_k) − h/alpha, over the replies; N counts all clients.

    Running statistics of normalization layers are averaged.
    """

    allowed_units: ClassVar[frozenset[str]] = frozenset({"none", "record", "client"})

    def __init__(self, *, alpha: float = 0.1) -> None:
        super().__init__()
        self.alpha = number("alpha", alpha, above=0)
        self.local_rule = LocalRule(session=partial(Dynamic, alpha=self.alpha), keeps=(GRADIENT,))
        self._h: NDArray[np.float64] | None = None
        self._model = np.zeros(0)
        self._population = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model to every client that the grid shows."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._model = self.layout.flatten(arrays_of(arrays))
        self._population = population_of(grid, messages)
        if self._h is None:
            self._h = np.zeros(self.layout.size)
        return messages

    def aggregate_total(self, server_round: int, total: Total) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new model, and take the new h; None when nothing was folded."""
        mean = total.mean()
        if mean is None or self._h is None:
            return None, None
        self._h = self._h - self.alpha * total.count / self._population * (mean - self._model)
        self._h[statistics_of(self.layout)] = 0.0
        return record_of(self.layout.unflatten(mean - self._h / self.alpha)), MetricRecord()

    def state_dict(self) -> dict[str, Any]:
        """Return h."""
        return {"h": self._h}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up h."""
        self._h = state["h"]
