"""Clients behind one interface: a site of bract's with policy and ledger, and four that do as others' do.

Each owns a table of records (x, label) in [-1, 1]^200, and trains a linear model of them by DP-SGD when asked.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import LocalDpMod
from numpy.typing import NDArray
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from bract.clients.site.request import RunRequest
from bract.clients.site.site import Site
from bract.core import flower
from bract.core.parameters import Arrays, arrays_of, record_of
from bract.experiment import Experiment
from bract.privacy.ledger.ledger import Ledger
from bract.privacy.policy import Policy

FEATURES, DECLARED, BATCH = 200, 125, 1
EPSILON, DELTA = 3.0, 1e-5


@dataclass(frozen=True, kw_only=True)
class Table:
    """A client's records: inputs [n, FEATURES] and labels [n], n at most DECLARED."""

    inputs: NDArray[np.float64]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, rows: int, seed: int) -> Table:
        draws = np.random.default_rng(seed)
        return cls(inputs=draws.uniform(-1, 1, (rows, FEATURES)), labels=draws.integers(0, 2, rows))

    def tensors(self) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.inputs).float(), torch.from_numpy(self.labels)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An update [..], and all that stands beside it."""

    update: NDArray[np.float64]
    told: Mapping[str, Any]


class Client(Protocol):
    """`train` and `measure` return None where the client refuses; `epsilon()` is what it shows to have spent."""

    def train(self, round: int, noise_multiplier: float) -> Reply | None: ...

    def measure(self, round: int) -> Mapping[str, Any] | None: ...

    def restart(self) -> None: ...

    def epsilon(self) -> float: ...


class BractSite:
    """A site whose owner allows DP-SGD and noised metrics, and EPSILON in all; in `folder`, its state beside."""

    def __init__(self, table: Table, folder: Path) -> None:
        flower.identify_process(1)
        names = [f"x{number}" for number in range(FEATURES)]
        with (folder / "table.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, "sick"])
            writer.writerows([*row, label] for row, label in zip(table.inputs, table.labels, strict=True))
        data = {"path": "table.csv", "records": DECLARED, "epsilon": EPSILON, "delta": DELTA}
        allow = {"tasks": ["tabular"], "strategies": ["fedavg"], "updates": ["dp-sgd"], "metrics": "noised"}
        allow |= {"message_bytes": 100_000, "epochs": 1}
        self._policy = Policy.of({"data": {"table": data}, "allow": allow}, source=folder / "policy.toml")
        features = {name: {"range": [-1, 1]} for name in names}
        task = {"name": "tabular", "target": "sick", "positive": [1], "features": features}
        self._experiment = Experiment.of(
            {
                "task": task,
                "train": {"device": "cpu", "learning_rate": 0.1},
                "privacy": {"unit": "record", "noise_multiplier": 1.0},
            },
            folder=folder,
        )
        self._state = folder / "state"
        Ledger.create(self._state).close()
        self._site = self._open()

    def _open(self) -> Site:
        return Site.open(self._state, self._policy, self._experiment, server=None)

    def restart(self) -> None:
        self.close()
        self._site = self._open()

    def close(self) -> None:
        self._site.close()

    def train(self, round: int, noise_multiplier: float) -> Reply | None:
        reply = self._ask("train", round, noise_multiplier)
        if reply.has_error():
            return None
        found = arrays_of(reply.content["arrays"])  # type: ignore[arg-type]
        told = {name: dict(record) for name, record in reply.content.items() if name != "arrays"}
        return Reply(update=vector(found), told=told)

    def measure(self, round: int) -> Mapping[str, Any] | None:
        reply = self._ask("evaluate", round, 2.0)
        return None if reply.has_error() else {name: dict(record) for name, record in reply.content.items()}

    def epsilon(self) -> float:
        with Ledger.open(self._state) as ledger:
            return ledger.spending("table").spent

    def _ask(self, phase: str, round: int, noise_multiplier: float) -> Message:
        asked = RunRequest(
            run=f"run {noise_multiplier:g}",
            task="tabular",
            strategy="fedavg",
            update="dp-sgd",
            rounds=3,
            batch_size=BATCH,
            clipping_norm=1.0,
            noise_multiplier=1.0,
            delta=DELTA,
            metrics="noised",
            metrics_epsilon=1.0,
            releases=2,
        )
        config = replace(asked, noise_multiplier=noise_multiplier).to_config()
        config |= {"server-round": round, "model-version": f"v{round}"}
        model = {"weight": np.zeros((1, FEATURES), np.float32), "bias": np.zeros(1, np.float32)}
        message = Message(RecordDict({"arrays": record_of(model), "config": ConfigRecord(config)}), 7, phase)
        flower.set_message_id(message, f"{phase} {round} {noise_multiplier:g}")
        return self._site.handle(message)


class EnginePerMessage:
    """As Flower's example of Opacus (and NVFLARE's hello-dp): each message makes an engine, and shows its epsilon.

    As in hello-dp `first_round_only` attaches it in a run's first round, to objects that a restart forgets.
    """

    def __init__(self, table: Table, folder: Path, *, first_round_only: bool = False) -> None:
        self._table, self._first_round_only = table, first_round_only
        self._epsilon = 0.0
        self.restart()

    def restart(self) -> None:
        self._model: nn.Module = nn.Linear(FEATURES, 2)
        self._optimizer: Any = torch.optim.SGD(self._model.parameters(), lr=0.1)
        self._loader: Any = DataLoader(TensorDataset(*self._table.tensors()), batch_size=BATCH)

    def train(self, round: int, noise_multiplier: float) -> Reply | None:
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.zero_()
        engine = None
        if round == 1 or not self._first_round_only:
            if not self._first_round_only:
                self.restart()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                engine = PrivacyEngine()
                self._model, self._optimizer, self._loader = engine.make_private(
                    module=self._model,
                    optimizer=self._optimizer,
                    data_loader=self._loader,
                    noise_multiplier=noise_multiplier,
                    max_grad_norm=1.0,
                )
        before = parameters_of(self._model)
        for inputs, labels in self._loader:
            self._optimizer.zero_grad()
            functional.cross_entropy(self._model(inputs), labels).backward()
            self._optimizer.step()
        if engine is not None:
            self._epsilon = engine.get_epsilon(DELTA)
        return Reply(update=parameters_of(self._model) - before, told={})

    def measure(self, round: int) -> Mapping[str, Any] | None:
        return None

    def epsilon(self) -> float:
        return self._epsilon


class ResearchersSigma:
    """As a node of Fed-BioMed's: its `dp_args`, sigma and clip, come with the training plan that a researcher sends."""

    def __init__(self, table: Table, folder: Path) -> None:
        self._table = table

    def restart(self) -> None:
        """Nothing is kept."""

    def train(self, round: int, noise_multiplier: float) -> Reply | None:
        inputs, labels = self._table.tensors()
        gradients = inputs * (0.5 - labels.float())[:, None]
        clipped = gradients / gradients.norm(dim=1, keepdim=True).clamp(min=1.0)
        noise = torch.randn(DECLARED, FEATURES, generator=torch.Generator().manual_seed(round))
        steps = clipped + noise_multiplier * noise[: len(clipped)]
        return Reply(update=-0.1 * steps.sum(dim=0).double().numpy(), told={})

    def measure(self, round: int) -> Mapping[str, Any] | None:
        return None

    def epsilon(self) -> float:
        return math.nan


