"""The discrete Gaussian on the integers: an exact sampler at the speed of a floating-point one, and its epsilon.

N_Z(0, sigma²) gives the integer x a probability proportional to exp(-x² / (2 sigma²)) (Canonne, Kamath and Steinke
2020). Added to an integer sum it leaves no trace of floating point behind (Mironov 2012): the sum, the noise and what
is released are integers, and every one of them has the stated probability.

Setting: clients' vectors are clipped to a norm C and rounded toward zero to integers (`core.ring`), so each moves the
sum by an integer vector s of norm at most C / step; sigma_units = noise_multiplier · C / step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from ..core.keys import Stream
from . import accounting
from .accounting import Relation

LEAST_SIGMA, LARGEST_SIGMA = 2.0**6, 2.0**58
TOTAL_VARIATION = 2.0**-161
"""Distance between the law of one coordinate of `sample` and the discrete Gaussian: at most this."""

_REACH = 15
_COLUMN_BITS, _THRESHOLD_BITS = 11, 52
_COLUMNS = 2**_COLUMN_BITS
_DIGITS = 60
_MARGIN = 2.0**-32
_BLOCK = 2**14


def sample(stream: Stream, sigma: float, count: int) -> NDArray[np.int64]:
    """Return `count` independent draws [count] of the discrete Gaussian; sigma in units of the integers, 2^6 to 2^58.

    Formal guarantee: if the words of the stream are independent and uniform, each draw is within `TOTAL_VARIATION` of
    N_Z(0, sigma²), for the exact rational number that the float `sigma` is. Proof: let w be the power of two with
    64 <= sigma / w < 128, J = ceil(15 sigma / w), g(x) = exp(-x² / (2 sigma²)). With integers S and W_j >= S g(jw) of
    sum 2^63, a proposal takes strip j < J with probability W_j / 2^63 (alias method with integer thresholds of 52
    bits), an offset r uniform in [0, w) (a power of two) and a fair sign, and is x = jw + r or x = -1 - (jw + r): each
    x in [-Jw, Jw) comes from one (j, r, sign). It is accepted if U < p = S g(x) / W_j, for U uniform in [0, 1) with as
    many binary digits as that takes. p <= 1, since |x| >= jw; so accepted ones have the law g(x) on [-Jw, Jw), without
    any error. What is left out has |x| >= 15 sigma: at most 2 exp(-112.5) < 2^-161 of the law, by Chernoff's bound and
    E exp(tX) <= exp(t² sigma² / 2) (the lattice sum of exp(-(n - u)² / (2 sigma²)) is largest at u = 0).

    No rounding touches the law, since U < p is only ever decided where the truth is known. (1) U's leading digits and
    an integer table below the least p of the strip: integers only. (2) Else in float64, if the two differ by more than
    2^-32: with f = |x| / w - j (exact: at most 53 bits) and h = w² / (2 sigma²), p = S g(jw) / W_j · exp(-e) for e =
    f (2j + f) h < 0.25. Roundings u = 2^-53: at most four in e, each factor positive; 2^-58 for Taylor's series after
    the 12th power; 26 in Horner's rule and 13 in its coefficients, all relative to sums below exp(0.25); two for the
    table and its product; one for U. Together below 60 u + 2^-58 < 2^-47, with additions and products as IEEE 754
    defines them and no library's exp. (3) Else (less than one draw in 2^30) in integers, with bounds of exp from
    correctly rounded decimals and more digits of U, until they are apart.

    One call's draws are a function of the stream, sigma and count; two calls for half as many take other bytes. Time
    depends on the draws, as with any rejection. The caller checks that `largest(sigma)` and the sum fit int64.
    Errors: ValueError for a sigma out of range.
    """
    strips = _strips(float(sigma))
    draws = np.empty(count, np.int64)
    # In blocks that stay in the processor's cache.
    for first in range(0, count, _BLOCK):
        block = draws[first : first + _BLOCK]
        filled = 0
        while filled < len(block):
            accepted = _accepted(strips, stream, len(block) - filled)
            block[filled : filled + len(accepted)] = accepted
            filled += len(accepted)
    return draws


def largest(sigma: float) -> int:
    """Return the largest magnitude that `sample` can draw: little more than 15 sigma."""
    strips = _strips(float(sigma))
    return strips.count << strips.width_bits


def epsilon(
    *,
    sampling_rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    sigma_units: float,
    coordinates: int,
    relation: Relation = "add-remove",
) -> float:
    """Return an upper bound of epsilon of `steps` sums of clients, Poisson-sampled at a rate, each noised by `sample`.

    The smaller of two bounds, for sums of `coordinates` integers that one client moves by an integer vector s with
    |s| <= sigma_units / noise_multiplier (twice that under replace-one):

    - *Rounded Gaussian.* Adding round(N(0, sigma²)) to integers is rounding the Gaussian mechanism's result, so every
      figure of `accounting.epsilon` holds for it. `rounding_distance` bounds how far all noise of the run is from its.
    - *Rényi.* For a whole order a the lattice sum of P^a Q^(1-a), P = N_Z(s), Q = N_Z(0), is that of
      exp(-|x - a s|² / (2 sigma²)) times exp(a (a-1) |s|² / (2 sigma²)), and a s is a lattice point: the moment is the
      continuous Gaussian's to the last digit (at any order at most that: Canonne, Kamath and Steinke 2020, proposition
      5). The moment of (1-q) Q + q P against Q is a sum of these (Mironov, Talwar and Zhang 2019, section 3.3). The
      other direction is smaller by their theorem 5, on the lattice too: pair x with s - x, and let A = 1 - q + q P/Q
      at x, B the same at s - x, P/Q >= 1 at x; A >= 1 / B and A - 1 = P/Q (1 - B) give it pair by pair. So the whole
      orders of the sampled Gaussian mechanism carry over.

    A distance T between real and assumed noise of the whole run turns (epsilon, delta) into (epsilon, delta + (1 +
    exp(epsilon)) T), whatever depends on what: `TOTAL_VARIATION` of every draw counts in both bounds.
    Errors: ValueError for values out of range; infinity where no bound holds.
    """
    for name, value in (("sigma_units", sigma_units), ("coordinates", coordinates)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} = {value}: must be finite and above 0")
    common = {"sampling_rate": sampling_rate, "noise_multiplier": noise_multiplier, "steps": steps}
    gaussian = partial(accounting.epsilon, **common, relation=relation)
    if steps == 0 or sampling_rate == 0 or noise_multiplier == 0:
        return gaussian(delta=delta)
    renyi = partial(_renyi_epsilon, sampling_rate, noise_multiplier, steps, relation)
    draws = steps * coordinates
    sampler = draws * TOTAL_VARIATION
    rounding = rounding_distance(sigma_units=sigma_units, draws=draws)
    return min(_despite(gaussian, sampler + rounding, delta), _despite(renyi, sampler, delta))


def rounding_distance(*, sigma_units: float, draws: int) -> float:
    """Return a bound of the total variation distance of `draws` rounded Gaussians to as many discrete ones.

    sqrt(draws) / (15 sigma²), and 1 where sigma < 4. Proof: the ratio of the two laws at n is c E exp(-t² / (2 sigma²))
    cosh(n t / sigma²) for t uniform in [-1/2, 1/2], where c, the lattice sum of the density, is 1 to within
    3 exp(-2 pi² sigma²). It is at least 1 - 1 / (24 sigma²), and for |n| <= 2 sigma², where cosh y - 1 <= 0.55 y², at
    most 1 + 0.55 n² / (12 sigma⁴). So chi-squared, the mean of (ratio - 1)², is at most (1 + 1.21 · 3) / (576 sigma⁴)
    < 0.0081 / sigma⁴, but for the tail and c, which from sigma = 4 on fit between that and 2 / (15² sigma⁴). It bounds
    the Kullback-Leibler divergence, which adds up over draws; Pinsker's inequality gives sqrt(draws · chi-squared / 2).
    """
    return min(1.0, math.sqrt(draws) / (15 * sigma_units**2)) if sigma_units >= 4 else 1.0


def _despite(spent: Callable[..., float], distance: float, delta: float) -> float:
    """Return the least found epsilon whose (1 + exp(epsilon)) · distance fits the part of delta set aside for it."""
    for part in (1e-9, 1e-6, 1e-3, 0.1, 0.5):
        # What is certain to be too little costs no evaluation.
        if 2 * distance <= part * delta:
            value = spent(delta=delta * (1 - part))
            if value < 700 and (1 + math.exp(value)) * distance <= part * delta:
                return value
    return math.inf


def _renyi_epsilon(q: float, noise_multiplier: float, steps: int, relation: Relation, *, delta: float) -> float:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    if relation == "replace-one":
        # Nothing is known of the sampled lattice there; without sampling the shift is twice as long.
        q, noise_multiplier = 1.0, noise_multiplier / 2
    whole = [*range(2, 65), *(round(2 ** (power / 8)) for power in range(49, 97))]
    orders = whole if q < 1 else [1 + 2 ** (power / 16) for power in range(-128, 193)]
    renyi = RdpAccountant(orders=orders, neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    gaussian = GaussianDpEvent(noise_multiplier)
    renyi.compose(gaussian if q == 1 else PoissonSampledDpEvent(q, gaussian), steps)
    return float(renyi.get_epsilon(delta))


@dataclass(frozen=True, kw_only=True)
class _Strips:
    """The tables of one sigma; strips of 2^width_bits integers, arrays [columns]."""

    sigma: Fraction
    width_bits: int
    count: int
    scale: int
    weights: tuple[int, ...]
    thresholds: NDArray[np.uint64]
    others: NDArray[np.uint64]
    surely: NDArray[np.uint64]
    shares: NDArray[np.float64]
    curvature: float


@lru_cache(maxsize=16)
def _strips(sigma: float) -> _Strips:
    if not LEAST_SIGMA <= sigma <= LARGEST_SIGMA:
        raise ValueError(f"sigma = {sigma}: must lie between {LEAST_SIGMA:g} and {LARGEST_SIGMA:g} units")
    exact = Fraction(sigma)
    width_bits = math.frexp(sigma)[1] - 7
    width = 1 << width_bits
    count = math.ceil(_REACH * exact / width)
    lows, highs = zip(*(_bounds(j * width, exact, _DIGITS) for j in range(count + 1)), strict=True)
    total, unit = _COLUMNS << _THRESHOLD_BITS, 10**_DIGITS
    # ceil adds less than 1 a strip; what is left of the total widens strip 0, which is still an envelope.
    scale = (total - count) * unit // sum(highs[:count])
    weights = [-(-scale * high // unit) for high in highs[:count]] + [0] * (_COLUMNS - count)
    weights[0] += total - sum(weights)
    thresholds, others = _alias(weights)
    ends = [(scale * lows[j + 1] << (64 - width_bits)) // (weights[j] * unit) for j in range(count)]
    shares = [scale * lows[j] / (weights[j] * unit) for j in range(count)]
    return _Strips(
        sigma=exact,
        width_bits=width_bits,
        count=count,
        scale=scale,
        weights=tuple(weights),
        thresholds=np.array(thresholds, np.uint64),
        others=np.array(others, np.uint64),
        surely=np.array(ends + [0] * (_COLUMNS - count), np.uint64),
        shares=np.array(shares + [0.0] * (_COLUMNS - count)),
        curvature=float(width**2 / (2 * exact**2)),
    )


def _alias(weights: list[int]) -> tuple[list[int], list[int]]:
    """Walker's alias method (1977; Vose 1991) in integers: column c is c below its threshold, else the other."""
    full = 1 << _THRESHOLD_BITS
    left, others = list(weights), list(range(_COLUMNS))
    thresholds = [full] * _COLUMNS
    small = [column for column, weight in enumerate(left) if weight < full]
    large = [column for column, weight in enumerate(left) if weight >= full]
    # The weights sum to columns · full, so while one is short another has more than enough.
    while small:
        short, rich = small.pop(), large[-1]
        thresholds[short], others[short] = left[short], rich
        left[rich] -= full - left[short]
        if left[rich] < full:
            small.append(large.pop())
    return thresholds, others


