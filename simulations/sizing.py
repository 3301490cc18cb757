"""How many worker processes a run gets: a fixed rule over public sizes, never a timing."""

from __future__ import annotations

import os

from ..experiment import Experiment

# Starting the workers' server takes some five seconds; below three times that, processes do not pay for themselves.
WORTH_SECONDS = 15.0
STEP_SECONDS = {"none": 3e-4, "record": 1.2e-3}
FLOPS = 2e10
DEFAULT_RECORDS = 100


def worker_count(
    experiment: Experiment, *, clients: int, records: int, parameters: int, device: str, gpus: int = 0
) -> int:
    """Return how many processes train: 1 means in this process.

    `records` is the number of training records of all clients, 0 where it is not known. "auto" is one a core when the
    estimated work (steps, and six operations for each parameter and record) is worth starting them; on GPUs, one each.
    """
    wanted = experiment.simulation.workers
    if wanted != "auto":
        return wanted
    sampled = experiment.clients.per_round if experiment.clients.sampling != "all" else None
    cohort = min(sampled or clients, clients)
    if device != "cpu" or cohort < 2:
        return max(1, min(gpus, cohort))
    train = experiment.train
    per_client = train.epochs * (records / clients if records else DEFAULT_RECORDS)
    steps = max(1.0, per_client / train.batch_size)
    seconds = steps * STEP_SECONDS.get(experiment.privacy.unit, 3e-4) + 6 * parameters * per_client / FLOPS
    worth = seconds * cohort * experiment.experiment.rounds > WORTH_SECONDS
    return min(cores(), cohort) if worth else 1


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
