"""The listener: a gRPC server in a thread of its own, with which the synchronous round loop talks through queues."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from ...core.errors import BractError, InputError, RunError
from ...transport.announcement import Announcement, refuse_question
from ...transport.channel import SERVER_OPTIONS, Credentials, refuse_insecure, split_address
from ...transport.greeting import Hello
from ...transport.peers import peer_name
from ...transport.wire import DESCRIBE, METHOD, Limits, shown
from .errands import ClientStatus, Deadlines, Mailbox
from .roster import Noticed, Roster
from .session import Admit, Gatekeeper, Session

Result = TypeVar("Result")
_RECHECK = 10.0


def admit_all(name: str, hello: Hello) -> None:
    """Admit every client that has a name."""


class Listener:
    """Accepts clients' streams from `start` to `stop`.

    `address` is host:port; port 0 takes a free one, and `port` says which. Credentials are PEM, or what gRPC's own
    functions make; without any only the loopback is listened on, and clients are who they say. `gatekeeper` names the
    client of a TLS session or refuses it; it is asked again every 10 s for open streams, so that a revocation takes
    effect. `admit` may refuse a hello, for another task say. `announcement` is what clients that the gatekeeper knows
    are told before they join; its run's number goes into each welcome. `notice` is called in the listener's thread.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials | grpc.ServerCredentials | None,
        *,
        run: int = 0,
        deadlines: Deadlines | None = None,
        limits: Limits | None = None,
        gatekeeper: Gatekeeper = peer_name,
        admit: Admit = admit_all,
        announcement: Announcement | None = None,
        notice: Noticed = lambda kind, name, code, sentence: None,
    ) -> None:
        if credentials is None:
            refuse_insecure(address)
        self.deadlines, self.limits = deadlines or Deadlines(), limits or Limits()
        self.run = run if announcement is None else announcement.number
        self.announcement = announcement
        self.roster = Roster(self.deadlines, time.monotonic, notice)
        self.port = 0
        self._address, self._credentials = address, credentials
        self._gatekeeper = gatekeeper if credentials is not None else None
        self._admit = admit
        self._started: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._farewell: tuple[str, str, bool] = ("", "", False)
        self._thread = threading.Thread(target=self._run, name="bract-listener", daemon=True)

    def start(self) -> Self:
        """Listen; InputError `address-unusable` if that cannot be."""
        self._thread.start()
        self.port = self._started.result()
        return self

    def stop(self, code: str = "", sentence: str = "", *, final: bool = True) -> None:
        """Say farewell to all clients and stop listening. With no code it means that the federation has ended."""
        if self._loop is not None and self._thread.is_alive():
            self._farewell = (code, sentence, final)
            self._loop.call_soon_threadsafe(self._stop)
            self._thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, BaseException):
            self.stop("interrupted", "the server was stopped", final=False)
        else:
            self.stop()

    @property
    def alive(self) -> bool:
        """Whether it listens."""
        return self._thread.is_alive()

    def call(self, work: Callable[[], Result]) -> Result:
        """Return what a function returns that runs in the listener's thread, where the roster lives."""
        assert self._loop is not None
        done: concurrent.futures.Future[Result] = concurrent.futures.Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        try:
            self._loop.call_soon_threadsafe(run)
            while True:
                try:
                    return done.result(timeout=1)
                except concurrent.futures.TimeoutError:
                    if not self.alive:
                        raise RunError("internal", "the listener's thread has ended") from None
        except RuntimeError as error:
            raise RunError("internal", "the listener has stopped") from error

    def post(self, work: Callable[[], None]) -> None:
        """Run a function in the listener's thread without waiting for it; nothing happens once it has stopped."""
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(work)
        except RuntimeError:
            pass

    def mailbox(self) -> Mailbox:
        """Return an empty mailbox with permits of its own."""
        return Mailbox(uploads=self.limits.uploads, upload_bytes=self.limits.upload_bytes)

    def status(self) -> list[ClientStatus]:
        """Return where each client is."""
        return self.call(self.roster.status)

    def wait_for_clients(self, minimum: int, *, seconds: float | None = None) -> list[ClientStatus]:
        """Wait until so many clients are there, and return them; RunError `clients-missing` after so many seconds.

        By default the seconds are `connect_for`.
        """
        patience = self.deadlines.connect_for if seconds is None else seconds
        until = time.monotonic() + patience
        while True:
            there = [each for each in self.status() if each.state != "away"]
            if len(there) >= minimum:
                return there
            if time.monotonic() > until:
                raise RunError(
                    "clients-missing",
                    f"clients.minimum = {minimum}: {len(there)} joined within {patience:g} s; start the others",
                )
            time.sleep(0.02)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if not self._started.done():
                self._started.set_exception(error)
            elif not isinstance(error, Exception):
                raise

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        loop = self._loop = asyncio.get_running_loop()
        server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=self.limits.streams)
        server.add_generic_rpc_handlers((_Handlers(self),))
        split_address(self._address)
        try:
            if self._credentials is None:
                port = server.add_insecure_port(self._address)
            else:
                given = self._credentials
                shown = given.for_server() if isinstance(given, Credentials) else given
                port = server.add_secure_port(self._address, shown)
            await server.start()
        except (RuntimeError, ValueError) as error:
            raise InputError(
                "address-unusable",
                f"address = {self._address!r}: cannot be listened on; is it in use or not this machine's?",
            ) from error
        self.sessions: set[Session] = set()
        self._started.set_result(port)
        checked = loop.time()
        pause = min(1.0, self.deadlines.stall_after / 4)
        while not self._stopping.is_set():
            try:
                await asyncio.wait_for(self._stopping.wait(), pause)
            except TimeoutError:
                self.roster.tick()
            if loop.time() - checked > _RECHECK:
                checked = loop.time()
                self.recheck()
        code, sentence, final = self._farewell
        for session in list(self.sessions):
            session.end(code, sentence, final=final)
        deadline = loop.time() + 5
        while self.sessions and loop.time() < deadline:
            await asyncio.sleep(0.01)
        await server.stop(0.5)

    def recheck(self) -> None:
        """Ask the gatekeeper of every open stream, and end those that it refuses."""
        for session in list(self.sessions):
            error = session.refused()
            if error is not None:
                self.roster.notice("refused", session.name, error.code, error.sentence)
                session.end(error.code, error.sentence, final=True)

    def _stop(self) -> None:
        assert self._stopping is not None
        self._stopping.set()

    async def _describe(self, asked: bytes, context: Any) -> bytes:
        """Answer a client's question; a refusal is `code: sentence` in the details of the status."""
        try:
            refuse_question(asked)
            if self._gatekeeper is not None:
                self._gatekeeper(context.auth_context())
        except BractError as error:
            self.roster.notice("refused", shown(str(context.peer())), error.code, error.sentence)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{error.code}: {error.sentence}")
        if self.announcement is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server announces nothing")
            raise AssertionError
        return self.announcement.write()

    async def _join(self, _: Any, context: Any) -> None:
        session = Session(
            context, self.roster, self.limits, run=self.run, gatekeeper=self._gatekeeper, admit=self._admit
        )
        self.sessions.add(session)
        try:
            await session.serve()
        finally:
            self.sessions.discard(session)


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The methods by name: frames go through as the bytes they are."""

    def __init__(self, listener: Listener) -> None:
        self._methods = {
            METHOD: grpc.stream_stream_rpc_method_handler(listener._join),
            DESCRIBE: grpc.unary_unary_rpc_method_handler(listener._describe),
            "/grpc.health.v1.Health/Check": grpc.unary_unary_rpc_method_handler(
                _health,
                request_deserializer=health_pb2.HealthCheckRequest.FromString,
                response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
            ),
        }

    def service(self, call: Any) -> Any:
        return self._methods.get(call.method)


async def _health(request: Any, context: Any) -> Any:
    if request.service not in ("", "bract.transport.v1.Federation"):
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
    return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
