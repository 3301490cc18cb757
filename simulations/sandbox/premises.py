"""What each process of a sandbox is given: an identity, and for a site its own data, policy and ledger."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ...core import toml
from ...core.errors import InputError
from ...experiment import Experiment
from ...privacy.ledger.ledger import Ledger
from ...server.plan import make_plan
from ...tasks.partition import client_names
from ...tasks.prepared import SUFFIX, save_site
from ...tasks.task import SiteData, Task
from ...transport import provisioning
from ...transport.authority import Authority
from ...transport.certificates import Hosts, check_name
from ..plan import load_clients

HOST = "localhost"
"""The server's name in its certificate, and to the sites' policies."""
DATA_SET = "records"
MOST_CLIENTS = 64
"""Each is a process of some 400 MiB."""
_MESSAGE_BYTES = 8 << 30


@dataclass(frozen=True, kw_only=True)
class SitePremises:
    """One site's folders and files."""

    name: str
    identity: Path
    policy: Path
    state: Path
    log: Path


@dataclass(frozen=True, kw_only=True)
class Premises:
    """A server's identity and every site's premises."""

    server: Path
    sites: tuple[SitePremises, ...]


def furnish(folder: Path, experiment: Experiment, task: Task | None, *, now: datetime) -> Premises:
    """Write a fresh authority, identities, data, policies and ledgers into an empty folder, and return where they are.

    `task` is None where a Flower ClientApp brings its own data. Each site's policy allows this experiment, once.
    Raises InputError for clients that cannot be processes here.
    """
    data = load_clients(experiment, task) if task else {}
    names = tuple(data) or tuple(client_names(experiment.clients.count or 1))
    _refuse_names(experiment, names)
    budget = _budget(experiment, data, task)
    authority = Authority.create(folder / "authority", name="sandbox", now=now)
    server = provisioning.serve(authority, folder / "server", Hosts.of([HOST], ["127.0.0.1"]), now=now)
    sites = []
    for number, name in enumerate(names):
        home = folder / "sites" / name
        site = SitePremises(
            name=name,
            identity=home / "identity",
            policy=home / "policy.toml",
            state=home / "state",
            log=home / "client.log",
        )
        asked = provisioning.request(name, site.identity)
        answer = site.identity / "answer.pem"
        answer.write_bytes(authority.answer(authority.approve(asked.file.read_bytes(), where=str(asked.file), now=now)))
        provisioning.install(answer, site.identity, fingerprint=authority.fingerprint, now=now)
        records = home / f"records{SUFFIX}"
        if task is None:
            records = experiment.folder or Path()
        else:
            save_site(records, data[name])
        count = len(data[name].train) if task else 1
        tables = policy_of(experiment, name, records.absolute(), count, budget)
        if task is None:
            tables["data"][DATA_SET]["node_config"] = {"partition-id": number, "num-partitions": len(names)}
        site.policy.write_text(toml.write(tables))
        Ledger.create(site.state).close()
        sites.append(site)
    return Premises(server=server.folder, sites=tuple(sites))


def policy_of(
    experiment: Experiment, name: str, path: Path, records: int, budget: tuple[float, float] | None
) -> dict[str, Any]:
    """Return the tables of a policy under which a site takes part in this experiment: what it needs, and no more."""
    privacy, app = experiment.privacy, experiment.clients.app
    if privacy.unit == "record" or privacy.record is not None:
        update, unit, metrics = "dp-sgd", "record", "noised" if privacy.unit == "record" else "withheld"
    elif privacy.unit == "client":
        update, unit, metrics = "noised" if privacy.trust == "nobody" else "raw", "client", "withheld"
    else:
        update, unit, metrics = "raw", "record", "raw"
    table: dict[str, Any] = {"path": str(path), "records": records, "unit": unit}
    # A site takes texts of a server's file to code that is not bract's only where the owner names their keys.
    texts = {*experiment.task.own, *experiment.strategy.own, *experiment.clients.run_config}
    apps = [app, experiment.task.model] if app else []
    options = {key: value for key, value in experiment.task.own.items() if key != "data"}
    if options and not app:
        table["task"] = options
    if budget is not None:
        table |= {"epsilon": budget[0], "delta": budget[1]}
    return {
        "site": {"name": name, "server": HOST},
        "data": {DATA_SET: table},
        "allow": {
            "tasks": [] if app else [experiment.task.name],
            "apps": apps,
            "options": sorted(texts),
            "strategies": [experiment.strategy.name],
            "epochs": experiment.train.epochs,
            "message_bytes": _MESSAGE_BYTES,
            "updates": [update],
            "metrics": metrics,
        },
    }


def _budget(experiment: Experiment, data: Mapping[str, SiteData], task: Task | None) -> tuple[float, float] | None:
    """Return the epsilon and delta that every site grants: what the plan needs; None where nothing is private."""
    if experiment.privacy.unit == "none":
        return None
    counts = {name: len(site.train) for name, site in data.items()}
    clients = len(counts) or experiment.clients.count or 1
    plan = make_plan(experiment, counts, len(task.classes) if task else 2, lambda event: None, clients=clients)
    promise = plan.guarantee(experiment)
    shown = promise.record or promise
    # Metrics are of other records than the training, so a ledger holds the larger of the two; a filter needs a little
    # more than the plan.
    epsilon = max(shown.epsilon or 0.0, plan.evaluation.epsilon or 0.0 if plan.evaluation else 0.0)
    return math.ceil(epsilon * 1.05 * 1000) / 1000, shown.delta or experiment.privacy.delta


def _refuse_names(experiment: Experiment, names: tuple[str, ...]) -> None:
    if len(names) > MOST_CLIENTS:
        raise InputError(
            "experiment-conflict",
            f"clients.count = {len(names)}: a sandbox starts a process for each client, at most {MOST_CLIENTS}; "
            f"`bract simulate` runs many in one{experiment.place('clients', 'count')}",
        )
    for name in names:
        check_name(name, of="client")
