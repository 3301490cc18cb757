"""The desk: which messages a client has, which one it works on, and which replies wait for their server.

It outlives streams: work goes on while the server is out of reach, and a reply is kept until its receipt came.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flwr.app import Error, Message, RecordDict

from ... import __version__
from ...core import flower
from ...core.errors import CATALOGUE, BractError, RunError
from ...privacy.ledger.chain import Head
from ...transport.body import Body
from ...transport.federation_pb2 import Header, Welcome
from ...transport.greeting import Hello, head_from, refuse_version
from ...transport.wire import control, head_of, shown
from .patience import Notice

Failed = Callable[[str, BaseException], None]
Takes = Callable[[int], bool]


class ProgressLike(Protocol):
    """How far the work on a message is: a stage, and the public number of steps."""

    @property
    def stage(self) -> str:
        """The stage's name."""

    @property
    def steps(self) -> int | None:
        """The steps, None where they are not public or there are none."""


class Party(Protocol):
    """What answers messages: a `Site`, or anything that says and does as much."""

    def hello(self) -> Mapping[str, Any]:
        """Return what the server is told, all of it public."""

    def handle(self, message: Message, *, progress: Callable[[Any], None]) -> Message:
        """Return the reply; raises nothing."""

    def head(self) -> Head | None:
        """Return the head of the ledger, if there is one."""

    def refuse_rollback(self, head: Head) -> None:
        """Raise Refusal unless the ledger holds what the server has seen of it."""

    def forget_replies(self, run: str, up_to_round: int) -> None:
        """Delete stored replies of rounds that the server has checkpointed."""


@dataclass(kw_only=True, eq=False)
class Job:
    """A message from its arrival to the receipt of its reply; `body` is the reply once it is ready.

    One that is not `wanted` belongs to a server that has not asked for it since the stream broke.
    """

    header: Header
    body: Body | None = None
    head: Head | None = None
    wanted: bool = True

    def offer(self) -> Header:
        """Return the header of the reply."""
        assert self.body is not None
        return Header(
            message=self.header.message,
            size=self.body.size,
            manifest=len(self.body.manifest),
            sha256=self.body.sha256,
            ledger=head_from(self.head.to_dict() if self.head else None),
        )


