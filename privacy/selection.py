"""The price of choosing the best of a random number of runs, of which only the chosen one is released.

Papernot and Steinke 2022, "Hyperparameter tuning with Rényi differential privacy" (ICLR 2022): draw a number of runs K
that does not depend on the data, run a mechanism Q that often, and release the result that a score puts first. The
score is part of the result (or follows from it and public data). For neighbours with results Q and Q' this releases
A(y) = Q(y) h(y), where h(y) is the mean over t in [0, 1] of f'(q_t), q_t = Q(below y) + t Q(y), and f(x) = E x^K; with
probability f(0) = P(K = 0) nothing is released. Since (a, b) -> a^λ b^(1-λ) is jointly convex,

    exp((λ-1) D_λ(A, A')) <= f(0) + exp((λ-1) D_λ(Q, Q')) · max over q, q' of f'(q)^λ f'(q')^(1-λ)        (lemma 7)

where 1 - q and 1 - q' are the probabilities of one and the same event under Q and Q', which bounds one by the other:

- *By the divergence of an order μ >= 1*: 1 - q' <= (exp(D_μ) (1 - q))^(1-1/μ). The truncated negative binomial
  distribution has f(0) = 0 and f'(x) = E(K) (g / (1 - (1-g) x))^(η+1), g its gamma. By Jensen's inequality
  g + (1-g) (1-q') <= exp((1-1/μ) D_μ) (g + (1-g) (1-q))^(1-1/μ), and the last bracket is at least g. So
  D_λ(A, A') <= D_λ + (1+η) ((1-1/μ) D_μ + log(1/g) / μ) + log E(K) / (λ-1)                            (theorem 2)
- *By (log(λ/(λ-1)), d)-differential privacy*: (1 - q') - λ/(λ-1) (1 - q) <= d. A Poisson number of mean N has
  f'(x) = N exp(N (x-1)), so exp((λ-1) D_λ(A, A')) <= exp(-N) + N exp((λ-1) (D_λ + N d))                (theorem 6)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Distribution = Literal["logarithmic", "geometric", "truncated negative binomial", "Poisson"]

# Where nothing is amplified any order has a closed form; sampled Gaussians have one for whole orders.
_ANY = tuple(1 + 2 ** (power / 8) for power in range(-48, 97))
_WHOLE = (*range(2, 65), *(round(2 ** (power / 4)) for power in range(25, 41)))
# Of a pure mechanism the largest orders count.
_PURE = (*_ANY, *(2.0**power for power in range(13, 50)))


@dataclass(frozen=True, kw_only=True)
class Repetitions:
    """The random number of runs: truncated negative binomial of a mean and a shape eta, or (shape infinity) Poisson.

    Shape 0 is the logarithmic, 1 the geometric distribution, all from 1 on; a Poisson number may be 0.
    Errors: ValueError for a mean that is no whole number from 1 on, or a shape below 0.
    """

    mean: int
    shape: float

    def __post_init__(self) -> None:
        if isinstance(self.mean, bool) or not isinstance(self.mean, int) or self.mean < 1:
            raise ValueError(f"mean = {self.mean}: must be a whole number, at least 1")
        if not self.shape >= 0:
            raise ValueError(f"shape = {self.shape}: must be at least 0")

    @property
    def distribution(self) -> Distribution:
        """The name under which the distribution is known."""
        named: dict[float, Distribution] = {0.0: "logarithmic", 1.0: "geometric", math.inf: "Poisson"}
        return named.get(self.shape, "truncated negative binomial")

    @property
    def parameter(self) -> float:
        """The parameter gamma of their definition 1 (success probability of the geometric), or the Poisson mean."""
        return self.mean if math.isinf(self.shape) else _gamma(self.mean, self.shape)

    def probability(self, runs: int) -> float:
        """Return the probability of exactly so many runs."""
        if runs < (1 if math.isfinite(self.shape) else 0):
            return 0.0
        if math.isinf(self.shape):
            return math.exp(runs * math.log(self.mean) - self.mean - math.lgamma(runs + 1))
        gamma, eta = self.parameter, self.shape
        if gamma == 1:
            return float(runs == 1)
        if eta == 0:
            return math.exp(runs * math.log1p(-gamma)) / (runs * -math.log(gamma))
        ways = math.lgamma(runs + eta) - math.lgamma(runs + 1) - math.lgamma(eta)
        return math.exp(runs * math.log1p(-gamma) + ways) / math.expm1(-eta * math.log(gamma))

    @property
    def median(self) -> int:
        """The least number of runs that is exceeded at most half of the time."""
        if math.isinf(self.shape):
            # Choi 1994: within log 2 below and 1/3 above the mean, so a whole mean itself.
            return self.mean
        if self.shape == 1 and self.mean > 1:
            return math.ceil(math.log(2) / -math.log1p(-self.parameter) - 1e-9)
        runs, below = 0, 0.0
        while below < 0.5 - 1e-12:
            runs += 1
            below += self.probability(runs)
        return runs


@dataclass(frozen=True, kw_only=True)
class RenyiCurve:
    """The Rényi divergences of one whole run, `costs[i]` at `orders[i]` above 1, in both directions of a neighbour.

    `distance` bounds the total variation between the run's real noise and the noise that the costs are those of.
    """

    orders: tuple[float, ...]
    costs: tuple[float, ...]
    distance: float = 0.0

    def __post_init__(self) -> None:
        if len(self.orders) != len(self.costs) or not self.orders or min(self.orders) <= 1:
            raise ValueError("orders: must all lie above 1, with one cost each")


@lru_cache(maxsize=256)
def gaussian_run(*, sampling_rate: float, noise_multiplier: float, steps: int, distance: float = 0.0) -> RenyiCurve:
    """Return the curve of `steps` Poisson-sampled Gaussian sums under zero-out; discrete ones have none above it.

    Without sampling order · steps / (2 sigma²); sampled, that or Mironov, Talwar and Zhang 2019 (`dp-accounting`).
    """
    if not (0 < sampling_rate <= 1 and noise_multiplier > 0 and steps >= 1):
        raise ValueError("gaussian_run: a rate in (0, 1], noise and at least one step are needed")
    orders = _ANY if sampling_rate == 1 else tuple(float(order) for order in _WHOLE)
    # Divided twice, since the square of the least noise that there is would be 0.
    costs = [order / 2 * (math.sqrt(steps) / noise_multiplier) ** 2 for order in orders]
    if sampling_rate < 1:
        costs = [min(pair) for pair in zip(costs, _sampled(sampling_rate, noise_multiplier, steps), strict=True)]
    return RenyiCurve(orders=orders, costs=tuple(costs), distance=distance)


def pure_run(*, epsilon: float, releases: int = 1) -> RenyiCurve:
    """Return the curve of `releases` pure mechanisms of `epsilon` each, such as histograms with discrete Laplace noise.

    That of randomized response, the worst of all (Kairouz, Oh and Viswanath 2015) and what this noise comes to: between
    two neighbouring counts the privacy loss is epsilon or -epsilon.
    """
    if not (math.isfinite(epsilon) and epsilon > 0 and releases >= 1):
        raise ValueError(f"epsilon = {epsilon}, releases = {releases}: must be above 0, and at least 1")
    return RenyiCurve(orders=_PURE, costs=tuple(releases * _randomized_response(epsilon, order) for order in _PURE))


def selected(run: RenyiCurve, repetitions: Repetitions) -> RenyiCurve:
    """Return the curve of the best of K runs; every one of them must have this curve or a lower one."""
    log_mean = math.log(repetitions.mean)
    if math.isinf(repetitions.shape):
        costs = [
            _poisson(run, order, cost, repetitions.mean) for order, cost in zip(run.orders, run.costs, strict=True)
        ]
    else:
        log_inverse = -math.log(repetitions.parameter)
        # At order 1 the divergence does not count at all.
        others = [
            (1 - 1 / order) * cost + log_inverse / order for order, cost in zip(run.orders, run.costs, strict=True)
        ]
        more = (1 + repetitions.shape) * min(log_inverse, *others)
        costs = [cost + more + log_mean / (order - 1) for order, cost in zip(run.orders, run.costs, strict=True)]
    # Only the noise of the runs that were made is unlike what is assumed: on average `mean` of them.
    return RenyiCurve(orders=run.orders, costs=tuple(costs), distance=repetitions.mean * run.distance)


def epsilon(curve: RenyiCurve, delta: float) -> float:
    """Return the least epsilon at delta over all orders (Canonne, Kamath and Steinke 2020, proposition 12).

    Infinite where no bound holds.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}: must lie between 0 and 1")
    # A distance T turns (epsilon, delta) into (epsilon, delta + (1 + exp(epsilon)) T).
    aside = 1e-9 * delta if curve.distance else 0.0
    log_delta = math.log(delta - aside)
    found = [
        cost + math.log1p(-1 / order) - (log_delta + math.log(order)) / (order - 1)
        for order, cost in zip(curve.orders, curve.costs, strict=True)
    ]
    least = max(0.0, min(found))
    if aside and not (least < 700 and (1 + math.exp(least)) * curve.distance <= aside):
        return math.inf
    return least


