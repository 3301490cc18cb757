"""How much each client counts in the server's sum, and what that is divided by."""

from __future__ import annotations

import math
from functools import partial

from ..finding import Finding, failed, figure
from .puppets import FAILING, SILENT, Answer
from .rounds import norm_of
from .subject import ClientSubject
from .updates import OUTLIER, bench, moved_by, rounding

_COUNTS = (1, 3, 10**9)


def weights(subject: ClientSubject) -> Finding:
    """Clients weigh the same whatever their counts, or by their counts up to the cap; those that noise send a 1."""
    counted = getattr(subject.strategy, "weights", "equal") == "counted"
    cap = getattr(subject.strategy, "weight_cap", None) if counted else None
    without = bench(subject, FAILING)
    counts = (*_COUNTS, *(() if cap is None else (cap, 2 * cap)))
    for count in counts:
        answer = Answer(update=OUTLIER * subject.direction("weights"), count=count)
        moved = moved_by(subject, bench(subject, answer), without)
        expected = 1.0 if cap is None else min(1.0, count / cap)
        if not abs(moved - expected) <= 1e-6 + rounding(subject):
            return failed(
                "weights",
                f"a client that says that it has {count} records weighs {moved:.4g}, where {expected:.4g} is planned",
                {"count": count, "weight": figure(moved), "planned": expected},
            )
    how = "the same, whatever their counts" if cap is None else f"by their counts, but never more than {cap}"
    return Finding(name="weights", passed=True, sentence=f"clients weigh {how}", figures={"counts": list(counts)})


def denominator(subject: ClientSubject) -> Finding:
    """The sum is divided by the planned cohort: a client's part is the same among few and many, silent or failed."""
    plan, many = subject.aggregate, min(8, len(subject.federation.names))
    count = getattr(subject.strategy, "weight_cap", None) or 1
    update = 0.5 * plan.clipping_norm * subject.direction("denominator")
    parts: dict[str, float] = {}
    for replies in sorted({1, max(1, many // 2), many}):
        for what, rest in (("silent", SILENT), ("failed", FAILING)):
            released = subject.server.rounds(
                1,
                partial(_one, subject.federation.names[0], Answer(update=update, count=count), rest),
                key=subject.key.child("denominator"),
                cohorts=[range(replies)],
                noise=False,
            )
            parts[f"{replies} asked, others {what}"] = float(released[0].sum @ update) / float(update @ update)
    # The sum is read with the planned cohort as its denominator, so a part other than 1 has another one.
    start = norm_of(subject.layout.flatten(subject.federation.initial))
    # The model that a client sends is rounded to float32.
    near = 1e-4 + 2.0**-22 * start / plan.clipping_norm
    odd = {name: part for name, part in parts.items() if not abs(part - 1) <= near}
    if odd:
        name, part = next(iter(odd.items()))
        return failed(
            "denominator",
            f"with {name}, the sum is divided by {plan.cohort / part if part else math.inf:.4g}, and not by the "
            f"planned {plan.cohort}",
            {"parts": {each: figure(value) for each, value in parts.items()}, "planned": plan.cohort},
        )
    return Finding(
        name="denominator",
        passed=True,
        sentence=f"sums are divided by {plan.cohort}, the expected cohort, however many clients reply "
        f"(up to {many} tried)",
        figures={"parts": parts, "planned": plan.cohort},
    )


def _one(first: str, answer: Answer, rest: Answer, round: int, name: str) -> Answer:
    return answer if name == first else rest
