"""Fixtures that many tests share: a tiny synthetic experiment, and the built-in one run once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bract.experiment import Experiment

TINY: dict[str, dict[str, Any]] = {
    "experiment": {"name": "tiny", "rounds": 4, "seed": 3},
    "task": {"name": "synthetic", "clients": 4, "records": 30, "features": 5, "classes": 2},
    "train": {"batch_size": 10, "learning_rate": 0.2},
    "privacy": {"randomness": "seed"},
    "simulation": {"curves": False, "baselines": False},
}
PRIVATE = {"privacy.unit": "record", "privacy.noise_multiplier": 4.0}


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Experiment]:
    """Return the tiny experiment with keys changed: tiny(**{"experiment.rounds": 2})."""

    def make(folder: Path | None = None, **keys: Any) -> Experiment:
        tables = copy.deepcopy(TINY)
        for path, value in keys.items():
            table, _, key = path.partition(".")
            tables.setdefault(table, {})[key] = value
        return Experiment.of(tables, folder=folder)

    return make


@pytest.fixture(scope="session")
def heart_run(tmp_path_factory):
    """Return the result of `bract.simulate()` as a user gets it, and the events of the run."""
    import bract

    events = []
    out = tmp_path_factory.mktemp("heart") / "run"
    return bract.simulate(out=out, listeners=[events.append]), events