def choose(mean: int, runs: Sequence[RenyiCurve], delta: float) -> dict[Repetitions, float]:
    """Return the epsilon of the best of K runs for each named distribution of K, the least epsilon first.

    A record is in one of `runs` (of its site, trained on or tested with), so the largest epsilon of these counts.
    """
    priced = {}
    for shape in (0.0, 1.0, math.inf):
        repetitions = Repetitions(mean=mean, shape=shape)
        priced[repetitions] = max(epsilon(selected(run, repetitions), delta) for run in dict.fromkeys(runs))
    return dict(sorted(priced.items(), key=lambda item: item[1]))


def _poisson(run: RenyiCurve, order: float, cost: float, mean: int) -> float:
    failure = _delta(run, -math.log1p(-1 / order))
    some = math.log(mean) + (order - 1) * (cost + mean * failure)
    # log(exp(-mean) + exp(some)): none at all, or some.
    return (some + math.log1p(math.exp(min(0.0, -mean - some)))) / (order - 1)


def _delta(run: RenyiCurve, epsilon: float) -> float:
    """Return a delta at epsilon: the same proposition solved for it, or the total variation distance.

    That is at most sqrt(1 - exp(-D)) for any order's D (Bretagnolle and Huber 1979).
    """
    found = [
        (order - 1) * (cost - epsilon + math.log1p(-1 / order)) - math.log(order)
        for order, cost in zip(run.orders, run.costs, strict=True)
    ]
    return min(1.0, math.exp(min(0.0, *found)), math.sqrt(-math.expm1(-min(run.costs))))


