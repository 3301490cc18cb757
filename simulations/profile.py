"""Where a simulation's time went: a table of its phases, and a trace of every call for Perfetto or chrome://tracing.

Phases are told apart by the events of the run, which follow one another in the main process; calls of clients are timed
where they run. Times are of `time.perf_counter`, which on one machine all processes share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..server.events import (
    Aggregated,
    Checkpointed,
    ClientFailed,
    ClientReplied,
    Evaluated,
    Event,
    Phase,
    PhaseAdvanced,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
)
from ..server.run_directory import RunDirectory
from .executors.executor import CallTimes

TABLE, TRACE = "private/profile.txt", "private/profile.json"
"""They name clients, and tell how long each took."""


@dataclass(frozen=True)
class Span:
    """One phase, in seconds of the machine's clock."""

    name: str
    began: float
    ended: float


class Profile:
    """A listener of a run, and of the calls of its clients: `called` takes those."""

    def __init__(self) -> None:
        self._began = self._mark = time.perf_counter()
        self._spans: list[Span] = []
        self._calls: list[CallTimes] = []
        self._started = False
        self._within = "finish"

    def __call__(self, event: Event) -> None:
        """Take the time since the event before for the phase that this one ends."""
        now = time.perf_counter()
        match event:
            case RunStarted():
                self._end("plan", now)
                self._started = True
            case RoundStarted():
                self._end("curves", now)
            case ClientReplied() | ClientFailed():
                self._end("clients", now)
            case Aggregated():
                self._end("aggregate", now)
            case Evaluated():
                self._end("evaluate", now)
            case RoundFinished():
                self._end("record", now)
            case Checkpointed():
                self._end("checkpoint", now)
            case Phase(name=name):
                self._end("finish" if self._started else "plan", now)
                self._within = name
            case PhaseAdvanced(name=name):
                self._end(name, now)
            case RunFinished():
                self._end(self._within, now)

    def called(self, times: CallTimes) -> None:
        """Take how long a client's call took."""
        self._calls.append(times)

    def table(self) -> str:
        """Return the phases with their seconds and shares, and what the clients' calls add up to."""
        total = max(self._mark - self._began, 1e-9)
        seconds: dict[str, float] = {}
        for span in self._spans:
            seconds[span.name] = seconds.get(span.name, 0.0) + span.ended - span.began
        lines = [f"{'phase':<32}{'seconds':>10}{'share':>8}"]
        lines += [f"{name:<32}{each:>10.3f}{each / total:>8.1%}" for name, each in seconds.items()]
        lines.append(f"{'all':<32}{total:>10.3f}{1:>8.1%}")
        if self._calls:
            train = sum(call.answered - call.began for call in self._calls)
            fold = sum(call.ended - call.answered for call in self._calls)
            workers = len({call.process for call in self._calls})
            wall = max(seconds.get("clients", 0.0), 1e-9)
            lines += [
                "",
                f"{'within clients':<32}{'seconds':>10}{'share':>8}",
                f"{'  train and evaluate':<32}{train:>10.3f}{train / (workers * wall):>8.1%}",
                f"{'  fold':<32}{fold:>10.3f}{fold / (workers * wall):>8.1%}",
                "",
                f"{len(self._calls)} calls in {workers} process{'es' if workers > 1 else ''}: "
                f"{len(self._calls) / wall:.1f} a second, {1000 * train / len(self._calls):.2f} ms each",
            ]
        return "\n".join(lines) + "\n"

    def trace(self) -> str:
        """Return the trace in the Trace Event Format: complete events, in microseconds since the start."""
        return json.dumps({"traceEvents": list(self._events()), "displayTimeUnit": "ms"})

    def write(self, directory: RunDirectory) -> None:
        """Put table and trace into the run directory, for the experimenter alone."""
        directory.write(TABLE, self.table())
        directory.write(TRACE, self.trace())

    def _end(self, name: str, now: float) -> None:
        self._spans.append(Span(name, self._mark, now))
        self._mark = now

    def _events(self) -> Iterator[dict[str, Any]]:
        here = os.getpid()
        names = {here: "server"} | {call.process: f"worker {call.process}" for call in self._calls}
        for process, name in names.items():
            yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}
        for span in self._spans:
            yield self._event(span.name, here, span.began, span.ended)
        for call in self._calls:
            # In one process the clients' calls lie within its phases, in a lane of their own.
            yield self._event(call.kind, call.process, call.began, call.answered, lane=1, client=call.client)
            if call.ended > call.answered:
                yield self._event("fold", call.process, call.answered, call.ended, lane=1, client=call.client)

    def _event(
        self, name: str, process: int, began: float, ended: float, *, lane: int = 0, **about: Any
    ) -> dict[str, Any]:
        start = 1e6 * (began - self._began)
        known = {"name": name, "ph": "X", "pid": process, "tid": lane, "ts": start, "dur": 1e6 * (ended - began)}
        return known | ({"args": about} if about else {})
