"""manifest.json: what a reader needs to know of how a run was made, and what a resumed run must find unchanged."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.parameters import Arrays, digest
from ..experiment import Experiment
from ..privacy.mechanism import RecordLevelPlan
from .run_directory import RunDirectory

SCHEMA = 1
LISTED_SITES = 100
_PACKAGES = ("bract", "torch", "opacus", "flwr", "numpy", "dp-accounting")
# Other software may round differently: the resumed run would not end with the bytes of one that was not killed, and
# noise drawn twice for two different gradients would reveal their difference.
_MUST_STAY = ("bract", "torch", "opacus", "flwr", "numpy", "machine")


@dataclass(frozen=True, kw_only=True)
class SiteRecords:
    """How many records a site trains and is tested on; `test` is None where a real site says nothing of it."""

    train: int
    test: int | None = None


def manifest(
    experiment: Experiment,
    *,
    kernel: str,
    device: str,
    parameters: int,
    clients: int,
    classes: tuple[str, ...],
    sites: Mapping[str, SiteRecords],
    mechanisms: Mapping[str, RecordLevelPlan],
    dp_engine: str | None = None,
    precision: str = "float32",
) -> dict[str, Any]:
    """Return the object of manifest.json; at most 100 sites are listed.

    `dp_engine` is what computes clipped gradients; None without record-level privacy, or where each site says.
    """
    listed = sites if len(sites) <= LISTED_SITES else {}
    return {
        "schema": SCHEMA,
        **{name.replace("-", "_"): version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seed": experiment.experiment.seed,
        "kernel": kernel,
        "precision": precision,
        "dp_engine": dp_engine,
        "device": device,
        "threads": 1,
        "clients": clients,
        "parameters": parameters,
        "task": experiment.task.name or experiment.clients.app,
        "classes": list(classes),
        "model": experiment.train.model or experiment.task.model,
        "sites": {name: _site(site, mechanisms.get(name)) for name, site in listed.items()},
    }


def refuse_other_software(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise InputError `run-changed` if a run would go on with other software than it began with."""
    for name in _MUST_STAY:
        if old.get(name) != new[name]:
            raise InputError(
                "run-changed",
                f"the run began with {name} {old.get(name)}, not {new[name]}; install that version, or start a new run",
            )
    # Two engines round differently, and `auto` follows what the model does, which its owner may change.
    if old.get("dp_engine") != new["dp_engine"]:
        raise InputError(
            "run-changed",
            f'train.dp_engine: the run began with "{old.get("dp_engine")}", and its model now takes '
            f'"{new["dp_engine"]}"; restore the code of the model, or start a new run',
        )
    # Kernels round differently too, and which one can train follows from the model, whose code its owner may change.
    if old.get("kernel") != new["kernel"]:
        raise InputError(
            "run-changed",
            f'simulation.kernel: the run began with "{old.get("kernel")}", and its model now takes "{new["kernel"]}"; '
            "restore the code of the model, or start a new run",
        )


def origin_of(experiment: Experiment, initial: Arrays) -> dict[str, str]:
    """Return what a resumed run must find as it was, the object of private/origin.json."""
    return {
        "folder": str((experiment.folder or Path()).resolve()),
        "experiment": hashlib.sha256(experiment.to_toml().encode()).hexdigest(),
        "initial model": digest(initial),
    }


def refuse_changed(directory: RunDirectory, description: Mapping[str, Any], origin: Mapping[str, str]) -> None:
    """Raise InputError `run-changed` unless a run finds software, experiment, data and model as it left them."""
    refuse_other_software(directory.read_json("manifest.json"), description)
    before = directory.read_json("private/origin.json")
    for part in sorted(origin.keys() - {"folder"}):
        if before.get(part) != origin[part]:
            raise InputError(
                "run-changed",
                f"{directory.path}: the {part} changed since the run began; restore what it was, or start a new run",
            )


def _site(site: SiteRecords, plan: RecordLevelPlan | None) -> dict[str, Any]:
    record: dict[str, Any] = {"train_records": site.train, "test_records": site.test}
    if plan is not None:
        record |= {
            "sampling_rate": plan.sampling_rate,
            "steps_per_round": plan.steps_per_round,
            "noise_multiplier": plan.noise_multiplier,
        }
    return record


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return f"{names[0]}, {os.cpu_count()} cores"
    except (OSError, IndexError):
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