def _accepted(strips: _Strips, stream: Stream, count: int) -> NDArray[np.int64]:
    """Return those of `count` proposals that are accepted."""
    words = stream.words(2 * count)
    first, second = words[:count], words[count:]
    bits = np.uint64(strips.width_bits)
    column = (first >> np.uint64(64 - _COLUMN_BITS)).view(np.int64)
    keep = (first & np.uint64(2**_THRESHOLD_BITS - 1)) < strips.thresholds.take(column)
    strip = np.where(keep, column, strips.others.take(column).view(np.int64))
    sign = (first >> np.uint64(_THRESHOLD_BITS)) & np.uint64(1)
    offset = second & np.uint64(2**strips.width_bits - 1)
    digits = second >> bits
    # -1 - x is x with all bits flipped.
    positive = (strip.view(np.uint64) << bits) | offset
    draws: NDArray[np.int64] = (positive ^ (np.uint64(0) - sign)).view(np.int64)
    unsure = np.flatnonzero(digits >= strips.surely.take(strip))
    beyond = (offset[unsure] + sign[unsure]).astype(np.float64)
    accepted = np.ones(count, bool)
    accepted[unsure] = _decide(strips, strip[unsure], beyond, draws[unsure], digits[unsure], stream)
    return draws[accepted]


