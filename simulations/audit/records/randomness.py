"""What is drawn: batches at the accounted rate, noise of the planned deviation, and nothing of either twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..chance import Measured, Vector, alike, gaussian, prefixes, repeated, spread_is_too_small
from ..finding import SIGNIFICANCE, Finding, failed
from .probe import Visit
from .subject import Subject


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
        same = repeated(draws, q, tests) if 0 < q < 1 else None
        if same is not None:
            return failed("sampling", f"{site}: rounds {same[0]} and {same[1]} draw the same records", {"site": site})
        rate, count = plan.accounted_rate, int(together.sum())
        seen[site] = count / together.size
        if rate < 1:
            above = float(stats.binom.sf(count - 1, together.size, rate))
            below = float(stats.binom.cdf(count, together.size, rate)) if plan.accounted_records is None else 1.0
            odd = min(above, below) < SIGNIFICANCE / tests
        else:
            odd = plan.accounted_records is None and count < together.size
        if odd or together.max(initial=0) > 1:
            return failed(
                "sampling",
                f"{site} draws a record with probability {seen[site]:.4g}, and {rate:.4g} is accounted for",
                {"site": site, "drawn": seen[site], "accounted": rate},
            )
        if 0 < q < 1:
            for axis, what in ((1, "batches are of nearly one size"), (0, "records take turns")):
                if spread_is_too_small(together.sum(axis=axis), together.shape[axis], q, tests):
                    return failed("sampling", f"{site}: {what}, so they are no Poisson sample", {"site": site})
    worst = max(subject.mechanisms, key=lambda site: seen[site] / subject.mechanisms[site].accounted_rate)
    return Finding(
        name="sampling",
        passed=True,
        sentence=f"batches are drawn at the accounted rate ({worst}: {seen[worst]:.4g} seen, "
        f"{subject.mechanisms[worst].accounted_rate:.4g} accounted)",
        figures={"drawn": seen, "accounted": {site: plan.accounted_rate for site, plan in subject.mechanisms.items()}},
    )


def noise(subject: Subject) -> Finding:
    """The noise on a step's sum is Gaussian, of deviation z·C on every tensor of every site."""
    measured: list[Measured] = []
    for site, visits in subject.silent().items():
        plan, steps = subject.mechanisms[site], [step for visit in visits for step in visit.steps]
        # Not plan.noise_deviation, which the kernel reads: what the accountant was told.
        scale = subject.denominator(site) / (plan.noise_multiplier * plan.clipping_norm)
        measured.extend(
            Measured(
                owner=site,
                tensor=tensor,
                count=size * len(steps),
                squares=sum(step.squares[tensor] for step in steps) * scale**2,
                values=[step.values[tensor] * scale for step in steps],
            )
            for tensor, size in steps[0].sizes.items()
        )
    return gaussian(measured)


def fresh_noise(subject: Subject) -> Finding:
    """No two rounds, steps, clients, tensors or models share noise."""
    return alike(_groups(subject), what="rounds, steps, clients, tensors and models")


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
        groups.extend(prefixes(f"two tensors of {site}", tensors))
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


def _drawn(visit: Visit, records: int) -> NDArray[np.int64]:
    """Return how often each step of a visit drew each record, [steps, records]."""
    return np.stack([np.bincount(step.drawn, minlength=records) for step in visit.steps])


def _flat(visit: Visit) -> Vector:
    return np.concatenate([_values(step.values) for step in visit.steps])


def _values(values: Mapping[str, Vector]) -> Vector:
    return np.concatenate(list(values.values()))
