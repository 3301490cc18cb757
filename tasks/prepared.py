"""Prepared data: one client's records as tensors in a `.safetensors` file, which a site can give any task.

It holds `train.inputs`, `train.targets`, `test.inputs` and `test.targets`, split already, and nothing else. Reading it
runs no code, and gives the tensors that were written, bit for bit.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.errors import InputError
from .task import Examples, SiteData, Task

SUFFIX = ".safetensors"
_FORM = {"format": "bract prepared data 1"}
_NAMES = ("train.inputs", "train.targets", "test.inputs", "test.targets")


def save_site(path: Path, data: SiteData) -> None:
    """Write one client's records for their owner alone (0600); a kill leaves the old file or the new."""
    tensors = {
        f"{part}.{kind}": getattr(getattr(data, part), kind).detach().cpu().contiguous()
        for part in ("train", "test")
        for kind in ("inputs", "targets")
    }
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(save(tensors, metadata=_FORM))
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def load_site(path: Path) -> SiteData:
    """Return the records of a file of `save_site`. Raises InputError."""
    if not path.is_file():
        raise InputError("data-missing", f'--data = "{path}": there is no such file')
    try:
        with safe_open(path, framework="pt") as file:
            names, form = sorted(file.keys()), file.metadata() or {}
            if names != sorted(_NAMES) or form != _FORM:
                raise _invalid(path, f"holds {', '.join(names[:8]) or 'nothing'}")
            found = {name: file.get_tensor(name) for name in _NAMES}
    except (SafetensorError, OSError) as error:
        raise _invalid(path, "is no safetensors file that can be read") from error
    parts = {part: _examples(path, found, part) for part in ("train", "test")}
    train, test = parts["train"], parts["test"]
    if train.inputs.shape[1:] != test.inputs.shape[1:] or train.inputs.dtype != test.inputs.dtype:
        raise _invalid(path, f"test.inputs are {_form(test.inputs)}, and train.inputs {_form(train.inputs)}")
    return SiteData(train=train, test=test)


def site_data(task: Task, path: Path) -> SiteData:
    """Return the records of one real client: prepared ones by the name of their file, else as the task reads them."""
    return load_site(path) if path.suffix == SUFFIX else task.site(path)


def _examples(path: Path, found: dict[str, Tensor], part: str) -> Examples:
    inputs, targets = found[f"{part}.inputs"], found[f"{part}.targets"]
    if targets.dtype != torch.int64 or targets.ndim != 1:
        raise _invalid(path, f"{part}.targets are {_form(targets)}, not torch.int64 [n]")
    if inputs.ndim < 1 or len(inputs) != len(targets):
        raise _invalid(path, f"{part}.inputs are {_form(inputs)} for {len(targets)} targets")
    if inputs.is_complex():
        raise _invalid(path, f"{part}.inputs are {_form(inputs)}, which no task takes")
    return Examples(inputs, targets)


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _invalid(path: Path, what: str) -> InputError:
    return InputError("data-invalid", f'--data = "{path}": {what}; bract.tasks.prepared.save_site writes such a file')
