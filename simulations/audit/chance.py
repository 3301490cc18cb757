"""Statistics of an audit's checks of chance, each exact or a bound, for records and for clients alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from .finding import SIGNIFICANCE, Finding, failed, figure, variance_bounds

Vector = NDArray[np.float64]


def alike(groups: Sequence[tuple[str, Sequence[Vector]]], *, what: str) -> Finding:
    """Return whether noise is used twice: groups of vectors of which no two may be alike, each with words for two.

    For independent Gaussian vectors of length n the cosine c has (1 + c) / 2 ~ Beta((n - 1) / 2, (n - 1) / 2), exactly.
    """
    pairs = 0
    largest = (0.0, 1.0, "")
    for two, vectors in groups:
        cosines, p = most_alike(vectors)
        count = len(vectors) * (len(vectors) - 1) // 2
        pairs += count
        if count and p * count < largest[1]:
            largest = (cosines, p * count, two)
    passed = largest[1] >= SIGNIFICANCE / len(groups)
    return Finding(
        name="fresh-noise",
        passed=passed,
        sentence=f"{what} have noise of their own ({pairs:,} pairs, the most alike with a cosine of {largest[0]:.3f})"
        if passed
        else f"noise is used twice: {largest[2]} have noise with a cosine of {largest[0]:.4f}",
        figures={"pairs": pairs, "cosine": largest[0], "p": largest[1]},
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Noise of one owner on one tensor over the planned deviation: how many values, their squares, and some of them."""

    owner: str
    tensor: str
    count: int
    squares: float
    values: Sequence[Vector]


def gaussian(measured: Sequence[Measured]) -> Finding:
    """Return whether noise is Gaussian and of the planned deviation everywhere.

    The mean square of n values is chi-squared; a shape other than Gaussian is found by Kolmogorov's test.
    """
    tests = 1 + len(measured)
    ratios = []
    for each in measured:
        ratio = each.squares / each.count
        ratios.append(ratio)
        low, high = variance_bounds(each.count, tests=tests)
        if not low <= ratio <= high:
            return failed(
                "noise",
                f"the noise of {each.owner} on {each.tensor} has {root(ratio):.4g} times the planned deviation",
                {"site": each.owner, "tensor": each.tensor, "deviation": figure(root(ratio)), "planned": 1.0},
            )
    shape = float(stats.kstest(np.concatenate([part for each in measured for part in each.values]), "norm").pvalue)
    if shape < SIGNIFICANCE / tests:
        return failed("noise", f"the noise is not Gaussian (p = {shape:.1g})", {"p": shape})
    lowest, highest, total = root(min(ratios)), root(max(ratios)), sum(each.count for each in measured)
    return Finding(
        name="noise",
        passed=True,
        sentence=f"the noise is Gaussian and has {lowest:.3f} to {highest:.3f} times the planned deviation by tensor "
        f"({total:,} values)",
        figures={"least": lowest, "most": highest, "values": total, "gaussian_p": shape},
    )


def prefixes(what: str, tensors: Sequence[Sequence[Vector]]) -> list[tuple[str, list[Vector]]]:
    """Return the pairs of tensors, each cut to what both have in every step: reuse starts at their beginning."""
    found = []
    for one, other in combinations(tensors[:16], 2):
        size = min(len(one[0]), len(other[0]))
        found.append((what, [np.concatenate([step[:size] for step in each]) for each in (one, other)]))
    return found


def most_alike(vectors: Sequence[Vector]) -> tuple[float, float]:
    """Return the largest cosine of two vectors, cut to the shortest, and the chance of one so large."""
    length = min((len(vector) for vector in vectors), default=0)
    if len(vectors) < 2 or length < 2:
        return 0.0, 1.0
    matrix = np.stack([vector[:length] for vector in vectors])
    norms = np.linalg.norm(matrix, axis=1)
    matrix = matrix / np.where(norms > 0, norms, 1.0)[:, None]
    cosines = (matrix @ matrix.T)[np.triu_indices(len(vectors), 1)]
    cosine = float(cosines[np.abs(cosines).argmax()])
    half = (length - 1) / 2
    return cosine, 2 * float(stats.beta.sf(min(1.0, (1 + abs(cosine)) / 2), half, half))


def spread_is_too_small(counts: NDArray[np.int64], draws: int, q: float, tests: int) -> bool:
    """Return whether counts, each Bin(draws, q), lie too close to their mean.

    Chernoff: the mean of n independent squares X is at most d with a chance of at most (min_s e^(s d) E e^(-s X))^n.
    """
    possible = np.arange(draws + 1)
    squares = (possible - draws * q) ** 2 / (draws * q * (1 - q))
    chances = stats.binom.logpmf(possible, draws, q)
    found = float(np.mean(squares[counts]))
    bounds = [s * found + float(special.logsumexp(chances - s * squares)) for s in np.geomspace(0.01, 1000, 60)]
    return bool(len(counts) * min(bounds) < math.log(SIGNIFICANCE / tests))


def repeated(draws: Sequence[NDArray[np.int64]], q: float, tests: int) -> tuple[int, int] | None:
    """Return two rounds that agree on whom they draw more often than chance allows."""
    pairs, agreeing = len(draws) * (len(draws) - 1) // 2, q * q + (1 - q) ** 2
    for one, other in combinations(range(len(draws)), 2):
        same = int((draws[one] == draws[other]).sum())
        if stats.binom.sf(same - 1, draws[one].size, agreeing) < SIGNIFICANCE / (tests * pairs):
            return one + 1, other + 1
    return None


def root(value: float) -> float:
    """Return the root of a variance, NaN for one that is none."""
    return math.sqrt(value) if value >= 0 else math.nan
