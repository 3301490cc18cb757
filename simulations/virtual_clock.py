"""A virtual clock: who among the simulated clients is working on what, and when each of them is done.

Time passes only as replies arrive, and only training takes any. A client is trained when its reply arrives, on the
message that it was sent, so the clock is all that tells a slow client from a fast one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from flwr.app import Message, RecordDict

from ..core import flower
from ..core.keys import Key
from ..experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A message whose reply has not arrived: `number` is its place in the order of sending."""

    arrives: float
    number: int
    node: int
    kind: str
    group: str
    content: RecordDict

    def message(self) -> Message:
        """Return the message as it was sent."""
        message = Message(self.content, self.node, self.kind, group_id=self.group)
        flower.set_message_id(message, str(self.number))
        return message


class VirtualClock:
    """The time, and the messages in flight.

    A client takes exp(spread · z) units of time for a round of training, z its own standard normal deviate: log-normal
    over clients, with median 1. Whoever holds the key knows all speeds, so it may be public.
    """

    def __init__(self, *, spread: float = 0.0, key: Key | None = None) -> None:
        self.spread = spread
        self.now = 0.0
        self._key = key or Key.from_seed(0)
        self._durations: dict[int, float] = {}
        self._flights: dict[int, Flight] = {}

    @classmethod
    def of(cls, experiment: Experiment) -> Self:
        """Return the clock of [simulation], keyed by the experiment's public seed."""
        return cls(spread=experiment.simulation.speed_spread, key=Key.from_seed(experiment.experiment.seed))

    def duration(self, node: int) -> float:
        """Return how long a client trains."""
        if self.spread == 0:
            return 1.0
        if node not in self._durations:
            deviate = float(self._key.child("speed", node).stream().normals(1)[0])
            self._durations[node] = math.exp(self.spread * deviate)
        return self._durations[node]

    def takes(self, message: Message) -> float:
        """Return how long the answer to a message takes: whatever is not training is answered at once."""
        kind = message.metadata.message_type.partition(".")[0]
        return self.duration(message.metadata.dst_node_id) if kind == "train" else 0.0

    def send(self, messages: Mapping[int, Message]) -> None:
        """Put messages in flight, by their numbers; a client begins with one when it is done with those before."""
        free = {flight.node: flight.arrives for flight in self._flights.values()}
        for number, message in messages.items():
            metadata = message.metadata
            node = metadata.dst_node_id
            free[node] = max(self.now, free.get(node, 0.0)) + self.takes(message)
            self._flights[number] = Flight(
                arrives=free[node],
                number=number,
                node=node,
                kind=metadata.message_type,
                group=metadata.group_id,
                content=message.content,
            )

    def next(self, count: int) -> list[Flight]:
        """Return the first so many to arrive, equal times by the order of sending; fewer where a client would be twice.

        A client's second message must find what it kept of its first.
        """
        first = heapq.nsmallest(count, self._flights.values(), key=lambda flight: (flight.arrives, flight.number))
        found: dict[int, Flight] = {}
        for flight in first:
            if flight.node in found:
                break
            found[flight.node] = flight
        return list(found.values())

    def arrive(self, flight: Flight) -> None:
        """Take a message out of the air; the time is then that of its arrival."""
        del self._flights[flight.number]
        self.advance(flight.arrives)

    def advance(self, time: float) -> None:
        """Let it be at least that late."""
        self.now = max(self.now, time)

    def remember(self) -> Callable[[], None]:
        """Return what puts time and flights back to what they are now."""
        now, flights = self.now, dict(self._flights)

        def put_back() -> None:
            self.now, self._flights = now, flights

        return put_back

    def state_dict(self) -> dict[str, Any]:
        """Return time and flights; a content that many were sent is in it once."""
        contents = {id(flight.content): flight.content for flight in self._flights.values()}
        places = {content: place for place, content in enumerate(contents)}
        return {
            "now": self.now,
            "flights": [
                [flight.arrives, flight.number, flight.node, flight.kind, flight.group, places[id(flight.content)]]
                for flight in self._flights.values()
            ],
            "contents": [flower.state_to_tree(content) for content in contents.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up time and flights."""
        contents = [flower.tree_to_state(tree) for tree in state["contents"]]
        self.now = float(state["now"])
        self._flights = {
            number: Flight(arrives=arrives, number=number, node=node, kind=kind, group=group, content=contents[place])
            for arrives, number, node, kind, group, place in state["flights"]
        }
