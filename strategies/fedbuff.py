"""FedBuff: the server does not wait for a cohort; it steps whenever its buffer holds K updates, stale ones for less.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek & Huba, "Federated learning with buffered asynchronous aggregation",
AISTATS 2022, Algorithm 1, with the staleness weight 1/√(1 + τ) of its experiments. A round is one step of the server;
the grid decides who arrives in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from numpy.typing import NDArray

from ..core.keys import Key
from ..core.parameters import arrays_of, record_of
from .server_rules import averaged
from .values import number, whole_number
from .whole_replies import Vector, WholeReplies


class FedBuff(WholeReplies):
    """x ← x + η/K · Σ s(τ_i) · (y_i − x_i), where x_i is the version, τ_i steps old, that client i was sent.

    `buffer` is K, `concurrency` how many clients train at once (by default all), s(τ) = (1 + τ)^−a with a the
    `staleness_exponent`. Whom of the idle the newest model is sent to is drawn by the public `seed`. Updates that do
    not fit are not counted in K. Running statistics and whole numbers take the mean of what came. The metric
    `staleness` is the mean of τ.
    """

    def __init__(
        self,
        *,
        buffer: int = 10,
        concurrency: int | None = None,
        server_learning_rate: float = 1.0,
        staleness_exponent: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.buffer = whole_number("buffer", buffer, least=1)
        self.concurrency = None if concurrency is None else whole_number("concurrency", concurrency, least=1)
        if self.concurrency is not None and self.buffer > self.concurrency:
            raise ValueError(f"buffer = {buffer}: must be at most concurrency, {concurrency}, or it never fills")
        self.server_learning_rate = number("server_learning_rate", server_learning_rate, above=0)
        self.staleness_exponent = number("staleness_exponent", staleness_exponent, least=0)
        self.seed = whole_number("seed", seed, least=0)
        # What was true after the last step: a round that fails half-way is repeated from there.
        self._version = 0
        self._in_flight: dict[int, int] = {}
        self._versions: dict[int, dict[str, NDArray[np.generic]]] = {}
        # What the round under way sends.
        self._sending: list[int] = []
        self._newest: dict[str, NDArray[np.generic]] = {}

    def draw(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        """Return idle clients at random, as many as may still train at once."""
        idle = [node for node in nodes if node not in self._in_flight]
        room = min(self.concurrency or len(nodes), len(nodes)) - (len(nodes) - len(idle))
        order = Key.from_seed(self.seed).child("fedbuff", server_round).stream().permutation(len(idle))
        return [idle[int(place)] for place in order[: max(0, room)]]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the newest model to every client that the grid shows: those that were drawn."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._sending = [message.metadata.dst_node_id for message in messages]
        self._newest = arrays_of(arrays)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the model after the step, or None where no update fits."""
        replies, layout = list(replies), self.layout
        sent, models = self._sent(), self._models()
        self.skip_train(server_round, replies)
        fitting = self.fitting(reply for reply in replies if reply.metadata.src_node_id in sent)
        if not fitting:
            return None, None
        x, delta = layout.flatten(self._newest), np.zeros(layout.size)
        ages = {node: self._version - sent[node] for node in fitting}
        received = {version: layout.flatten(models[version]) for version in {sent[node] for node in fitting}}
        for node, y in fitting.items():
            delta += (1 + ages[node]) ** -self.staleness_exponent * (y - received[sent[node]])
        stepped = x + self.server_learning_rate / len(fitting) * delta
        mean = sum(fitting.values(), np.zeros(layout.size)) / len(fitting)
        new: Vector = np.where(averaged(layout), mean, stepped)
        self._version += 1
        metrics = MetricRecord({"staleness": sum(ages.values()) / len(ages)})
        return record_of(layout.unflatten(new)), metrics

    def skip_train(self, server_round: int, replies: Iterable[Message]) -> None:
        """Take note of who was sent the newest model and of who arrived, with an update or a failure: it is idle."""
        models, in_flight = self._models(), self._sent()
        for reply in replies:
            in_flight.pop(reply.metadata.src_node_id, None)
        self._in_flight, self._sending = in_flight, []
        self._versions = {version: models[version] for version in sorted(set(in_flight.values()))}

    def state_dict(self) -> dict[str, Any]:
        """Return who is in flight, and the versions that they were sent."""
        return {
            "version": self._version,
            "in_flight": {str(node): version for node, version in self._in_flight.items()},
            "versions": {str(version): dict(arrays) for version, arrays in self._versions.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up both."""
        self._version = int(state["version"])
        self._in_flight = {int(node): int(version) for node, version in state["in_flight"].items()}
        self._versions = {int(version): dict(arrays) for version, arrays in state["versions"].items()}

    def _sent(self) -> dict[int, int]:
        """Return the version that each client in flight was sent, those of this round included."""
        return self._in_flight | dict.fromkeys(self._sending, self._version)

    def _models(self) -> dict[int, dict[str, NDArray[np.generic]]]:
        return self._versions | {self._version: self._newest}
