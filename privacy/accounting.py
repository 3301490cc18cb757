"""Epsilon of the Poisson-sampled Gaussian mechanism, and the noise for an epsilon.

Accountant of record: privacy loss distributions (Koskela, Jälkö and Honkela 2020; connect the dots, Doroshenko et al.
2022) of `dp-accounting`, rounded so that no figure lies below the truth. Where nothing is amplified the Gaussian has a
closed form (Balle and Wang 2018, theorem 8). Where the distribution would be too long (an epsilon above a hundred)
Rényi accounting takes over (Mironov, Talwar and Zhang 2019). `accountant` says which one a figure comes from.

Neighbouring relations: "zero-out" replaces a record by one that contributes nothing, with the number of records
public; "add-remove" has the same epsilon; "replace-one" replaces a record by any other, about twice the epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

from ..core.errors import InputError

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    from .mechanism import RecordLevelPlan

Relation = Literal["zero-out", "add-remove", "replace-one"]
Accountant = Literal["none", "closed form", "PLD", "RDP"]

SHOWN = 1e-4
"""Interval of the privacy losses for a figure that is shown."""
CALIBRATING = 1e-3
"""Interval of the privacy losses while noise is searched for, and along a curve."""

_LARGEST_NOISE = 1e7


def accountant(*, sampling_rate: float, noise_multiplier: float, steps: int) -> Accountant:
    """Return which accountant `epsilon` uses: "none" where epsilon is 0 or infinite."""
    if steps == 0 or noise_multiplier == 0 or sampling_rate == 0:
        return "none"
    if sampling_rate == 1:
        return "closed form"
    # Bounds the mean privacy loss of the whole run (chi-squared, and convexity), so the length of its distribution.
    inverse = 1 / noise_multiplier**2
    amplified = sampling_rate**2 * math.expm1(inverse) if inverse < 500 else math.inf
    mean_loss = steps * min(amplified, sampling_rate * inverse / 2)
    return "RDP" if mean_loss > 100 or noise_multiplier < 0.1 else "PLD"


@lru_cache(maxsize=4096)
def epsilon(
    *,
    sampling_rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    relation: Relation = "zero-out",
    interval: float = SHOWN,
) -> float:
    """Return an upper bound of epsilon after `steps` steps; 0 for no step, infinity without noise."""
    _check(sampling_rate=sampling_rate, steps=steps, delta=delta)
    _check_noise(noise_multiplier)
    _check_relation(relation)
    match accountant(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps):
        case "none":
            return 0.0 if steps == 0 or sampling_rate == 0 else math.inf
        case "closed form":
            return _gaussian_epsilon(noise_multiplier / math.sqrt(steps), delta, relation)
        case "RDP":
            unamplified = _gaussian_epsilon(noise_multiplier / math.sqrt(steps), delta, relation)
            # No Rényi bound is known to dp-accounting for replace-one: there the bound without amplification stands.
            if relation == "replace-one":
                return unamplified
            return min(unamplified, _renyi_epsilon(sampling_rate, noise_multiplier, steps, delta))
        case _:
            return _pld_epsilon(sampling_rate, noise_multiplier, steps, delta, relation, interval)


@lru_cache(maxsize=4096)
def noise_multiplier(*, sampling_rate: float, steps: int, epsilon: float, delta: float) -> float:
    """Return the least noise multiplier (to 1e-4 of itself) whose zero-out epsilon after `steps` is within `epsilon`.

    Errors: InputError if no noise reaches it.
    """
    _check(sampling_rate=sampling_rate, steps=steps, delta=delta)
    _check_target(epsilon)
    if steps == 0:
        return 0.0
    if sampling_rate == 1:
        return _rounded_up(_least(lambda sigma: _gaussian_epsilon(sigma, delta), epsilon) * math.sqrt(steps))

    def spent(sigma: float, interval: float = CALIBRATING) -> float:
        # The relation must be said in the same words everywhere, or equal calls miss the cache.
        return _epsilon(sampling_rate, sigma, steps, delta, "zero-out", interval)

    sigma = _rounded_up(_least(spent, epsilon))
    # A finer interval bounds the same truth, but nothing says that it lies below the coarse one at every point.
    while spent(sigma, SHOWN) > epsilon:
        sigma = _rounded_up(sigma * 1.0001)
    return sigma


def epsilons(plan: RecordLevelPlan, rounds: Sequence[int], *, relation: Relation = "zero-out") -> list[float]:
    """Return epsilon after each count of rounds: never falling, never below the truth, the largest count's exact.

    The others come from a coarser interval, within about 1e-3 of `plan.epsilon` or 0.4 %.
    """
    if not rounds:
        return []
    last = max(rounds)
    final = plan.epsilon(last, relation=relation)
    curve: dict[int, float] = {}
    highest = 0.0
    for count in sorted(set(rounds)):
        steps = plan.accounted_steps(count)
        coarse = (
            final
            if count == last
            else _epsilon(plan.accounted_rate, plan.noise_multiplier, steps, plan.delta, relation, CALIBRATING)
        )
        # The truth never falls, so the exact last value bounds all before it.
        highest = max(highest, min(coarse, final))
        curve[count] = highest
    return [curve[count] for count in rounds]


def _epsilon(q: float, sigma: float, steps: int, delta: float, relation: Relation, interval: float) -> float:
    return epsilon(
        sampling_rate=q, noise_multiplier=sigma, steps=steps, delta=delta, relation=relation, interval=interval
    )


def _pld_epsilon(q: float, sigma: float, steps: int, delta: float, relation: Relation, interval: float) -> float:
    # A step's losses spread by about q / sigma: many steps add up what a wider interval rounds away ...
    # ... and reach about 10 / sigma + 1 / (2 sigma^2): small noise would need too many points of a narrow one.
    narrowest = 1e-5 * (10 / sigma + 0.5 / sigma**2)
    interval = max(min(interval, 0.1 * q / sigma), narrowest)
    value = float(_one_step(q, sigma, relation, interval).self_compose(steps).get_epsilon_for_delta(delta))
    if value < 100 * interval and interval > max(narrowest, 1e-7):
        # So small an epsilon would be a product of the rounding.
        return min(value, _pld_epsilon(q, sigma, steps, delta, relation, interval / 10))
    return value


@lru_cache(maxsize=64)
def _one_step(q: float, sigma: float, relation: Relation, interval: float) -> PrivacyLossDistribution:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    relations = {
        "zero-out": NeighboringRelation.REPLACE_SPECIAL,
        "add-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace-one": NeighboringRelation.REPLACE_ONE,
    }
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=sigma,
        sampling_prob=q,
        value_discretization_interval=interval,
        neighboring_relation=relations[relation],
    )


def _renyi_epsilon(q: float, sigma: float, steps: int, delta: float) -> float:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    # Whole orders only: the series for fractional ones does not converge for small noise.
    renyi = RdpAccountant(orders=range(2, 257), neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    renyi.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps)
    return float(renyi.get_epsilon(delta))


def _gaussian_epsilon(sigma: float, delta: float, relation: Relation = "zero-out") -> float:
    """Balle and Wang 2018, theorem 8; sensitivity 1 under zero-out and add-remove, 2 under replace-one."""
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    mu = (2 if relation == "replace-one" else 1) / sigma

    def excess(value: float) -> float:
        high, low = log_ndtr(mu / 2 - value / mu), value + log_ndtr(-mu / 2 - value / mu)
        return float(math.exp(high) * -math.expm1(min(low - high, 0.0)) - delta)

    if excess(0.0) <= 0:
        return 0.0
    upper = 1.0
    while excess(upper) > 0:
        upper *= 2
    root = float(brentq(excess, 0.0, upper, xtol=1e-12, rtol=1e-12))
    return root * (1 + 1e-9) + 1e-9


def _least(spent: Callable[[float], float], target: float) -> float:
    """Return a noise multiplier at most 5e-5 of itself above the least one with spent(sigma) <= target."""
    low, high = 0.5, 1.0
    while spent(high) > target:
        low, high = high, 2 * high
        if high > _LARGEST_NOISE:
            raise InputError(
                "experiment-value",
                f"privacy.epsilon = {target:g}: no noise reaches it in this many steps; give a larger epsilon",
            )
    while low < high and spent(low) <= target:
        low, high = low / 2, low
    # Regula falsi on a scale where epsilon is nearly a line, guarded by bisection (epsilon falls as sigma grows).
    value_low, value_high = spent(low), spent(high)
    while high - low > 5e-5 * high:
        guess = math.sqrt(low * high)
        if math.isfinite(value_low) and 0 < value_high < value_low:
            share = math.log(value_low / target) / math.log(value_low / value_high)
            guess = low * (high / low) ** min(max(share, 0.0), 1.0)
        # A step of 2e-5 beyond the guess makes both ends close in.
        guess = min(max(guess * (1 + 2e-5), low + 0.02 * (high - low)), high - 0.02 * (high - low))
        value = spent(guess)
        if value <= target:
            closer, high, value_high = guess, guess, value
            # The end below is often a hair away: try it, before the interval shrinks from one side alone.
            below = closer * (1 - 4e-5)
            if below > low:
                value = spent(below)
                if value <= target:
                    high, value_high = below, value
                else:
                    low, value_low = below, value
        else:
            low, value_low = guess, value
    return high


def _rounded_up(sigma: float) -> float:
    """Round up to five significant digits, so that the figure does not hang on the last bits of a search."""
    step = 10.0 ** (math.floor(math.log10(sigma)) - 4)
    return round(math.ceil(sigma / step - 1e-9) * step, 12)


def _check(*, sampling_rate: float, steps: int, delta: float) -> None:
    _check_rate(sampling_rate)
    _check_steps(steps)
    _check_delta(delta)


def _check_rate(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"sampling_rate = {value}: must lie in [0, 1]")


def _check_steps(value: int) -> None:
    if value != int(value) or value < 0:
        raise ValueError(f"steps = {value}: must be a whole number, at least 0")


def _check_delta(value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"delta = {value}: must lie between 0 and 1")


def _check_noise(value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"noise_multiplier = {value}: must be finite and at least 0")


def _check_target(value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"epsilon = {value}: must be finite and above 0")


def _check_relation(value: str) -> None:
    if value not in get_args(Relation):
        raise ValueError(f"relation = {value!r}: must be one of {', '.join(get_args(Relation))}")
