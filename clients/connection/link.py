"""The link: a client's one stream to its server, opened again whenever it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ...core.errors import CATALOGUE, BractError, Refusal, RunError
from ...transport.channel import refuse_insecure, split_address
from ...transport.federation_pb2 import Farewell
from ...transport.wire import Limits, shown
from .desk import Desk, Failed, Party, Takes
from .patience import Backoff, Notice, Patience
from .stream import Shown, Stream

__all__ = ["Backoff", "Link"]


class Link:
    """A client's end. `run` connects, and works until the server says farewell, `stop` is called, or it is refused.

    One message at a time is handled, in a thread of its own; `limits.message_bytes` is the largest that is taken. A
    reply without a receipt is kept and offered over the next stream. `connect_for` is how long the server may be out
    of reach in seconds, None for ever; with `keep` the end of a federation is not the end. `name` counts only where
    there are no credentials. `takes` says of a run's number whether it is one that the party serves; with another the
    link ends as "changed". `connected` is called at each welcome, `diagnose` (in a thread) after each failure to get
    one, and `failed` is told of errors whose text is the owner's alone.
    """

    def __init__(
        self,
        party: Party,
        address: str,
        credentials: Shown,
        *,
        name: str = "",
        limits: Limits | None = None,
        backoff: Backoff | None = None,
        connect_for: float | None = None,
        keep: bool = False,
        notice: Notice = lambda text: None,
        takes: Takes = lambda run: True,
        connected: Callable[[], None] = lambda: None,
        diagnose: Callable[[], BractError | None] = lambda: None,
        failed: Failed | None = None,
    ) -> None:
        if credentials is None:
            refuse_insecure(address)
        split_address(address)
        self._party, self._address, self._credentials, self._name = party, address, credentials, name
        self._limits, self._keep, self._notice = limits or Limits(), keep, notice
        self._patience = Patience(address, backoff=backoff, seconds=connect_for, diagnose=diagnose, notice=notice)
        self._takes, self._connected, self._failed = takes, connected, failed
        self._desk: Desk | None = None
        self._stop_early = False
        self._stopped: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> str:
        """Serve to the end; return "finished", "stopped" or "changed". BractError if it is refused for good."""
        return asyncio.run(self.serve())

    @property
    def busy(self) -> bool:
        """Whether the party still works on a message."""
        return self._desk is not None and self._desk.busy

    def finish(self) -> None:
        """Block until the party has ended what it works on, after `run`."""
        if self._desk is not None:
            self._desk.finish()

    def stop(self) -> None:
        """End the link from any thread; what the party works on goes on until it is done, and is not sent."""
        self._stop_early = True
        if self._loop is not None and self._stopped is not None:
            self._loop.call_soon_threadsafe(self._stopped.set)

    async def serve(self) -> str:
        """Do as `run` in the loop that is running."""
        stopped = self._stopped = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self._stop_early:
            stopped.set()
        desk = self._desk = Desk(
            self._party, name=self._name, notice=self._notice, takes=self._takes, failed=self._failed
        )
        try:
            return await self._serve(desk, stopped)
        finally:
            desk.close()

    async def _serve(self, desk: Desk, stopped: asyncio.Event) -> str:
        patience, loop = self._patience, asyncio.get_running_loop()
        while not stopped.is_set():
            stream = Stream(desk, self._address, self._credentials, self._limits, stopped, self._welcomed)
            why = await stream.serve()
            if desk.other_run:
                return "changed"
            if stream.ended is not None and (stream.ended.final or not stream.ended.code):
                if stream.ended.code:
                    raise as_error(stream.ended)
                if not self._keep:
                    return "finished"
            if stopped.is_set():
                break
            silent = not stream.welcomed and stream.ended is None
            found = await loop.run_in_executor(None, patience.diagnosed) if silent else None
            pause = patience.failed(why, found)
            try:
                await asyncio.wait_for(stopped.wait(), pause)
            except TimeoutError:
                continue
        return "stopped"

    def _welcomed(self) -> None:
        self._patience.reached()
        self._connected()


def as_error(ended: Farewell) -> BractError:
    """Return the error of a farewell, in this side's words if the code is not known here."""
    if ended.code in CATALOGUE:
        return Refusal(ended.code, f"the server refused: {shown(ended.sentence, 500)}")
    return RunError("server-unreachable", f"the server refused ({shown(ended.code, 40)}): {shown(ended.sentence, 500)}")