class FlowerLocalDp:
    """Flower 1.41: an app as its templates have it, with the mod that clips and noises its update."""

    def __init__(self, table: Table, folder: Path) -> None:
        flower.identify_process(1)
        self._table = table

    def restart(self) -> None:
        """Nothing is kept."""

    def train(self, round: int, noise_multiplier: float) -> Reply | None:
        model = {"weight": np.zeros(FEATURES, np.float32)}
        message = Message(RecordDict({"arrays": record_of(model), "config": ConfigRecord({})}), 7, "train")
        flower.set_message_id(message, f"asked {round}")
        context = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
        mod = LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=EPSILON, delta=DELTA)
        with flower.quiet():
            reply = mod(message, context, self._app)
        found = arrays_of(reply.content["arrays"])  # type: ignore[arg-type]
        return Reply(update=vector(found), told={"metrics": dict(reply.content["metrics"])})

    def _app(self, message: Message, context: Context) -> Message:
        inputs, labels = self._table.tensors()
        gradient = (inputs * (0.5 - labels.float())[:, None]).mean(dim=0)
        metrics = MetricRecord({"num-examples": len(labels), "train-loss": self._loss()})
        arrays = record_of({"weight": -gradient.numpy()})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    def _loss(self) -> float:
        inputs, labels = self._table.tensors()
        return float(functional.binary_cross_entropy_with_logits(inputs.sum(dim=1), labels.float()))

    def measure(self, round: int) -> Mapping[str, Any] | None:
        inputs, labels = self._table.tensors()
        right = ((inputs.sum(dim=1) > 0) == (labels > 0)).float().mean()
        return {"num-examples": len(labels), "accuracy": float(right)}

    def epsilon(self) -> float:
        return EPSILON


def vector(arrays: Arrays) -> NDArray[np.float64]:
    """Return all tensors as one vector."""
    return np.concatenate([np.asarray(arrays[name], np.float64).ravel() for name in sorted(arrays)])


def parameters_of(module: nn.Module) -> NDArray[np.float64]:
    """Return the parameters of a module as one vector."""
    return np.concatenate([p.detach().double().numpy().ravel() for p in module.parameters()])
