"""What one record can do: to the released sum, to the other records in it, and when it is no number."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from ..finding import Finding, figure, not_tried, variance_bounds
from .bench import benches
from .probe import Seeing, Visit
from .subject import Subject

_SMALL = 64


def sensitivity(subject: Subject) -> Finding:
    """One record, made an outlier of 1e4 in its inputs or in its loss, moves the noised sum by at most C.

    Two runs of a first step with the same batch and the same noise, which cancels; in one the record is silent.
    """
    largest, allowed, tried = 0.0, 0.0, 0
    for bench in benches(subject):
        for record in bench.drawn:
            without = bench.sum(without=record)
            for change in bench.outliers(record):
                with change:
                    moved, rounding = bench.moved(without)
                largest, allowed = max((largest, allowed), (moved, 1 + rounding))
                tried += 1
                if not moved <= 1 + rounding:
                    return Finding(
                        name="sensitivity",
                        passed=False,
                        sentence=f"one record of {bench.site} moves the sum by {moved:.4g} C, which may be at most C",
                        figures={"moved": figure(moved), "allowed": 1 + rounding, "site": bench.site},
                    )
    if not tried or largest == 0:
        return not_tried("sensitivity", "no record was drawn, or none of them moves the sum")
    return Finding(
        name="sensitivity",
        passed=True,
        sentence=f"an outlier of 1e4 moves the sum by at most {largest:.4g} C (of {tried} tried), where C is allowed",
        figures={"moved": largest, "allowed": allowed, "outliers": tried},
    )


def independence(subject: Subject) -> Finding:
    """Remove one record and the rest stay: its part of the sum is the same alone and among the others.

    A silent record whose inputs are made outliers must not move the sum either.
    """
    worst, allowed, tried, where = 0.0, 0.0, 0, ""
    for bench in benches(subject):
        silence = bench.noise()
        everybody = bench.sum()
        for record in bench.drawn:
            without = bench.sum(without=record)
            alone = bench.sum(alone=record)
            part, rounding = bench.distance(everybody - without, alone - silence, everybody, alone)
            seen = [(part, rounding)]
            if bench.floating:
                with bench.inputs(record, bench.outlier(record)):
                    seen.append(bench.moved(without, without=record))
            tried += len(seen)
            for moved, rounding in seen:
                if not moved - rounding <= worst - allowed or not where:
                    worst, allowed, where = moved, rounding, bench.site
    if not tried:
        return not_tried("independence", "no record was drawn")
    passed = bool(worst <= allowed)
    return Finding(
        name="independence",
        passed=passed,
        sentence=f"without one record the others' part of the sum stays, to {worst:.2g} C ({tried} tried)"
        if passed
        else f"one record of {where} changes by {worst:.4g} C what the others add to the sum",
        figures={"moved": figure(worst), "allowed": allowed, "tried": tried},
    )


def bad_records(subject: Subject) -> Finding:
    """A record that is NaN or infinite leaves the sum finite, moves it by at most C, and by nothing where it is NaN.

    A batch without records is a step of noise.
    """
    tried = 0
    for bench in benches(subject):
        for record in bench.drawn[:1]:
            without = bench.sum(without=record)
            for value in (math.nan, math.inf, -math.inf, 3e38):
                for change in bench.bad(record, value):
                    with change:
                        moved, rounding = bench.moved(without)
                    tried += 1
                    limit = rounding + (0 if math.isnan(value) else 1)
                    if not moved <= limit:
                        what = "makes the sum not finite" if not math.isfinite(moved) else f"moves it by {moved:.4g} C"
                        return Finding(
                            name="bad-records",
                            passed=False,
                            sentence=f"a record of {bench.site} that is {value:g} {what}",
                            figures={"value": str(value), "moved": figure(moved), "allowed": limit},
                        )
    steps, planned, ratio, (low, high) = _empty_batches(subject)
    passed = steps == planned and low <= ratio <= high
    return Finding(
        name="bad-records",
        passed=passed,
        sentence=f"NaN and infinite records count as bounded ({tried} tried), an empty batch as a step of noise"
        if passed
        else f"of {planned} planned steps with empty batches among them {steps} are taken, and the empty ones have "
        f"{ratio:.3g} times the planned variance",
        figures={"tried": tried, "steps": steps, "planned": planned, "empty_batch_variance": figure(ratio)},
    )


def _empty_batches(subject: Subject) -> tuple[int, int, float, tuple[float, float]]:
    """Return the steps of the kernel at batches of one record, those planned, and the variance where none was drawn.

    The chance that no batch of 64 is empty is below 1e-12. The variance is a multiple of the planned one.
    """
    site, mechanism = next(iter(subject.mechanisms.items()))
    examples = subject.data[site].train
    examples = examples.select([place % len(examples) for place in range(_SMALL)])
    plan = replace(mechanism, records=_SMALL, batch_size=1, epochs=1, accounted_records=None)
    visit = Visit(site=site, round=1)
    parameters = {name: tensor for name, tensor in subject.model.module.named_parameters() if tensor.requires_grad}
    subject.model.load(subject.federation.initial)
    subject.probe.begin(visit)
    subject.kernel(
        subject.model,
        subject.probe.loss,
        examples,
        plan=plan,
        key=subject.key.child("audit", "empty batches"),
        session=Seeing(partial(subject.probe.end_step, parameters)),
    )
    empty = [step for step in visit.steps if not len(step.drawn)]
    count = sum(sum(step.sizes.values()) for step in empty)
    # A batch of one is expected, so the sum is the mean.
    squares = sum(sum(step.squares.values()) for step in empty) / (plan.noise_multiplier * plan.clipping_norm) ** 2
    if not count:
        return len(visit.steps), plan.steps_per_round, 0.0, (1.0, 1.0)
    return len(visit.steps), plan.steps_per_round, squares / count, variance_bounds(count)
