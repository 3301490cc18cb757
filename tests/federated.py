"""Small federations whose optimum is known, run round by round without a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bract.clients.training import reproducible
from bract.core import flower
from bract.core.keys import Key
from bract.core.parameters import record_of
from bract.experiment import Experiment
from bract.server.accounts import Accounts
from bract.server.cohort import CohortSampler
from bract.server.evaluation import evaluate
from bract.server.plan import make_plan
from bract.server.progress import Progress, Rules
from bract.server.rounds import RoundLoop
from bract.simulations.executors.executor import InlineExecutor
from bract.simulations.federation import Federation, virtual_federation
from bract.simulations.grid import VirtualGrid
from bract.tasks.classification import Classification
from bract.tasks.task import Examples, SiteData

KEY = Key.from_seed(7)


class Point(nn.Module):
    """A parameter w; for a record (a, b) it puts out a/2 · ‖w − b‖²."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((size,), 3.0))

    def forward(self, inputs):
        curvature, centre = inputs[:, :1], inputs[:, 1:]
        return (curvature / 2 * (self.w - centre) ** 2).sum(1, keepdim=True)


class Quadratics(Classification):
    """Client k holds `records` times the record (a_k, b_k): F_k(w) = a_k/2 · ‖w − b_k‖²."""

    classes = ("a", "b")

    def __init__(self, *clients: tuple[float, float, int]) -> None:
        self.clients = clients

    @property
    def optimum(self) -> float:
        """Where Σ F_k is least."""
        return sum(a * b for a, b, _ in self.clients) / sum(a for a, _, _ in self.clients)

    def model(self):
        return Point(2)

    def partitions(self, source=None):
        sites = {}
        for number, (a, b, records) in enumerate(self.clients):
            one = Examples(torch.tensor([[a, b, b]] * records), torch.zeros(records, dtype=torch.int64))
            sites[f"client-{number}"] = SiteData(train=one, test=one)
        return sites

    def loss(self, outputs, targets):
        return outputs[:, 0]


@dataclass
class Trained:
    """What a few rounds left."""

    federation: Federation
    grid: VirtualGrid
    arrays: dict[str, np.ndarray]
    strategy: Any
    failures: list[str]
    evaluation: Any

    @property
    def w(self) -> float:
        """The mean of the model's values, for a model that is a point."""
        return float(np.mean(self.arrays["w"]))

    @property
    def states(self) -> dict[str, Any]:
        """What clients kept: name -> record name -> arrays."""
        trees = self.grid.client_states()
        return {name: {record: item["value"] for record, item in tree.items()} for name, tree in trees.items()}

    @property
    def accuracy(self) -> float:
        """The clients' accuracy, each with the model that it evaluates."""
        config = {"server-round": 1000, "model-version": ""}
        found = evaluate(self.grid, self.grid.names, record_of(self.arrays), self.evaluation, config)
        return found.metrics["accuracy"]


def federation_of(task, strategy, **keys):
    """Return (experiment, federation, grid, failures) for keys such as {"train.epochs": 3}."""
    tables: dict[str, dict[str, Any]] = {"experiment": {"rounds": keys.pop("rounds", 30)}, "task": {"name": "own"}}
    for path, value in ({"train.device": "cpu"} | keys).items():
        table, _, key = path.partition(".")
        tables.setdefault(table, {})[key] = value
    experiment = Experiment.of(tables)
    data = task.partitions(None)
    plan = make_plan(experiment, {name: len(site.train) for name, site in data.items()}, len(task.classes), list)
    federation = virtual_federation(experiment, task, data, plan, key=KEY, strategy=strategy)
    failures: list[str] = []
    grid = VirtualGrid(InlineExecutor(federation.app, log=failures.append), federation.names)
    flower.identify_process(1)
    return experiment, federation, grid, failures


def train(task, strategy, **keys) -> Trained:
    """Run the rounds of `experiment.rounds` in bract's loop."""
    with reproducible():
        experiment, federation, grid, failures = federation_of(task, strategy, **keys)
        loop = RoundLoop(
            strategy=strategy,
            grid=grid,
            clients=grid.names,
            sampler=CohortSampler(
                sampling=experiment.clients.sampling, per_round=experiment.clients.per_round, key=KEY
            ),
            budget=Accounts({}),
            rules=Rules(rounds=experiment.experiment.rounds, quorum=0.0),
            evaluation=None,
            emit=lambda event: None,
            compression=federation.compression,
        )
        progress = Progress(round=0, arrays=dict(federation.initial))
        loop.run(progress)
    return Trained(federation, grid, progress.arrays, strategy, failures, federation.evaluation)


def train_under_flower(task, strategy, **keys) -> dict[str, np.ndarray]:
    """Return the model that Flower's own `strategy.start` gets over the same clients."""
    with reproducible(), flower.quiet():
        experiment, federation, grid, _ = federation_of(task, strategy, **keys)
        result = strategy.start(
            grid=grid, initial_arrays=record_of(federation.initial), num_rounds=experiment.experiment.rounds
        )
    return {name: array.numpy() for name, array in result.arrays.items()}
