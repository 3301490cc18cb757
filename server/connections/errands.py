"""Errands: messages on their way to clients and back, where their replies are put down, and who may upload next."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from flwr.app import Message

from ...transport.body import Body
from ...transport.federation_pb2 import Header
from ..grid import Arrival

State = Literal["waiting", "sent", "offered", "uploading", "done"]


@dataclass(kw_only=True, eq=False)
class Errand:
    """One message to one client, until its reply is in the mailbox. `deadline` and `created` are monotonic seconds.

    The reply to one that is `kept` is good in a later exchange too, so it is not late once it was offered.
    """

    message: Message
    body: Body
    mailbox: Mailbox
    created: float
    deadline: float | None
    kept: bool = False
    state: State = "waiting"
    tries: int = 0

    @property
    def id(self) -> str:
        """The id of the message."""
        found: str = self.message.metadata.message_id
        return found

    @property
    def node(self) -> int:
        """The client's node id."""
        found: int = self.message.metadata.dst_node_id
        return found

    def header(self) -> Header:
        """Return the header of the message."""
        metadata = self.message.metadata
        return Header(
            message=self.id,
            type=metadata.message_type,
            group=metadata.group_id,
            ttl=metadata.ttl,
            size=self.body.size,
            manifest=len(self.body.manifest),
            sha256=self.body.sha256,
        )


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A reply in a mailbox; `size` is what it holds of the permits, None if it came without one."""

    arrival: Arrival
    size: int | None = None


class Mailbox:
    """Where replies are put down by the loop's thread, and taken by the round loop's.

    Its permits bound the replies that are in memory between the first byte of an upload and the fold: at most `uploads`
    of them, and of `upload_bytes` together unless it is one alone. `expected` is the taker's: how many are to come.
    """

    def __init__(self, *, uploads: int, upload_bytes: int) -> None:
        self.inbox: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.expected = 0
        self.flying: set[Errand] = set()
        self._uploads, self._upload_bytes = uploads, upload_bytes
        self._granted, self._granted_bytes = 0, 0
        self._waiting: deque[Waiting] = deque()

    def ask(self, waiting: Waiting) -> None:
        """Take a place in the line for a permit."""
        self._waiting.append(waiting)
        self._grant()

    def withdraw(self, errand: Errand) -> None:
        """Leave the line."""
        self._waiting = deque(each for each in self._waiting if each.errand is not errand)

    def release(self, size: int) -> None:
        """Give a permit back."""
        self._granted -= 1
        self._granted_bytes -= size
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._granted < self._uploads:
            size = self._waiting[0].size
            if self._granted and self._granted_bytes + size > self._upload_bytes:
                return
            first = self._waiting.popleft()
            self._granted += 1
            self._granted_bytes += size
            first.granted()


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A place in a mailbox's line: the size of the upload, and what is called once it may begin."""

    errand: Errand
    size: int
    granted: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long things may take, in seconds.

    A round (`round_deadline`, None for ever); silence of a client that is there, or an upload without a further piece
    (`stall_after`); the absence of a client that a message waits for (`connect_for`).
    """

    round_deadline: float | None = 3600.0
    stall_after: float = 60.0
    connect_for: float = 300.0


@dataclass(frozen=True, kw_only=True)
class ClientStatus:
    """What may be shown of a client: where it is, what it does, and since when it has done so in seconds."""

    name: str
    node: int
    state: Literal["away", "idle", "waiting", "receiving", "working", "uploading"]
    seconds: float
    stage: str = ""
    steps: int = 0
    capabilities: dict[str, object] = field(default_factory=dict)
