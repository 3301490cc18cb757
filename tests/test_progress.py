"""Live progress: plain lines where stderr is no terminal, a display that goes away where it is one."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from bract.reports.progress import SHOWN_FAILURES, Progress
from bract.server.events import (
    ClientFailed,
    ClientReplied,
    Event,
    Notice,
    Phase,
    PhaseAdvanced,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
)

from .sample_run import guarantee, without_privacy


class Clock:
    """Seconds that pass when they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def started(rounds: int, first: int = 1) -> RunStarted:
    return RunStarted(
        name="heart", rounds=rounds, clients=2, first_round=first, run_dir=Path("runs/heart"), guarantee=guarantee()
    )


def a_round(number: int, **record: object) -> Iterator[Event]:
    yield RoundStarted(round=number, cohort=2)
    yield ClientReplied(round=number, client="a", seconds=0.1)
    yield ClientReplied(round=number, client="b", seconds=0.1)
    yield RoundFinished(round=number, record={"round": number, "epsilon": 0.1 * number, **record})


def plain(clock: Clock) -> tuple[Progress, io.StringIO]:
    output = io.StringIO()
    return Progress(Console(file=output, width=80), clock=clock), output


def test_plain_lines_at_most_one_a_second() -> None:
    clock = Clock()
    progress, output = plain(clock)
    with progress:
        progress(started(100))
        for number in range(1, 101):
            clock.now += 0.1
            for event in a_round(number):
                progress(event)
    lines = [line for line in output.getvalue().splitlines() if line.startswith("round ")]
    assert lines[0].startswith("round 1/100: 2 of 2 clients, epsilon so far 0.1, 20 clients/s, about 10 s left")
    assert lines[-1] == "round 100/100: 2 of 2 clients, epsilon so far 10, 20 clients/s"
    assert 10 <= len(lines) <= 12


def test_plain_lines_hold_released_metrics_and_no_control_characters() -> None:
    progress, output = plain(Clock())
    with progress:
        progress(started(1))
        progress(Notice(text="[red]BatchNorm\x1b[2J\nreplaced[/red]"))
        for event in a_round(1, accuracy=0.8125, auc=None):
            progress(event)
        progress(RunFinished(result={}))
    text = output.getvalue()
    assert "accuracy 0.812, AUC –" in text
    assert "note: [red]BatchNorm" in text and "\x1b" not in text
    assert "heart: 1 round, 2 clients, record level, delta 1e-5; runs/heart" in text


def test_failures_are_shown_and_at_last_counted() -> None:
    progress, output = plain(Clock())
    with progress:
        progress(started(1))
        progress(RoundStarted(round=1, cohort=40))
        for index in range(40):
            progress(ClientFailed(round=1, client=f"site {index}", code="client-failed", sentence="it raised an error"))
        progress(RoundFinished(round=1, record={"round": 1}))
    text = output.getvalue()
    assert "round 1: site 0 failed, client-failed: it raised an error" in text
    assert text.count("it raised") == SHOWN_FAILURES and "0 of 40 clients, 40 failed" in text


def test_time_left_counts_from_where_a_resumed_run_began() -> None:
    clock = Clock()
    progress, output = plain(clock)
    with progress:
        progress(started(20, first=11))
        clock.now = 2.0
        for event in a_round(11):
            progress(event)
    console, _ = terminal()
    resumed = Progress(console, clock=Clock())
    resumed(started(20, first=11))
    with console.capture() as capture:
        console.print(resumed._display())
    assert "round 10/20" in capture.get()
    assert "going on with round 11" in output.getvalue() and "about 18 s left" in output.getvalue()


def terminal() -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, force_terminal=True, width=80, height=20, legacy_windows=False), output


def test_display_shows_rounds_clients_epsilon_and_phase() -> None:
    console, _ = terminal()
    progress = Progress(console, clock=Clock())
    progress(started(20))
    for event in a_round(7, accuracy=0.8):
        progress(event)
    progress(RoundStarted(round=8, cohort=2))
    progress(ClientReplied(round=8, client="a", seconds=0.1))
    progress(Phase(name="comparison", total=5))
    progress(PhaseAdvanced(name="comparison"))
    with console.capture() as capture:
        console.print(progress._display())
    shown = capture.get()
    for part in ("heart", "record level, delta 1e-5", "7/20", "1/2", "comparison 1/5", "0.700", "0.800"):
        assert part in shown.replace("so far 0.7", "so far 0.700")


def test_display_without_privacy_says_so() -> None:
    console, _ = terminal()
    progress = Progress(console)
    progress(
        RunStarted(name="heart", rounds=1, clients=2, first_round=1, run_dir=Path("r"), guarantee=without_privacy())
    )
    with console.capture() as capture:
        console.print(progress._display())
    assert "no privacy guarantee" in capture.get()


def test_terminal_is_left_clean_when_the_run_fails() -> None:
    console, output = terminal()
    with pytest.raises(RuntimeError, match="boom"), Progress(console) as progress:
        progress(started(20))
        progress(Notice(text="said aloud"))
        raise RuntimeError("boom")
    text = output.getvalue()
    assert "said aloud" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is hidden, and back
    assert text.rstrip().endswith("\x1b[2K")  # the display is wiped
