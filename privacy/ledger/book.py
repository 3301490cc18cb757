"""What a ledger's entries add up to: budgets, plans, reservations, replies, and what each data set was charged.

A `Book` is a fold over verified entries, kept in memory: nothing that a ledger decides on comes from an unverified row.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..accounting import Relation
from ..guarantee import rounded_up
from .chain import START, Entry
from .composition import Figure
from .events import Claimed, Event, Part, RunPlan, event_from_dict, event_to_dict
from .spending import fits, spent

if TYPE_CHECKING:
    from ...core.keys import Key

Counts = dict[Part, Counter[Event]]

TOGETHER = "train and test together, as the data or their split have changed"


@dataclass(frozen=True, kw_only=True)
class DataSetBudget:
    """What the owner lets all runs together spend on one data set, for ever."""

    name: str
    unit: Literal["record", "client"]
    relation: Relation
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (self.name and self.unit in ("record", "client") and self.relation in get_args(Relation)):
            raise ValueError(f"budget of {self.name!r}: unit = {self.unit}, relation = {self.relation}: unknown")
        if not (0 < self.epsilon < float("inf") and 0 < self.delta < 1):
            raise ValueError(f"budget of {self.name!r}: epsilon must be above 0 and finite, delta between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a message asks of a data set. Digests are of the whole content; `message_id` names the message in its run.

    `round` is the server's, and tells which replies it no longer needs; (`run`, `model_version`, `phase`, both digests)
    tell which request this is.
    """

    data_set: str
    data_digest: str
    run: str
    plan: RunPlan
    round: int
    model_version: str
    phase: str
    message_id: str
    message_digest: str
    event: Event

    @property
    def content(self) -> tuple[str, ...]:
        """What makes two requests one: they share a reservation, its bytes and its reply."""
        return (self.data_set, self.run, self.model_version, self.phase, self.message_digest, self.data_digest)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object, without the plan (it has an entry of its own)."""
        named = {name: value for name, value in vars(self).items() if name not in ("plan", "event")}
        return named | {"event": event_to_dict(self.event)}


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """A charged request: `reply` is what was committed for it before; else `secret` holds its 32 fresh bytes."""

    sequence: int
    secret: bytes | None = field(repr=False)
    reply: bytes | None = field(repr=False)

    @property
    def key(self) -> Key:
        """The key from which noise and batches expand; ValueError once the reply is committed."""
        from ...core.keys import Key

        if self.secret is None:
            raise ValueError("the reply to this message is committed: there is nothing left to draw")
        return Key(self.secret)


@dataclass(frozen=True, kw_only=True)
class Reserved:
    """A reservation as the book holds it."""

    data_set: str
    run: str
    round: int
    message_id: str
    message_digest: str
    event: Event
    secret_mac: str


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What a data set has spent and what is left; `claimed`: a trusted server says so, and the site cannot check it."""

    data_set: str
    unit: str
    relation: Relation
    budget: float
    delta: float
    spent: float
    left: float
    parts: Mapping[str, Figure]
    claimed: bool
    runs: int
    reservations: int

    @property
    def counted(self) -> str:
        """How the figure of each part was found, in words."""
        if self.claimed:
            return "claimed by the server, not checked"
        return "; ".join(f"{part}: {figure.method}" for part, figure in self.parts.items()) or "nothing is drawn yet"

    @property
    def shown(self) -> dict[str, str]:
        """`spent` rounded up and `left` rounded down, marked where they are claimed."""
        mark = " (claimed)" if self.claimed else ""
        figure = rounded_up(self.spent) if math.isfinite(self.spent) else "more than the budget"
        return {"spent": figure + mark, "left": f"{math.floor(self.left * 1000) / 1000:g}" + mark}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object; an infinite epsilon is null."""
        parts = {
            part: {"epsilon": _finite(figure.epsilon), "method": figure.method} for part, figure in self.parts.items()
        }
        return asdict(self) | {"parts": parts, "spent": _finite(self.spent), "counted": self.counted}


@dataclass
class Book:
    """The state after `sequence` entries, of which the last has this `mac`."""

    sequence: int = 0
    mac: bytes = START
    budgets: dict[str, DataSetBudget] = field(default_factory=dict)
    plans: dict[tuple[str, str], RunPlan] = field(default_factory=dict)
    reserved: dict[int, Reserved] = field(default_factory=dict)
    replies: dict[int, str] = field(default_factory=dict)
    forgotten: dict[tuple[str, str], int] = field(default_factory=dict)
    by_content: dict[tuple[str, ...], int] = field(default_factory=dict)
    by_message: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)
    charged: dict[str, Counts] = field(default_factory=dict)
    first: dict[str, Counts] = field(default_factory=dict)
    claims: set[tuple[str, str, Event]] = field(default_factory=set)
    digests: dict[str, set[str]] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Take in the next entry; ValueError, KeyError or TypeError if it is no entry of a ledger."""
        body = json.loads(entry.body)
        match entry.kind:
            case "init":
                pass
            case "budget":
                self.budgets[body["name"]] = DataSetBudget(
                    **{name: value for name, value in body.items() if name != "time"}
                )
            case "plan":
                self._plan(body["data_set"], body["run"], RunPlan.from_dict(body["plan"]))
            case "reserve":
                self._reserve(entry.sequence, body)
            case "commit":
                self.replies[body["reservation"]] = body["reply_sha256"]
            case "forget":
                of = (body["data_set"], body["run"])
                self.forgotten[of] = max(body["up_to_round"], self.forgotten.get(of, -1))
            case _:
                raise ValueError(f"kind = {entry.kind!r}: no entry of a ledger")
        self.sequence, self.mac = entry.sequence, entry.mac

    def is_forgotten(self, sequence: int) -> bool:
        """Return whether the server has what this reservation was for, so that its reply was deleted."""
        held = self.reserved[sequence]
        return held.round <= self.forgotten.get((held.data_set, held.run), -1)

    def reserved_of(self, data_set: str, run: str) -> dict[int, Reserved]:
        """Return the reservations of a run on a data set, by number."""
        return {number: held for number, held in self.reserved.items() if (held.data_set, held.run) == (data_set, run)}

    def admits(self, request: Request) -> bool:
        """Return whether the budget allows the request: the event, and before a run's first one its whole plan."""
        begun = (request.data_set, request.run) in self.plans
        asked = (
            _counted((request.event, 1))
            if begun
            else _counted(*((each.event, each.times) for each in request.plan.events))
        )
        budget = self.budgets[request.data_set]
        charged, first = self.charged.get(request.data_set, {}), self.first.get(request.data_set, {})
        if begun:
            # A claim covers a whole run.
            asked = {
                part: Counter({each: n for each, n in events.items() if not self._claimed_before(request, each)})
                for part, events in asked.items()
            }
        if self._moved(request.data_set, request.data_digest) and len({*charged, *asked}) > 1:
            events = _together(charged) + _together(asked)
            return fits(events, Counter(), epsilon=budget.epsilon, delta=budget.delta)
        for part, events in asked.items():
            planned = first.get(part, events)
            if not fits(charged.get(part, Counter()) + events, planned, epsilon=budget.epsilon, delta=budget.delta):
                return False
        return True

    def mixes(self, request: Request) -> bool:
        """Return whether the request would put what is claimed and what is enforced into one budget."""
        known = [event for events in self.charged.get(request.data_set, {}).values() for event in events]
        known += [each.event for each in request.plan.events]
        return len({isinstance(event, Claimed) for event in known}) > 1

    def spending(self, data_set: str) -> Spending:
        """Return what a data set has spent: the largest of its parts, or both together once the data have changed."""
        budget = self.budgets[data_set]
        charged, first = self.charged.get(data_set, {}), self.first.get(data_set, {})
        parts: dict[str, Figure]
        if self._moved(data_set) and len(charged) > 1:
            parts = {TOGETHER: spent(_together(charged), {}, epsilon=budget.epsilon, delta=budget.delta)}
        else:
            parts = {
                part: spent(events, first.get(part, {}), epsilon=budget.epsilon, delta=budget.delta)
                for part, events in sorted(charged.items())
            }
        most = max((figure.epsilon for figure in parts.values()), default=0.0)
        return Spending(
            data_set=data_set,
            unit=budget.unit,
            relation=budget.relation,
            budget=budget.epsilon,
            delta=budget.delta,
            spent=most,
            left=max(0.0, budget.epsilon - most),
            parts=parts,
            claimed=any(isinstance(event, Claimed) for events in charged.values() for event in events),
            runs=sum(name == data_set for name, _ in self.plans),
            reservations=sum(held.data_set == data_set for held in self.reserved.values()),
        )

    def _moved(self, data_set: str, digest: str | None = None) -> bool:
        """Return whether the records, or their split, have changed: one may then have been in both parts."""
        return len(self.digests.get(data_set, set()) | ({digest} if digest is not None else set())) > 1

    def _plan(self, data_set: str, run: str, plan: RunPlan) -> None:
        self.plans[data_set, run] = plan
        first = self.first.setdefault(data_set, {})
        for part, events in _counted(*((each.event, each.times) for each in plan.events)).items():
            first.setdefault(part, events)

    def _reserve(self, sequence: int, body: Mapping[str, Any]) -> None:
        event = event_from_dict(body["event"])
        held = Reserved(
            event=event,
            **{name: body[name] for name in ("data_set", "run", "round", "message_id", "message_digest", "secret_mac")},
        )
        self.reserved[sequence] = held
        names = ("data_set", "run", "model_version", "phase", "message_digest", "data_digest")
        self.by_content[tuple(body[name] for name in names)] = sequence
        self.digests.setdefault(held.data_set, set()).add(body["data_digest"])
        self.by_message.setdefault((held.data_set, held.run, held.message_id), []).append(sequence)
        if isinstance(event, Claimed):
            if (held.data_set, held.run, event) in self.claims:
                return
            self.claims.add((held.data_set, held.run, event))
        self.charged.setdefault(held.data_set, {}).setdefault(event.part, Counter())[event] += 1

    def _claimed_before(self, request: Request, event: Event) -> bool:
        return isinstance(event, Claimed) and (request.data_set, request.run, event) in self.claims


def _counted(*drawn: tuple[Event, int]) -> Counts:
    counts: Counts = {}
    for event, times in drawn:
        # A claim covers a whole run, however many messages carry it.
        counts.setdefault(event.part, Counter())[event] += 1 if isinstance(event, Claimed) else times
    return counts


def _together(counts: Mapping[Part, Counter[Event]]) -> Counter[Event]:
    return sum(counts.values(), Counter())


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None
