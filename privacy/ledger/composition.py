"""Epsilon of a multiset of events that was fixed in advance.

Four bounds, of which the least counts: basic composition where each event has an epsilon of its own, the closed form
where all are Gaussian, privacy loss distributions of up to DISTINCT different events (as privacy/accounting.py), and
Rényi accounting, which also takes over where distributions would be too long. No figure takes longer than about two
seconds, and none fails: an event beyond what accountants can compute counts as one with less noise that they can. NumPy
is imported only for what is sampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from .. import accounting
from .events import Claimed, DiscreteLaplace, Event, Gaussian, SampledGaussian
from .renyi import LEAST_DELTA, Counts, added, computable, converted, renyi_costs

Method = Literal["none", "sum", "closed form", "PLD", "RDP", "RDP filter", "claimed"]

DISTINCT = 3
"""With more distinct events in one plan, Rényi accounting takes the place of the distributions."""
LONGEST = 300_000
"""With more sampled steps in one plan likewise: a distribution of them takes seconds, and of 10^7 minutes."""
ROUNDING = 1e-9
"""Share of epsilon that sums of floats may exceed it by: 3 · (1 / 3) epsilon is the whole, not more."""

_LARGEST_NUMERIC = 20.0


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An upper bound of epsilon at the budget's delta, and how it was found."""

    epsilon: float
    method: Method

    def within(self, epsilon: float) -> bool:
        """Return whether the figure keeps within a budget."""
        return self.epsilon <= epsilon * (1 + ROUNDING)


def composed(counts: Counts, delta: float, *, interval: float = accounting.SHOWN) -> Figure:
    """Return epsilon of a multiset of events that was fixed in advance, in any order of drawing.

    A wider `interval` of the distributions is quicker, and a bound too.
    """
    drawn = {event: times for event, times in positive(counts).items() if not _is_empty(event)}
    return _composed(frozenset(computable(drawn).items()), delta, interval)


@lru_cache(maxsize=256)
def _composed(items: frozenset[tuple[Event, int]], delta: float, interval: float) -> Figure:
    counts = dict(items)
    if not counts:
        return Figure(epsilon=0.0, method="none")
    added = summed(counts, delta)
    if delta < LEAST_DELTA or any(isinstance(event, Claimed) for event in counts):
        return added
    renyi = Figure(epsilon=converted(renyi_costs(counts), delta), method="RDP")
    if _steps(counts) > LONGEST:
        numeric = [_unamplified(counts, delta)]
    else:
        # Far above any budget that means something, distributions are long and Rényi accounting is as good.
        close = renyi.epsilon <= _LARGEST_NUMERIC or len(counts) == 1
        numeric = [_numeric(counts, delta, interval)] if close else []
    return min(added, _closed_form(counts, delta), *numeric, renyi, key=lambda each: each.epsilon)


def _steps(counts: Counts) -> int:
    sampled = (event for event in counts if isinstance(event, SampledGaussian) and event.sampling_rate < 1)
    return sum(event.steps * counts[event] for event in sampled)


def summed(counts: Counts, delta: float) -> Figure:
    """Basic composition, where every event has an epsilon of its own; else infinite."""
    claimed = {event: times for event, times in counts.items() if isinstance(event, Claimed)}
    pure = {event: times for event, times in counts.items() if isinstance(event, DiscreteLaplace)}
    deltas = math.fsum(event.delta * times for event, times in claimed.items())
    if len(claimed) + len(pure) < len(counts) or deltas > delta * (1 + ROUNDING):
        return Figure(epsilon=math.inf, method="claimed" if claimed else "sum")
    epsilons = [event.epsilon * times for event, times in claimed.items()]
    epsilons += [event.cost * times for event, times in pure.items()]
    return Figure(epsilon=added(epsilons), method="claimed" if claimed else "sum")


def _closed_form(counts: Counts, delta: float) -> Figure:
    """Gaussian mechanisms alone: their squared inverse noise multipliers add up (Dong et al. 2022, corollary 3.3)."""
    plain = [_as_gaussian(event) for event in counts]
    if not all(plain):
        return Figure(epsilon=math.inf, method="closed form")
    ((relation, *others),) = [{each.relation for each in plain if each}]
    if others:
        raise ValueError("events of two neighbouring relations do not compose")
    return Figure(epsilon=_gaussians(counts, relation, delta), method="closed form")


def _unamplified(counts: Counts, delta: float) -> Figure:
    """The closed form of the Gaussian mechanisms without their sampling, which only ever helps."""
    whole: dict[Event, int] = {}
    for event, times in counts.items():
        if not isinstance(event, SampledGaussian | Gaussian):
            return Figure(epsilon=math.inf, method="closed form")
        plain = _as_gaussian(replace(event, sampling_rate=1.0) if isinstance(event, SampledGaussian) else event)
        assert plain is not None
        whole[plain] = whole.get(plain, 0) + times
    return _closed_form(whole, delta)


