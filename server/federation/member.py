"""A member of a federation: what a client says when it joins, and whether that goes with the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from ...core.errors import Refusal
from ...experiment import Experiment
from ...privacy.accounting import Relation
from ...privacy.policy import Update
from ...transport.greeting import Hello
from .model import ServerModel

# What a site takes on at most, and what an accountant counts in no time.
_MOST_STEPS = 10**5
_MOST_RECORDS = 2**40
_UNITS = ("record", "client")
_RELATIONS = ("zero-out", "add-remove", "replace-one")
_METRICS = ("withheld", "noised", "raw")


@dataclass(frozen=True, kw_only=True)
class Member:
    """What a client said of itself when it joined: all of it public, and the same in every later hello."""

    name: str
    data: str
    records: int
    unit: str
    relation: Relation
    metrics: str
    ledger: bool
    seeded: bool
    noise_multiplier: float | None = None


def suited(
    name: str, hello: Hello, experiment: Experiment, model: ServerModel, *, needs_metrics: bool = False
) -> Member:
    """Return what a hello says; Refusal unless it has the form, and allows what the run asks for."""
    run, said, update = experiment, hello.capabilities, update_of(experiment)
    if hello.task != model.name:
        raise unsuited(f"this run learns {model.name}, and {name} was started for {hello.task or 'nothing'}")
    if said.get("strategy") != run.strategy.name:
        raise unsuited(
            f"this run aggregates by {run.strategy.name}, and {name} was started for another strategy; start it "
            "with the experiment that the server announces"
        )
    if update not in _texts(said.get("updates")):
        raise unsuited(f'this run asks for "{update}" updates, which the policy of {name} does not release')
    unit, records, epochs = said.get("unit"), said.get("records"), said.get("epochs")
    if needs_metrics and said.get("metrics") != "raw":
        raise unsuited(f"{run.strategy.name} needs metrics without noise, which the policy of {name} withholds")
    needed = {"dp-sgd": "record", "noised": "client", "raw": "client"}[update]
    if unit not in _UNITS or (unit != needed and not (update == "raw" and run.privacy.unit == "none")):
        raise unsuited(f"this run is private for a {needed}, and the budget of {name} is for a {unit}")
    if not _is_count(records) or not 1 <= records <= _MOST_RECORDS:
        raise unsuited(f"{name} declares no number of records that a site may have")
    relation, metrics = said.get("relation"), said.get("metrics")
    if relation not in _RELATIONS or metrics not in _METRICS:
        raise unsuited(f"{name} says nothing that this version of bract knows of its relation and metrics")
    if run.clients.app is None and (not _is_count(epochs) or epochs < run.train.epochs):
        raise unsuited(f"this run trains {run.train.epochs} epochs a round, and the policy of {name} allows less")
    most = said.get("message_bytes")
    if not _is_count(most) or most < model.traffic.down:
        raise unsuited(f"a message of this run has {model.traffic.down} bytes, and the policy of {name} takes less")
    if update == "dp-sgd" and _steps(run, records) > _MOST_STEPS:
        raise unsuited(f"with {records} records {name} would train more than {_MOST_STEPS} steps in this run")
    return Member(
        name=name,
        data=hello.data,
        records=records,
        unit=unit,
        relation=relation,
        metrics=metrics,
        ledger=hello.ledger is not None,
        seeded=bool(said.get("seeded", False)),
    )


def update_of(experiment: Experiment) -> Update:
    """Return what a run's train messages ask for."""
    privacy = experiment.privacy
    if privacy.unit == "record" or privacy.record is not None:
        return "dp-sgd"
    return "noised" if privacy.trust == "nobody" else "raw"


def counts_clients(experiment: Experiment) -> bool:
    """Return whether the mechanism is about a public number of clients."""
    privacy = experiment.privacy
    return privacy.unit == "client" and (privacy.trust == "server" or experiment.clients.sampling == "cyclic")


def unsuited(sentence: str) -> Refusal:
    """Return the refusal of a client that does not go with the run."""
    return Refusal("client-unsuited", sentence)


def _steps(experiment: Experiment, records: int) -> int:
    train = experiment.train
    return experiment.experiment.rounds * train.epochs * -(-records // train.batch_size)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _texts(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
