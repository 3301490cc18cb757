"""What a site's ledger counts: events, each with a canonical JSON form, and the plan of a run as a list of them.

An event is what one message draws from the records of one part ("train" or "test") of a data set. Nothing here, and
nothing that it imports, needs NumPy: a ledger opens in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..accounting import Relation

if TYPE_CHECKING:
    from ..mechanism import RecordLevelPlan

Part = Literal["train", "test"]

MOST = 2**40
"""The most steps of an event, and the most messages of a plan: more is no training, and no float counts them."""


@dataclass(frozen=True, kw_only=True)
class SampledGaussian:
    """`steps` noised sums, each over a fresh Poisson sample; `noise_multiplier` per sensitivity under zero-out.

    `delta` is what the run was planned with; a ledger composes at the delta of its budget.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int
    relation: Relation
    delta: float
    part: Part = "train"

    def __post_init__(self) -> None:
        _check_between("sampling_rate", self.sampling_rate, 0, 1)
        _check_between("noise_multiplier", self.noise_multiplier, 0, math.inf)
        _check_steps(self.steps)
        _check_between("delta", self.delta, 0, 1)
        _check_names(self.relation, self.part)


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """`steps` noised sums that nothing amplifies: client level, local privacy, matrix factorization."""

    noise_multiplier: float
    steps: int
    relation: Relation
    delta: float
    part: Part = "train"

    def __post_init__(self) -> None:
        _check_between("noise_multiplier", self.noise_multiplier, 0, math.inf)
        _check_steps(self.steps)
        _check_between("delta", self.delta, 0, 1)
        _check_names(self.relation, self.part)


@dataclass(frozen=True, kw_only=True)
class DiscreteLaplace:
    """One histogram of privacy/release.py: exactly `epsilon` under zero-out, twice that under replace-one."""

    epsilon: float
    relation: Relation
    part: Part = "test"

    def __post_init__(self) -> None:
        _check_between("epsilon", self.epsilon, 0, math.inf)
        _check_names(self.relation, self.part)

    @property
    def cost(self) -> float:
        """The epsilon under the event's own relation: a replaced record moves two cells."""
        return 2 * self.epsilon if self.relation == "replace-one" else self.epsilon


@dataclass(frozen=True, kw_only=True)
class Claimed:
    """An epsilon that a trusted server claims for a whole run: the site cannot check it, and says so."""

    epsilon: float
    delta: float
    relation: Relation
    part: Part = "train"

    def __post_init__(self) -> None:
        _check_between("epsilon", self.epsilon, 0, math.inf)
        _check_between("delta", self.delta, 0, 1)
        _check_names(self.relation, self.part)


Event = SampledGaussian | Gaussian | DiscreteLaplace | Claimed

_KINDS: dict[str, type[Event]] = {
    "sampled-gaussian": SampledGaussian,
    "gaussian": Gaussian,
    "discrete-laplace": DiscreteLaplace,
    "claimed": Claimed,
}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """`times` messages of one phase, each with the same event."""

    phase: str
    event: Event
    times: int

    def __post_init__(self) -> None:
        _check_steps(self.times)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """All that a run may do with one data set; `digest` binds what the events leave out (clip, batch, task, rounds)."""

    digest: str
    events: tuple[Planned, ...]

    def holds(self, phase: str, event: Event) -> bool:
        """Return whether a message of this phase may draw this event."""
        return any(each.phase == phase and each.event == event for each in self.events)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        events = [
            {"phase": each.phase, "event": event_to_dict(each.event), "times": each.times} for each in self.events
        ]
        return {"digest": self.digest, "events": events}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> RunPlan:
        """Return the plan of a JSON object that `to_dict` made."""
        events = tuple(
            Planned(phase=each["phase"], event=event_from_dict(each["event"]), times=each["times"])
            for each in value["events"]
        )
        return cls(digest=value["digest"], events=events)


def round_of(plan: RecordLevelPlan, *, relation: Relation = "zero-out", part: Part = "train") -> SampledGaussian:
    """Return the event of one round of record-level training, as the plan accounts for it."""
    return SampledGaussian(
        sampling_rate=plan.accounted_rate,
        noise_multiplier=plan.noise_multiplier,
        steps=plan.accounted_steps(1),
        relation=relation,
        delta=plan.delta,
        part=part,
    )


def event_to_dict(event: Event) -> dict[str, Any]:
    """Return the JSON object of an event: its kind and its fields."""
    kind = next(name for name, each in _KINDS.items() if type(event) is each)
    return {"kind": kind, **asdict(event)}


def event_from_dict(value: Mapping[str, Any]) -> Event:
    """Return the event of a JSON object; ValueError if it is not exactly what `event_to_dict` makes."""
    kind = _KINDS.get(str(value.get("kind")))
    if kind is None or {each.name for each in fields(kind)} | {"kind"} != set(value):
        raise ValueError(f"event = {dict(value)}: its kind or its fields are unknown")
    return kind(**{name: each for name, each in value.items() if name != "kind"})


def canonical(value: Any) -> str:
    """Return the one JSON text of a value: sorted names, no spaces, ASCII, floats that read back exactly."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(settings: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object, for `RunPlan.digest`."""
    return hashlib.sha256(canonical(settings).encode()).hexdigest()


def _check_between(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} = {value}: must be finite and lie in [{low:g}, {high:g}]")


def _check_steps(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise ValueError(f"steps or times = {str(value)[:40]}: must be a whole number in [1, {MOST}]")


def _check_names(relation: str, part: str) -> None:
    if relation not in get_args(Relation) or part not in get_args(Part):
        raise ValueError(f"relation = {relation!r}, part = {part!r}: unknown")
