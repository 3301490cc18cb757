"""A federation of virtual clients: task, sites, resident model and ClientApp, put together from an experiment.

A worker process puts together the same one from the same recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import nn

from ..clients.app import Site, client_app
from ..clients.gate import Gate
from ..clients.local_model import LocalModel, build_module
from ..clients.training import LocalTraining, choose_device
from ..core.errors import InputError
from ..core.keys import Key
from ..core.parameters import Layout
from ..core.plugins import resolve
from ..experiment import Experiment
from ..privacy.dpsgd.independence import refuse_mixing
from ..privacy.release import EvaluationPlan
from ..server.trained_model import make_module
from ..strategies.codec import layout_bytes
from ..strategies.compression import Compression
from ..strategies.local_rule import PLAIN, LocalRule
from ..strategies.registry import load_strategy
from ..tasks.partition import client_names
from ..tasks.task import SiteData, Task
from .plan import Plan

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The bytes of the tensors that one client gets and sends in one round, and how many compression saves."""

    down: int
    up: int
    saved: int = 0


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What a round loop runs on.

    `module` puts shared tensors into the resident module. `evaluation` is None where the clients' own app evaluates,
    or nobody does.
    """

    app: ClientApp
    names: tuple[str, ...]
    initial: Arrays
    module: Callable[[Arrays], nn.Module]
    device: str = "cpu"
    evaluation: EvaluationPlan | None = None
    withholds_metrics: bool = False
    local: LocalModel | None = None
    traffic: Traffic = Traffic(down=0, up=0)
    compression: Compression | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The number of values that travel."""
        return sum(array.size for array in self.initial.values())


def virtual_federation(
    experiment: Experiment,
    task: Task,
    data: Mapping[str, SiteData],
    plan: Plan,
    *,
    key: Key,
    strategy: object | None = None,
) -> Federation:
    """Return the federation of bract's own clients over a task's data.

    `strategy` is an object to use instead of what the experiment names; its local rule is the clients' half.
    """
    rule = local_rule(experiment, strategy)
    private = experiment.privacy.unit != "none"
    module, notes = build_module(task, seed=experiment.experiment.seed, private=private)
    model, training = local_model(experiment, module, rule, device=choose_device(experiment.train.device))
    if plan.mechanisms:
        refuse_mixing(model.module, next(iter(data.values())).train.inputs)
    sites = {
        name: Site(
            name=name,
            data=site,
            key=key.child("site", name),
            plan=plan.mechanisms.get(name),
            evaluation=plan.evaluation,
            local=plan.local,
        )
        for name, site in data.items()
    }
    # A trusted server may weigh its clients by their counts; nobody else learns them.
    gate = Gate(
        layout=model.layout,
        withhold_counts=private and plan.aggregate is None,
        rule=rule,
        compression=Compression.of(experiment.compression),
    )

    def loaded(arrays: Arrays) -> nn.Module:
        model.load(arrays)
        return model.module

    return Federation(
        app=client_app(sites, task, training, model, gate),
        names=tuple(sites),
        initial=model.shared_arrays(),
        module=loaded,
        device=str(model.device),
        evaluation=plan.evaluation,
        withholds_metrics=plan.evaluation is None,
        local=model,
        traffic=traffic_of(model.layout, rule, gate.compression),
        compression=gate.compression,
        notes=(*notes, *remarks_on(experiment, strategy)),
    )


def local_rule(experiment: Experiment, strategy: object | None = None) -> LocalRule:
    """Return the client half of a strategy, by default of the experiment's; raises InputError if [train] forbids it."""
    if strategy is None:
        table = experiment.strategy
        place = experiment.place("strategy", "name")
        strategy = load_strategy(table.name, table.own, folder=experiment.folder, place=place)
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


def traffic_of(layout: Layout, rule: LocalRule, compression: Compression | None) -> Traffic:
    """Return a round's bytes: the model, and each record that the strategy's rule has beside it, which stays whole."""
    model = layout_bytes(layout)
    update = compression.codec(layout).nbytes if compression else model
    return Traffic(down=model * (1 + len(rule.receives)), up=update + model * len(rule.sends), saved=model - update)


def remarks_on(experiment: Experiment, strategy: object) -> tuple[str, ...]:
    """Return what a user may not expect of a strategy under the experiment's privacy."""
    privacy = experiment.privacy
    withheld = privacy.unit == "record" or (privacy.unit == "client" and privacy.trust == "nobody")
    if withheld and getattr(strategy, "weights", "equal") == "counted":
        return (
            'strategy.weights = "counted": the clients weigh alike, because under privacy their numbers of records '
            "are withheld",
        )
    return ()


def travelling_size(experiment: Experiment, task: Task | None, strategy: object | None = None) -> int:
    """Return how many values the model that travels has."""
    if task is None:
        return sum(tensor.numel() for tensor in make_module(experiment).state_dict().values())
    private = experiment.privacy.unit != "none"
    module, _ = build_module(task, seed=experiment.experiment.seed, private=private)
    return local_model(experiment, module, local_rule(experiment, strategy))[0].layout.size


def flower_federation(experiment: Experiment, strategy: object | None = None) -> Federation:
    """Return the federation of a Flower ClientApp's clients; the app brings its own data and its own metrics."""
    local_rule(experiment, strategy)
    clients, folder = experiment.clients, experiment.folder
    app = resolve(str(clients.app), folder=folder, key="clients.app")
    if not isinstance(app, ClientApp):
        raise InputError(
            "plugin-invalid",
            f'clients.app = "{clients.app}": is a {type(app).__name__}, not a flwr.clientapp.ClientApp'
            f"{experiment.place('clients', 'app')}",
        )
    module = make_module(experiment)

    def loaded(arrays: Arrays) -> nn.Module:
        module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
        return module

    # A Flower app sends and expects the whole state_dict.
    initial: Arrays = {name: tensor.detach().cpu().numpy().copy() for name, tensor in module.state_dict().items()}
    return Federation(
        app=app,
        names=tuple(client_names(clients.count or 1)),
        initial=initial,
        module=loaded,
        withholds_metrics=experiment.privacy.unit != "none",
        traffic=traffic_of(Layout.of(initial), PLAIN, None),
    )
