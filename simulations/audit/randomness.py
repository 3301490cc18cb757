"""What is drawn: batches at the accounted rate, noise of the planned deviation, and nothing of either twice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from .finding import SIGNIFICANCE, Finding, figure, variance_bounds
from .probe import Visit
from .subject import Subject

Vector = NDArray[np.float64]


def sampling(subject: Subject) -> Finding:
    """Batches are Poisson samples at the rate that the accountant takes.

    How often records are drawn is binomial: a two-sided test, or, where nearly equal sites share a bound, of no more
    than it. Counts by step or by record that spread too little betray batches of a fixed size or in turns (bounded by
    Chernoff), and two rounds that agree on too many records share their batches (binomial).
    """
    tests = 4 * len(subject.mechanisms)
    seen: dict[str, float] = {}
    for site, plan in subject.mechanisms.items():
        draws = [_drawn(visit, plan.records) for visit in subject.silent()[site]]
        together = np.concatenate(draws)
        q = min(1.0, plan.batch_size / plan.records)
        # First, as batches that return also lie further from the rate than chance allows.
        same = _repeated(draws, q, tests) if 0 < q < 1 else None
        if same is not None:
            return _failed("sampling", f"{site}: rounds {same[0]} and {same[1]} draw the same records", {"site": site})
        rate, count = plan.accounted_rate, int(together.sum())
        seen[site] = count / together.size
        if rate < 1:
            above = float(stats.binom.sf(count - 1, together.size, rate))
            below = float(stats.binom.cdf(count, together.size, rate)) if plan.accounted_records is None else 1.0
            odd = min(above, below) < SIGNIFICANCE / tests
        else:
            odd = plan.accounted_records is None and count < together.size
        if odd or together.max(initial=0) > 1:
            return _failed(
                "sampling",
                f"{site} draws a record with probability {seen[site]:.4g}, and {rate:.4g} is accounted for",
                {"site": site, "drawn": seen[site], "accounted": rate},
            )
        if 0 < q < 1:
            for axis, what in ((1, "batches are of nearly one size"), (0, "records take turns")):
                if _spread_is_too_small(together.sum(axis=axis), together.shape[axis], q, tests):
                    return _failed("sampling", f"{site}: {what}, so they are no Poisson sample", {"site": site})
    worst = max(subject.mechanisms, key=lambda site: seen[site] / subject.mechanisms[site].accounted_rate)
    return Finding(
        name="sampling",
        passed=True,
        sentence=f"batches are drawn at the accounted rate ({worst}: {seen[worst]:.4g} seen, "
        f"{subject.mechanisms[worst].accounted_rate:.4g} accounted)",
        figures={"drawn": seen, "accounted": {site: plan.accounted_rate for site, plan in subject.mechanisms.items()}},
    )


def noise(subject: Subject) -> Finding:
    """The noise on a step's sum is Gaussian, of deviation z·C on every tensor of every site.

    The mean square of n values is chi-squared; a shape other than Gaussian is found by Kolmogorov's test.
    """
    ratios: dict[tuple[str, str], float] = {}
    pooled: list[Vector] = []
    tests = 1 + sum(len(visits[0].steps[0].sizes) for visits in subject.silent().values())
    total = 0
    for site, visits in subject.silent().items():
        plan, steps = subject.mechanisms[site], [step for visit in visits for step in visit.steps]
        # Not plan.noise_deviation, which the kernel reads: what the accountant was told.
        scale = subject.denominator(site) / (plan.noise_multiplier * plan.clipping_norm)
        for tensor, size in steps[0].sizes.items():
            ratio = sum(step.squares[tensor] for step in steps) * scale**2 / (size * len(steps))
            ratios[site, tensor] = ratio
            total += size * len(steps)
            low, high = variance_bounds(size * len(steps), tests=tests)
            if not low <= ratio <= high:
                return _failed(
                    "noise",
                    f"the noise of {site} on {tensor} has {_root(ratio):.4g} times the planned deviation",
                    {"site": site, "tensor": tensor, "deviation": figure(_root(ratio)), "planned": 1.0},
                )
            pooled.extend(step.values[tensor] * scale for step in steps)
    shape = float(stats.kstest(np.concatenate(pooled), "norm").pvalue)
    if shape < SIGNIFICANCE / tests:
        return _failed("noise", f"the noise is not Gaussian (p = {shape:.1g})", {"p": shape})
    lowest, highest = _root(min(ratios.values())), _root(max(ratios.values()))
    return Finding(
        name="noise",
        passed=True,
        sentence=f"the noise is Gaussian and has {lowest:.3f} to {highest:.3f} times the planned deviation by tensor "
        f"({total:,} values)",
        figures={"least": lowest, "most": highest, "values": total, "gaussian_p": shape},
    )


def fresh_noise(subject: Subject) -> Finding:
    """No two rounds, steps, clients, tensors or models share noise.

    For independent Gaussian vectors of length n the cosine c has (1 + c) / 2 ~ Beta((n - 1) / 2, (n - 1) / 2), exactly.
    """
    pairs = 0
    largest = (0.0, 1.0, "")
    groups = _groups(subject)
    for what, vectors in groups:
        cosines, p = _most_alike(vectors)
        count = len(vectors) * (len(vectors) - 1) // 2
        pairs += count
        if count and p * count < largest[1]:
            largest = (cosines, p * count, what)
    passed = largest[1] >= SIGNIFICANCE / len(groups)
    return Finding(
        name="fresh-noise",
        passed=passed,
        sentence=f"rounds, steps, clients, tensors and models have noise of their own ({pairs:,} pairs, the most alike "
        f"with a cosine of {largest[0]:.3f})"
        if passed
        else f"noise is used twice: {largest[2]} have noise with a cosine of {largest[0]:.4f}",
        figures={"pairs": pairs, "cosine": largest[0], "p": largest[1]},
    )


def _groups(subject: Subject) -> list[tuple[str, list[Vector]]]:
    """Return groups of noise vectors that must not be alike, each with the words for two of them."""
    groups: list[tuple[str, list[Vector]]] = []
    silent = subject.silent()
    for site, visits in silent.items():
        groups.append((f"two rounds of {site}", [_flat(visit) for visit in visits]))
        steps = range(min(len(visit.steps) for visit in visits))
        each = [np.concatenate([_values(visit.steps[step].values) for visit in visits]) for step in steps]
        groups.append((f"two steps of {site}", each))
        tensors = [[step.values[name] for visit in visits for step in visit.steps] for name in visits[0].steps[0].sizes]
        groups.extend(_prefixes(f"two tensors of {site}", tensors))
        with subject.probe.silence(site):
            # A server may send any model as that of a round: the difference of two replies must not lose the noise.
            moved = {name: np.add(array, 1).astype(array.dtype) for name, array in subject.federation.initial.items()}
            other = subject.replay(site, round=1, arrays=moved, limit=len(visits[0].steps))
        groups.append((f"two models in one round of {site}", [_flat(visits[0]), _flat(other)]))
        rounds = [_flat(visit) for visit in subject.trained().visits if visit.site == site and visit.steps]
        groups.append((f"two rounds of the loop of {site}", rounds))
    groups.append(("two clients", _aligned(list(silent.values()))))
    return groups


def _aligned(sites: Sequence[Sequence[Visit]]) -> list[Vector]:
    """Return each site's noise of the rounds, and of the steps of a round, that all sites have."""
    rounds = min(len(visits) for visits in sites)
    steps = min(len(visit.steps) for visits in sites for visit in visits)
    return [
        np.concatenate([_values(step.values) for visit in visits[:rounds] for step in visit.steps[:steps]])
        for visits in sites
    ]


