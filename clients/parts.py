"""A client's parts as an experiment describes them: the strategy's client half, the resident model, the training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from flwr.clientapp import ClientApp
from torch import nn

from ..core.errors import InputError
from ..core.plugins import resolve
from ..experiment import Experiment
from ..strategies.local_rule import PLAIN, LocalRule
from ..strategies.registry import load_strategy
from ..tasks.task import initial_model
from .local_model import LocalModel
from .training import LocalTraining


def strategy_of(experiment: Experiment) -> object:
    """Return the strategy that [strategy] names. Raises InputError."""
    table = experiment.strategy
    return load_strategy(table.name, table.own, folder=experiment.folder, place=experiment.place("strategy", "name"))


def local_rule(experiment: Experiment, strategy: object) -> LocalRule:
    """Return the client half of a strategy; raises InputError if [train] or [clients] forbids it."""
    rule = getattr(strategy, "local_rule", PLAIN)
    if not isinstance(rule, LocalRule):
        raise InputError("plugin-invalid", f"strategy {type(strategy).__name__}: its local_rule is no LocalRule")
    if experiment.clients.app:
        if not rule.in_messages:
            why = f"{type(strategy).__name__} has a client half of its own, which a Flower ClientApp does not run"
            raise experiment.conflict("clients", "app", why=why)
        return rule
    conflict = rule.conflict(experiment.train)
    if conflict:
        raise experiment.conflict("train", conflict[0], why=conflict[1])
    return rule


def local_model(
    experiment: Experiment, module: nn.Module, rule: LocalRule, *, device: torch.device | None = None
) -> tuple[LocalModel, LocalTraining]:
    """Return the resident model and the training that [train] and the strategy's rule describe together."""
    private = experiment.privacy.unit != "none"
    training = LocalTraining.of(experiment.train, private=private)
    training = replace(training, personal=(*training.personal, *rule.personal(module)))
    return LocalModel(module, training, device=device, keep_buffers=not private), training


def withholds_counts(experiment: Experiment) -> bool:
    """Return whether a client weighs 1, whatever its number of records: under privacy, unless the server is trusted.

    Also where the number is declared, and so public: a simulation and a federation must give the same model.
    """
    privacy = experiment.privacy
    return privacy.unit == "record" or (privacy.unit == "client" and privacy.trust == "nobody")


def flower_app(experiment: Experiment) -> ClientApp:
    """Return the ClientApp that [clients] names by its dotted path. Raises InputError."""
    path = str(experiment.clients.app)
    app = resolve(path, folder=experiment.folder, key="clients.app")
    if not isinstance(app, ClientApp):
        place = experiment.place("clients", "app")
        raise InputError(
            "plugin-invalid",
            f'clients.app = "{path}": is a {type(app).__name__}, not a flwr.clientapp.ClientApp{place}',
        )
    return app


def app_module(experiment: Experiment) -> nn.Module:
    """Return the module whose weights a Flower ClientApp's run starts from. Raises InputError."""
    path, folder = str(experiment.task.model), experiment.folder or Path()
    module = initial_model(resolve(path, folder=folder, key="task.model"), experiment.experiment.seed)
    if not isinstance(module, nn.Module):
        place = experiment.place("task", "model")
        raise InputError(
            "plugin-invalid", f'task.model = "{path}": returned a {type(module).__name__}, not a torch module{place}'
        )
    return module