def _decide(
    strips: _Strips,
    strip: NDArray[np.int64],
    beyond: NDArray[np.float64],
    draws: NDArray[np.int64],
    digits: NDArray[np.uint64],
    stream: Stream,
) -> NDArray[np.bool_]:
    """Return whether U < p: in float64 where that is sure, else exactly; `beyond` is |x| - jw."""
    more = stream.words(len(strip))
    uniform = (digits + more * 2.0**-64) * 2.0 ** (strips.width_bits - 64)
    distance = _nearly(strips, strip, beyond) - uniform
    below = distance > 0
    for place in np.flatnonzero(np.abs(distance) <= _MARGIN):
        known = int(digits[place]) << 64 | int(more[place])
        below[place] = _exactly(strips, int(strip[place]), int(draws[place]), known, stream)
    return below


def _nearly(strips: _Strips, strip: NDArray[np.int64], beyond: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p to within 2^-47, from additions and products alone."""
    fraction = beyond * 2.0**-strips.width_bits
    exponent: NDArray[np.float64] = (2 * strip + fraction) * fraction * strips.curvature
    series: NDArray[np.float64] = np.full(len(strip), 1 / math.factorial(12))
    for power in range(11, -1, -1):
        series = 1 / math.factorial(power) - exponent * series
    return np.multiply(strips.shares.take(strip), series)


def _exactly(strips: _Strips, strip: int, draw: int, known: int, stream: Stream) -> bool:
    """Return whether U < p, from the first 128 - width_bits digits of U, and more of them where those do not tell."""
    bits, digits = 128 - strips.width_bits, _DIGITS
    while True:
        low, high = _bounds(draw, strips.sigma, digits)
        right = strips.weights[strip] * 10**digits
        if (known + 1) * right <= strips.scale * low << bits:
            return True
        if known * right >= strips.scale * high << bits:
            return False
        known, bits, digits = known << 64 | int(stream.words(1)[0]), bits + 64, digits + 30


def _bounds(value: int, sigma: Fraction, digits: int) -> tuple[int, int]:
    """Return integers around 10^digits · exp(-value² / (2 sigma²)), for an exponent of at most 120."""
    # Every operation of decimal is correctly rounded: together they err by less than a tenth of a unit.
    context = Context(prec=digits + 5, rounding=ROUND_HALF_EVEN)
    numerator, denominator = (value * sigma.denominator) ** 2, 2 * sigma.numerator**2
    exponent = context.divide(context.create_decimal(-numerator), context.create_decimal(denominator))
    middle = int(context.scaleb(context.exp(exponent), digits))
    return max(middle - 1, 0), middle + 2
