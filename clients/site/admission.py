"""What a site does for a message: the server's request held against the owner's policy, as mechanisms and as events.

Nothing here touches the data. The site computes q, steps and noise from the declared number of records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...core.errors import InputError, Refusal, RunError
from ...privacy.accounting import Relation
from ...privacy.ledger.events import Claimed, DiscreteLaplace, Event, Gaussian, Planned, RunPlan, digest_of, round_of
from ...privacy.local import LocalPlan
from ...privacy.mechanism import RecordLevelPlan
from ...privacy.policy import LARGEST_CLIPPING_NORM, SMALLEST_CLIPPING_NORM, Policy
from ...privacy.release import EvaluationPlan
from .request import MessageRequest, Phase, RunRequest

_MOST_STEPS = 10**5
"""Of a run: with more, accountants take minutes and then for ever, and a server could hang a site by asking."""


@dataclass(frozen=True, kw_only=True)
class Mechanisms:
    """What covers a run's releases at one site; `plan` is None where the owner set no budget, and all is raw.

    `events` holds what a message of each phase is charged as.
    """

    training: RecordLevelPlan | None
    local: LocalPlan | None
    evaluation: EvaluationPlan | None
    events: Mapping[Phase, Event]
    plan: RunPlan | None


def admit(
    request: MessageRequest,
    *,
    policy: Policy,
    data: str,
    server: str | None,
    is_app: bool,
    classes: int,
    coordinates: int,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Mechanisms:
    """Return the mechanisms of an admitted message. Raises Refusal or RunError.

    `data` is the owner's name of the data set, `server` the name in the certificate of who asks, `coordinates` the
    number of values that travel; `options` are further fields of a RecordLevelPlan, and `settings` what else the site's
    experiment fixes.
    """
    run = request.run
    refuse_what_may_not_run(policy, run.task, run.strategy, is_app=is_app)
    policy.refuse_unlisted("updates", run.update)
    _refuse_too_many_epochs(policy, run, is_app)
    _refuse_extreme_clipping(policy, run)
    training = local = None
    event: Event | None = None
    if run.update == "raw":
        policy.refuse_untrusted(server, "an update without noise")
        event = _claim(policy, data, run)
    else:
        _refuse_without_budget(policy, data, run.update)
        _refuse_larger_delta(policy, data, run)
    if run.update == "dp-sgd":
        training = _dp_sgd(policy, data, run, is_app, options)
        event = round_of(training, relation=policy.data[data].relation)
    if run.update == "noised":
        local = _local(policy, data, run, coordinates)
        event = _update_of(local, relation=policy.data[data].relation)
    evaluation, release = _evaluation(policy, data, run, server, is_app, classes)
    if request.phase == "evaluate" and run.metrics == "withheld":
        raise RunError("metrics-withheld", f"run {run.run}: asks for metrics, though it planned none")
    events: dict[Phase, Event] = {}
    planned = []
    for phase, each, times in (("train", event, run.rounds), ("evaluate", release, run.releases)):
        if each is not None:
            events[phase] = each  # type: ignore[index]
            planned.append(Planned(phase=phase, event=each, times=times))
    asked = {name: value for name, value in vars(run).items() if name != "run"}
    table = policy.data[data]
    digest = digest_of({"asked": asked, "records": table.records, **settings})
    plan = RunPlan(digest=digest, events=tuple(planned)) if table.epsilon is not None else None
    return Mechanisms(training=training, local=local, evaluation=evaluation, events=events, plan=plan)


def refuse_what_may_not_run(policy: Policy, task: str, strategy: str, *, is_app: bool) -> None:
    """Raise Refusal unless the policy names the task (or the ClientApp) and the strategy."""
    policy.refuse_unlisted("apps" if is_app else "tasks", task)
    policy.refuse_unlisted("strategies", strategy)


def _refuse_too_many_epochs(policy: Policy, run: RunRequest, is_app: bool) -> None:
    # How often an app goes over its records is its own affair.
    if not is_app and run.epochs > policy.allow.epochs:
        raise policy.refusal(
            "allow",
            "epochs",
            why=f"{run.epochs} epochs a round are asked for, and {policy.allow.epochs} are allowed",
            write=f"epochs = {run.epochs}",
        )


def _refuse_extreme_clipping(policy: Policy, run: RunRequest) -> None:
    norm = run.clipping_norm
    if norm is not None and not SMALLEST_CLIPPING_NORM <= norm <= LARGEST_CLIPPING_NORM:
        raise Refusal(
            "policy-refused",
            f"clipping norm = {norm:g}: must lie in [{SMALLEST_CLIPPING_NORM:g}, {LARGEST_CLIPPING_NORM:g}], whatever "
            f"a policy allows{policy.place('allow', 'updates')}",
        )


def _refuse_larger_delta(policy: Policy, data: str, run: RunRequest) -> None:
    delta, allowed = run.delta or 0.0, policy.data[data].delta or 0.0
    if delta > allowed:
        raise policy.refusal(
            "data", data, "delta", why=f"the run is planned with {delta:g}, more than {allowed:g}", write=f"{delta:g}"
        )


def _dp_sgd(policy: Policy, data: str, run: RunRequest, is_app: bool, options: Mapping[str, Any]) -> RecordLevelPlan:
    if is_app:
        raise RunError("request-invalid", "the gradients of a Flower ClientApp are not seen, so they cannot be noised")
    _refuse_other_unit(policy, data, "record", "DP-SGD")
    known = {
        "records": policy.data[data].records,
        "batch_size": run.batch_size,
        "epochs": run.epochs,
        "rounds": run.rounds,
        "clipping_norm": run.clipping_norm,
        "delta": run.delta,
        **options,
    }
    silent = RecordLevelPlan(noise_multiplier=run.noise_multiplier or 0.0, **known)
    if silent.steps() > _MOST_STEPS:
        raise RunError("request-invalid", f"{silent.steps()} steps are asked for, more than {_MOST_STEPS} in a run")
    if run.noise_multiplier is not None:
        return silent
    _refuse_to_calibrate(policy, data)
    return _calibrated(RecordLevelPlan, epsilon=run.epsilon, **known)  # type: ignore[return-value]


def _local(policy: Policy, data: str, run: RunRequest, coordinates: int) -> LocalPlan:
    """Return the mechanism of one noised update a message: the whole data set moves it, and nothing is sampled."""
    _refuse_other_unit(policy, data, "client", "one noised update a message")
    known: dict[str, Any] = {
        "participations": run.rounds,
        "clipping_norm": run.clipping_norm,
        "delta": run.delta,
        "coordinates": coordinates,
    }
    if run.noise_multiplier is not None:
        plan = LocalPlan(noise_multiplier=run.noise_multiplier, **known)
        # With so little noise the discrete mechanism's own delta leaves nothing of the run's.
        if math.isinf(plan.epsilon(relation=policy.data[data].relation)):
            raise RunError("request-invalid", f"noise_multiplier = {run.noise_multiplier:g} gives no epsilon at all")
        return plan
    _refuse_to_calibrate(policy, data)
    return _calibrated(LocalPlan, epsilon=run.epsilon, **known)  # type: ignore[return-value]


def _update_of(plan: LocalPlan, *, relation: Relation) -> Gaussian:
    # The hair less pays for what the accountant of discrete noise sets aside beyond that of the Gaussian.
    noise_multiplier = plan.noise_multiplier * (1 - 1e-9)
    return Gaussian(noise_multiplier=noise_multiplier, steps=1, relation=relation, delta=plan.delta)


def _refuse_to_calibrate(policy: Policy, data: str) -> None:
    relation = policy.data[data].relation
    if relation != "zero-out":
        raise policy.refusal(
            "data",
            data,
            "relation",
            why=f"noise is calibrated under zero-out, not under {relation}",
            write='relation = "zero-out", or have the server ask by noise_multiplier',
        )


@lru_cache(maxsize=64)
def _calibrated(kind: type[RecordLevelPlan] | type[LocalPlan], **known: Any) -> RecordLevelPlan | LocalPlan:
    try:
        return kind.calibrate(**known)
    except InputError as error:
        raise RunError("request-invalid", f"no noise keeps the run within its epsilon ({error.sentence})") from error


def _claim(policy: Policy, data: str, run: RunRequest) -> Event | None:
    table = policy.data[data]
    if run.claimed_epsilon is None:
        if table.epsilon is not None:
            raise policy.refusal(
                "data",
                data,
                "epsilon",
                why="a raw update is asked for and no epsilon claimed, so the budget would promise nothing",
                write="no epsilon and no delta: nothing is bounded then",
            )
        return None
    _refuse_without_budget(policy, data, "a claimed epsilon")
    _refuse_other_unit(policy, data, "client", "what a server claims")
    return Claimed(epsilon=run.claimed_epsilon, delta=run.delta or 0.0, relation=table.relation)


def _evaluation(
    policy: Policy, data: str, run: RunRequest, server: str | None, is_app: bool, classes: int
) -> tuple[EvaluationPlan | None, Event | None]:
    if run.metrics == "withheld":
        return None, None
    allowed, table = policy.allow.metrics, policy.data[data]
    if allowed == "withheld" or (run.metrics == "raw" and allowed == "noised"):
        raise policy.refusal(
            "allow",
            "metrics",
            why=f"{run.metrics} metrics are asked for, and {allowed} is what is allowed",
            write=f'metrics = "{run.metrics}"',
        )
    if run.metrics == "raw":
        policy.refuse_untrusted(server, "metrics without noise")
        if table.epsilon is not None:
            raise policy.refusal(
                "data",
                data,
                "epsilon",
                why="raw metrics are asked for, and no budget bounds what they tell",
                write="no epsilon and no delta: nothing is bounded then",
            )
        return EvaluationPlan(epsilon=None, releases=run.releases, classes=classes), None
    if is_app:
        raise RunError("request-invalid", "what a Flower ClientApp measures has no bound, so it cannot be noised")
    _refuse_without_budget(policy, data, "noised metrics")
    _refuse_other_unit(policy, data, "record", "noised metrics")
    plan = EvaluationPlan(epsilon=run.metrics_epsilon, releases=run.releases, classes=classes)
    return plan, DiscreteLaplace(epsilon=plan.epsilon_per_release or 0.0, relation=table.relation)


def _refuse_without_budget(policy: Policy, data: str, what: str) -> None:
    if policy.data[data].epsilon is None:
        raise policy.refusal(
            "data", data, "epsilon", why=f"{what} would spend a budget, and there is none", write="epsilon and delta"
        )


def _refuse_other_unit(policy: Policy, data: str, unit: str, what: str) -> None:
    if policy.data[data].unit != unit:
        raise policy.refusal(
            "data",
            data,
            "unit",
            why=f"{what} is counted for a {unit}, and the budget for a {policy.data[data].unit}",
            write=f'unit = "{unit}"',
        )
