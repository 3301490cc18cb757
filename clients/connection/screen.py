"""The screen of a client: one line for each thing that happens, as text or as JSON; no records, no paths of others."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Literal, TextIO

from ...transport.wire import shown

Format = Literal["text", "json"]
Level = Literal["info", "warning", "error"]
_LONGEST = 2_000


class Screen:
    """Prints events on stderr. Safe for threads; what others wrote is shown without control characters.

    As JSON each line has `time`, `level`, `event` and `text`, and the event's own fields.
    """

    def __init__(
        self,
        how: Format = "text",
        *,
        stream: TextIO | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._how, self._stream, self._clock = how, stream or sys.stderr, clock
        self._lock = threading.Lock()

    def __call__(
        self, event: str, text: str, *, level: Level = "info", fields: Mapping[str, str | int] | None = None
    ) -> None:
        """Print an event; JSON holds its fields beside the text."""
        text, now = shown(text, _LONGEST), self._clock()
        if self._how == "json":
            known = {name: shown(value) if isinstance(value, str) else value for name, value in (fields or {}).items()}
            line = json.dumps({"time": now.isoformat(), "level": level, "event": event, "text": text, **known})
        else:
            line = f"{now.astimezone():%H:%M:%S}  {'' if level == 'info' else f'{level}: '}{text}"
        # Whoever read it may have gone; the work goes on.
        with self._lock, contextlib.suppress(OSError, ValueError):
            print(line, file=self._stream, flush=True)

    def warn(self, event: str, text: str) -> None:
        """Print a warning."""
        self(event, text, level="warning")

    def fail(self, code: str, sentence: str) -> None:
        """Print what ends the client, and where to read more about it."""
        more = "" if self._how == "json" else f" (more: bract explain {code})"
        self("failed", f"{shown(sentence, _LONGEST)}{more}", level="error", fields={"code": code})
