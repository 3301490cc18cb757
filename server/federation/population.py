"""Who may be drawn in a round: those who are there, waited for until they are enough."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence

from ..connections.listener import Listener as Connections
from ..events import Listener, Notice, WaitingForClients
from ..run_directory import RunDirectory
from .membership import Membership

FILE = "private/population.json"
MEMBERS = "private/members.json"
_PAUSE = 0.05


class Population:
    """A federation's clients, round by round; `minimum` of them are waited for, without limit.

    Who was there is written down before a round begins, so that a resumed server goes on with the same clients: it
    waits for them for `connect_for` seconds. What `warning` returns is told on the way. Used by one thread, that of the
    round loop.
    """

    def __init__(
        self,
        membership: Membership,
        connections: Connections,
        directory: RunDirectory,
        *,
        minimum: int,
        emit: Listener,
        should_stop: Callable[[], bool],
        warning: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._warning = warning
        self._membership, self._connections, self._directory = membership, connections, directory
        self._minimum, self._emit, self._should_stop = minimum, emit, should_stop
        self._written: list[str] = []
        self._expected: list[str] = []

    def load(self) -> None:
        """Take up who was there when the run ended or was killed."""
        path = self._directory.path / FILE
        if (self._directory.path / MEMBERS).is_file():
            self._membership.load_state_dict(self._directory.read_json(MEMBERS), self._emit)
        if path.is_file():
            self._expected = self._written = list(self._directory.read_json(FILE)["clients"])

    def connected(self) -> dict[int, str]:
        """Return the members that are there, by node id, in the order in which they joined."""
        there = {each.node for each in self._connections.status() if each.state != "away"}
        return {node: name for node, name in self._membership.names.items() if node in there}

    def wait(self) -> dict[int, str]:
        """Wait until there are enough, make newcomers members, and return who is there; KeyboardInterrupt."""
        until, told = time.monotonic() + self._connections.deadlines.connect_for, None
        while True:
            there = self._enrolled()
            warning = self._warning()
            if warning is not None:
                self._emit(Notice(text=warning))
            missing = tuple(name for name in self._expected if name not in there.values())
            enough = self._membership.begun and len(there) >= self._minimum
            if enough and (not missing or time.monotonic() > until):
                self._expected = []
                return there
            waiting = WaitingForClients(present=len(there), minimum=self._minimum, missing=missing)
            if waiting != told:
                self._emit(waiting)
                told = waiting
            if self._should_stop():
                raise KeyboardInterrupt
            time.sleep(_PAUSE)

    def draw_from(self, round: int) -> Sequence[int]:
        """Return the nodes of a round's population; where their number is public, with places that are nobody's."""
        there = self.wait()
        names = list(there.values())
        if names != self._written:
            self._directory.write(FILE, json.dumps({"round": round, "clients": names}) + "\n")
            self._written = names
        return places(self._membership.names, there, self._membership.places)

    def _enrolled(self) -> dict[int, str]:
        there = {each.node: each.name for each in self._connections.status() if each.state != "away"}
        # The first members come together, so that the mechanisms are those of all of them.
        if self._membership.begun or len(there) >= self._minimum:
            if self._membership.enrol(list(there.values()), self._emit):
                self._directory.write(MEMBERS, json.dumps(self._membership.state_dict(), indent=1) + "\n")
            return self.connected()
        return there


def places(members: Mapping[int, str], there: Mapping[int, str], number: int | None) -> list[int]:
    """Return whom a cohort is drawn from: those who are there, or `number` places of which some are nobody's.

    A place is a member's for good, so that no other's probability hangs on who is there.
    """
    if number is None:
        return list(there)
    taken = [node if node in there else -1 - place for place, node in enumerate(members)]
    return taken + [-1 - place for place in range(len(taken), number)]
