"""The model of a federation as its server has it: the form of what travels, the first weights, and no data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from ...clients.local_model import build_module
from ...clients.parts import app_module, local_model, local_rule
from ...core.parameters import Layout
from ...experiment import Experiment
from ...strategies.compression import Compression
from ...strategies.local_rule import PLAIN, LocalRule
from ...strategies.tensors import arrays_like
from ...tasks.registry import find_task
from ..traffic import Traffic, traffic_of
from ..trained_model import load_tensors_into

if TYPE_CHECKING:
    from torch import nn

Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class ServerModel:
    """What a server knows of what is learned; `module` puts the tensors that travel into the module."""

    name: str
    classes: tuple[str, ...]
    initial: Arrays
    module: Callable[[Arrays], nn.Module]
    rule: LocalRule
    compression: Compression | None
    traffic: Traffic
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The number of values that travel."""
        return sum(array.size for array in self.initial.values())

    @classmethod
    def of(cls, experiment: Experiment, strategy: Strategy) -> ServerModel:
        """Return the model of a task or of a Flower ClientApp's experiment. Raises InputError."""
        rule = local_rule(experiment, strategy)
        if experiment.clients.app is not None:
            return cls._of_app(experiment)
        task = find_task(experiment)
        private = experiment.privacy.unit != "none"
        module, notes = build_module(task, seed=experiment.experiment.seed, private=private)
        # Here nothing is trained, so no GPU is taken.
        model, _ = local_model(experiment, module, rule)

        def loaded(arrays: Arrays) -> nn.Module:
            model.load(arrays)
            return model.module

        compression = Compression.of(experiment.compression)
        return cls(
            name=experiment.task.name,
            classes=task.classes,
            initial=model.shared_arrays(),
            module=loaded,
            rule=rule,
            compression=compression,
            traffic=traffic_of(model.layout, rule, compression),
            notes=tuple(notes),
        )

    @classmethod
    def _of_app(cls, experiment: Experiment) -> ServerModel:
        module = app_module(experiment)
        # A Flower app sends and expects the whole state_dict.
        initial = arrays_like(module.state_dict())
        return cls(
            name=str(experiment.clients.app),
            classes=(),
            initial=initial,
            module=lambda arrays: load_tensors_into(module, arrays),
            rule=PLAIN,
            compression=None,
            traffic=traffic_of(Layout.of(initial), PLAIN, None),
        )
