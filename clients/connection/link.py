"""The link: a client's one stream to its server, opened again whenever it breaks."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from ...core.errors import CATALOGUE, BractError, Refusal, RunError
from ...transport.channel import refuse_insecure, split_address
from ...transport.federation_pb2 import Farewell
from ...transport.wire import Limits, shown
from .desk import Desk, Notice, Party
from .stream import Shown, Stream


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """Pauses between attempts in seconds: ever longer, and by chance, so that not all clients come back at once."""

    first: float = 0.1
    longest: float = 10.0
    factor: float = 1.6

    def pause(self, attempt: int) -> float:
        """Return the pause before an attempt, counted from 1."""
        # No privacy hangs on it: the system's generator, so that a seeded run's is left alone.
        spread = random.SystemRandom().uniform(0.5, 1.0)
        return min(self.longest, self.first * self.factor ** min(attempt - 1, 60)) * spread


class Link:
    """A client's end. `run` connects, and works until the server says farewell, `stop` is called, or it is refused.

    One message at a time is handled, in a thread of its own; `limits.message_bytes` is the largest that is taken. A
    reply without a receipt is kept and offered over the next stream. `connect_for` is how long the server may be out
    of reach in seconds, None for ever; with `keep` the end of a federation is not the end. `name` counts only where
    there are no credentials.
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
    ) -> None:
        if credentials is None:
            refuse_insecure(address)
        split_address(address)
        self._party, self._address, self._credentials, self._name = party, address, credentials, name
        self._limits, self._backoff = limits or Limits(), backoff or Backoff()
        self._connect_for, self._keep, self._notice = connect_for, keep, notice
        self._stop_early = False
        self._stopped: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> str:
        """Serve to the end; return "finished" or "stopped". BractError if this client is refused for good."""
        return asyncio.run(self.serve())

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
        desk = Desk(self._party, name=self._name, notice=self._notice)
        try:
            return await self._serve(desk, stopped)
        finally:
            desk.close()

    async def _serve(self, desk: Desk, stopped: asyncio.Event) -> str:
        attempt, reached = 0, time.monotonic()
        while not stopped.is_set():
            stream = Stream(desk, self._address, self._credentials, self._limits, stopped)
            why = await stream.serve()
            if stream.welcomed:
                attempt, reached = 0, time.monotonic()
            if stream.ended is not None and (stream.ended.final or not stream.ended.code):
                if stream.ended.code:
                    raise _as_error(stream.ended)
                if not self._keep:
                    return "finished"
            if stopped.is_set():
                break
            away = time.monotonic() - reached
            if self._connect_for is not None and away > self._connect_for:
                why = shown(why, 300)
                raise RunError("server-unreachable", f"server {self._address}: not reached for {away:.0f} s; {why}")
            attempt += 1
            pause = self._backoff.pause(attempt)
            self._notice(f"server {self._address}: {shown(why, 300)}; trying again in {pause:.1f} s")
            try:
                await asyncio.wait_for(stopped.wait(), pause)
            except TimeoutError:
                continue
        return "stopped"


def _as_error(ended: Farewell) -> BractError:
    """Return the error of a farewell, in this side's words if the code is not known here."""
    if ended.code in CATALOGUE:
        return Refusal(ended.code, f"the server refused: {shown(ended.sentence, 500)}")
    return RunError("server-unreachable", f"the server refused ({shown(ended.code, 40)}): {shown(ended.sentence, 500)}")
