"""The virtual grid: every client is a call of a ClientApp, made when its reply is due."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message

from ..core import flower
from ..server.grid import Arrival, Exchange, RoundGrid
from ..strategies.fold import Fold
from .contexts import ClientContexts
from .executors.executor import Call, Executor
from .virtual_clock import VirtualClock


class VirtualGrid(RoundGrid):
    """Virtual clients by name; their state lives in their Flower contexts, and an executor runs them.

    `clock` says how fast each of them is, by default all alike; `folder` is where their state may lie, in a file
    without a name.
    """

    def __init__(
        self,
        executor: Executor,
        names: Sequence[str],
        *,
        run_config: Mapping[str, bool | int | float | str] | None = None,
        clock: VirtualClock | None = None,
        folder: Path | None = None,
    ) -> None:
        self._contexts = ClientContexts(names, run_config, folder=folder)
        self.names = self._contexts.names
        self.executor = executor
        self._clock = clock or VirtualClock()
        self._reopened = False
        self._sent = 0

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of all virtual clients."""
        return list(self.names.ids)

    def virtual_time(self) -> float | None:
        """Return the clients' time, the median client's training being 1; None where it would only count exchanges."""
        return self._clock.now if self._clock.spread or self._reopened else None

    def exchange(self, messages: Iterable[Message], *, fold: Fold | None = None, until: int | None = None) -> Exchange:
        """Have the executor call the app for each message, as the replies are asked for.

        With `until`, the replies are the first of all in flight, also of those sent before, in the order of their
        arrival by the virtual clock; the executor gets as many calls at once as replies are wanted. Without it, they
        are those to these messages, in their order, and the time is then that of the slowest.
        """
        if until is None:
            return Exchange(self._all(messages, fold), fold=fold)
        self._reopened = True
        self._clock.send({self._number(message): message for message in messages})
        # Past `until` nothing may be in the total, so there the exchange folds reply by reply.
        return Exchange(self._first(until), fold=fold, until=until)

    def client_states(self) -> dict[str, Any]:
        """Return the contexts' states of the clients that keep any, by name."""
        return self._contexts.states()

    def load_client_states(self, states: Mapping[str, Any]) -> None:
        """Put the contexts' states back."""
        self._contexts.load(states.items())

    def state_dict(self) -> dict[str, Any]:
        """Return the clients' states, the virtual time and what is in flight."""
        return {"states": self.client_states(), "clock": self._clock.state_dict(), "sent": self._sent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put all of it back."""
        self.load_client_states(state["states"])
        self._clock.load_state_dict(state["clock"])
        self._sent = int(state["sent"])

    def remember(self) -> Callable[[], None]:
        """Return what puts clients' states, time and flights back to what they are now: for a round to be repeated."""
        before = self._contexts.remember()
        sent, put_clock_back = self._sent, self._clock.remember()

        def put_back() -> None:
            self._contexts.restore(before)
            self._sent = sent
            put_clock_back()

        return put_back

    def _all(self, messages: Iterable[Message], fold: Fold | None) -> Iterator[Arrival]:
        began = self._clock.now
        for arrival in self.executor.run(self._calls(messages), fold=fold):
            self._clock.advance(began + self._clock.takes(arrival.instruction))
            yield arrival

    def _first(self, wanted: int) -> Iterator[Arrival]:
        good = 0
        # One more at a time where the exchange refused a reply that was good here.
        while flights := self._clock.next(max(1, wanted - good)):
            calls = [self._call(flight.message()) for flight in flights]
            arrivals = self.executor.run(calls, fold=None)
            for flight in flights:
                arrival = next(arrivals)
                if flight is flights[-1]:
                    # The executor ends now, and not within a later exchange, when this one is forgotten.
                    next(arrivals, None)
                self._clock.arrive(flight)
                good += arrival.reply.has_content()
                yield arrival

    def _calls(self, messages: Iterable[Message]) -> Iterator[Call]:
        for message in messages:
            self._number(message)
            yield self._call(message)

    def _number(self, message: Message) -> int:
        self._sent += 1
        flower.set_message_id(message, str(self._sent))
        return self._sent

    def _call(self, message: Message) -> Call:
        node = message.metadata.dst_node_id
        return Call(client=self.names[node], node=node, message=message, contexts=self._contexts)
