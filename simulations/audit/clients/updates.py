"""What one client can do to the server's sum, and to the other clients in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from ..finding import Finding, failed, figure, not_tried, variance_bounds
from .noise import of_rounds
from .puppets import FAILING, SILENT, Answer, Vector
from .rounds import Release, norm_of
from .subject import ClientSubject

OUTLIER = 1e4
_ROUNDING = 2.0**-40
"""Sums are of float64 integers, but the model that they are added to has rounded digits of its own."""


def sensitivity(subject: ClientSubject) -> Finding:
    """One client, whatever it sends, moves the sum by at most C and the votes by at most one.

    Two rounds without noise and with the same others; in one the client sends nothing. An update of zero moves nothing.
    """
    largest, tried, allowed = 0.0, 0, 1 + rounding(subject)
    without = bench(subject, FAILING)
    for what, answer, limit in (*_outliers(subject), ("that is zero", SILENT, 0.0)):
        found = bench(subject, answer)
        moved, votes = moved_by(subject, found, without), abs(found.votes - without.votes)
        largest, tried = max(largest, moved), tried + 1
        if not moved <= limit + rounding(subject):
            return failed(
                "sensitivity",
                f"an update {what} moves the sum by {moved:.4g} C, which may be at most {'C' if limit else '0'}",
                {"moved": figure(moved), "allowed": limit + rounding(subject)},
            )
        if votes > 1:
            return failed(
                "sensitivity", f"an update {what} moves the votes by {votes}, which may be at most 1", {"votes": votes}
            )
    if largest == 0:
        return not_tried("sensitivity", "no update moves the sum")
    return Finding(
        name="sensitivity",
        passed=True,
        sentence=f"a client's outlier of 1e4 moves the sum by at most {largest:.4g} C (of {tried} tried), where C is "
        "allowed",
        figures={"moved": largest, "allowed": allowed, "outliers": tried},
    )


def independence(subject: ClientSubject) -> Finding:
    """Remove one client and the rest stay: its part of the sum is the same alone and among the others."""
    worst, tried = 0.0, 0
    nobody, others = bench(subject, FAILING, others=False), bench(subject, FAILING)
    for what, answer, _ in _outliers(subject):
        alone, together = bench(subject, answer, others=False), bench(subject, answer)
        apart = norm_of((together.sum - others.sum) - (alone.sum - nobody.sum)) / together.clipping_norm
        worst, tried = max(worst, apart) if math.isfinite(apart) else math.inf, tried + 1
        if not apart <= 4 * rounding(subject):
            return failed(
                "independence",
                f"a client whose update is one {what} changes by {apart:.4g} C what the others add to the sum",
                {"moved": figure(apart)},
            )
    return Finding(
        name="independence",
        passed=True,
        sentence=f"without one client the others' part of the sum stays, to {worst:.2g} C ({tried} tried)",
        figures={"moved": worst, "tried": tried},
    )


def bad_updates(subject: ClientSubject) -> Finding:
    """An update that is no number, is cut, or fails adds nothing; a round without any is released as noise."""
    tried = 0
    without = bench(subject, FAILING)
    for what, answer in bad_answers(subject):
        found = bench(subject, answer)
        moved, votes = moved_by(subject, found, without), abs(found.votes - without.votes)
        tried += 1
        if not moved <= rounding(subject) or votes:
            return _bad_update(what, moved)
    rounds, planned, ratio, (low, high) = _empty_rounds(subject)
    passed = rounds == planned and low <= ratio <= high
    return Finding(
        name="bad-updates",
        passed=passed,
        sentence=f"NaN, infinite, cut and failed updates add nothing ({tried} tried), and a round of them is noise"
        if passed
        else f"of {planned} rounds, some without any update, {rounds} are released, and these have {ratio:.3g} times "
        "the planned variance",
        figures={"tried": tried, "rounds": rounds, "planned": planned, "empty_round_variance": figure(ratio)},
    )


def bench(subject: ClientSubject, answer: Answer, *, others: bool = True) -> Release:
    """Return one round without noise, in which the first client answers this and the others what they always do."""
    names = subject.federation.names
    rest = {name: _ordinary(subject, name) if others else SILENT for name in names[1:3]}
    (release,) = subject.server.rounds(
        1,
        lambda round, name: answer if name == names[0] else rest[name],
        key=subject.key.child("bench"),
        cohorts=[range(min(3, len(names)))],
        noise=False,
    )
    return release


def _ordinary(subject: ClientSubject, name: str) -> Answer:
    """Return an update of which some are clipped and some are not."""
    length = 0.5 if name == subject.federation.names[1] else 2.0
    return Answer(update=length * subject.aggregate.clipping_norm * subject.direction("others", name))


def moved_by(subject: ClientSubject, found: Release, without: Release) -> float:
    """Return how far a client moves the sum, in units of C."""
    return norm_of(found.sum - without.sum) / subject.aggregate.clipping_norm


def rounding(subject: ClientSubject) -> float:
    """Return how much of a move, in units of C, may be rounding of the mean that it is read from."""
    start = norm_of(subject.layout.flatten(subject.federation.initial))
    plan = subject.aggregate
    return _ROUNDING * (8 + start * plan.cohort / plan.clipping_norm)


def outlier_updates(subject: ClientSubject) -> Mapping[str, Vector]:
    """Return updates of a size that has to be clipped, and of one that has not."""
    norm, direction = subject.mechanism.clipping_norm, subject.direction("outlier")
    spread = np.sign(direction) * OUTLIER
    single = np.zeros(subject.layout.size)
    single[np.abs(direction).argmax()] = OUTLIER
    found = {
        "of 1e4": OUTLIER * norm * direction,
        "of -1e4": -OUTLIER * norm * direction,
        "of 1e4 on every value": spread,
        "of 1e4 on one value": single,
        "of 1.01 C": 1.01 * norm * direction,
        "of C": norm * direction,
    }
    # The last tensor alone: one that was forgotten would be clipped by nothing.
    end = np.zeros(subject.layout.size)
    end[-subject.layout.sizes[-1] :] = OUTLIER
    return found | {"of 1e4 on the last tensor": end}


def _outliers(subject: ClientSubject) -> Iterator[tuple[str, Answer, float]]:
    for what, update in outlier_updates(subject).items():
        yield what, Answer(update=update), 1.0
    yield "with a count of 1e9", Answer(update=outlier_updates(subject)["of 1e4"], count=10**9), 1.0
    yield "of 3e37", Answer(update=3e37 * subject.direction("outlier")), 1.0


def bad_answers(subject: ClientSubject) -> Iterator[tuple[str, Answer]]:
    """Yield answers that must count as nothing."""
    size, direction = subject.layout.size, subject.direction("bad")
    for value in (math.nan, math.inf, -math.inf):
        one = direction.copy()
        one[0] = value
        yield f"{value:g} in one value", Answer(update=one)
        yield f"{value:g} in all values", Answer(update=np.full(size, value))
    yield "an error", FAILING
    yield "a cut model", Answer(cut=True)


def _bad_update(what: str, moved: float) -> Finding:
    does = "makes the sum not finite" if not math.isfinite(moved) else f"moves it by {moved:.4g} C"
    return failed("bad-updates", f"{what} {does}, where it should add nothing", {"moved": figure(moved)})


def _empty_rounds(subject: ClientSubject) -> tuple[int, int, float, tuple[float, float]]:
    """Return the rounds released in which nobody replies, those planned, and the variance of the noise in them.

    Every second one has no cohort at all where cohorts are Poisson samples.
    """
    plan, count = subject.aggregate, min(subject.planned, 6)
    found = subject.server.rounds(
        count,
        lambda round, name: FAILING,
        key=subject.key.child("empty"),
        cohorts=[() if plan.sampling == "poisson" and number % 2 else (0,) for number in range(count)],
    )
    if plan.bands:
        # Rounds of correlated noise are not of one variance: the check of the noise whitens them.
        return len(found), count, 1.0, (1.0, 1.0)
    vectors = of_rounds(plan, found, "").vectors
    values = sum(len(each) for each in vectors)
    ratio = sum(float(each @ each) for each in vectors) / max(1, values)
    return len(found), count, ratio, variance_bounds(max(1, values))
