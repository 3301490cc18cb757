"""`bract audit quick`: run the checks of an experiment's unit, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor, nn

from ...clients.local_model import LocalModel
from ...clients.training import LocalTraining, reproducible
from ...core import flower
from ...core.errors import BractError
from ...core.keys import Key
from ...experiment import Experiment
from ...privacy.canary import canary_test
from ...privacy.dpsgd.dpsgd import Loss
from ...privacy.mechanism import RecordLevelPlan
from ...tasks.task import Examples, Task
from .accountants import accountants
from .data import data
from .finding import Finding
from .probe import Seeing
from .randomness import fresh_noise, noise, sampling
from .records import bad_records, independence, sensitivity
from .released import ledger, release, weights
from .subject import Subject, subject_of

Check = Callable[[Subject], Finding]


def canary(subject: Subject) -> Finding:
    """Planted records are found no more often than the claimed noise allows, at the site with the least noise."""
    site = min(subject.mechanisms, key=lambda name: subject.mechanisms[name].noise_multiplier)
    plan = subject.mechanisms[site]
    found = canary_test(
        plan, subject.key.child("audit", "canary"), steps=partial(_kernel_steps, subject), device=subject.model.device
    )
    verdict = "as the noise allows" if found.passed else "more than the noise allows"
    weak = "" if found.power >= 0.99 else f"; so much noise hides a mistake: half of it is found in {found.power:.0%}"
    return Finding(
        name="canary",
        passed=found.passed,
        sentence=f"{found.right} of {found.canaries} coins are guessed, {verdict} (at most {found.most}){weak}",
        figures={
            "right": found.right,
            "most": found.most,
            "canaries": found.canaries,
            "steps": found.steps,
            "mu": found.mu,
            "power": found.power,
        },
    )


def _kernel_steps(
    subject: Subject,
    layer: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    plan: RecordLevelPlan,
    key: Key,
    see: Callable[[], None],
) -> None:
    """Take the steps by the kernel, whichever engine it chooses."""
    model = LocalModel(layer, LocalTraining(buffers=()), device=inputs.device)
    subject.kernel(model, loss, Examples(inputs, targets), plan=plan, key=key, session=Seeing(see))


CHECKS: Mapping[str, Mapping[str, Check]] = {
    "record": {
        "data": data,
        "sensitivity": sensitivity,
        "independence": independence,
        "bad-records": bad_records,
        "sampling": sampling,
        "noise": noise,
        "fresh-noise": fresh_noise,
        "release": release,
        "weights": weights,
        "ledger": ledger,
        "accountants": accountants,
        "canary": canary,
    }
}
"""The checks by privacy.unit, in order."""


def quick(experiment: Experiment, *, task: Task | None = None) -> Iterator[Finding]:
    """Yield the findings of an experiment's checks, each when it is there; writes nothing.

    `task` is an object to use instead of what the experiment names. A sound program fails a check of chance with a
    probability of at most 1e-6. Raises InputError, `experiment-conflict` where no check knows the unit.
    """
    checks = _checks_of(experiment)
    # No `with` around a yield: whoever takes the findings must find torch as it was.
    with reproducible(), flower.quiet():
        subject = subject_of(experiment, task=task)
    for name, check in checks.items():
        with reproducible(), flower.quiet():
            finding = _checked(name, check, subject)
        yield finding


def _checks_of(experiment: Experiment) -> Mapping[str, Check]:
    unit = experiment.privacy.unit
    if unit == "none":
        why = 'there is nothing to audit; set privacy.unit = "record" and privacy.epsilon'
        raise experiment.conflict("privacy", "unit", why=why)
    if unit not in CHECKS:
        raise experiment.conflict("privacy", "unit", why='the audit knows the unit "record" alone so far')
    return CHECKS[unit]


def _checked(name: str, check: Check, subject: Subject) -> Finding:
    try:
        return check(subject)
    except BractError as error:
        return Finding(name=name, passed=False, sentence=f"the run failed: {error.sentence}")
    except Exception as error:  # what a task or a strategy raises is what a run would fail of
        return Finding(name=name, passed=False, sentence=f"the run failed: {type(error).__name__}: {error}")