def _prefixes(what: str, tensors: Sequence[Sequence[Vector]]) -> list[tuple[str, list[Vector]]]:
    """Return the pairs of tensors, each cut to what both have in every step: reuse starts at their beginning."""
    found = []
    for one, other in combinations(tensors[:16], 2):
        size = min(len(one[0]), len(other[0]))
        found.append((what, [np.concatenate([step[:size] for step in each]) for each in (one, other)]))
    return found


def _most_alike(vectors: Sequence[Vector]) -> tuple[float, float]:
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


def _spread_is_too_small(counts: NDArray[np.int64], draws: int, q: float, tests: int) -> bool:
    """Return whether counts, each Bin(draws, q), lie too close to their mean.

    Chernoff: the mean of n independent squares X is at most d with a chance of at most (min_s e^(s d) E e^(-s X))^n.
    """
    possible = np.arange(draws + 1)
    squares = (possible - draws * q) ** 2 / (draws * q * (1 - q))
    chances = stats.binom.logpmf(possible, draws, q)
    found = float(np.mean(squares[counts]))
    bounds = [s * found + float(special.logsumexp(chances - s * squares)) for s in np.geomspace(0.01, 1000, 60)]
    return bool(len(counts) * min(bounds) < math.log(SIGNIFICANCE / tests))


def _repeated(draws: Sequence[NDArray[np.int64]], q: float, tests: int) -> tuple[int, int] | None:
    """Return two rounds that agree on whom they draw more often than chance allows."""
    pairs, agreeing = len(draws) * (len(draws) - 1) // 2, q * q + (1 - q) ** 2
    for one, other in combinations(range(len(draws)), 2):
        same = int((draws[one] == draws[other]).sum())
        if stats.binom.sf(same - 1, draws[one].size, agreeing) < SIGNIFICANCE / (tests * pairs):
            return one + 1, other + 1
    return None


def _drawn(visit: Visit, records: int) -> NDArray[np.int64]:
    """Return how often each step of a visit drew each record, [steps, records]."""
    return np.stack([np.bincount(step.drawn, minlength=records) for step in visit.steps])


def _flat(visit: Visit) -> Vector:
    return np.concatenate([_values(step.values) for step in visit.steps])


def _values(values: Mapping[str, Vector]) -> Vector:
    return np.concatenate(list(values.values()))


def _root(value: float) -> float:
    return math.sqrt(value) if value >= 0 else math.nan


def _failed(name: str, sentence: str, figures: dict[str, object]) -> Finding:
    return Finding(name=name, passed=False, sentence=sentence, figures=figures)