@lru_cache(maxsize=64)
def _gamma(mean: int, shape: float) -> float:
    """Return the gamma whose distribution has this mean, and not above it: the bounds fall as it grows."""
    from scipy.optimize import brentq

    if mean == 1:
        return 1.0
    if shape == 1:
        return 1 / mean

    def excess(log_inverse: float) -> float:
        # log of mean = eta (1/gamma - 1) / (1 - gamma^eta), whose limit at eta = 0 has log(1/gamma) below.
        below = -math.expm1(-shape * log_inverse) / shape if shape else log_inverse
        return log_inverse + math.log(-math.expm1(-log_inverse)) - math.log(below) - math.log(mean)

    # The mean is at most (shape + 1) / gamma, and at least 1 / gamma over 1 + log(1 / gamma).
    upper = 2 * (math.log(mean) + math.log1p(shape)) + 10
    log_inverse = brentq(excess, 1e-12, upper, xtol=1e-14, rtol=1e-14)
    return math.exp(-float(log_inverse) * (1 + 1e-12) - 1e-12)


def _sampled(sampling_rate: float, noise_multiplier: float, steps: int) -> list[float]:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    renyi = RdpAccountant(orders=list(_WHOLE), neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    renyi.compose(PoissonSampledDpEvent(sampling_rate, GaussianDpEvent(noise_multiplier)), steps)
    return [float(each) for each in renyi.rdp]


def _randomized_response(epsilon: float, order: float) -> float:
    log_high = -math.log1p(math.exp(-epsilon))
    log_low = log_high - epsilon
    right, wrong = order * log_high + (1 - order) * log_low, order * log_low + (1 - order) * log_high
    return min(epsilon, max(0.0, (right + math.log1p(math.exp(wrong - right))) / (order - 1)))
