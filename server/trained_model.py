"""The trained module of a finished run, rebuilt from its directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..clients.local_model import build_module
from ..clients.parts import app_module
from ..core.errors import InputError
from ..core.parameters import Arrays
from ..experiment import Experiment
from ..tasks.registry import find_task
from ..tasks.task import Task
from .run_directory import RunDirectory


def load(run: str | Path, *, task: Task | None = None) -> nn.Module:
    """Return the trained module of a run directory, on the CPU, in evaluation mode.

    `task` is needed for a run whose task was an object of a notebook. Raises InputError `run-missing` where there is
    no run or no model, and `run-changed` where task and model do not fit.
    """
    directory = RunDirectory.open(Path(run))
    tensors = directory.load_model()
    module = make_module(directory.experiment(), task)
    return load_tensors(module, tensors, directory.path)


def make_module(experiment: Experiment, task: Task | None = None) -> nn.Module:
    """Return the experiment's module as a run makes it, with its initial weights."""
    if experiment.clients.app:
        return app_module(experiment)
    private = experiment.privacy.unit != "none"
    return build_module(task or find_task(experiment), seed=experiment.experiment.seed, private=private)[0]


def load_tensors(module: nn.Module, tensors: Arrays, where: Path) -> nn.Module:
    """Put tensors into a module; raises InputError `run-changed` if they are another model's."""
    try:
        return load_tensors_into(module, tensors).eval()
    except RuntimeError as error:
        raise InputError("run-changed", f"{where}: the model file does not fit the task's model") from error


def load_tensors_into(module: nn.Module, tensors: Arrays) -> nn.Module:
    """Put tensors into a module, which is returned; RuntimeError if they are another model's."""
    module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in tensors.items()})
    return module
