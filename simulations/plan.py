"""The virtual clients of a simulation: the records of each, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..experiment import Experiment
from ..tasks.partition import partition
from ..tasks.pool import Pool
from ..tasks.task import SiteData, Task


def load_clients(experiment: Experiment, task: Task) -> Mapping[str, SiteData]:
    """Return the data of every virtual client, by name, in a pool where all are of one shape; raises InputError."""
    data = experiment.task.own.get("data")
    path = None if data is None else (experiment.folder or Path()) / str(data)
    clients = partition(
        task.partitions(path),
        partitioner=experiment.clients.partitioner,
        count=experiment.clients.count,
        seed=experiment.experiment.seed,
        options=experiment.clients.partitioner_options,
    )
    per_round = experiment.clients.per_round
    if per_round is not None and per_round > len(clients):
        raise experiment.conflict("clients", "per_round", why=f"there are only {len(clients)} clients")
    try:
        return Pool.of(clients)
    except ValueError:
        return clients
