"""What is drawn at the client level: cohorts as they are accounted, noise as it is planned, and nothing twice."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..chance import Measured, Vector, alike, gaussian, prefixes, repeated, spread_is_too_small
from ..finding import SIGNIFICANCE, Finding, failed, variance_bounds
from .noise import update_noise
from .puppets import FAILING, SILENT, Answer
from .subject import ClientSubject

_DRAWS = 100_000
_PAIRED = 60
_KEPT = 512


def sampling(subject: ClientSubject) -> Finding:
    """Cohorts are Poisson samples at the accounted rate, or come again only after as many rounds as is accounted.

    No client is in a cohort twice. A cyclic client rests for a whole period, whatever the round in which it is first;
    any other cohort but a Poisson sample is accounted as if everybody were in it.
    """
    size, sampler = len(subject.federation.names), subject.sampler
    rounds = min(2000, max(60, _DRAWS // size))
    drawn = np.zeros((rounds, size), np.int64)
    for number in range(rounds):
        np.add.at(drawn[number], sampler.draw(number + 1, range(size)), 1)
    if drawn.max(initial=0) > 1:
        return failed("sampling", "a client is in a cohort twice", {"times": int(drawn.max())})
    plan = subject.plan.aggregate
    if plan is not None and plan.sampling_rate < 1:
        return _poisson(drawn, plan.sampling_rate)
    period, participations = _accounted(subject)
    gap = _least_gap(drawn)
    most = int(drawn[: subject.planned].sum(axis=0).max())
    if gap < period or most > participations:
        return failed(
            "sampling",
            f"a client comes again after {gap} rounds and is in {most} of {subject.planned}, where {period} and at "
            f"most {participations} are accounted",
            {"gap": gap, "accounted_gap": period, "rounds": most, "accounted_rounds": participations},
        )
    how = f"only after {period} rounds" if period > 1 else "as often as it may: nothing is amplified"
    return Finding(
        name="sampling",
        passed=True,
        sentence=f"a client comes again {how} (in at most {most} rounds, {participations} accounted)",
        figures={"gap": gap, "accounted_gap": period, "rounds": most, "accounted_rounds": participations},
    )


def noise(subject: ClientSubject) -> Finding:
    """The noise is Gaussian, of deviation z·C on every tensor; that of bands is so when it is whitened, Z = C Y.

    C is the clipping norm of each round. The noise on the votes of adaptive clipping is read from how the norm moves.
    """
    sizes, places = subject.layout.sizes, np.cumsum(subject.layout.sizes)[:-1]
    owner = "the sum" if subject.sites is None else ""
    parts: dict[tuple[str, str], list[Vector]] = {}
    for series in subject.series:
        for vector in series.vectors:
            for name, size, part in zip(subject.layout.names, sizes, np.split(vector, places), strict=True):
                if size:
                    parts.setdefault((owner or series.owner, name), []).append(part)
    measured = [
        Measured(
            owner=who,
            tensor=name,
            count=sum(len(each) for each in found),
            squares=sum(float(each @ each) for each in found),
            values=[each[:_KEPT] for each in found],
        )
        for (who, name), found in parts.items()
    ]
    found = gaussian(measured)
    if found.passed and subject.plan.aggregate is not None and subject.aggregate.adaptive_clipping:
        return _votes(subject) or found
    return found


def fresh_noise(subject: ClientSubject) -> Finding:
    """No two rounds (of a run that was resumed, too), clients, tensors, models or sums share noise.

    A round that is repeated with the same sum draws the same noise, as two draws could be averaged.
    """
    for series in subject.series:
        for one, other in series.repeated:
            if not np.array_equal(one, other):
                return failed(
                    "fresh-noise",
                    f"a round of {series.owner} that is repeated with the same updates draws other noise",
                    {"owner": series.owner},
                )
    groups: list[tuple[str, Sequence[Vector]]] = []
    places = np.cumsum(subject.layout.sizes)[:-1]
    for series in subject.series:
        groups.append((f"two rounds of {series.owner}", series.vectors[:_PAIRED]))
    split = [np.split(vector, places) for series in subject.series[:4] for vector in series.vectors[:_PAIRED]]
    tensors = [[vector[place] for vector in split] for place, size in enumerate(subject.layout.sizes) if size]
    groups += prefixes("two tensors", tensors)
    if subject.sites is not None:
        return alike([*groups, *_of_sites(subject)], what="rounds, clients, tensors and models")
    groups.append(("two runs", [series.vectors[0] for series in subject.series]))
    if not subject.aggregate.bands:
        groups += _of_one_round(subject)
    return alike(groups, what="rounds, tensors, models and sums, those of resumed runs too,")


def _of_sites(subject: ClientSubject) -> list[tuple[str, Sequence[Vector]]]:
    sites = subject.sites
    assert sites is not None
    nothing = np.zeros(subject.layout.size)
    # A server may send any model as that of a round: the difference of two replies must not lose the noise.
    moved = {name: np.add(array, 1).astype(array.dtype) for name, array in sites.initial.items()}
    groups: list[tuple[str, Sequence[Vector]]] = [
        (
            f"two models in one round of {site}",
            [sites.released(site, nothing), sites.released(site, nothing, arrays=moved)],
        )
        for site in sites.names
    ]
    least = min(len(series.vectors) for series in subject.series)
    return [*groups, ("two clients", [np.concatenate(series.vectors[:least]) for series in subject.series])]


def _of_one_round(subject: ClientSubject) -> list[tuple[str, Sequence[Vector]]]:
    """Return what one round releases, under one key, for another model and for other sums: the noise of each alone."""
    key, initial = subject.key.child("one round"), subject.federation.initial
    moved = {name: np.add(array, 1).astype(array.dtype) for name, array in initial.items()}
    update = 0.5 * subject.aggregate.clipping_norm * subject.direction("one round")

    def sent(answer: Answer, round: int, name: str) -> Answer:
        return answer

    def first(answer: Answer, *, noise: bool = True, other: bool = False) -> Vector:
        (release,) = subject.server.rounds(
            1, partial(sent, answer), key=key, cohorts=[(0,)], noise=noise, arrays=moved if other else None
        )
        return release.sum

    changed = Answer(update=update)
    silent = first(SILENT)
    return [
        ("two models in one round", [silent, first(SILENT, other=True)]),
        ("two sums in one round", [silent, first(changed) - first(changed, noise=False)]),
        ("two cohorts in one round", [first(changed) - first(changed, noise=False), first(FAILING)]),
    ]


def _votes(subject: ClientSubject) -> Finding | None:
    """Return what is wrong with the noise on the votes, None if nothing is.

    From C' = C exp(-rate (share - quantile)) (Andrew et al. 2021, algorithm 1) follow the noised votes.
    """
    plan, clipping = subject.aggregate, subject.aggregate.clipping()
    assert clipping is not None
    drawn = []
    for release in (each for run in subject.silent for each in run):
        share = clipping.quantile - np.log(release.next_norm / release.clipping_norm) / clipping.learning_rate
        drawn.append(((share - 0.5) * plan.cohort - release.votes / 2) / clipping.votes_deviation)
    values = np.array(drawn)
    ratio = float(values @ values) / len(values)
    low, high = variance_bounds(len(values))
    if not low <= ratio <= high:
        return failed(
            "noise",
            f"the noise on the votes for the clipping norm has {ratio**0.5:.4g} times the planned deviation",
            {"votes": ratio**0.5, "z": update_noise(plan)},
        )
    return None


def _poisson(drawn: NDArray[np.int64], rate: float) -> Finding:
    """Return whether cohorts [rounds, clients] are Poisson samples at a rate: binomial, Chernoff, binomial by pairs."""
    tests, count = 4, int(drawn.sum())
    seen = count / drawn.size
    figures = {"drawn": seen, "accounted": rate}
    same = repeated(list(drawn[:_PAIRED]), rate, tests)
    if same is not None:
        return failed("sampling", f"rounds {same[0]} and {same[1]} draw the same clients", figures)
    above, below = stats.binom.sf(count - 1, drawn.size, rate), stats.binom.cdf(count, drawn.size, rate)
    if min(above, below) < SIGNIFICANCE / tests:
        return failed(
            "sampling", f"a client is drawn with probability {seen:.4g}, and {rate:.4g} is accounted for", figures
        )
    for axis, what in ((1, "cohorts are of nearly one size"), (0, "clients take turns")):
        if spread_is_too_small(drawn.sum(axis=axis), drawn.shape[axis], rate, tests):
            return failed("sampling", f"{what}, so they are no Poisson sample", figures)
    return Finding(
        name="sampling",
        passed=True,
        sentence=f"cohorts are drawn at the accounted rate ({seen:.4g} seen, {rate:.4g} accounted)",
        figures=figures,
    )


def _accounted(subject: ClientSubject) -> tuple[int, int]:
    """Return the rounds after which a client may come again, and the most that it may be in, as they are accounted."""
    plan = subject.plan.aggregate
    if plan is not None:
        return plan.period, plan.participations
    participations = subject.local.participations
    return (1 if participations >= subject.planned else -(-subject.planned // participations)), participations


def _least_gap(drawn: NDArray[np.int64]) -> int:
    """Return the fewest rounds after which a client comes again."""
    least = len(drawn)
    for column in drawn.T:
        rounds = np.flatnonzero(column)
        if len(rounds) > 1:
            least = min(least, int(np.diff(rounds).min()))
    return least
