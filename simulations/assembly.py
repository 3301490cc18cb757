"""Everything that a run is made of, put together before the first round, and checked when a run goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InputError
from ..core.keys import Key
from ..core.parameters import Layout, digest
from ..experiment import Experiment
from ..server.events import Listener
from ..server.manifest import manifest, refuse_other_software
from ..server.private_aggregation import PrivateAggregation
from ..server.run_directory import RunDirectory
from ..tasks.partition import client_names
from ..tasks.task import SiteData, Task
from .accounts import Accounts, PopulationAccount, accounts_of
from .executors import Executor, InlineExecutor
from .federation import Federation, flower_federation, travelling_size, virtual_federation
from .grid import VirtualGrid
from .plan import Plan, load_clients, make_plan, refuse_too_few_clients
from .recipe import Recipe
from .shared_data import SharedData
from .sizing import worker_count
from .virtual_clock import VirtualClock
from .workers import WorkerPool


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """A run's parts. `task` is None, and `data` empty, where a Flower ClientApp brings its own."""

    experiment: Experiment
    directory: RunDirectory
    task: Task | None
    data: Mapping[str, SiteData]
    plan: Plan
    accounts: Accounts | PopulationAccount
    federation: Federation
    grid: VirtualGrid
    key: Key


def assemble(
    experiment: Experiment,
    task: Task | None,
    *,
    given: bool,
    existing: RunDirectory | None,
    out: Path | None,
    emit: Listener,
    strategy: object | None = None,
) -> Assembly:
    """Load data, make or reopen the run directory, calibrate noise, and build the virtual clients.

    A reopened run must find data, initial model and software as they were: its noise is drawn again, and the same
    noise over other gradients would reveal their difference. `given` objects (of a notebook) train in this process,
    as a worker could not find them; `strategy` is the one that the run uses. Raises InputError.
    """
    free = None if existing else RunDirectory.free(out, experiment.experiment.name)
    data = load_clients(experiment, task) if task else {}
    secret = existing.key() if existing else Key.fresh()
    key = secret if experiment.privacy.randomness == "secret" else Key.from_seed(experiment.experiment.seed)
    counts = {name: len(site.train) for name, site in data.items()}
    plan = make_plan(
        experiment,
        counts or dict.fromkeys(client_names(experiment.clients.count or 1), 0),
        len(task.classes) if task else 2,
        emit,
        coordinates=travelling_size(experiment, task, strategy) if experiment.privacy.unit == "client" else 1,
    )
    if task is None:
        federation = flower_federation(experiment, strategy)
    else:
        federation = virtual_federation(experiment, task, data, plan, key=key, strategy=strategy)
    refuse_too_few_clients(experiment, strategy, len(federation.names))
    # Made last: what was refused until here leaves no folder behind.
    directory = existing or RunDirectory.create(cast(Path, free), experiment, secret)
    workers = worker_count(
        experiment,
        clients=len(federation.names),
        records=sum(counts.values()),
        parameters=federation.size,
        device=federation.device,
    )
    executor: Executor
    if workers > 1 and not given:
        shared = SharedData.of(data) if task else None
        data = shared.sites() if shared else data
        recipe = Recipe(tables=experiment.model_dump(), folder=experiment.folder, data=shared, plan=plan, key=key)
        executor = WorkerPool(recipe, workers, log=directory.log_client)
    else:
        executor = InlineExecutor(federation.app, log=directory.log_client, isolate=task is None)
    assembly = Assembly(
        experiment=experiment,
        directory=directory,
        task=task,
        data=data,
        plan=plan,
        accounts=accounts_of(
            plan, rounds=experiment.experiment.rounds, epsilon_budget=experiment.privacy.epsilon_budget
        ),
        federation=federation,
        grid=VirtualGrid(
            executor,
            federation.names,
            run_config=experiment.clients.run_config,
            clock=VirtualClock.of(experiment),
        ),
        key=key,
    )
    _describe(assembly, resumed=existing is not None)
    return assembly


def aggregation_of(assembly: Assembly) -> PrivateAggregation | None:
    """Return the server's mechanism, None where the clients have their own or there is none."""
    if assembly.plan.aggregate is None:
        return None
    secret = assembly.experiment.privacy.randomness == "secret"

    def noise_key() -> Key:
        return assembly.directory.key("noise_key") if secret else assembly.key.child("correlated")

    layout, key = Layout.of(assembly.federation.initial), assembly.key.child("server")
    return PrivateAggregation(assembly.plan.aggregate, layout=layout, key=key, noise_key=noise_key)


def _describe(assembly: Assembly, *, resumed: bool) -> None:
    """Write what the run is made of; a resumed run must be made of the same."""
    directory, experiment, federation = assembly.directory, assembly.experiment, assembly.federation
    description = manifest(
        experiment,
        kernel="sequential",
        device=federation.device,
        parameters=federation.size,
        clients=len(federation.names),
        classes=assembly.task.classes if assembly.task else (),
        # Under client-level privacy nothing that is passed on names a client.
        sites=assembly.data if assembly.plan.aggregate is None else {},
        mechanisms=assembly.plan.mechanisms,
    )
    origin = {
        "folder": str((experiment.folder or Path()).resolve()),
        "experiment": hashlib.sha256(experiment.to_toml().encode()).hexdigest(),
        # A digest of private data would let a guess of the data be checked, so it stays in private/.
        "data": digest(_tensors(assembly.data)),
        "initial model": digest(federation.initial),
    }
    if not resumed:
        directory.write_json("private/origin.json", origin)
        directory.write_json("manifest.json", description)
        return
    refuse_other_software(directory.read_json("manifest.json"), description)
    before = directory.read_json("private/origin.json")
    for part in ("experiment", "data", "initial model"):
        if before.get(part) != origin[part]:
            raise InputError(
                "run-changed",
                f"{directory.path}: the {part} changed since the run began; restore what it was, or start a new run",
            )


def _tensors(data: Mapping[str, SiteData]) -> dict[str, NDArray[np.generic]]:
    return {
        f"{name}/{part}/{kind}": getattr(getattr(site, part), kind).numpy()
        for name, site in data.items()
        for part in ("train", "test")
        for kind in ("inputs", "targets")
    }
