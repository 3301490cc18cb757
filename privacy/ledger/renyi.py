"""Rényi costs of events, which add up whatever is chosen along the way, and the epsilon that they come to.

NumPy is imported only for what is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from .events import Claimed, DiscreteLaplace, Event, Gaussian, SampledGaussian

Counts = Mapping[Event, int]

ORDERS = (2, 3, 5, 8, 13, 24, 48, 128, 512)
"""Rényi orders, fixed for ever: a filter whose orders were chosen after seeing results would be void. Whole numbers,
because the series for others does not converge for small noise."""
_ROUNDING_OF_A_STEP = 1e-15
# Beyond these, squares and logarithms leave what floats can hold.
_LEAST_NOISE, _MOST_NOISE, _LEAST_RATE, LEAST_DELTA = 1e-6, 1e7, 1e-12, 1e-300


def renyi_costs(counts: Counts) -> list[float]:
    """Return the Rényi costs of events at each of ORDERS; infinite where an event has none."""
    curves = [(_curve(event), times) for event, times in computable(counts).items()]
    return [added([curve[place] * times for curve, times in curves]) for place in range(len(ORDERS))]


def converted(costs: list[float], delta: float) -> float:
    """Rényi costs at ORDERS to epsilon (Canonne, Kamath and Steinke 2020, proposition 12)."""
    if not any(costs):
        return 0.0
    if delta < LEAST_DELTA / len(ORDERS):
        return math.inf
    found = [
        cost + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        for order, cost in zip(ORDERS, costs, strict=True)
    ]
    return max(0.0, min(found))


@lru_cache(maxsize=1024)
def _curve(event: Event) -> tuple[float, ...]:
    """Return the Rényi cost of one event at each of ORDERS."""
    if isinstance(event, Claimed):
        return (math.inf,) * len(ORDERS)
    if isinstance(event, DiscreteLaplace):
        return tuple(_pure(event.cost, order) for order in ORDERS)
    if event.noise_multiplier == 0:
        return (math.inf,) * len(ORDERS)
    moved = 4 if event.relation == "replace-one" else 1
    unamplified = [event.steps * moved * order / (2 * event.noise_multiplier**2) for order in ORDERS]
    # No Rényi bound is known to dp-accounting for replace-one: there the bound without amplification stands.
    if isinstance(event, Gaussian) or event.sampling_rate == 1 or event.relation == "replace-one":
        return tuple(unamplified)
    if event.sampling_rate == 0:
        return (0.0,) * len(ORDERS)
    amplified = _sampled(event.sampling_rate, event.noise_multiplier, event.steps)
    return tuple(min(pair) for pair in zip(amplified, unamplified, strict=True))


def _sampled(sampling_rate: float, noise_multiplier: float, steps: int) -> list[float]:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    renyi = RdpAccountant(orders=list(ORDERS), neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    renyi.compose(PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier)), steps)
    # What rounding may have taken from the cost of a step, which is the logarithm of a number near 1.
    return [max(0.0, float(each)) + _ROUNDING_OF_A_STEP * steps for each in renyi.rdp]


def _pure(epsilon: float, order: int) -> float:
    """Rényi divergence of randomized response, the worst of all epsilon-DP (Kairouz et al. 2015, theorem 3.1)."""
    log_p = -math.log1p(math.exp(-epsilon))
    log_q = log_p - epsilon
    high, low = order * log_p + (1 - order) * log_q, order * log_q + (1 - order) * log_p
    return min(epsilon, max(0.0, (high + math.log1p(math.exp(low - high))) / (order - 1)))


def added(values: list[float]) -> float:
    """Return the exact sum; infinite beyond the largest float, where fsum raises."""
    return math.inf if math.isinf(sum(values)) else math.fsum(values)


def computable(counts: Counts) -> dict[Event, int]:
    """Return the events as accountants can compute them: with as much noise and as small a rate as they can take."""
    found: dict[Event, int] = {}
    for event, times in counts.items():
        if isinstance(event, SampledGaussian | Gaussian):
            noise = event.noise_multiplier
            event = replace(event, noise_multiplier=min(noise, _MOST_NOISE) if noise >= _LEAST_NOISE else 0.0)
        if isinstance(event, SampledGaussian):
            event = replace(event, sampling_rate=max(event.sampling_rate, _LEAST_RATE) if event.sampling_rate else 0.0)
        found[event] = found.get(event, 0) + times
    return found
