"""What happens in a run, as typed events; progress, reports and trackers listen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..privacy.guarantee import Guarantee

if TYPE_CHECKING:
    from .connections.errands import ClientStatus


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a listener may show or keep."""


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The run begins, or goes on, with `first_round`."""

    name: str
    rounds: int
    clients: int
    first_round: int
    run_dir: Path
    guarantee: Guarantee


@dataclass(frozen=True, kw_only=True)
class Listening(Event):
    """A server listens at an address; `status` returns where each client is, as long as it does."""

    name: str
    run: str
    address: str
    run_dir: Path
    status: Callable[[], Sequence[ClientStatus]]
    secret_cohorts: bool


@dataclass(frozen=True, kw_only=True)
class WaitingForClients(Event):
    """A round waits until `minimum` clients are there; `missing` names those that it is waiting for, if it is known."""

    present: int
    minimum: int
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClientNoticed(Event):
    """A client has "joined", "left", or was "refused", or a message to it has "failed". Comes in any thread."""

    what: str
    client: str
    code: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """Something that the user should know."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Phase(Event):
    """Work besides the rounds begins, of `total` steps where that is known."""

    name: str
    total: int | None = None


@dataclass(frozen=True, kw_only=True)
class PhaseAdvanced(Event):
    """A step of the phase is done."""

    name: str


@dataclass(frozen=True, kw_only=True)
class RoundStarted(Event):
    """The round's cohort was drawn."""

    round: int
    cohort: int


@dataclass(frozen=True, kw_only=True)
class ClientReplied(Event):
    """A client's update arrived."""

    round: int
    client: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ClientFailed(Event):
    """A client failed, with a code of the catalogue and one sentence."""

    round: int
    client: str
    code: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Aggregated(Event):
    """The strategy made the round's model of the replies, or kept the one before."""

    round: int


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """Metrics were released."""

    round: int
    metrics: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class RoundFinished(Event):
    """The round ended; `record` is its line of metrics.jsonl."""

    round: int
    record: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Checkpointed(Event):
    """The state after the round is on disk."""

    round: int


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """The run ended; `result` is the object of result.json."""

    result: Mapping[str, Any]


Listener = Callable[[Event], None]
