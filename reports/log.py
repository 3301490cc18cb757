"""A run's events as JSON, one object a line on stderr: for a machine that collects logs.

No data, no paths, and no text that a client wrote: codes of the catalogue, names and numbers alone.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from ..core.errors import CATALOGUE
from ..server.events import (
    Checkpointed,
    ClientFailed,
    ClientNoticed,
    Event,
    Listening,
    Notice,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
    WaitingForClients,
)

_RESULT = ("status", "rounds", "metrics", "model_sha256")


class EventLog:
    """A listener that logs; of a run with secret cohorts it names nobody who was drawn."""

    def __init__(self, stream: TextIO | None = None) -> None:
        handler = logging.StreamHandler(stream or sys.stderr)
        handler.setFormatter(_Json())
        # Of its own, so that nothing else in the process writes into it.
        self._logger = logging.Logger("bract.server", logging.INFO)
        self._logger.addHandler(handler)
        self._secret = False

    def __call__(self, event: Event) -> None:
        """Take an event, from any thread."""
        match event:
            case Listening():
                self._secret = event.secret_cohorts
                self._write("listening", name=event.name, run=event.run, address=event.address)
            case WaitingForClients():
                self._write("waiting", present=event.present, minimum=event.minimum, missing=list(event.missing))
            case ClientNoticed(what="failed"):
                # Told as a failure of its round.
                return
            case ClientNoticed():
                level = logging.WARNING if event.what == "refused" else logging.INFO
                code = {"code": known(event.code)} if event.code else {}
                self._write(f"client-{event.what}", level=level, client=event.client, **code)
            case RunStarted():
                given = event.guarantee
                self._write(
                    "run-started",
                    name=event.name,
                    rounds=event.rounds,
                    first_round=event.first_round,
                    epsilon=given.epsilon,
                    delta=given.delta,
                    unit=given.unit,
                )
            case RoundStarted():
                self._write("round-started", round=event.round, **({} if self._secret else {"cohort": event.cohort}))
            case ClientFailed() if not self._secret:
                found = {"round": event.round, "client": event.client, "code": known(event.code)}
                self._write("client-failed", level=logging.WARNING, **found)
            case RoundFinished():
                self._write("round-finished", **_plain(event.record))
            case Checkpointed():
                self._write("checkpoint", round=event.round)
            case Notice():
                # Its text may name files.
                self._write("notice", level=logging.WARNING)
            case RunFinished():
                shown: dict[str, Any] = {name: event.result.get(name) for name in _RESULT}
                if event.result.get("error"):
                    shown["code"] = event.result["error"]["code"]
                self._write("run-finished", **shown)
            case _:
                return

    def _write(self, event: str, *, level: int = logging.INFO, **fields: Any) -> None:
        self._logger.log(level, event, extra={"fields": fields})


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        head = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        return json.dumps(head | getattr(record, "fields", {}), ensure_ascii=True, allow_nan=False, default=str)


def known(code: str) -> str:
    """Return a code of the catalogue, "other" for one that a client made up."""
    return code if code in CATALOGUE else "other"


def _plain(record: Any) -> dict[str, Any]:
    return {name: value for name, value in record.items() if value is None or isinstance(value, int | float | str)}
