"""Checkpoints that a kill at any moment leaves whole: written aside, synced, then renamed into place."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ..core.errors import RunError
from ..core.parameters import Arrays

_ARRAY = "__array__"


@dataclass(kw_only=True)
class Checkpoint:
    """The state after a round: the model, the strategy's state, and what the round loop counts."""

    round: int
    arrays: dict[str, NDArray[np.generic]]
    strategy: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    clients: dict[str, Any] = field(default_factory=dict)


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint as `round-N.safetensors`, then delete the older ones. Raises RunError."""
    tensors: dict[str, NDArray[np.generic]] = {}
    tree = _strip(
        {
            "round": checkpoint.round,
            "arrays": checkpoint.arrays,
            "strategy": checkpoint.strategy,
            "progress": checkpoint.progress,
            "clients": checkpoint.clients,
        },
        tensors,
    )
    tensors["__tree__"] = np.frombuffer(json.dumps(tree).encode(), dtype=np.uint8)
    path = folder / f"round-{checkpoint.round:08d}.safetensors"
    write_atomically(path, save_tensors({name: np.asarray(array, order="C") for name, array in tensors.items()}))
    for old in folder.glob("round-*.safetensors"):
        if old != path:
            old.unlink(missing_ok=True)


def load(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint, or None where there is none. Raises RunError `run-unreadable`."""
    paths = sorted(folder.glob("round-*.safetensors"))
    if not paths:
        return None
    try:
        tensors = load_tensors(paths[-1].read_bytes())
        tree = json.loads(tensors.pop("__tree__").tobytes())
        return Checkpoint(**_fill(tree, tensors))
    except Exception as error:  # a damaged file raises whatever its reader meets first
        raise RunError("run-unreadable", f"{paths[-1]}: this checkpoint is damaged") from error


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Write a file so that a reader, or a kill, sees the old content or the new, never a part. Raises RunError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise RunError("run-unwritable", f"{path}: cannot be written ({error.strerror})") from error


def _strip(value: Any, tensors: dict[str, NDArray[np.generic]], path: str = "") -> Any:
    """Return the tree with each array replaced by its name in `tensors`."""
    if isinstance(value, np.ndarray):
        tensors[path] = value
        return {_ARRAY: path}
    if isinstance(value, Mapping):
        return {str(key): _strip(item, tensors, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strip(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]
    return value


def _fill(value: Any, tensors: Arrays) -> Any:
    if isinstance(value, dict):
        if set(value) == {_ARRAY}:
            return tensors[value[_ARRAY]]
        return {key: _fill(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, tensors) for item in value]
    return value
