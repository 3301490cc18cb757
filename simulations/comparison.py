"""Exact figures that only a simulation can compute: curves by round, and models that nobody would release.

None of it passes the gate or is accounted for: it is the experimenter's, lies in `private/`, is marked wherever it is
shown, and stands in the guarantee's `excludes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from flwr.serverapp.strategy import Strategy

from ..clients.kernels import sequential
from ..clients.local_model import LocalModel
from ..core.errors import RunError
from ..core.keys import Key
from ..core.parameters import Arrays
from ..experiment import CompressionTable, Experiment, PrivacyTable
from ..server.accounts import Accounts
from ..server.cohort import CohortSampler
from ..server.events import Listener, Phase, PhaseAdvanced
from ..server.plan import make_plan
from ..server.progress import Progress, Rules
from ..server.rounds import RoundLoop
from ..tasks.pool import Pool, counts_of
from ..tasks.task import Examples, SiteData, Task
from .executors.executor import InlineExecutor
from .federation import Federation, virtual_federation
from .grid import VirtualGrid
from .virtual_clock import VirtualClock

# With more sites a table of lone models is no longer read, and costs a run each.
MOST_SITES = 10


def scores(local: LocalModel, task: Task, arrays: Arrays, examples: Examples) -> dict[str, float | None]:
    """Return the task's metrics on examples, exactly, and the mean `loss`; None for what they do not support."""
    local.load(arrays)
    probabilities = sequential.predict(local, task.probabilities, examples.inputs, classes=len(task.classes))
    result: dict[str, float | None] = {}
    for name, metric in task.metrics().items():
        supported = len(examples) > 0 and (name != "auc" or len(examples.targets.unique()) > 1)
        if supported:
            metric.update(probabilities, examples.targets)
        result[name] = float(metric.compute()) if supported else None
    if len(examples):
        chosen = probabilities[torch.arange(len(examples)), examples.targets]
        result["loss"] = float(-chosen.clamp_min(1e-12).log().mean())
    return result


class Curves:
    """Metrics of the model after each round on all sites' test records, and on each site's while they are few."""

    def __init__(self, federation: Federation, task: Task, data: Mapping[str, SiteData]) -> None:
        self._federation, self._task = federation, task
        self._sites = dict(data) if len(data) <= MOST_SITES else {}
        self._all = pooled(data)

    def line(self, round: int, arrays: Arrays) -> dict[str, Any]:
        """Return the line of private/curves.jsonl for a round's model."""
        local = self._federation.local
        assert local is not None
        line: dict[str, Any] = {"round": round, **scores(local, self._task, arrays, self._all)}
        if self._sites:
            line["sites"] = {name: scores(local, self._task, arrays, site.test) for name, site in self._sites.items()}
        return line


def compare(
    experiment: Experiment,
    task: Task,
    data: Mapping[str, SiteData],
    federation: Federation,
    arrays: Arrays,
    *,
    make_strategy: Callable[[], Strategy],
    label: str,
    key: Key,
    emit: Listener,
) -> dict[str, Any]:
    """Return private/comparison.json: this model, one without privacy, and each site's lone model, on every site.

    A lone model is trained without privacy, as a site needs none towards itself.
    """
    everything = pooled(data)

    def row(model: str, kind: str, of: Federation, arrays: Arrays) -> dict[str, Any]:
        local = of.local
        assert local is not None
        return {
            "model": model,
            "kind": kind,
            "sites": {name: scores(local, task, arrays, site.test) for name, site in data.items()},
            "all": scores(local, task, arrays, everything),
        }

    plain = experiment.model_copy(update={"privacy": PrivacyTable(), "compression": CompressionTable()})
    others: list[tuple[str, str, Mapping[str, SiteData], Key]] = []
    if experiment.privacy.unit != "none":
        others.append(("federated, without privacy", "reference", data, key.child("open")))
    others += [(f"{name} alone", "lone", {name: site}, key.child("lone", name)) for name, site in data.items()]
    emit(Phase(name="comparison", total=len(others)))
    rows = [row(label, "federated", federation, arrays)]
    for model, kind, trained_on, own_key in others:
        # A model that no client could train has no row; the run itself is done.
        with suppress(RunError):
            rows.append(row(model, kind, *_trained(plain, task, trained_on, make_strategy, own_key)))
        emit(PhaseAdvanced(name="comparison"))
    return {"sites": list(data), "rows": rows}


def pooled(data: Mapping[str, SiteData]) -> Examples:
    """Return all sites' test records as one."""
    if isinstance(data, Pool):
        return data.test
    tests = [site.test for site in data.values()]
    return Examples(torch.cat([test.inputs for test in tests]), torch.cat([test.targets for test in tests]))


def _trained(
    experiment: Experiment,
    task: Task,
    data: Mapping[str, SiteData],
    make_strategy: Callable[[], Strategy],
    key: Key,
) -> tuple[Federation, Arrays]:
    """Train without privacy for as many rounds, all clients in each, and return federation and model."""
    planned = make_plan(experiment, counts_of(data)[0], len(task.classes), _silent)
    strategy = make_strategy()
    federation = virtual_federation(experiment, task, data, planned, key=key, strategy=strategy)
    executor = InlineExecutor(federation.app, log=_silent)
    grid = VirtualGrid(executor, federation.names, clock=VirtualClock.of(experiment))
    loop = RoundLoop(
        strategy=strategy,
        grid=grid,
        clients=grid.names,
        sampler=CohortSampler(sampling="all", per_round=None, key=key),
        budget=Accounts({}),
        rules=Rules(rounds=experiment.experiment.rounds, quorum=0.0),
        evaluation=None,
        emit=_silent,
    )
    progress = Progress(round=0, arrays=dict(federation.initial))
    loop.run(progress)
    return federation, progress.arrays


def _silent(said: object) -> None:
    """Listen to nothing: these runs are no part of the run that is shown."""