class Desk:
    """A party's messages. Lives in the loop in which it is made; the party works in a thread of its own."""

    def __init__(
        self,
        party: Party,
        *,
        name: str,
        notice: Notice,
        takes: Takes = lambda run: True,
        failed: Failed | None = None,
    ) -> None:
        self.party, self.jobs = party, dict[str, Job]()
        self.other_run = False
        self._takes, self._failed = takes, failed or self._say_failure
        self.working = self.stage = ""
        self.steps = 0
        self.ready: Callable[[], None] = lambda: None
        self._name, self._notice = name, notice
        self._instance = secrets.token_bytes(16)
        self._node = 0
        self._answering = 0
        self._queue: deque[tuple[Header, RecordDict | Error]] = deque()
        self._loop = asyncio.get_running_loop()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="bract-client")

    def close(self) -> None:
        """Take nothing more on; what is worked on goes on until it is done."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def busy(self) -> bool:
        """Whether the party works on a message."""
        return bool(self._answering)

    def finish(self) -> None:
        """Block until the party has ended what it works on."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def hello(self) -> bytes:
        """Return the first frame of a stream."""
        hello = Hello.of(self.party.hello(), name=self._name)
        return control(hello=hello.write(instance=self._instance, holds=list(self.jobs)[-8:]))

    def welcome(self, welcome: Welcome) -> bool:
        """Take up a stream; return False if it is of a run that the party does not serve.

        BractError if this side cannot work with that server.
        """
        refuse_version(welcome.protocol, welcome.bract, __version__, side="server")
        self.other_run = not self._takes(welcome.run)
        if self.other_run:
            return False
        seen = head_of(welcome.ledger)
        if seen is not None:
            self.party.refuse_rollback(Head.from_dict(seen))
        self._node = welcome.node
        flower.identify_process(welcome.run)
        for job in self.jobs.values():
            job.wanted = False
        return True

    def take(self, header: Header, content: RecordDict | Error) -> None:
        """Take a message that has arrived whole; RunError `frame-invalid` if it is one too many."""
        if header.message in self.jobs:
            self.jobs[header.message].wanted = True
            return
        if len(self._queue) + bool(self.working) >= 2:
            raise RunError("frame-invalid", "more messages than one that waits and one that is worked on")
        # What nobody asked for again is not kept beside new work.
        for message in [each for each, job in self.jobs.items() if job.body is not None and not job.wanted]:
            del self.jobs[message]
        self.jobs[header.message] = Job(header=header)
        self._queue.append((header, content))
        self._work()

    def to_offer(self) -> Job | None:
        """Return a reply that is ready and wanted."""
        return next((job for job in self.jobs.values() if job.body is not None and job.wanted), None)

    def ask(self, message: str) -> bool:
        """Take note that the server wants the reply to a message; return whether it is here, or will be."""
        job = self.jobs.get(message)
        if job is not None:
            job.wanted = True
        return job is not None

    def receipt(self, message: str, code: str) -> None:
        """Let go of a reply that the server has or does not want; one that came damaged is offered again."""
        job = self.jobs.get(message)
        if job is not None and job.body is not None and code != "message-damaged":
            del self.jobs[message]
            if code:
                self._notice(f"message {shown(message)}: the server did not take the reply ({shown(code, 40)})")

    def forget(self, run: str, up_to_round: int) -> None:
        """Delete stored replies that the server needs no longer; where that cannot be, the next time does it."""
        try:
            self.party.forget_replies(run, up_to_round)
        except BractError as error:
            self._notice(f"replies are kept longer than needed: {error.sentence}")

    def _work(self) -> None:
        if self.working or not self._queue:
            return
        header, content = self._queue.popleft()
        self.working, self.stage, self.steps = header.message, "", 0
        # In a list that the thread empties, so that nothing here holds the model while it is worked on.
        done = self._loop.run_in_executor(self._pool, self._answer, [(header, content)])
        done.add_done_callback(lambda future: self._done(header.message, future))

    def _answer(self, held: list[tuple[Header, RecordDict | Error]]) -> tuple[Body, Head | None]:
        """Return the body of the reply, in the thread that works."""
        self._answering += 1
        try:
            return self._answer_one(held)
        finally:
            self._answering -= 1

    def _answer_one(self, held: list[tuple[Header, RecordDict | Error]]) -> tuple[Body, Head | None]:
        header, content = held.pop()
        try:
            if isinstance(content, Error):
                raise RunError("request-invalid", "the message holds an error and no content")
            message = Message(content, self._node, header.type, group_id=header.group, ttl=header.ttl or None)
            flower.set_message_id(message, header.message)
            del content
            reply = self.party.handle(message, progress=self._progress)
            del message
            body = Body.of_error(reply.error) if reply.has_error() else Body.of(reply.content)
        except Exception as error:  # a site raises nothing; the handler of a stock app may
            code = error.code if isinstance(error, BractError) else "client-failed"
            self._failed(f"message {shown(header.message)}", error)
            # The text of an error may hold records, so it stays here.
            body = Body.of_error(Error(flower.ERROR_CODE, f"{code}: {CATALOGUE[code].meaning.rstrip('.')}"))
        return body, self.party.head()

    def _progress(self, progress: ProgressLike) -> None:
        self.stage, self.steps = progress.stage, max(progress.steps or 0, 0)

    def _done(self, message: str, future: asyncio.Future[tuple[Body, Head | None]]) -> None:
        self.working = self.stage = ""
        if future.cancelled():
            return
        job = self.jobs[message]
        error = future.exception()
        if error is not None:
            # Only the ledger's head can have failed; the server waits no longer than its deadline.
            del self.jobs[message]
            self._failed(f"message {shown(message)}", error)
        else:
            job.body, job.head = future.result()
        self.ready()
        self._work()

    def _say_failure(self, what: str, error: BaseException) -> None:
        self._notice(f"{what}: {type(error).__name__}: {shown(str(error), 500)}")
