"""Patience: how long a client goes on trying to reach its server, and what it says of each failure."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from ...core.errors import BractError, RunError
from ...transport.wire import shown

Notice = Callable[[str], None]

_MENDS_NOT = ("server-untrusted", "identity-rejected")
# A server that is killed within a handshake looks like one that rejects, so one sight of it is not believed.
_BELIEVED = 3
_SAID_AGAIN = 60.0


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


class Patience:
    """What a client thinks of a server that it does not reach.

    `seconds` is how long that may last, None for ever. `diagnose` blocks and returns what is wrong, None if it finds
    nothing: certificates that do not fit end the patience once they were seen three times, unless it is to last for
    ever. The same failure is said once a minute.
    """

    def __init__(
        self,
        address: str,
        *,
        backoff: Backoff | None = None,
        seconds: float | None = None,
        diagnose: Callable[[], BractError | None] = lambda: None,
        notice: Notice = lambda text: None,
    ) -> None:
        self._address, self._backoff, self._seconds = address, backoff or Backoff(), seconds
        self._notice, self._diagnose = notice, diagnose
        self._attempt, self._reached = 0, time.monotonic()
        self._verdicts = ""
        self._sights = 0
        self._said, self._said_at = "", 0.0

    def reached(self) -> None:
        """Take note that the server was there."""
        self._attempt, self._reached, self._said, self._sights = 0, time.monotonic(), "", 0

    def diagnosed(self) -> BractError | None:
        """Dial once more, and return what is wrong; blocks for some seconds at most."""
        try:
            return self._diagnose()
        except (OSError, ValueError):
            return None

    def failed(self, why: str, found: BractError | None = None) -> float:
        """Return the pause before the next attempt in seconds; BractError if there is to be none."""
        verdict = found.code if found is not None and found.code in _MENDS_NOT else ""
        self._sights = self._sights + 1 if verdict and verdict == self._verdicts else int(bool(verdict))
        self._verdicts = verdict
        away = time.monotonic() - self._reached
        if found is not None and self._sights >= _BELIEVED and self._seconds is not None:
            raise found
        why = found.sentence if found is not None else f"server {self._address}: {shown(why, 300)}"
        if self._seconds is not None and away > self._seconds:
            if found is not None and verdict:
                raise found
            raise RunError("server-unreachable", f"{why}; not reached for {away:.0f} s, given up")
        self._attempt += 1
        pause = self._backoff.pause(self._attempt)
        now = time.monotonic()
        if why != self._said or now - self._said_at > _SAID_AGAIN:
            self._said, self._said_at = why, now
            self._notice(f"{why}; trying again")
        return pause
