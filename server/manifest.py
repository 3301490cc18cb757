"""manifest.json: what a reader needs to know of how a run was made, and what a resumed run must find unchanged."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from ..core.errors import InputError
from ..experiment import Experiment
from ..privacy.mechanism import RecordLevelPlan
from ..tasks.task import SiteData

SCHEMA = 1
LISTED_SITES = 100
_PACKAGES = ("bract", "torch", "opacus", "flwr", "numpy", "dp-accounting")
# Other software may round differently: the resumed run would not end with the bytes of one that was not killed, and
# noise drawn twice for two different gradients would reveal their difference.
_MUST_STAY = ("bract", "torch", "opacus", "flwr", "numpy", "machine")


def manifest(
    experiment: Experiment,
    *,
    kernel: str,
    device: str,
    parameters: int,
    clients: int,
    classes: tuple[str, ...],
    sites: Mapping[str, SiteData],
    mechanisms: Mapping[str, RecordLevelPlan],
) -> dict[str, Any]:
    """Return the object of manifest.json; at most 100 sites are listed."""
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


def _site(site: SiteData, plan: RecordLevelPlan | None) -> dict[str, Any]:
    record: dict[str, Any] = {"train_records": len(site.train), "test_records": len(site.test)}
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
