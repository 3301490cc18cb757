"""The run directory: what a run leaves for people and programs, and in `private/` what would void its guarantee."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ..core.errors import InputError, RunError
from ..core.keys import Key
from ..core.parameters import Arrays
from ..experiment import Experiment
from .checkpoint import write_atomically


class RunDirectory:
    """One run's folder. Writing raises RunError `run-unwritable` with the file's name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def free(path: Path | None, name: str) -> Path:
        """Return where a new run may go, by default `runs/<time>-<name>`; raises InputError if that is taken."""
        if path is None:
            stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
            return _unused(Path("runs") / f"{stamp}-{name}")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError("run-exists", f"{path}: is taken; choose another --out, or go on with it by --resume")
        return path

    @classmethod
    def create(cls, path: Path, experiment: Experiment, key: Key) -> RunDirectory:
        """Make the folder, its private part (0700), its secret key (0600) and the resolved experiment."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "checkpoint").mkdir(mode=0o700)
            (path / "private").mkdir(mode=0o700)
            (path / "plots").mkdir()
        except OSError as error:
            raise InputError("run-unwritable", f"{path}: cannot be made ({error.strerror})") from error
        run = cls(path)
        run.write("private/key", key.secret.hex() + "\n", mode=0o600)
        if experiment.privacy.bands:
            run.write("private/noise_key", Key.fresh().secret.hex() + "\n", mode=0o600)
        run.write("experiment.toml", experiment.to_toml())
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Return an existing run; raises InputError `run-missing`."""
        run = cls(path)
        if not (path / "manifest.json").is_file():
            raise InputError("run-missing", f"{path}: there is no run of bract here (no manifest.json)")
        return run

    def experiment(self) -> Experiment:
        """Return the experiment that the run was started with."""
        folder = Path(str(self.read_json("private/origin.json")["folder"]))
        return Experiment.load(self.path / "experiment.toml", folder=folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process alone; RunError `run-in-use`: two would draw one noise for two sums."""
        with os.fdopen(os.open(self.path / "private" / "lock", os.O_RDWR | os.O_CREAT, 0o600), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError("run-in-use", f"{self.path}: another process goes on with this run; end it") from error
            yield

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints (0700: a client's personal tensors are in them)."""
        return self.path / "checkpoint"

    def key(self, name: str = "key") -> Key:
        """Return the run's secret key, or that of its correlated noise: "noise_key"."""
        try:
            return Key(bytes.fromhex((self.path / "private" / name).read_text()))
        except (OSError, ValueError) as error:
            sentence = f"{self.path}/private/{name}: without its key a run cannot go on"
            raise RunError("run-unreadable", sentence) from error

    def forget_noise_key(self) -> None:
        """Delete the key of the correlated noise: whoever has it can take the noise off, and the run has ended."""
        (self.path / "private" / "noise_key").unlink(missing_ok=True)

    def write(self, name: str, text: str, *, mode: int | None = None) -> None:
        """Write a text file whole; what lies in `private/` is readable by its owner alone."""
        write_atomically(self.path / name, text.encode(), mode=mode or _mode(name))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file whole."""
        self.write(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Return a JSON file's object; raises RunError `run-unreadable`."""
        try:
            return dict(json.loads((self.path / name).read_text()))
        except (OSError, ValueError) as error:
            raise RunError("run-unreadable", f"{self.path / name}: missing or damaged") from error

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append one JSON line."""
        self._append(name, json.dumps(record, allow_nan=False))

    def log_client(self, text: str) -> None:
        """Append what a client raised to private/clients.log."""
        self.log("clients.log", text)

    def log(self, name: str, text: str) -> None:
        """Append text to a log in `private/`."""
        self._append(f"private/{name}", text.rstrip("\n"))

    def _append(self, name: str, text: str) -> None:
        try:
            descriptor = os.open(self.path / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, _mode(name))
            with os.fdopen(descriptor, "w") as file:
                file.write(f"{text}\n")
        except OSError as error:
            raise RunError("run-unwritable", f"{self.path / name}: cannot be written ({error.strerror})") from error

    def forget_after(self, name: str, round: int) -> None:
        """Drop the lines of rounds after a checkpoint's: they will be written again."""
        path = self.path / name
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["round"] <= round:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # the last line, cut by a kill
        self.write(name, "".join(f"{line}\n" for line in kept))

    def save_model(self, tensors: Arrays) -> str:
        """Write model.safetensors and return the file's SHA-256 in hexadecimal."""
        content = save_tensors({name: np.array(array, order="C") for name, array in sorted(tensors.items())})
        write_atomically(self.path / "model.safetensors", content)
        return hashlib.sha256(content).hexdigest()

    def load_model(self) -> dict[str, NDArray[np.generic]]:
        """Return the tensors of model.safetensors; raises InputError `run-missing`."""
        path = self.path / "model.safetensors"
        if not path.is_file():
            raise InputError("run-missing", f"{path}: this run has left no model yet")
        try:
            return load_tensors(path.read_bytes())
        except Exception as error:  # safetensors raises an exception of its own, and KeyError for an unknown type
            raise RunError("run-unreadable", f"{path}: this model file is damaged") from error


def _mode(name: str) -> int:
    return 0o600 if name.startswith("private/") else 0o644


def _unused(path: Path) -> Path:
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate
