"""The terms of a federated run: what it offers of an experiment, and what of it must stay secret."""

from __future__ import annotations

from flwr.serverapp.strategy import Strategy

from ...core.errors import InputError
from ...experiment import Experiment
from ...strategies.asynchronous import Asynchronous
from ..run_directory import RunDirectory
from .member import counts_clients


def minimum_of(experiment: Experiment) -> int:
    """Return how many clients a round waits for."""
    clients = experiment.clients
    minimum = clients.minimum or clients.count or 2
    if counts_clients(experiment) and clients.count is None:
        # How many there are is fixed by who is there at the start.
        return max(minimum, clients.per_round or 1)
    return minimum


def refuse_finished(directory: RunDirectory) -> None:
    """Raise InputError for a run that has come to its end: its clients were told so."""
    if not (directory.path / "result.json").is_file():
        return
    status = directory.read_json("result.json").get("status")
    if status not in ("interrupted", "failed"):
        raise InputError("run-finished", f"{directory.path}: this run is {status}; start a new one, bract server FILE")


def has_secret_cohorts(experiment: Experiment) -> bool:
    """Return whether a guarantee counts on nobody knowing who was drawn."""
    return experiment.privacy.unit == "client" and experiment.privacy.trust == "server"


def refuse_what_no_federation_offers(experiment: Experiment, strategy: Strategy) -> None:
    """Raise InputError for what runs in a simulation alone."""
    clients = experiment.clients
    if counts_clients(experiment) and (clients.minimum or 0) > (clients.count or clients.minimum or 0):
        raise experiment.conflict("clients", "minimum", why=f"must be at most clients.count, {clients.count}")
    if experiment.privacy.record is not None and experiment.privacy.trust == "nobody":
        # A site noises each step or its whole update, not both.
        raise experiment.conflict("privacy", "record", why='goes with privacy.trust = "server" in a federation')
    if isinstance(strategy, Asynchronous):
        raise experiment.conflict(
            "strategy", "name", why="waits for no cohort, which only `bract simulate` does so far; choose another"
        )