def _gaussians(counts: Counts, relation: accounting.Relation, delta: float) -> float:
    steps = [(each.noise_multiplier, each.steps * counts[event]) for event in counts if (each := _as_gaussian(event))]
    if len(steps) == 1:
        # In the same words as a plan's own figure, so that both are the same number.
        (noise_multiplier, count), *_ = steps
    elif any(sigma == 0 for sigma, _ in steps):
        return math.inf
    else:
        noise_multiplier, count = _joint(steps), 1
    return accounting.epsilon(
        sampling_rate=1.0, noise_multiplier=noise_multiplier, steps=count, delta=delta, relation=relation
    )


def _joint(steps: list[tuple[float, int]]) -> float:
    return 1 / math.sqrt(math.fsum(count / sigma**2 for sigma, count in steps))


def _numeric(counts: Counts, delta: float, interval: float) -> Figure:
    """The figure from privacy loss distributions; infinite where they would be too long or too many."""
    if len(counts) > DISTINCT:
        return Figure(epsilon=math.inf, method="PLD")
    alone = [_alone(event, times, delta, interval) for event, times in counts.items()]
    if len(counts) == 1:
        return alone[0]
    sampled = [event for event in counts if isinstance(event, SampledGaussian) and event.sampling_rate < 1]
    too_long = any(
        accounting.accountant(
            sampling_rate=event.sampling_rate,
            noise_multiplier=event.noise_multiplier,
            steps=event.steps * counts[event],
        )
        == "RDP"
        for event in sampled
    )
    if not sampled or too_long or not all(math.isfinite(each.epsilon) for each in alone):
        return Figure(epsilon=math.inf, method="PLD")
    # Another interval when an event joins could let the figure fall by a hair: each event alone bounds it from below.
    return Figure(epsilon=max(_distributions(counts, delta), *(each.epsilon for each in alone)), method="PLD")


def _alone(event: Event, times: int, delta: float, interval: float) -> Figure:
    if isinstance(event, DiscreteLaplace | Claimed):
        return summed({event: times}, delta)
    plain = _as_gaussian(event)
    if plain is not None:
        return Figure(epsilon=_gaussians({plain: times}, plain.relation, delta), method="closed form")
    assert isinstance(event, SampledGaussian)
    steps = event.steps * times
    epsilon = accounting.epsilon(
        sampling_rate=event.sampling_rate,
        noise_multiplier=event.noise_multiplier,
        steps=steps,
        delta=delta,
        relation=event.relation,
        interval=interval,
    )
    how = accounting.accountant(sampling_rate=event.sampling_rate, noise_multiplier=event.noise_multiplier, steps=steps)
    return Figure(epsilon=epsilon, method="RDP" if how == "RDP" else "PLD")


def _distributions(counts: Counts, delta: float) -> float:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import common
    from dp_accounting.pld import privacy_loss_distribution as pld

    relations = {
        "zero-out": NeighboringRelation.REPLACE_SPECIAL,
        "add-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace-one": NeighboringRelation.REPLACE_ONE,
    }
    ((relation, *others),) = [{event.relation for event in counts}]
    if others:
        raise ValueError("events of two neighbouring relations do not compose")
    plain = [(each.noise_multiplier, each.steps * counts[event]) for event in counts if (each := _as_gaussian(event))]
    gaussians = [(1.0, _joint(plain), 1)] if plain else []
    for event, times in counts.items():
        if isinstance(event, SampledGaussian) and event.sampling_rate < 1:
            gaussians.append((event.sampling_rate, event.noise_multiplier, event.steps * times))
    widest = max(1e-5 * (10 / sigma + 0.5 / sigma**2) for _, sigma, _ in gaussians)
    interval = max(min(accounting.CALIBRATING, *(0.1 * q / sigma for q, sigma, _ in gaussians)), widest)
    whole = pld.identity(value_discretization_interval=interval)
    for q, sigma, count in gaussians:
        step = pld.from_gaussian_mechanism(
            standard_deviation=sigma,
            sampling_prob=q,
            value_discretization_interval=interval,
            neighboring_relation=relations[relation],
        )
        whole = whole.compose(step.self_compose(count))
    for event, times in counts.items():
        if isinstance(event, DiscreteLaplace):
            pure = common.DifferentialPrivacyParameters(event.cost, 0.0)
            whole = whole.compose(pld.from_privacy_parameters(pure, interval).self_compose(times))
    return float(whole.get_epsilon_for_delta(delta))


def _is_empty(event: Event) -> bool:
    return isinstance(event, SampledGaussian) and event.sampling_rate == 0


def _as_gaussian(event: Event) -> Gaussian | None:
    if isinstance(event, SampledGaussian) and event.sampling_rate == 1:
        return Gaussian(
            noise_multiplier=event.noise_multiplier,
            steps=event.steps,
            relation=event.relation,
            delta=event.delta,
            part=event.part,
        )
    return event if isinstance(event, Gaussian) else None


def positive(counts: Counts) -> dict[Event, int]:
    """Return the events that were drawn at all."""
    return {event: times for event, times in counts.items() if times > 0}
