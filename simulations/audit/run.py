"""`bract audit quick`: run the checks of an experiment's units, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...clients.training import reproducible
from ...core import flower
from ...core.errors import BractError
from ...experiment import Experiment
from ...tasks.task import Task
from .clients import accountants as clients_accountants
from .clients import at_sites, canary, randomness, released, updates, weighing
from .clients.subject import client_subject_of
from .finding import Finding
from .records import accountants as records_accountants
from .records import canary as records_canary
from .records import data, sensitivity
from .records import randomness as records_randomness
from .records import released as records_released
from .records.subject import subject_of

Check = Callable[[Any], Finding]

CHECKS: Mapping[str, Mapping[str, Check]] = {
    "record": {
        "data": data.data,
        "sensitivity": sensitivity.sensitivity,
        "independence": sensitivity.independence,
        "bad-records": sensitivity.bad_records,
        "sampling": records_randomness.sampling,
        "noise": records_randomness.noise,
        "fresh-noise": records_randomness.fresh_noise,
        "release": records_released.release,
        "weights": records_released.weights,
        "ledger": records_released.ledger,
        "accountants": records_accountants.accountants,
        "canary": records_canary.canary,
    },
    "client": {
        "sensitivity": updates.sensitivity,
        "independence": updates.independence,
        "bad-updates": updates.bad_updates,
        "sampling": randomness.sampling,
        "noise": randomness.noise,
        "fresh-noise": randomness.fresh_noise,
        "release": released.release,
        "weights": weighing.weights,
        "denominator": weighing.denominator,
        "ledger": released.ledger,
        "accountants": clients_accountants.accountants,
        "canary": canary.canary,
    },
    "client, trusting nobody": {
        "sensitivity": at_sites.sensitivity,
        "independence": at_sites.independence,
        "bad-updates": at_sites.bad_updates,
        "sampling": randomness.sampling,
        "noise": randomness.noise,
        "fresh-noise": randomness.fresh_noise,
        "release": at_sites.release,
        "weights": at_sites.weights,
        "ledger": released.ledger,
        "accountants": clients_accountants.accountants,
        "canary": canary.canary_of_sites,
    },
}
"""The checks by privacy.unit, that of clients by privacy.trust, in order. Each takes the subject of its unit."""

BENEATH = "record."
"""What the checks of [privacy.record] begin with, where clients are protected and their records too."""


def checks_of(experiment: Experiment) -> list[str]:
    """Return the names of an experiment's checks, in order. Raises InputError where there is nothing to audit."""
    return [name for part in _parts(experiment) for name in part.checks]


def quick(experiment: Experiment, *, task: Task | None = None) -> Iterator[Finding]:
    """Yield the findings of an experiment's checks, each when it is there; writes nothing.

    `task` is an object to use instead of what the experiment names. A sound program fails a check of chance with a
    probability of at most 1e-6. Raises InputError, `experiment-conflict` where there is nothing to audit.
    """
    for part in _parts(experiment):
        # No `with` around a yield: whoever takes the findings must find torch as it was.
        with reproducible(), flower.quiet():
            subject = part.subject(experiment, task=task)
        for name, check in part.checks.items():
            with reproducible(), flower.quiet():
                finding = _checked(name, check, subject)
            yield finding


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The checks of one unit, and what makes their subject."""

    checks: Mapping[str, Check]
    subject: Callable[..., Any]


def _parts(experiment: Experiment) -> list[_Part]:
    privacy = experiment.privacy
    if privacy.unit == "none":
        why = 'there is nothing to audit; set privacy.unit = "record" and privacy.epsilon'
        raise experiment.conflict("privacy", "unit", why=why)
    if privacy.unit == "record":
        return [_Part(checks=CHECKS["record"], subject=subject_of)]
    of_clients = CHECKS["client" if privacy.trust == "server" else "client, trusting nobody"]
    parts = [_Part(checks=of_clients, subject=client_subject_of)]
    if privacy.record is not None:
        # A trusted server may know and weigh counts; what that may move is a check of clients.
        left_out = ("weights",) if privacy.trust == "server" else ()
        beneath = {BENEATH + name: check for name, check in CHECKS["record"].items() if name not in left_out}
        parts.append(_Part(checks=beneath, subject=subject_of))
    return parts


def _checked(name: str, check: Check, subject: Any) -> Finding:
    try:
        return replace(check(subject), name=name)
    except BractError as error:
        return Finding(name=name, passed=False, sentence=f"the run failed: {error.sentence}")
    except Exception as error:  # what a task or a strategy raises is what a run would fail of
        return Finding(name=name, passed=False, sentence=f"the run failed: {type(error).__name__}: {error}")
