"""What a server is doing, on stderr: who is connected, training, late or refused, beneath the run's own progress."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..core.errors import BractError
from ..server.events import ClientFailed, ClientNoticed, ClientReplied, Event, Listening, WaitingForClients
from . import words
from .progress import Progress

if TYPE_CHECKING:
    from ..server.connections.errands import ClientStatus

LISTED = 20
"""Clients that the table lists; of more only the numbers are shown."""
REMEMBERED = 4
"""Refusals that the display keeps in view."""

_STATES = {
    "away": ("away", "yellow"),
    "idle": ("connected", "green"),
    "waiting": ("done, waits to send", "green"),
    "receiving": ("receiving the model", "cyan"),
    "working": ("training", "cyan"),
    "uploading": ("sending", "cyan"),
}


class FederationProgress(Progress):
    """A listener that shows a federated run: a live table in a terminal, plain lines elsewhere.

    Of a run with secret cohorts it shows only who is connected: who trains is what its guarantee counts on.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console, clock=clock)
        self._status: Callable[[], Sequence[ClientStatus]] | None = None
        self._secret = False
        self._waiting: WaitingForClients | None = None
        self._refused: deque[str] = deque(maxlen=REMEMBERED)
        # Clients come and go in the listener's thread.
        self._lock = threading.RLock()

    def __call__(self, event: Event) -> None:
        """Take an event, from any thread."""
        with self._lock:
            match event:
                case Listening():
                    self._status, self._secret = event.status, event.secret_cohorts
                    self._name = words.printable(event.name)
                    self._say(f"listening on {event.address}, run {words.printable(event.run)}")
                case WaitingForClients():
                    self._waiting = event
                    self._say(_waiting(event), plain_only=True)
                case ClientNoticed():
                    self._notice(event)
                case ClientFailed() | ClientReplied() if self._secret:
                    # That a client failed says that it was drawn.
                    return
                case _:
                    self._waiting = None
                    super().__call__(event)

    def _notice(self, event: ClientNoticed) -> None:
        name, why = words.shortened(event.client, 60), _why(event)
        if event.what == "failed":
            # The round says so as well, except while nothing waits for the reply.
            return
        if event.what == "refused":
            self._refused.append(f"{name}{why}")
            self._say(f"refused {name}{why}", style="red", plain_only=True)
        else:
            self._say(f"{name} {event.what}{why}", plain_only=True)

    def _clients_text(self, *, short: bool = False) -> str:
        return "a secret cohort" if self._secret else super()._clients_text(short=short)

    def _display(self) -> RenderableType:
        lines = [super()._display()]
        if self._waiting is not None:
            lines.append(Text(f"  {_waiting(self._waiting)}", style="yellow"))
        lines.extend(self._clients())
        lines.extend(Text(f"  refused {each}", style="red") for each in self._refused)
        return Group(*lines)

    def _clients(self) -> list[RenderableType]:
        try:
            status = list(self._status()) if self._status is not None else []
        except BractError:
            # The listener has ended.
            return []
        shown = [(each, *self._shown(each)) for each in status]
        if not shown:
            return []
        if len(shown) > LISTED:
            counted = Counter(label for _, label, _ in shown)
            return [Text("  " + "   ".join(f"{number} {label}" for label, number in counted.items()))]
        table = Table.grid(padding=(0, 2, 0, 2))
        for each, label, style in shown:
            detail = "" if self._secret or each.state not in ("working", "away") else words.duration(each.seconds)
            table.add_row(Text(words.shortened(each.name or "(expected)", 40)), Text(label, style=style), Text(detail))
        return [table]

    def _shown(self, status: ClientStatus) -> tuple[str, str]:
        label, style = _STATES["idle" if self._secret and status.state != "away" else status.state]
        if label == "training" and status.steps:
            label = f"training, {status.steps} steps a round"
        return label, style


def _waiting(event: WaitingForClients) -> str:
    names = ", ".join(words.shortened(name, 40) for name in event.missing[:LISTED])
    missing = f"; of this round {names} {'is' if len(event.missing) == 1 else 'are'} not back yet" if names else ""
    return f"waiting for clients: {event.present} of {event.minimum} are there{missing}"


def _why(event: ClientNoticed) -> str:
    if not event.code:
        return ""
    return f" ({words.printable(event.code)}" + (f": {words.printable(event.sentence)})" if event.sentence else ")")
