"""SCAFFOLD: control variates take the drift of clients with unlike data out of each local step.

Karimireddy, Kale, Mohri, Reddi, Stich & Suresh, "SCAFFOLD: stochastic controlled averaging for federated learning",
ICML 2020, Algorithm 1 with option II for the clients' variates. Option I would take another gradient over the records;
option II is a function of the received and the returned model, so under record-level privacy it is post-processing.
"""

from __future__ import annotations

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
from .fold import Fold, Total
from .local_rule import LocalRound, LocalRule, Sent, needs_plain_sgd, population_of, statistics_of
from .tensors import add_to_gradient, arrays_like, copies, tensors_like
from .values import number

VARIATE = "variate"


class Controlled:
    """A client's round: y ← y − η·(g(y) − c_i + c) at each of K steps, then a new variate of its own."""

    def __init__(self, round: LocalRound) -> None:
        self._round = round
        self._received = copies(round.parameters)
        self._server = tensors_like(round.received[VARIATE], round.parameters)
        self._own = tensors_like(round.state.get(VARIATE, {}), round.parameters)

    def correct(self) -> None:
        """Add c − c_i to the gradient."""
        for name, parameter in self._round.parameters.items():
            add_to_gradient(parameter, self._server[name] - self._own[name])

    def finish(self) -> Sent:
        """Keep c_i⁺ = c_i − c + (x − y) / (K·η), and send its change."""
        scale = 1 / (self._round.steps * self._round.learning_rate)
        new, change = {}, {}
        for name, parameter in self._round.parameters.items():
            change[name] = (self._received[name] - parameter.detach()) * scale - self._server[name]
            new[name] = self._own[name] + change[name]
        self._round.state[VARIATE] = arrays_like(new)
        return Sent(arrays={VARIATE: arrays_like(change)})


@dataclass(frozen=True, kw_only=True)
class ModelAndVariate:
    """The fold of replies that hold two records: Σ y_i and Σ Δc_i, end to end in one exact sum."""

    layout: Layout
    ring: Ring

    def start(self) -> Total:
        """Return the empty sum."""
        return ExactSum.zero(self.ring, 2 * self.layout.size)

    def add(self, total: Total, content: RecordDict) -> None:
        """Add one reply; raises RunError `reply-invalid` or `value-out-of-range`."""
        total.add(*self._pieces(content, "arrays"), *self._pieces(content, VARIATE))

    def _pieces(self, content: RecordDict, name: str) -> list[NDArray[np.generic]]:
        record = content.get(name)
        if not isinstance(record, ArrayRecord):
            raise RunError("reply-invalid", f"the reply holds no record {name!r}")
        return self.layout.pieces(arrays_of(record))


class Scaffold(FedAvg):
    """x ← x + η_g · mean(y_i − x) and c ← c + |S|/N · mean(Δc_i), with η_g the `server_learning_rate`.

    Running statistics of normalization layers are averaged whatever η_g is.
    """

    # A bound on a client's model would not bound its variate, which is sent beside it: no client-level sensitivity.
    allowed_units: ClassVar[frozenset[str]] = frozenset({"none", "record"})

    def __init__(self, *, server_learning_rate: float = 1.0) -> None:
        super().__init__()
        self.server_learning_rate = number("server_learning_rate", server_learning_rate, above=0)
        self.local_rule = LocalRule(
            session=Controlled, sends=(VARIATE,), receives=(VARIATE,), keeps=(VARIATE,), conflict=needs_plain_sgd
        )
        self._variate: NDArray[np.float64] | None = None
        self._model = np.zeros(0)
        self._population = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model and c to every client that the grid shows."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._model = self.layout.flatten(arrays_of(arrays))
        self._population = population_of(grid, messages)
        if self._variate is None:
            self._variate = np.zeros(self.layout.size)
        variate = record_of(self.layout.unflatten(self._variate))
        for message in messages:
            message.content[VARIATE] = variate
        return messages

    def fold(self) -> Fold:
        """Return how the replies of the configured round are summed."""
        return ModelAndVariate(layout=self.layout, ring=Ring(capacity=max(1, self._cohort)))

    def aggregate_total(self, server_round: int, total: Total) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new model, and take the new c; None when nothing was folded."""
        mean = total.mean()
        if mean is None or self._variate is None:
            return None, None
        layout = self.layout
        models, changes = mean[: layout.size], mean[layout.size :]
        rate = np.where(statistics_of(layout), 1.0, self.server_learning_rate)
        self._variate = self._variate + total.count / self._population * changes
        return record_of(layout.unflatten(self._model + rate * (models - self._model))), MetricRecord()

    def state_dict(self) -> dict[str, Any]:
        """Return c."""
        return {VARIATE: self._variate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up c."""
        self._variate = state[VARIATE]
