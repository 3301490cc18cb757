"""A second and a third opinion on epsilon: other libraries' accountants, told what was done."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from .finding import Finding, figure

PRV_ERROR = 0.01
"""Opacus' PRV accountant promises an epsilon within this of the truth (Gopi, Lee and Wutschitz 2021, theorem 5.1)."""
_ROUNDED_UP = 0.01
"""What the accountant of record may add by rounding up: the PLD's interval of 1e-4 makes less."""
_MOST_MESHES = 5e5


@dataclass(frozen=True, kw_only=True)
class Told:
    """What was done: so many steps at a rate with noise; `shown` is the epsilon that is claimed for it.

    `bounded` says that the claim may lie above the truth, `exact` that it comes from no looser accountant.
    """

    owner: str
    rate: float
    noise: float
    steps: int
    delta: float
    shown: float
    exact: bool = True
    bounded: bool = False


def opinions(told: list[Told]) -> Finding:
    """Return whether each epsilon is at most Rényi accounting's bound, and within PRV accounting's error of its figure.

    Rényi accounting (Mironov, Talwar and Zhang 2019) is an upper bound of the truth, and looser than a privacy loss
    distribution, so a figure above it is wrong. PRV accounting is Opacus' own code: its upper end is at most twice its
    error above the truth, so a figure below that, or more than one hundredth above it, is wrong. Where nothing is
    amplified the Gaussian's privacy loss is integrated instead.
    """
    rows = []
    for each in told:
        above = _renyi(each.rate, each.noise, each.steps, each.delta)
        second = _second(each.rate, each.noise, each.steps, each.delta, reach=above)
        row = {"site": each.owner, "shown": figure(each.shown), "renyi": figure(above)}
        rows.append(row | ({} if second is None else {"second": second}))
        low = -math.inf if second is None else second - 2 * PRV_ERROR
        loose = second is None or each.bounded or not each.exact
        high = math.inf if loose or second is None else second * (1 + _ROUNDED_UP) + PRV_ERROR
        if not each.bounded:
            high = min(high, above * (1 + 1e-6) + 1e-6)
        if not low <= each.shown <= high:
            other = f"Opacus' PRV {second:.4g}, " if second is not None else ""
            return Finding(
                name="accountants",
                passed=False,
                sentence=f"epsilon {each.shown:.4g} of {each.owner} is not what others find: {other}"
                f"Rényi {above:.4g} at most",
                figures={"sites": rows},
            )
    widest = max(rows, key=lambda row: float(row["shown"]))
    third = f", {widest['second']:.3f} by another" if "second" in widest else ""
    return Finding(
        name="accountants",
        passed=True,
        sentence=f"epsilon {float(widest['shown']):.4g} of {widest['site']} is confirmed: "
        f"at most {float(widest['renyi']):.4g} by Rényi accounting{third}",
        figures={"sites": rows},
    )


def _renyi(rate: float, noise: float, steps: int, delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    # Whole orders only: the series for fractional ones does not converge for small noise.
    renyi = RdpAccountant(orders=[*range(2, 65), *range(72, 129, 8), 192, 256, 512, 1024])
    gaussian = GaussianDpEvent(noise)
    renyi.compose(gaussian if rate == 1 else PoissonSampledDpEvent(rate, gaussian), steps)
    return float(renyi.get_epsilon(delta))


def _second(rate: float, noise: float, steps: int, delta: float, *, reach: float) -> float | None:
    """Return a figure that was not made by dp-accounting, None where it would take too long."""
    if rate == 1:
        return _integrated(math.sqrt(steps) / noise, delta)
    # The mesh that Opacus' PRV accountant would lay over the losses, from its own rule.
    mesh = PRV_ERROR / math.sqrt(steps * math.log(12_000 / delta) / 2)
    if not 2 * (reach + 3) / mesh < _MOST_MESHES:
        return None
    from opacus.accountants import PRVAccountant

    prv = PRVAccountant()
    prv.history = [(noise, rate, steps)]
    try:
        with warnings.catch_warnings():
            # How it finds its mesh concerns nobody.
            warnings.simplefilter("ignore")
            return float(prv.get_epsilon(delta, eps_error=PRV_ERROR))
    except (ValueError, RuntimeError, OverflowError, MemoryError):
        return None


def _integrated(mu: float, delta: float) -> float:
    """Return epsilon of a Gaussian shift, by integrating E[(1 - e^(eps - loss))⁺] with loss ~ N(mu²/2, mu²)."""
    from scipy import integrate, optimize, stats

    def excess(epsilon: float) -> float:
        centre = epsilon - mu**2 / 2
        start = centre / mu

        def weighed(x: float) -> float:
            return -math.expm1(centre - mu * x) * float(stats.norm.pdf(x))

        value, _ = integrate.quad(weighed, start, max(start, 0) + 12, limit=200)
        return float(value) - delta

    if excess(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, mu**2 / 2 + 12 * mu + 1))
