"""Clients that send what the audit tells them to, for whatever a server makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from ....clients.gate import release_error
from ....core.errors import RunError
from ....core.parameters import Layout, arrays_of, record_of
from ....server.grid import Arrival
from ....strategies.fedavg import COUNT_KEY
from ....strategies.fold import Fold
from ...executors.executor import Call

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one client sends: the model with an update [size] on it (None: as it is), a count, and other numbers.

    `fails` sends an error in place of it all, `cut` leaves the last tensor out.
    """

    update: Vector | None = None
    count: int = 1
    beside: tuple[tuple[str, float], ...] = ()
    fails: bool = False
    cut: bool = False


SILENT, FAILING = Answer(), Answer(fails=True)

Answers = Callable[[int, str], Answer]
"""What a client answers in a round."""


class Puppets:
    """An executor whose clients train nothing; `asked` counts the messages of each (round, client)."""

    def __init__(self, layout: Layout, answers: Answers) -> None:
        self._layout, self._answers = layout, answers
        self.asked: dict[tuple[int, str], int] = {}
        self.messages: list[Message] = []

    def run(self, calls: Iterable[Call], *, fold: Fold | None) -> Iterator[Arrival]:
        """Yield each reply whole."""
        for call in calls:
            number = int(call.message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
            self.asked[number, call.client] = self.asked.get((number, call.client), 0) + 1
            if not self.messages:
                self.messages.append(call.message)
            yield Arrival(instruction=call.message, reply=self._reply(call, self._answers(number, call.client)))

    def close(self) -> None:
        """Nothing was started."""

    def _reply(self, call: Call, answer: Answer) -> Message:
        if answer.fails:
            return release_error(call.message, RunError("client-failed", "as the audit wants it"))
        arrays = arrays_of(call.message.content.array_records["arrays"])
        if answer.update is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                arrays = self._layout.unflatten(self._layout.flatten(arrays) + answer.update)
        if answer.cut:
            arrays.popitem()
        metrics = MetricRecord({COUNT_KEY: answer.count, **dict(answer.beside)})
        return Message(RecordDict({"arrays": record_of(arrays), "metrics": metrics}), reply_to=call.message)


@dataclass(frozen=True, kw_only=True)
class Cast:
    """A sampler that draws whom the audit wants: in round r those at places `by_round[r - 1]`, then always the last."""

    by_round: tuple[tuple[int, ...], ...]

    def draw(self, round: int, population: Iterable[int]) -> list[int]:
        """Return the cohort of a round."""
        nodes = list(population)
        return [nodes[place] for place in self.by_round[min(round, len(self.by_round)) - 1]]
