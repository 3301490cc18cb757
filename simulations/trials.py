"""The price of hyper-parameter tuning: many runs of one plan on the same data, all of them released or only the best.

All released, their mechanisms compose. Of a random number of runs the best alone costs far less
(`privacy.selection`), if the score that chooses it is released with it: what chooses by anything else tells more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..experiment import Experiment
from ..privacy import accounting, selection
from ..privacy.client_level import ClientLevelPlan
from ..privacy.discrete_gaussian import TOTAL_VARIATION
from ..privacy.guarantee import Guarantee
from ..privacy.ledger.composition import composed
from ..privacy.ledger.events import DiscreteLaplace
from ..privacy.mechanism import RecordLevelPlan
from ..privacy.release import EvaluationPlan
from ..privacy.selection import RenyiCurve
from ..server.plan import Plan

# As for a guarantee's second figure: many unequal sites share the wider interval, which bounds the same truth.
_FEW = 8


def refuse_nothing_to_count(experiment: Experiment) -> None:
    """Raise InputError for an experiment without privacy."""
    if experiment.privacy.unit == "none":
        raise experiment.conflict(
            "privacy", "unit", why='there is nothing for --trials to count without privacy; set "record" or "client"'
        )


def price(experiment: Experiment, planned: Plan, guarantee: Guarantee, trials: int) -> dict[str, Any]:
    """Return epsilon of one run, of `trials` runs all released, and of the best of about as many.

    Everything at the plan's delta and under the guarantee's neighbouring relation, for runs that draw what this plan
    draws, whatever else they change. An epsilon that no bound holds for is None. Raises InputError without privacy.
    """
    if guarantee.epsilon is None or guarantee.delta is None:
        raise experiment.conflict(
            "privacy", "unit", why="there is nothing for --trials to count, since the epsilon of one run is infinite"
        )
    curves: list[RenyiCurve] | None = None
    if planned.local is not None:
        # The server sees every run, so the best one does not hide the others.
        together = replace(planned.local, participations=trials * planned.local.participations).epsilon()
        found = _priced(guarantee, trials, together, curves, released="updates, and so the models,", score="")
    elif planned.aggregate is not None:
        together, curves = _clients_together(planned.aggregate, trials), [_clients_curve(planned.aggregate)]
        found = _priced(guarantee, trials, together, curves, released="model", score="a metric on public data")
    else:
        together = _records_together(planned.mechanisms.values(), planned.evaluation, trials)
        curves = _records_curves(planned.mechanisms.values(), planned.evaluation)
        released, score = "model and metrics", "a released metric"
        found = _priced(guarantee, trials, together, curves, released=released, score=score)
    if guarantee.record is not None:
        # The records beneath clients.
        together = _records_together(planned.mechanisms.values(), None, trials)
        curves = _records_curves(planned.mechanisms.values(), None) if planned.local is None else None
        released, score = "model", "a metric on public data"
        found["record"] = _priced(guarantee.record, trials, together, curves, released=released, score=score)
    return found


def _priced(
    guarantee: Guarantee, trials: int, together: float, curves: list[RenyiCurve] | None, *, released: str, score: str
) -> dict[str, Any]:
    one, delta = guarantee.epsilon or 0.0, guarantee.delta or 0.0
    found: dict[str, Any] = {
        "runs": trials,
        "unit": guarantee.unit,
        "delta": delta,
        "neighbouring": guarantee.neighbouring,
        "one": {"epsilon": one, "released": f"the {released} of this run"},
        "all": {
            # Both are bounds of more than one run; two accountants may differ by their rounding.
            "epsilon": _finite(max(one, together)),
            "released": f"the {released} of every run, each of which may follow from those before it",
        },
        "best": None,
        "record": None,
    }
    if curves is not None:
        options = [
            {
                "epsilon": _finite(max(one, epsilon)),
                "distribution": repetitions.distribution,
                "parameter": repetitions.parameter,
                "mean": repetitions.mean,
                "median": repetitions.median,
            }
            for repetitions, epsilon in selection.choose(trials, curves, delta).items()
        ]
        only = f"the {released} of the run that is best by {score}, and nothing of the others, nor their number"
        found["best"] = {**options[0], "score": score, "released": only, "others": options[1:]}
    return found


def _records_together(plans: Iterable[RecordLevelPlan], evaluation: EvaluationPlan | None, trials: int) -> float:
    """Trained and tested records are disjoint, as those of two sites: the largest epsilon counts."""
    alike = list(dict.fromkeys(replace(plan, rounds=trials * plan.rounds) for plan in plans))
    interval = accounting.SHOWN if len(alike) <= _FEW else accounting.CALIBRATING
    trained = max(plan.epsilon(interval=interval) for plan in alike)
    if evaluation is None or evaluation.epsilon_per_release is None:
        return trained
    # One run's metrics cost their sum, without any delta; so many runs' may use that of the plan.
    histogram = DiscreteLaplace(epsilon=evaluation.epsilon_per_release, relation="zero-out")
    return max(trained, composed({histogram: trials * evaluation.releases}, max(plan.delta for plan in alike)).epsilon)


def _records_curves(plans: Iterable[RecordLevelPlan], evaluation: EvaluationPlan | None) -> list[RenyiCurve]:
    """Return one curve for each kind of record: of each site's trained ones, and of the tested ones.

    A trained record moves a run's model, and its metrics and score through the model alone (post-processing); a tested
    one moves the histograms alone, whatever was released before them. So neither ever pays for both.
    """
    curves = [
        selection.gaussian_run(
            sampling_rate=plan.accounted_rate,
            noise_multiplier=plan.noise_multiplier,
            steps=plan.accounted_steps(),
        )
        for plan in plans
    ]
    if evaluation is not None and evaluation.epsilon_per_release is not None:
        curves.append(selection.pure_run(epsilon=evaluation.epsilon_per_release, releases=evaluation.releases))
    return list(dict.fromkeys(curves))


def _clients_together(plan: ClientLevelPlan, trials: int) -> float:
    if plan.bands:
        # Each run's correlated noise is one Gaussian mechanism.
        return accounting.epsilon(
            sampling_rate=1.0, noise_multiplier=plan.noise_multiplier, steps=trials, delta=plan.delta
        )
    return replace(plan, rounds=trials * plan.participations * plan.period).epsilon()


def _clients_curve(plan: ClientLevelPlan) -> RenyiCurve:
    # The exact discrete noise has at most the Gaussian's divergences (`discrete_gaussian.epsilon`).
    draws = plan.participations * (plan.coordinates + plan.adaptive_clipping)
    return selection.gaussian_run(
        sampling_rate=plan.sampling_rate,
        noise_multiplier=plan.noise_multiplier,
        steps=1 if plan.bands else plan.participations,
        distance=0.0 if plan.bands else draws * TOTAL_VARIATION,
    )


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None
