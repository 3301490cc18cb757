"""Everything that a run is made of, put together before the first round, and checked when a run goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from ..clients.training import LocalTraining
from ..core.keys import Key
from ..core.names import ByName
from ..core.parameters import digest
from ..experiment import Experiment
from ..server.accounts import Accounts, PopulationAccount, accounts_of
from ..server.events import Listener
from ..server.manifest import LISTED_SITES, SiteRecords, manifest, origin_of, refuse_changed
from ..server.plan import Plan, make_plan, refuse_too_few_clients
from ..server.run_directory import RunDirectory
from ..tasks.partition import client_names
from ..tasks.pool import Pool, counts_of
from ..tasks.task import SiteData, Task
from .executors.executor import Executor, InlineExecutor, Watch
from .executors.inline import InlineWorker
from .executors.orders import Dealing
from .executors.ray_cluster import RayCluster, find_ray
from .executors.workers import WorkerPool
from .federation import Federation, flower_federation, travelling_size, virtual_federation
from .grid import VirtualGrid
from .plan import load_clients
from .recipe import Recipe
from .sizing import worker_count
from .virtual_clock import VirtualClock

_KINDS = ("inputs", "targets")


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
    watch: Watch | None = None,
) -> Assembly:
    """Load data, make or reopen the run directory, calibrate noise, and build the virtual clients.

    A reopened run must find data, initial model and software as they were: its noise is drawn again, and the same
    noise over other gradients would reveal their difference. `given` objects (of a notebook) train in this process,
    as a worker could not find them; `strategy` is the one that the run uses. `watch` is told how long each call of a
    client takes. Raises InputError.
    """
    free = None if existing else RunDirectory.free(out, experiment.experiment.name)
    data = load_clients(experiment, task) if task else {}
    secret = existing.key() if existing else Key.fresh()
    key = secret if experiment.privacy.randomness == "secret" else Key.from_seed(experiment.experiment.seed)
    counts, _ = counts_of(data)
    plan = make_plan(
        experiment,
        counts or ByName.alike(client_names(experiment.clients.count or 1), 0),
        len(task.classes) if task else 2,
        emit,
        coordinates=travelling_size(experiment, task, strategy) if experiment.privacy.unit == "client" else 1,
    )
    if task is None:
        federation = flower_federation(experiment, strategy)
    else:
        federation = virtual_federation(experiment, task, data, plan, key=key, strategy=strategy)
    refuse_too_few_clients(experiment, strategy, len(federation.names))
    engine = _dp_engine(experiment, data, plan, federation)
    where = experiment.simulation.executor
    if where in ("processes", "ray"):
        if given:
            why = "a task or strategy that is an object of this program trains in it; name it in the file by its path"
            raise experiment.conflict("simulation", "executor", why=why)
        if task and not isinstance(data, Pool):
            why = "the clients' records are not all of one shape and type, which sharing them takes; use inline"
            raise experiment.conflict("simulation", "executor", why=why)
    if where == "ray":
        find_ray()
    # Made last: what was refused until here leaves no folder behind.
    directory = existing or RunDirectory.create(cast(Path, free), experiment, secret)
    # A device that is named is the only one.
    gpus = torch.cuda.device_count() if federation.device == "cuda" else 0
    workers = worker_count(
        experiment,
        clients=len(federation.names),
        records=sum(counts.values()),
        parameters=federation.size,
        device=federation.device,
        gpus=gpus,
    )
    executor: Executor
    records = np.fromiter(counts.values(), np.int64, len(counts)) if task else None
    dealing = Dealing(width=federation.group.width if federation.group is not None else 1, records=records)
    spreads = workers > 1 and not given and (task is None or isinstance(data, Pool))
    if where in ("processes", "ray") or (where == "auto" and spreads):
        shared = data.share() if isinstance(data, Pool) else None
        recipe = Recipe(
            tables=experiment.model_dump(), folder=experiment.folder, data=shared, plan=plan, key=key, gpus=gpus
        )
        if where == "ray":
            wanted, address = experiment.simulation.workers, experiment.simulation.ray_address
            count = None if wanted == "auto" else wanted
            executor = RayCluster(
                recipe, count, address=address, dealing=dealing, log=directory.log_client, watch=watch
            )
        else:
            executor = WorkerPool(recipe, workers, dealing=dealing, log=directory.log_client, watch=watch)
    elif federation.group is not None:
        executor = InlineWorker(federation, federation.group, log=directory.log_client, watch=watch)
    else:
        executor = InlineExecutor(federation.app, log=directory.log_client, isolate=task is None, watch=watch)
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
            folder=directory.path / "private",
        ),
        key=key,
    )
    _describe(assembly, engine, resumed=existing is not None)
    return assembly


def _dp_engine(experiment: Experiment, data: Mapping[str, SiteData], plan: Plan, federation: Federation) -> str | None:
    """Return which engine computes the clients' clipped gradients; None without record-level privacy."""
    if federation.local is None or not plan.mechanisms:
        return None
    like = next(iter(data.values())).train.inputs[:2]
    from ..clients.kernels.dp_engines import dp_engine

    return dp_engine(federation.local, like, LocalTraining.of(experiment.train, private=True))


def _describe(assembly: Assembly, engine: str | None, *, resumed: bool) -> None:
    """Write what the run is made of; a resumed run must be made of the same."""
    directory, experiment, federation = assembly.directory, assembly.experiment, assembly.federation
    # Under client-level privacy nothing that is passed on names a client, or tells how many records it has.
    trains, tests = counts_of(assembly.data)
    listed = trains if experiment.privacy.unit != "client" and len(trains) <= LISTED_SITES else ()
    description = manifest(
        experiment,
        kernel=federation.kernel,
        device=federation.device,
        parameters=federation.size,
        clients=len(federation.names),
        classes=assembly.task.classes if assembly.task else (),
        sites={name: SiteRecords(train=trains[name], test=tests[name]) for name in listed},
        mechanisms=assembly.plan.mechanisms,
        dp_engine=engine,
        precision=experiment.simulation.precision,
    )
    # A digest of private data would let a guess of the data be checked, so it stays in private/.
    origin = origin_of(experiment, federation.initial) | {"data": _data_digest(assembly.data)}
    if resumed:
        refuse_changed(directory, description, origin)
    else:
        directory.write_json("private/origin.json", origin)
        directory.write_json("manifest.json", description)


def _data_digest(data: Mapping[str, SiteData]) -> str:
    """Return the SHA-256 of all clients' records."""
    state = hashlib.sha256()
    if isinstance(data, Pool):
        parts = {"train": data.train, "test": data.test}
        whole = {f"{part}/{kind}": getattr(of, kind).numpy() for part, of in parts.items() for kind in _KINDS}
        ends = {"train/ends": data.train_ends, "test/ends": data.test_ends}
        state.update(digest(whole | ends).encode())
        for name in data:
            state.update(f"{len(name)}:{name}".encode())
        return state.hexdigest()
    for name in sorted(data):
        site = data[name]
        parts = {"train": site.train, "test": site.test}
        tensors = {f"{part}/{kind}": getattr(of, kind).numpy() for part, of in parts.items() for kind in _KINDS}
        state.update(f"{len(name)}:{name}{digest(tensors)}".encode())
    return state.hexdigest()
