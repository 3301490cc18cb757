"""One stream of a client: what it says to its server, and what comes over it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc

from ...core.errors import CATALOGUE, BractError, InputError, Refusal, RunError
from ...transport.channel import CLIENT_OPTIONS, Credentials
from ...transport.federation_pb2 import Farewell, Frame, Heartbeat, Lack, Welcome
from ...transport.receiving import Receiving
from ...transport.wire import METHOD, Limits, control, farewell, read
from .desk import Desk

Shown = Credentials | Callable[[], grpc.ChannelCredentials] | None
"""What a client shows: PEM, or what makes gRPC's credentials anew for each attempt, or nothing on the loopback."""


class Stream:
    """One stream, from hello to its end."""

    def __init__(
        self,
        desk: Desk,
        address: str,
        credentials: Shown,
        limits: Limits,
        stopped: asyncio.Event,
        connected: Callable[[], None] = lambda: None,
    ) -> None:
        self._desk, self._address, self._credentials = desk, address, credentials
        self._limits, self._stopped, self._connected = limits, stopped, connected
        desk.ready = self._wake_up
        self._controls: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._offered: str | None = None
        self._permitted = False
        self._incoming: Receiving | None = None
        self._heard = time.monotonic()
        self._call: Any = None
        self.welcomed = False
        self.ended: Farewell | None = None

    def _wake_up(self) -> None:
        self._wake.set()

    async def serve(self) -> str:
        """Serve until the stream ends; return why it did. Refusals of this side are raised."""
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(self._address, options=CLIENT_OPTIONS)
        elif isinstance(self._credentials, Credentials):
            named = self._credentials.server_name
            options = (*CLIENT_OPTIONS, ("grpc.ssl_target_name_override", named)) if named else CLIENT_OPTIONS
            channel = grpc.aio.secure_channel(self._address, self._credentials.for_client(), options=options)
        else:
            channel = grpc.aio.secure_channel(self._address, self._credentials(), options=CLIENT_OPTIONS)
        try:
            return await self._serve(channel)
        except grpc.aio.AioRpcError as error:
            return str(error.details() or error.code().name)
        except (asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            return f"the stream broke off ({type(error).__name__})"
        finally:
            await channel.close()

    async def _serve(self, channel: Any) -> str:
        self._call = channel.stream_stream(METHOD)()
        try:
            await asyncio.wait_for(self._call.write(self._desk.hello()), self._limits.greeting)
            raw = await asyncio.wait_for(self._call.read(), self._limits.greeting)
        except TimeoutError:
            return f"no answer within {self._limits.greeting:g} s"
        except asyncio.InvalidStateError:
            # The call is over: its status says why.
            raw = grpc.aio.EOF
        if raw is grpc.aio.EOF:
            return str(await self._call.details() or (await self._call.code()).name)
        try:
            frame = read(raw)
            if isinstance(frame, memoryview) or frame.WhichOneof("kind") not in ("welcome", "farewell"):
                return "the server's first frame is no welcome"
            if frame.WhichOneof("kind") == "farewell":
                self.ended = frame.farewell
                return self.ended.sentence
            if not self._desk.welcome(frame.welcome):
                await self._goodbye(None)
                return "the server has another run"
        except RunError as error:
            if error.code != "frame-invalid":
                await self._goodbye(error)
                raise
            return error.sentence
        except (Refusal, InputError) as error:
            await self._goodbye(error)
            raise
        self.welcomed = True
        self._connected()
        tasks = [
            asyncio.create_task(work)
            for work in (self._read(), self._write(), self._beat(frame.welcome), self._await_stop())
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        broken: BaseException | None = None
        for task in tasks:
            if task.done() and not task.cancelled():
                broken = broken or task.exception()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(broken, BractError):
            await self._goodbye(broken)
            return broken.sentence
        if isinstance(broken, TimeoutError):
            return "nothing was heard from the server"
        if broken is not None and not isinstance(broken, (grpc.RpcError, asyncio.InvalidStateError)):
            raise broken
        if self._stopped.is_set():
            await self._goodbye(None)
            return "stopped"
        if self.ended is not None:
            return self.ended.sentence or "the federation ended"
        return str(broken.details()) if isinstance(broken, grpc.aio.AioRpcError) else "the server closed the stream"

    async def _goodbye(self, error: BractError | None) -> None:
        """Say why this side leaves, if the stream still takes it."""
        frame = farewell(error.code, CATALOGUE[error.code].meaning) if error else farewell("")
        try:
            await asyncio.wait_for(self._call.write(frame), 1)
            await asyncio.wait_for(self._call.done_writing(), 1)
            await asyncio.wait_for(self._call.code(), 1)
        except (TimeoutError, grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            pass
        self._call.cancel()

    async def _await_stop(self) -> None:
        await self._stopped.wait()

    async def _beat(self, welcome: Welcome) -> None:
        """Send heartbeats, and give up a server that has fallen silent; TimeoutError."""
        pause, silence = max(welcome.heartbeat, 0.01), max(welcome.silence, 0.05)
        desk, count = self._desk, 0
        while True:
            count += 1
            beat = Heartbeat(message=desk.working, stage=desk.stage, steps=desk.steps, count=count)
            if len(self._controls) < 8:
                self._controls.append(control(heartbeat=beat))
                self._wake.set()
            await asyncio.sleep(pause)
            if time.monotonic() - self._heard > silence:
                raise TimeoutError

    async def _write(self) -> None:
        pieces = None
        while True:
            while self._controls:
                await self._call.write(self._controls.popleft())
            if pieces is not None:
                frame = next(pieces, None) if self._permitted else None
                if frame is None:
                    # Sent whole, or not wanted any more.
                    pieces, self._permitted = None, False
                else:
                    await self._call.write(frame)
                continue
            if self._offered is None:
                job = self._desk.to_offer()
                if job is not None:
                    self._offered = job.header.message
                    await self._call.write(control(header=job.offer()))
                    # Nothing here may hold a reply that nobody waits for.
                    job = None
                    continue
            elif self._permitted:
                job = self._desk.jobs.get(self._offered)
                pieces = job.body.pieces() if job is not None and job.body is not None else iter(())
                job = None
                continue
            self._wake.clear()
            if not self._controls:
                await self._wake.wait()

    async def _read(self) -> None:
        while (raw := await self._call.read()) is not grpc.aio.EOF:
            self._heard = time.monotonic()
            frame = read(raw)
            if isinstance(frame, memoryview):
                if self._incoming is None:
                    raise RunError("frame-invalid", "a piece without a header")
                self._incoming.add(frame)
                await self._whole()
            elif frame.WhichOneof("kind") == "header":
                if self._incoming is not None:
                    raise RunError("frame-invalid", "a header within a message")
                # One that is too large ends the stream, and the server is told by which code.
                self._incoming = Receiving(frame.header, limit=self._limits.message_bytes)
                await self._whole()
            elif frame.WhichOneof("kind") == "farewell":
                self.ended = frame.farewell
                return
            else:
                self._control(frame)

    async def _whole(self) -> None:
        incoming = self._incoming
        if incoming is None or incoming.remaining:
            return
        self._incoming = None
        content = await incoming.content()
        self._desk.take(incoming.header, content)
        self._wake.set()

    def _control(self, frame: Frame) -> None:
        kind = frame.WhichOneof("kind")
        if kind == "permit":
            self._permitted = frame.permit.message == self._offered
        elif kind == "receipt":
            if frame.receipt.message == self._offered:
                self._offered, self._permitted = None, False
            self._desk.receipt(frame.receipt.message, frame.receipt.code)
        elif kind == "ask":
            if not self._desk.ask(frame.ask.message):
                self._controls.append(control(lack=Lack(message=frame.ask.message)))
        elif kind == "forget":
            self._desk.forget(frame.forget.run, frame.forget.round)
        elif kind != "heartbeat":
            raise RunError("frame-invalid", f"a server does not send {kind}")
        self._wake.set()
