"""RoundGrid: Flower's Grid with `exchange`, which hands over replies as they arrive or only their folded total."""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from ..core import flower
from ..core.errors import BractError
from ..core.live_array import LiveArray
from ..strategies.compression import Compression, Decoding
from ..strategies.fold import Fold, Total

if TYPE_CHECKING:
    from flwr.supercore.typing import Run  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A reply and the message that it answers; `total` when a worker folded it, alone or with those before it.

    `folded_bytes` is then the size of the arrays that it came with; None for a whole reply.
    """

    instruction: Message
    reply: Message
    folded_bytes: int | None = None
    total: Total | None = None


class Exchange(Iterator[Message]):
    """The replies to one batch of messages, in the order of the messages.

    With a fold, each reply is added to `total` and yielded without its arrays, so that nothing holds all updates;
    a reply that the fold refuses is yielded as an error. `until` ends the exchange after that many good replies.
    With a `compression`, which a fold brings along as `Decoding`, whole replies are decoded before they are yielded.
    `bytes_up` counts the arrays of good replies as they came.
    """

    compression: Compression | None = None
    bytes_up = 0

    def __init__(self, arrivals: Iterable[Arrival], *, fold: Fold | None = None, until: int | None = None) -> None:
        self.total: Total | None = fold.start() if fold else None
        self._fold = fold
        self._until = until
        self._good = 0
        self._arrivals = iter(arrivals)

    def __next__(self) -> Message:
        if self._until is not None and self._good >= self._until:
            raise StopIteration
        arrival = next(self._arrivals)
        reply = arrival.reply
        if arrival.total is not None and self.total is not None:
            self.total.merge(arrival.total)
        if arrival.folded_bytes is not None:
            size = arrival.folded_bytes
        elif self._fold is not None and self.total is not None:
            reply, size = fold_in(self._fold, self.total, arrival.instruction, reply)
        else:
            size = size_of(reply.content) if reply.has_content() else 0
            if self.compression is not None:
                reply = decoded(self.compression, arrival.instruction, reply)
        if reply.has_content():
            self._good += 1
            self.bytes_up += size
        return reply


def fold_in(fold: Fold, total: Total, instruction: Message, reply: Message) -> tuple[Message, int]:
    """Add a reply to a total; return what is left of it and the bytes of its arrays.

    An error reply and 0 if the fold refuses it.
    """
    if reply.has_error():
        return reply, 0
    size = size_of(reply.content)
    if isinstance(fold, Decoding):
        reply = decoded(fold.compression, instruction, reply)
        if reply.has_error():
            return reply, 0
    try:
        fold.add(total, reply.content)
    except BractError as error:
        return flower.error_reply(instruction, error.code, error.sentence), 0
    reply.content = flower.without_arrays(reply.content)
    return reply, size


def decoded(compression: Compression, instruction: Message, reply: Message) -> Message:
    """Return a reply to a train message with the model in place of its encoding; an error reply if that is malformed.

    Other replies, to a query for example, are not compressed.
    """
    if reply.has_error() or instruction.metadata.message_type.partition(".")[0] != "train":
        return reply
    try:
        reply.content = compression.decode(instruction, reply.content)
    except BractError as error:
        return flower.error_reply(instruction, error.code, error.sentence)
    return reply


def size_of(content: RecordDict) -> int:
    """Return the bytes of a message's tensors, without what they are wrapped in."""
    records = (record for record in content.values() if isinstance(record, ArrayRecord))
    return sum(_array_size(array) for record in records for array in record.values())


def _array_size(array: Array) -> int:
    if isinstance(array, LiveArray):
        return int(array.live.nbytes)
    try:
        return min(len(array.data), math.prod(array.shape) * np.dtype(array.dtype).itemsize)
    except (TypeError, ValueError, SyntaxError):  # a client may call a type what it likes
        return len(array.data)


class RoundGrid(Grid):
    """A Grid whose one primitive is `exchange`; what Flower's Grid has follows from it."""

    @abstractmethod
    def exchange(self, messages: Iterable[Message], *, fold: Fold | None = None, until: int | None = None) -> Exchange:
        """Send messages and return their replies as they arrive, folded if `fold` is given.

        With `until` they are the first so many good ones from whoever is in flight, and failures until then. What has
        not arrived by then does so in a later exchange with `until`; one without hands over its own replies alone.
        """

    @abstractmethod
    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of the clients that are there."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return all replies."""
        return list(self.exchange(messages))

    def set_run(self, run: Run) -> None:
        """Take note of the run: a RoundGrid serves one run, which the process already knows."""

    @property
    def run(self) -> Run:
        """The run: kept by the run directory, not by the grid."""
        raise AttributeError("a RoundGrid has no Flower run record; the run directory describes the run")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages and keep their replies for `pull_messages`; return the messages' ids."""
        messages = list(messages)
        for message in messages:
            flower.set_message_id(message, f"{random.getrandbits(128):032x}")
        pushed: dict[str, Message] = self.__dict__.setdefault("_pushed", {})
        pushed.update((reply.metadata.reply_to_message_id, reply) for reply in self.exchange(messages))
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have arrived for these ids, each once."""
        pushed: dict[str, Message] = self.__dict__.setdefault("_pushed", {})
        return [pushed.pop(message_id) for message_id in message_ids if message_id in pushed]


class FlowerGrid(RoundGrid):
    """Any other Grid with `exchange`: the replies arrive all at once."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._late: deque[Arrival] = deque()

    def get_node_ids(self) -> Iterable[int]:
        """Return the other grid's node ids."""
        return self._grid.get_node_ids()

    def exchange(self, messages: Iterable[Message], *, fold: Fold | None = None, until: int | None = None) -> Exchange:
        """Send messages, wait for all replies, and hand them over, with `until` those first that came before."""
        by_node = {message.metadata.dst_node_id: message for message in messages}
        replies = self._grid.send_and_receive(by_node.values())
        arrivals = (Arrival(instruction=by_node[reply.metadata.src_node_id], reply=reply) for reply in replies)
        if until is None:
            return Exchange(arrivals, fold=fold)
        self._late.extend(arrivals)
        return Exchange(_emptying(self._late), fold=fold, until=until)


def _emptying(late: deque[Arrival]) -> Iterator[Arrival]:
    while late:
        yield late.popleft()
