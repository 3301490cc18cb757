"""One client's stream on the server: who it is, what goes to it, and what comes, which never ends the server."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import grpc

from ... import __version__
from ...core.errors import BractError, RunError
from ...transport.federation_pb2 import Ask, Farewell, Frame, Heartbeat, Hello, Welcome
from ...transport.greeting import Hello as Greeting
from ...transport.greeting import head_from, refuse_version
from ...transport.wire import PROTOCOL, Limits, control, farewell, read, shown
from .errands import Errand
from .roster import Client, Roster
from .uploads import Uploads

Gatekeeper = Callable[[Mapping[str, Iterable[bytes]]], str]
"""Returns the name of the client that a TLS session is with, or raises a BractError that says why it may not join."""

Admit = Callable[[str, Greeting], None]
"""Raises a BractError that says why the client of this name may not join with this hello."""

_MOST_CONTROLS = 256
_HEARTBEATS = 4


class Session:
    """A client's stream, from its hello to its end."""

    def __init__(
        self, context: Any, roster: Roster, limits: Limits, *, run: int, gatekeeper: Gatekeeper | None, admit: Admit
    ) -> None:
        self._context, self._roster, self._limits, self._run = context, roster, limits, run
        self._gatekeeper, self._admit = gatekeeper, admit
        self._controls: deque[bytes] = deque()
        self._work = asyncio.Event()
        self._over = asyncio.Event()
        self._held: set[str] = set()
        self._client: Client | None = None
        self._uploads = Uploads(roster, limits, self.say)
        self._ending: bytes | None = None
        self.heard = roster.now()
        self.sending = False

    async def serve(self) -> None:
        """Serve the stream until it ends."""
        try:
            client = await self._greet()
        except BractError as error:
            self._roster.notice("refused", shown(str(self._context.peer())), error.code, error.sentence)
            await self._context.write(farewell(error.code, error.sentence, final=error.code != "frame-invalid"))
            return
        except TimeoutError:
            return
        tasks = [asyncio.create_task(work) for work in (self._read(), self._write(), self._over.wait())]
        reader, writer, _ = tasks
        code = ""
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            broken = reader.exception() if reader.done() else None
            if isinstance(broken, BractError):
                code = broken.code
                self._roster.notice("refused", client.name, broken.code, broken.sentence)
                self.end(broken.code, broken.sentence)
                # The writer says so, unless the client does not read.
                await asyncio.wait({writer}, timeout=self._limits.greeting)
            elif broken is not None:
                code = "internal"
                self._roster.notice("refused", client.name, code, type(broken).__name__)
        finally:
            for task in tasks:
                task.cancel()
            self._uploads.give_back()
            self._roster.leave(client, self, code)
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def name(self) -> str:
        """The client's name, empty before its hello."""
        return self._client.name if self._client else ""

    def wake(self) -> None:
        """Have the writer look for something to send."""
        self._work.set()

    def say(self, frame: bytes) -> None:
        """Send a control frame before anything else; a client that does not read is given up."""
        if len(self._controls) >= _MOST_CONTROLS:
            self._over.set()
        else:
            self._controls.append(frame)
            self.wake()

    def end(self, code: str, sentence: str = "", *, final: bool = False) -> None:
        """Say farewell and end the stream, also if the client does not read it."""
        self._ending = self._ending or farewell(code, sentence, final=final)
        asyncio.get_running_loop().call_later(self._limits.greeting, self._over.set)
        self.wake()

    def refused(self) -> BractError | None:
        """Return why the client may be here no longer, if so: its certificate may have been revoked meanwhile."""
        try:
            if self._gatekeeper is not None:
                self._gatekeeper(self._context.auth_context())
        except BractError as error:
            return error
        return None

    def reject(self, errand: Errand) -> None:
        """Tell the client that a reply which it offered, or is sending, is not wanted any more."""
        assert self._client is not None
        self._uploads.reject(self._client, errand)

    def stalled(self, seconds: float) -> bool:
        """Return whether nothing was heard, or an upload has not moved, for so long."""
        return self._roster.now() - self.heard > seconds or self._uploads.stalled(seconds)

    async def _greet(self) -> Client:
        raw = await asyncio.wait_for(self._context.read(), self._limits.greeting)
        frame = read(raw) if isinstance(raw, bytes) else None
        if not isinstance(frame, Frame) or frame.WhichOneof("kind") != "hello":
            raise RunError("frame-invalid", "the first frame is no hello")
        said: Hello = frame.hello
        refuse_version(said.protocol, said.bract, __version__, side="client")
        name = self._gatekeeper(self._context.auth_context()) if self._gatekeeper else said.name
        if not 0 < len(name) <= 200 or not name.isprintable():
            raise RunError("frame-invalid", "a name must have 1 to 200 printable letters")
        if len(said.holds) > 8 or len(said.instance) > 64:
            raise RunError("frame-invalid", "a hello holds too much")
        hello = Greeting.read(said)
        self._admit(name, hello)
        roster = self._roster
        self._client = client = roster.join(self, name, hello, said.holds)
        seen = roster.heads.get((name, hello.data))
        silence = roster.deadlines.stall_after
        self.say(
            control(
                welcome=Welcome(
                    protocol=PROTOCOL,
                    bract=__version__,
                    node=client.node,
                    run=self._run,
                    heartbeat=silence / _HEARTBEATS,
                    silence=silence,
                    ledger=head_from(seen),
                )
            )
        )
        if roster.forget is not None:
            self.say(control(forget=roster.forget))
        self._held = set(said.holds)
        for errand in client.errands.values():
            if errand.state == "sent":
                self.say(control(ask=Ask(message=errand.id)))
        return client

    async def _write(self) -> None:
        pieces: Iterator[bytes] | None = None
        client = self._client
        assert client is not None
        while True:
            while self._controls:
                await self._context.write(self._controls.popleft())
            if self._ending is not None:
                await self._context.write(self._ending)
                return
            if pieces is None:
                errand = client.next()
                if errand is None or client.session is not self:
                    self._work.clear()
                    if self._ending is None and not self._controls:
                        await self._work.wait()
                    continue
                errand.state = "sent"
                errand.tries += 1
                if errand.id in self._held:
                    # Sent by a server that was killed: the client works on it, or has the reply.
                    await self._context.write(control(ask=Ask(message=errand.id)))
                    continue
                await self._context.write(control(header=errand.header()))
                pieces = errand.body.pieces()
                # Nothing here may hold a model that nobody waits for.
                errand = None
                self.sending = True
            frame = next(pieces, None)
            if frame is None:
                pieces, self.sending = None, False
            else:
                await self._context.write(frame)

    async def _read(self) -> None:
        while (raw := await self._context.read()) is not grpc.aio.EOF:
            self.heard = self._roster.now()
            frame = read(raw)
            if isinstance(frame, memoryview):
                await self._uploads.piece(frame)
            elif frame.WhichOneof("kind") == "farewell":
                self._left(frame.farewell)
                return
            else:
                self._control(frame)

    def _left(self, said: Farewell) -> None:
        """Take note of why a client leaves: a message that it may not take need not be sent again."""
        assert self._client is not None
        if said.code == "message-too-large":
            for errand in [each for each in self._client.errands.values() if each.state == "sent"]:
                self._roster.fail(errand, said.code, "the client takes no message of that size")

    def _control(self, frame: Frame) -> None:
        client, kind = self._client, frame.WhichOneof("kind")
        assert client is not None
        if kind == "heartbeat":
            client.stage, client.steps = shown(frame.heartbeat.stage, 40), frame.heartbeat.steps
            self.say(control(heartbeat=Heartbeat(count=frame.heartbeat.count)))
        elif kind == "header":
            self._held.discard(frame.header.message)
            self._uploads.offer(client, frame.header)
            self.wake()
        elif kind == "lack":
            self._held.discard(frame.lack.message)
            errand = client.errands.get(frame.lack.message)
            if errand is not None and errand.state == "sent":
                errand.state = "waiting"
                self.wake()
        else:
            raise RunError("frame-invalid", f"a client does not send {kind}")
