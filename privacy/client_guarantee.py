"""The guarantees for whole clients: the server bounds and noises what they add, or they do it themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .client_level import ClientLevelPlan
from .guarantee import OTHER_RUNS, Guarantee, Place, Randomness, finite, no_privacy
from .local import LocalPlan

EXCLUDED = (
    "timing: how long a round or the run took",
    "the number of clients, which is public, and that one of them stayed away for reasons outside of its records",
    "the choice of hyper-parameters, as far as earlier runs with the same clients led to it",
    "several clients of one person or owner: epsilon counts for each of them",
    f"{OTHER_RUNS} with the same clients: the epsilon counts this run alone",
)
FLOATING = "the correlated noise is floating-point"
_ZERO_OUT = "zero-out (one client replaced by one that contributes nothing, the number of clients public)"
_TRUST: dict[Place, str] = {
    "simulation": "this is a simulation: one process holds all records and sees every update before the noise; the "
    "promise is about the released models",
    "federation": "the server is trusted: it sees every client's update before it adds the noise; the promise is about "
    "the models that it releases, towards everybody else",
}


_LOCAL_TRUST: dict[Place, str] = {
    "simulation": "this is a simulation: one process holds all records; in it each client adds the noise to its own "
    "update before anybody sees it, and the promise is about these updates",
    "federation": "nobody is trusted: each client adds the noise to its own update before it leaves, so the promise "
    "holds towards the server too",
}


def client_level(
    plan: ClientLevelPlan,
    rounds: int,
    *,
    randomness: Randomness = "secret",
    place: Place = "simulation",
    excludes_extra: Sequence[str] = (),
) -> Guarantee:
    """Return the guarantee after so many rounds of a plan: the same for every client, drawn or not."""
    epsilon = plan.epsilon(rounds)
    if not math.isfinite(epsilon):
        return no_privacy(randomness=randomness, place=place, excludes_extra=excludes_extra)
    return Guarantee(
        epsilon=epsilon,
        delta=plan.delta,
        unit="client",
        neighbouring=_ZERO_OUT,
        sampler=f"{rounds} rounds with {_cohorts(plan)}",
        randomness=randomness,
        trust=_TRUST[place],
        excludes=(*EXCLUDED, *([FLOATING] if plan.bands else []), *excludes_extra),
        replace_one_epsilon=finite(plan.epsilon(rounds, relation="replace-one")),
        released="models",
        drawn="noise and the cohorts",
    )


def local_privacy(
    plan: LocalPlan,
    rounds: int,
    *,
    randomness: Randomness = "secret",
    place: Place = "simulation",
    excludes_extra: Sequence[str] = (),
) -> Guarantee:
    """Return the guarantee of clients that noise their own updates, after so many rounds of the run."""
    sent = min(plan.participations, rounds)
    epsilon = plan.epsilon(sent)
    if not math.isfinite(epsilon):
        return no_privacy(randomness=randomness, place=place, excludes_extra=excludes_extra)
    return Guarantee(
        epsilon=epsilon,
        delta=plan.delta,
        unit="client",
        neighbouring=_ZERO_OUT,
        sampler=f"{rounds} rounds in which a client sends at most {sent} updates",
        randomness=randomness,
        trust=_LOCAL_TRUST[place],
        excludes=(*EXCLUDED, *excludes_extra),
        replace_one_epsilon=finite(plan.epsilon(sent, relation="replace-one")),
        released="updates, and so the models,",
        drawn="noise",
    )


def _cohorts(plan: ClientLevelPlan) -> str:
    if plan.sampling == "poisson" and plan.sampling_rate < 1:
        return (
            f"each of {plan.clients} clients in a round's secret cohort with probability {plan.sampling_rate:.4g} "
            "(Poisson sampling)"
        )
    if plan.sampling == "cyclic":
        correlated = f", the noise correlated over {plan.bands} rounds" if plan.bands else ""
        return f"each of {plan.clients} clients in one of every {plan.period} rounds{correlated}"
    if plan.sampling == "fixed":
        return f"cohorts of {plan.cohort} of {plan.clients} clients, counted as if each client were in all of them"
    return f"all {plan.clients} clients in each"
