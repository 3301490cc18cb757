"""Processes that live and end together: one that is killed is started again, and none outlives the sandbox."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MOST_RESTARTS = 1000
_TERM_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1


@dataclass(kw_only=True)
class Supervised:
    """A process, and how it is started again after a kill.

    `log` is a file for its output; None lets it write where this process does. `again` makes the command after a kill,
    by default the same.
    """

    name: str
    command: Sequence[str]
    again: Callable[[], Sequence[str]] | None = None
    log: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0

    def start(self, *, again: bool = False) -> None:
        """Start it in a session of its own, so that a terminal's Ctrl-C reaches the sandbox alone."""
        command = self.again() if again and self.again else self.command
        environment = {**os.environ, **self.environment}
        known = {"stdin": subprocess.DEVNULL, "start_new_session": True, "env": environment}
        if self.log is None:
            self.process = subprocess.Popen(command, preexec_fn=_end_with_parent, **known)  # type: ignore[call-overload]
            return
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(  # type: ignore[call-overload]
                command, stdout=log, stderr=log, preexec_fn=_end_with_parent, **known
            )

    def ended(self) -> int | None:
        """Return its exit status (negative: the signal that killed it), None while it runs."""
        return None if self.process is None else self.process.poll()

    def restart_if_killed(self) -> bool:
        """Start it again if a signal killed it, up to `MOST_RESTARTS` times, and return whether it was."""
        status = self.ended()
        if status is None or status >= 0 or self.restarts >= MOST_RESTARTS:
            return False
        self.restarts += 1
        self.start(again=True)
        return True

    def signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def last_words(self) -> str:
        """Return the last line of its log, which says why it ended."""
        if self.log is None or not self.log.exists():
            return ""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("error:")]
        return (said or lines or [""])[-1].removeprefix("error: ")


def end_all(processes: Sequence[Supervised], *, seconds: float = _TERM_SECONDS) -> None:
    """End processes: asked first, killed after so many seconds. None of them runs afterwards."""
    for each in processes:
        each.signal(signal.SIGTERM)
    until = time.monotonic() + seconds
    for each in processes:
        if each.process is None:
            continue
        try:
            each.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            each.process.kill()
            each.process.wait()


def _end_with_parent() -> None:
    """In the child: ask the kernel for a SIGTERM when the sandbox dies, however it dies. Elsewhere than Linux, no."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
