"""The trained module of a finished run, rebuilt from its directory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..clients.local_model import build_module
from ..core.errors import InputError
from ..core.parameters import Arrays
from ..core.plugins import resolve
from ..experiment import Experiment
from ..tasks.registry import find_task
from ..tasks.task import Task, initial_model
from .run_directory import RunDirectory


def load(run: str | Path, *, task: Task | None = None) -> nn.Module:
    """Return the trained module of a run directory, on the CPU, in evaluation mode.

    `task` is needed for a run whose task was an object of a notebook. Raises InputError `run-missing` where there is
    no run or no model, and `run-changed` where task and model do not fit.
    """
    directory = RunDirectory.open(Path(run))
    tensors = directory.load_model()
    folder = Path(str(directory.read_json("private/origin.json")["folder"]))
    experiment = Experiment.load(directory.path / "experiment.toml", folder=folder)
    module = make_module(experiment, task)
    return load_tensors(module, tensors, directory.path)


def make_module(experiment: Experiment, task: Task | None = None) -> nn.Module:
    """Return the experiment's module as a run makes it, with its initial weights."""
    if experiment.clients.app:
        make = resolve(str(experiment.task.model), folder=experiment.folder, key="task.model")
        module = initial_model(make, experiment.experiment.seed)
        if not isinstance(module, nn.Module):
            raise InputError(
                "plugin-invalid",
                f'task.model = "{experiment.task.model}": returned a {type(module).__name__}, not a torch module'
                f"{experiment.place('task', 'model')}",
            )
        return module
    private = experiment.privacy.unit != "none"
    return build_module(task or find_task(experiment), seed=experiment.experiment.seed, private=private)[0]


def load_tensors(module: nn.Module, tensors: Arrays, where: Path) -> nn.Module:
    """Put tensors into a module; raises InputError `run-changed` if they are another model's."""
    try:
        module.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in tensors.items()})
    except RuntimeError as error:
        raise InputError("run-changed", f"{where}: the model file does not fit the task's model") from error
    return module.eval()
