"""What a run promises, as one object: it prints as one sentence and travels in every result, report and JSON."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, Self

from . import accounting

if TYPE_CHECKING:
    from .mechanism import RecordLevelPlan
    from .release import EvaluationPlan

Unit = Literal["none", "record", "client"]
Randomness = Literal["secret", "seed"]
Place = Literal["simulation", "federation"]

LISTED_CLIENTS = 100
OTHER_RUNS = "other runs"
"""How the exclusion begins that holds only where no ledger adds runs up."""
ALWAYS_EXCLUDED = (
    "timing: how long a step, a round or the run took",
    "the number of records, which is declared public",
    "the choice of hyper-parameters, as far as earlier runs on the same data led to it",
    "several records of one person: epsilon counts for each of them",
    "the noise of the training is floating-point (that of the released metrics is exact and discrete)",
    f"{OTHER_RUNS} on the same data: the epsilon counts this run alone",
)

_TRUST: dict[Place, str] = {
    "simulation": "this is a simulation: one process holds all records and sees everything before the noise; the "
    "promise is about the released model and metrics",
    "federation": "each site adds the noise to its own updates and counts before they leave, so neither the server nor "
    "another site sees anything before the noise",
}
_ZERO_OUT = "zero-out (one record replaced by one that contributes nothing, the number of records public)"


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """The privacy of a whole run; `epsilon` None means that there is none.

    `per_client` maps client names to their epsilon, or above 100 clients min, p25, median, p75 and max. `record` is the
    guarantee for records beneath one for clients.
    """

    epsilon: float | None
    delta: float | None
    unit: Unit
    neighbouring: str
    sampler: str
    randomness: Randomness
    trust: str
    excludes: tuple[str, ...]
    replace_one_epsilon: float | None = None
    per_client: Mapping[str, float] = field(default_factory=dict)
    released: str = "model and the metrics"
    drawn: str = "noise and the batches"
    record: Guarantee | None = None

    def __post_init__(self) -> None:
        _check_excludes(self.excludes)
        _check_epsilon(self.epsilon, self.unit)

    @property
    def sentence(self) -> str:
        """The guarantee in one sentence; every figure is rounded up."""
        if self.epsilon is None:
            return "There is no differential privacy: the model and the metrics may reveal any record they came from."
        replace_one = (
            ""
            if self.replace_one_epsilon is None
            else f", and epsilon {rounded_up(self.replace_one_epsilon)} if it may be replaced by any other"
        )
        drawn = (
            f"the {self.drawn} came from a secret key"
            if self.randomness == "secret"
            else f"the {self.drawn} came from a published seed, so it is not private towards anyone who knows the seed"
        )
        beneath = f" {self.record.sentence}" if self.record is not None else ""
        return (
            f"The {self.released} that this run released tell at most epsilon {rounded_up(self.epsilon)} (delta "
            f"{self.delta:g}) about any one {self.unit} under {self.neighbouring}{replace_one}; that holds for the "
            f"whole run, {self.sampler}, and {drawn}.{beneath}"
        )

    def under_ledgers(self) -> Self:
        """Return the guarantee where each site's ledger bounds all runs on its data: other runs are not left out.

        Not for what a server claims to spend, nor where a site has no budget.
        """
        record = None if self.record is None else self.record.under_ledgers()
        left = tuple(each for each in self.excludes if not each.startswith(OTHER_RUNS))
        return replace(self, excludes=left or self.excludes, record=record)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object, the sentence included."""
        shown = asdict(self)
        return shown | {
            "excludes": list(self.excludes),
            "per_client": dict(self.per_client),
            "record": None if self.record is None else self.record.to_dict(),
            "sentence": self.sentence,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Return the guarantee of a JSON object that `to_dict` made."""
        known = {each.name for each in fields(cls)}
        kept = {name: item for name, item in value.items() if name in known}
        record = kept.get("record")
        beneath = None if record is None else cls.from_dict(record)
        return cls(**kept | {"excludes": tuple(kept["excludes"]), "record": beneath})


def record_level(
    plans: Mapping[str, RecordLevelPlan],
    rounds: Mapping[str, int],
    evaluation: EvaluationPlan | None = None,
    *,
    randomness: Randomness = "secret",
    place: Place = "simulation",
    excludes_extra: Sequence[str] = (),
) -> Guarantee:
    """Return the guarantee of sites that each trained so many rounds of their plan; {"A": plan}, {"A": 20}.

    Records of two sites, and a site's train and test records, are disjoint, so they compose in parallel: the largest
    epsilon counts (McSherry 2009, theorem 4). The evaluation counts with all its planned releases; replacing a record
    moves two cells of a histogram, so there its epsilon doubles.
    """
    _check_plans(plans)
    _check_evaluation(evaluation)
    trained = Counter((plan, rounds[name]) for name, plan in plans.items())
    released = 0.0 if evaluation is None or evaluation.epsilon is None else evaluation.epsilon
    spent = {each: max(epsilon, released) for each, epsilon in _epsilons(trained).items()}
    epsilon = max(spent.values())
    if not math.isfinite(epsilon):
        return no_privacy(randomness=randomness, place=place, excludes_extra=excludes_extra)
    return Guarantee(
        epsilon=epsilon,
        delta=max(plan.delta for plan in plans.values()),
        unit="record",
        neighbouring=_ZERO_OUT,
        sampler=_sampler(trained),
        randomness=randomness,
        trust=_TRUST[place],
        excludes=(*ALWAYS_EXCLUDED, *excludes_extra),
        replace_one_epsilon=finite(max(2 * released, _replace_one(trained))),
        per_client={name: spent[plan, rounds[name]] for name, plan in plans.items()}
        if len(plans) <= LISTED_CLIENTS
        else _quantiles([(spent[each], count) for each, count in trained.items()]),
    )


def no_privacy(
    *, randomness: Randomness = "secret", place: Place = "simulation", excludes_extra: Sequence[str] = ()
) -> Guarantee:
    """Return the guarantee of a run whose model and metrics no mechanism covers."""
    return Guarantee(
        epsilon=None,
        delta=None,
        unit="none",
        neighbouring="none",
        sampler="none",
        randomness=randomness,
        trust=_TRUST[place]
        if place == "simulation"
        else "records stay at their sites, but the server and whoever gets the model see what they reveal",
        excludes=("everything: no mechanism bounds what the result tells about a record", *excludes_extra),
    )


def finite(epsilon: float) -> float | None:
    """Return a figure, or None where there is none: then nothing is promised, and nothing is said of it."""
    return epsilon if math.isfinite(epsilon) else None


def rounded_up(value: float) -> str:
    """Return the figure with four significant digits, never below the value; "2" for 1.99981."""
    if value == 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / step - 1e-9) * step:.4g}"


Trained = tuple["RecordLevelPlan", int]
"""A plan, and the rounds that clients trained under it."""


def _epsilons(trained: Iterable[Trained]) -> dict[Trained, float]:
    counts: dict[RecordLevelPlan, list[int]] = {}
    for plan, count in sorted(trained, key=lambda each: each[1]):
        counts.setdefault(plan, []).append(count)
    return {
        (plan, count): epsilon
        for plan, each in counts.items()
        for count, epsilon in zip(each, accounting.epsilons(plan, each), strict=True)
    }


def _replace_one(trained: Iterable[Trained]) -> float:
    most: dict[RecordLevelPlan, int] = {}
    for plan, count in trained:
        most[plan] = max(most.get(plan, 0), count)
    # The second figure of many unequal sites may come from the wider interval: also a bound, at once.
    interval = accounting.SHOWN if len(most) <= 8 else accounting.CALIBRATING
    return max(
        accounting.epsilon(
            sampling_rate=plan.accounted_rate,
            noise_multiplier=plan.noise_multiplier,
            steps=plan.accounted_steps(count),
            delta=plan.delta,
            relation="replace-one",
            interval=interval,
        )
        for plan, count in most.items()
    )


def _sampler(trained: Iterable[Trained]) -> str:
    trained = list(trained)
    rates = [plan.sampling_rate for plan, _ in trained]
    steps = _range([plan.steps(count) for plan, count in trained])
    how = (
        "all records in every step"
        if min(rates) == 1
        else f"each record in a step's batch with probability {_range(rates)} (Poisson sampling)"
    )
    return f"{max(count for _, count in trained)} rounds with {steps} steps a site and {how}"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low} to {high}"


def _quantiles(values: Iterable[tuple[float, int]]) -> dict[str, float]:
    """Return those of values that so many clients each have."""
    ordered = sorted(values)
    ends = list(accumulate(count for _, count in ordered))

    # The next value above, never an interpolation: each figure is some client's own.
    def at(share: float) -> float:
        return ordered[bisect_right(ends, math.ceil(share * (ends[-1] - 1)))][0]

    return {"min": at(0), "p25": at(0.25), "median": at(0.5), "p75": at(0.75), "max": at(1)}


def _check_plans(plans: Mapping[str, RecordLevelPlan]) -> None:
    if not plans:
        raise ValueError("plans: at least one client must have a plan; use no_privacy() where none has")


def _check_evaluation(evaluation: EvaluationPlan | None) -> None:
    if evaluation is not None and evaluation.epsilon is None:
        raise ValueError("evaluation.epsilon = None: exact counts void a record-level guarantee")


def _check_excludes(excludes: tuple[str, ...]) -> None:
    if not excludes:
        raise ValueError("excludes: a guarantee always leaves something out")


def _check_epsilon(epsilon: float | None, unit: Unit) -> None:
    if (epsilon is None) != (unit == "none"):
        raise ValueError(f"epsilon = {epsilon}: goes with unit none exactly if it is None, not with {unit}")
    if epsilon is not None and not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon = {epsilon}: must be finite and at least 0")
