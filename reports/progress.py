"""What a run is doing, on stderr: a live display in a terminal, plain lines elsewhere. It listens to the events."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ..privacy.guarantee import rounded_up
from ..server.events import (
    ClientFailed,
    ClientReplied,
    Evaluated,
    Event,
    Notice,
    Phase,
    PhaseAdvanced,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
)
from . import words

if TYPE_CHECKING:
    from ..privacy.guarantee import Guarantee

SHOWN_FAILURES = 10
"""Failures shown one by one; the others are counted in their rounds."""
PLAIN_INTERVAL = 1.0
"""Seconds between two lines where stderr is no terminal."""


class Progress:
    """A listener that shows a run; as a context manager it leaves the terminal as it was, errors included."""

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._live: Live | None = None
        self._spinner = Spinner("dots", style="green")
        self._name = ""
        self._guarantee: Guarantee | None = None
        self._first, self._done, self._rounds = 1, 0, 0
        self._cohort = self._replied = self._failed = self._failures = self._all = 0
        self._epsilon: float | None = None
        self._metrics: Mapping[str, Any] = {}
        self._phase: tuple[str, int | None, int] | None = None
        self._began = self._said = clock()
        self._ahead = True

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            # Transient: the display goes, the summary stays. Drawn by rich's thread, so a long round is seen to live.
            self._live = Live(
                console=self._console, get_renderable=self._display, refresh_per_second=8, transient=True,
                redirect_stdout=False,
            )  # fmt: skip
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, event: Event) -> None:
        """Take an event."""
        match event:
            case RunStarted():
                self._start(event)
            case RoundStarted():
                self._phase, self._ahead = None, False
                self._cohort, self._replied, self._failed = event.cohort, 0, 0
            case ClientReplied():
                self._replied += 1
                self._all += 1
            case ClientFailed():
                self._fail(event)
            case RoundFinished():
                self._finish_round(event)
            case Evaluated():
                self._metrics = event.metrics
            case Phase():
                self._phase = (words.printable(event.name), event.total, 0)
                self._say(f"{self._phase[0]} \N{HORIZONTAL ELLIPSIS}", plain_only=True)
            case PhaseAdvanced():
                if self._phase is not None:
                    self._phase = (self._phase[0], self._phase[1], self._phase[2] + 1)
            case Notice():
                self._say(f"note: {words.printable(event.text)}", style="yellow")
            case RunFinished():
                self._phase = None
            case _:
                pass

    def _start(self, event: RunStarted) -> None:
        self._name, self._guarantee = words.printable(event.name), event.guarantee
        self._rounds, self._first, self._done = event.rounds, event.first_round, event.first_round - 1
        self._began, self._phase = self._clock(), None
        going_on = f", going on with round {event.first_round}" if event.first_round > 1 else ""
        scale = f"{words.plural(event.rounds, 'round')}, {words.plural(event.clients, 'client')}"
        self._say(f"{self._name}: {scale}, {self._promise().strip()}{going_on}; {event.run_dir}", plain_only=True)

    def _fail(self, event: ClientFailed) -> None:
        self._failed += 1
        self._failures += 1
        if self._failures <= SHOWN_FAILURES:
            self._say(
                f"round {event.round}: {words.shortened(event.client, 60)} failed, {words.printable(event.code)}: "
                f"{words.printable(event.sentence)}",
                style="red",
            )
            if self._failures == SHOWN_FAILURES:
                self._say("more failures are counted, not shown", style="red")

    def _finish_round(self, event: RoundFinished) -> None:
        self._done = event.round
        self._epsilon = event.record.get("epsilon", self._epsilon)
        found = {name: event.record[name] for name in ("accuracy", "auc") if name in event.record}
        self._metrics = found or self._metrics
        now = self._clock()
        if self._live is None and (now - self._said >= PLAIN_INTERVAL or event.round in (self._first, self._rounds)):
            self._said = now
            shown = "".join(f", {part}" for part in (self._epsilon_text(), *self._metric_texts(found)) if part)
            ahead = "".join(f", {part}" for part in (self._rate(), self._left()) if part)
            self._say(f"round {event.round}/{self._rounds}: {self._clients_text()}{shown}{ahead}")

    def _say(self, text: str, *, style: str = "", plain_only: bool = False) -> None:
        if self._live is None:
            self._console.print(Text(text), soft_wrap=True)
        elif not plain_only:
            self._live.console.print(Text(text, style=style))

    def _display(self) -> RenderableType:
        """The lines of the live display: the run, its rounds, and what it has given away so far."""
        self._spinner.update(text=Text.assemble((self._name or "preparing", "bold"), (self._promise(), "dim")))
        lines: list[RenderableType] = [self._spinner]
        if self._rounds and not (self._ahead and self._phase):
            lines.append(
                _bar(
                    "round", self._done, self._rounds,
                    self._clients_text(short=True),
                    "   ".join(part for part in (self._rate(), self._left()) if part),
                )
            )  # fmt: skip
        if self._phase is not None:
            name, total, done = self._phase
            lines.append(_bar(name, done, total, "", ""))
        known = [part for part in (self._epsilon_text(), *self._metric_texts(self._metrics)) if part]
        if known:
            lines.append(Text("  " + "   ".join(known)))
        return Group(*lines)

    def _clients_text(self, *, short: bool = False) -> str:
        failed = f", {self._failed} failed" if self._failed else ""
        if short:
            return f"clients {self._replied}/{self._cohort}{failed}"
        return f"{self._replied} of {self._cohort} clients{failed}"

    def _promise(self) -> str:
        given = self._guarantee
        if given is None:
            return ""
        if given.epsilon is None:
            return "  no privacy guarantee"
        return f"  {given.unit} level, delta {words.delta(given.delta)}"

    def _epsilon_text(self) -> str:
        return "" if self._epsilon is None else f"epsilon so far {rounded_up(self._epsilon)}"

    def _metric_texts(self, metrics: Mapping[str, Any]) -> list[str]:
        return [
            f"{'AUC' if name == 'auc' else words.printable(name)} {words.number(value)}"
            for name, value in metrics.items()
        ]

    def _rate(self) -> str:
        """How many clients train in a second: of simulated ones, as real ones take what they take."""
        seconds = self._clock() - self._began
        rate = self._all / seconds if seconds > 0 else 0.0
        return f"{rate:,.0f} clients/s" if rate >= 2 else ""

    def _left(self) -> str:
        """The time that the other rounds will take if they go on as they went."""
        rounds = self._done - self._first + 1
        if rounds <= 0 or self._done >= self._rounds:
            return ""
        seconds = (self._clock() - self._began) / rounds * (self._rounds - self._done)
        return f"about {words.duration(seconds) if seconds >= 60 else f'{seconds:.0f} s'} left"


def _bar(name: str, done: int, total: int | None, middle: str, right: str) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    of = f"{done}/{total}" if total else str(done) if done else ""
    grid.add_row(
        Text(f"  {name} {of}".rstrip()),
        ProgressBar(
            total=total, completed=done, width=28, pulse=total is None, complete_style="green", finished_style="green"
        ),
        Text(middle),
        Text(right, style="dim"),
    )
    return grid
