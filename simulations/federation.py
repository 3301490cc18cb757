"""A federation of virtual clients: task, sites, resident model and ClientApp, put together from an experiment.

A worker process puts together the same one from the same recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import nn

from ..clients.app import client_app
from ..clients.gate import Gate
from ..clients.group import ClientGroup
from ..clients.kernels.kernel import Together, choose_kernel
from ..clients.local_model import LocalModel, build_module
from ..clients.owner import Site
from ..clients.parts import flower_app, local_model, local_rule, strategy_of, withholds_counts
from ..clients.training import choose_device
from ..core.keys import Key
from ..core.parameters import Layout
from ..experiment import Experiment
from ..privacy.dpsgd.independence import refuse_mixing
from ..privacy.mechanism import RecordLevelPlan
from ..privacy.release import EvaluationPlan
from ..server.plan import Plan
from ..server.traffic import Traffic, traffic_of
from ..server.trained_model import load_tensors_into, make_module
from ..strategies.compression import Compression
from ..strategies.local_rule import PLAIN
from ..tasks.partition import client_names
from ..tasks.pool import Pool, longest_of
from ..tasks.task import SiteData, Task

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class Federation:
    """What a round loop runs on.

    `group` answers for many clients at once, where it can.
    `module` puts shared tensors into the resident module. `kernel` is what trains it, "app" the clients' own app.
    `evaluation` is None where the clients' own app evaluates, or nobody does.
    """

    app: ClientApp
    group: ClientGroup | None = None
    names: Sequence[str]
    initial: Arrays
    module: Callable[[Arrays], nn.Module]
    traffic: Traffic
    device: str = "cpu"
    kernel: str = "app"
    evaluation: EvaluationPlan | None = None
    withholds_metrics: bool = False
    local: LocalModel | None = None
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
    rule = local_rule(experiment, _chosen(experiment, strategy))
    private = experiment.privacy.unit != "none"
    if experiment.simulation.precision != "float32" and plan.mechanisms:
        why = "rounds products, with which a clipped gradient can exceed its norm; record-level privacy takes float32"
        raise experiment.conflict("simulation", "precision", why=why)
    module, notes = build_module(task, seed=experiment.experiment.seed, private=private)
    model, training = local_model(experiment, module, rule, device=choose_device(experiment.train.device))
    training = replace(training, precision=experiment.simulation.precision)
    like = next(iter(data.values())).train
    wanted, private = experiment.simulation.kernel, bool(plan.mechanisms)
    place = experiment.place("simulation", "kernel")
    compression = Compression.of(experiment.compression)
    # Else a client keeps or sends something of its own, for which it takes its message and its context.
    plain = rule.is_plain and not model.personal and compression is None and plan.local is None
    if wanted == "stacked" and not plain:
        why = "each client keeps or sends something of its own, which a stack does not"
        raise experiment.conflict("simulation", "kernel", why=why)
    longest = longest_of(data)
    together = Together(
        cohort=min(experiment.clients.per_round or len(data), len(data)),
        longest=longest,
        plan=next(iter(plan.mechanisms.values()), None),
    )
    kernel = choose_kernel(
        wanted,
        model,
        task.loss,
        like,
        training,
        rule,
        private=private,
        together=together if plain else None,
        place=place,
    )
    training = replace(training, kernel=kernel)
    if plan.mechanisms:
        refuse_mixing(model.module, like.inputs)
    owners = _Owners(data, plan, key)
    # A trusted server may weigh its clients by their counts; nobody else learns them.
    gate = Gate(
        layout=model.layout,
        withhold_counts=withholds_counts(experiment),
        rule=rule,
        compression=compression,
    )

    def loaded(arrays: Arrays) -> nn.Module:
        model.load(arrays)
        return model.module

    return Federation(
        app=client_app(owners, task, training, model, gate),
        group=ClientGroup(owners, task, training, model, gate, longest=longest) if plain else None,
        names=data.names if isinstance(data, Pool) else tuple(data),
        initial=model.shared_arrays(),
        module=loaded,
        device=str(model.device),
        kernel=kernel,
        evaluation=plan.evaluation,
        withholds_metrics=plan.evaluation is None,
        local=model,
        traffic=traffic_of(model.layout, rule, gate.compression),
        compression=gate.compression,
        notes=(*notes, *remarks_on(experiment, strategy)),
    )


class _Owners(Mapping[str, Site]):
    """The owners of the virtual clients' records, each made when it is asked for: most are in no cohort."""

    def __init__(self, data: Mapping[str, SiteData], plan: Plan, key: Key) -> None:
        self.data, self.evaluation, self._plan, self._key = data, plan.evaluation, plan, key

    def key_of(self, name: str) -> Key:
        return self._key.child("site", name)

    def plan_of(self, name: str) -> RecordLevelPlan | None:
        return self._plan.mechanisms.get(name)

    def __getitem__(self, name: str) -> Site:
        return Site(
            name=name,
            data=self.data[name],
            key=self.key_of(name),
            plan=self.plan_of(name),
            evaluation=self._plan.evaluation,
            local=self._plan.local,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)


def remarks_on(experiment: Experiment, strategy: object) -> tuple[str, ...]:
    """Return what a user may not expect of a strategy under the experiment's privacy."""
    if withholds_counts(experiment) and getattr(strategy, "weights", "equal") == "counted":
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
    return local_model(experiment, module, local_rule(experiment, _chosen(experiment, strategy)))[0].layout.size


def flower_federation(experiment: Experiment, strategy: object | None = None) -> Federation:
    """Return the federation of a Flower ClientApp's clients; the app brings its own data and its own metrics."""
    if experiment.simulation.precision != "float32":
        raise experiment.conflict("simulation", "precision", why="is the app's own with clients.app; drop the key")
    local_rule(experiment, _chosen(experiment, strategy))
    app = flower_app(experiment)
    module = make_module(experiment)

    # A Flower app sends and expects the whole state_dict.
    initial: Arrays = {name: tensor.detach().cpu().numpy().copy() for name, tensor in module.state_dict().items()}
    return Federation(
        app=app,
        names=client_names(experiment.clients.count or 1),
        initial=initial,
        module=lambda arrays: load_tensors_into(module, arrays),
        withholds_metrics=experiment.privacy.unit != "none",
        traffic=traffic_of(Layout.of(initial), PLAIN, None),
    )


def _chosen(experiment: Experiment, strategy: object | None) -> object:
    return strategy_of(experiment) if strategy is None else strategy
