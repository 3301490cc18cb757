"""The RoundGrid over the transport: messages leave the moment they exist, replies are folded as they arrive."""

from __future__ import annotations

import hashlib
import queue
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict

from ...core import flower
from ...core.errors import BractError, RunError
from ...strategies.compression import Decoding
from ...strategies.fold import Fold, Total
from ...transport.body import Body, Digests
from ..grid import Arrival, Exchange, RoundGrid
from .errands import Delivery, Errand, Mailbox
from .listener import Listener

_PAUSE = 0.25

Check = Callable[[Message, RecordDict], None]
"""Raises a BractError if the records of a reply are not what the message asked for."""


def check_nothing(instruction: Message, content: RecordDict) -> None:
    """Take any reply: the fold or the strategy looks at it."""


class FederationGrid(RoundGrid):
    """The clients that a listener has, as a Flower Grid. Used by one thread, that of the round loop.

    A message's id is a function of `run_name`, client and content, so that a resumed server asks with the same ids and
    sites answer from what they stored. `check` is for strategies without a fold that trust what they get. Where
    `should_stop` says so, waiting for a reply ends with KeyboardInterrupt.
    """

    def __init__(
        self,
        listener: Listener,
        *,
        run_name: str,
        check: Check = check_nothing,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        flower.identify_process(listener.run)
        self._listener, self._run_name, self._check, self._should_stop = listener, run_name, check, should_stop
        self._late = listener.mailbox()
        self._held: tuple[Mailbox, int] | None = None

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of the clients that are connected, in the order of their names."""
        return [each.node for each in self._listener.status() if each.state != "away"]

    @property
    def names(self) -> Mapping[int, str]:
        """The names of all clients that have joined, by node id, in the order of the names."""
        return {each.node: each.name for each in self._listener.status() if each.name}

    def heads(self) -> dict[str, dict[str, Any]]:
        """Return the latest ledger head that each client has shown for each data set, by name and by data set's id."""
        found: dict[str, dict[str, Any]] = {}
        for (name, data), head in self._listener.call(lambda: dict(self._listener.roster.heads)).items():
            found.setdefault(name, {})[data] = dict(head)
        return found

    def load_heads(self, heads: Mapping[str, Mapping[str, Any]]) -> None:
        """Put the heads of a checkpoint back, before clients join."""
        loaded = {(name, data): head for name, each in heads.items() for data, head in each.items()}
        self._listener.call(lambda: self._listener.roster.heads.update(loaded))

    def forget_replies(self, up_to_round: int) -> None:
        """Tell all sites that a checkpoint holds the rounds up to this one: they may delete stored replies."""
        self._listener.post(lambda: self._listener.roster.tell_to_forget(self._run_name, up_to_round))

    def exchange(self, messages: Iterable[Message], *, fold: Fold | None = None, until: int | None = None) -> Exchange:
        """Send messages at once, and return their replies as they arrive.

        A client that disconnects gets its message again when it is back. What is lost, late or unreadable is an error
        reply with a code. Replies to an exchange that was given up are dropped; those of one with `until` are kept.
        """
        mailbox = self._listener.mailbox() if until is None else self._late
        self._give_back()
        digests, now = Digests(), self._listener.roster.now()
        patience = self._listener.deadlines.round_deadline
        errands = []
        for message in messages:
            body = Body.of(message.content, digests)
            if not message.metadata.message_id:
                flower.set_message_id(message, self._message_id(message, body))
            deadline = None if patience is None else now + patience
            errands.append(
                Errand(
                    message=message,
                    body=body,
                    mailbox=mailbox,
                    created=now,
                    deadline=deadline,
                    kept=until is not None,
                )
            )
        mailbox.expected += len(errands)
        self._listener.call(lambda: self._listener.roster.send(errands))
        exchange = Exchange(self._arrivals(mailbox), fold=guarded(fold), until=until)
        if until is None:
            # Also one of which no reply was ever asked for.
            weakref.finalize(exchange, self._abandon, mailbox)
        return exchange

    def _abandon(self, mailbox: Mailbox) -> None:
        self._listener.post(lambda: self._listener.roster.abandon(mailbox))

    def _message_id(self, message: Message, body: Body) -> str:
        metadata = message.metadata
        parts = (self._run_name, metadata.message_type, metadata.group_id, str(metadata.dst_node_id), body.sha256.hex())
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def _arrivals(self, mailbox: Mailbox) -> Iterator[Arrival]:
        """Yield the next arrivals: all of a mailbox of this exchange alone, or those of all messages in flight."""
        try:
            while mailbox.expected:
                # In one expression: nothing may hold a reply longer than whoever folds it.
                yield self._opened(mailbox, self._next(mailbox))
                self._give_back()
        finally:
            self._give_back()

    def _next(self, mailbox: Mailbox) -> Delivery:
        while True:
            try:
                return mailbox.inbox.get(timeout=_PAUSE)
            except queue.Empty:
                if self._should_stop():
                    raise KeyboardInterrupt from None
                if not self._listener.alive:
                    raise RunError("internal", "the listener's thread has ended") from None

    def _opened(self, mailbox: Mailbox, delivery: Delivery) -> Arrival:
        """Return the arrival of a delivery, whose permit is held until the next is asked for."""
        mailbox.expected -= 1
        self._give_back()
        self._held = None if delivery.size is None else (mailbox, delivery.size)
        arrival = delivery.arrival
        if arrival.reply.has_content():
            try:
                self._check(arrival.instruction, arrival.reply.content)
            except BractError as error:
                refusal = flower.error_reply(arrival.instruction, error.code, error.sentence)
                return Arrival(instruction=arrival.instruction, reply=refusal)
        return arrival

    def _give_back(self) -> None:
        if self._held is not None:
            mailbox, size = self._held
            self._held = None
            self._listener.post(lambda: mailbox.release(size))


def guarded(fold: Fold | None) -> Fold | None:
    """Return a fold to which any error that a client's records cause is the client's: it ends no round."""
    if isinstance(fold, Decoding):
        return Decoding(compression=fold.compression, fold=_Guarded(fold=fold.fold))
    return None if fold is None else _Guarded(fold=fold)


@dataclass(frozen=True, kw_only=True)
class _Guarded:
    fold: Fold

    def start(self) -> Total:
        return self.fold.start()

    def add(self, total: Total, content: RecordDict) -> None:
        try:
            self.fold.add(total, content)
        except BractError:
            raise
        except Exception as error:  # whatever a hostile client makes numpy raise
            raise RunError("reply-invalid", f"the reply cannot be folded ({type(error).__name__})") from error
