"""A run directory like the main job's, written file by file, with plausible numbers and no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bract.privacy.guarantee import ALWAYS_EXCLUDED, Guarantee, no_privacy
from bract.privacy.release import metrics_from

SITES = {"Cleveland": (243, 60), "Hungary": (234, 60), "VA Long Beach": (160, 40), "Switzerland": (98, 25)}
HISTOGRAMS = {
    "Cleveland": [[19, 9, 4, 1], [2, 4, 8, 15]],
    "Hungary": [[24, 9, 3, 2], [3, 4, 6, 10]],
    "VA Long Beach": [[2, 3, 3, 1], [3, 6, 9, 13]],
    "Switzerland": [[1, 0, 2, -1], [1, 4, 8, 11]],
}
EXPERIMENT = """
[experiment]
name = "heart-disease"
rounds = 20
seed = 7
[task]
name = "heart-disease"
[clients]
partitioner = "natural"
count = 4
sampling = "all"
[train]
model = "logistic"
epochs = 1
batch_size = 32
optimizer = "sgd"
learning_rate = 0.5
device = "auto"
personal = []
[strategy]
name = "fedavg"
[privacy]
unit = "record"
epsilon = 2.0
delta = 1e-05
clipping_norm = 1.0
randomness = "secret"
[simulation]
kernel = "auto"
curves = true
baselines = "auto"
[server]
quorum = 0.5
checkpoint_every = 10.0
"""


def guarantee(**changes: Any) -> Guarantee:
    """The main job's guarantee, with changes."""
    given: dict[str, Any] = {
        "epsilon": 1.99996,
        "delta": 1e-5,
        "unit": "record",
        "neighbouring": "zero-out: one record replaced by one that contributes nothing, the number of records public",
        "sampler": "20 rounds with 4 to 8 steps a site and each record in a step's batch with probability 0.1317 to "
        "0.3265 (Poisson sampling)",
        "randomness": "secret",
        "trust": "this is a simulation: one process holds all records and sees everything before the noise; the "
        "promise is about the released model and metrics",
        "excludes": (*ALWAYS_EXCLUDED, "the exact curves and comparisons in private/, which the simulation computed"),
        "replace_one_epsilon": 3.8317,
        "per_client": {"Cleveland": 1.9996, "Hungary": 1.99996, "VA Long Beach": 1.9984, "Switzerland": 1.9997},
    }
    return Guarantee(**given | changes)


def write_run(
    folder: Path,
    *,
    sites: dict[str, tuple[int, int]] | None = None,
    histograms: dict[str, Any] | None = None,
    given: Guarantee | None = None,
    result: dict[str, Any] | None = None,
    classes: tuple[str, ...] = ("no disease", "heart disease"),
    rounds: int = 20,
    private: bool = True,
    finished: bool = True,
) -> Path:
    """Write the files of a run and return its folder; `result` overrides keys of result.json."""
    sites, histograms, given = sites or SITES, histograms or HISTOGRAMS, given or guarantee()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.toml").write_text(EXPERIMENT)
    manifest = {
        "schema": 1, "bract": "0.1.0", "python": "3.11.2", "torch": "2.13.0+cpu", "opacus": "1.6.0", "flwr": "1.41.0",
        "numpy": "2.4.6", "dp_accounting": "0.6.0", "platform": "Linux-6.1.0-x86_64", "machine": "x86_64",
        "processor": "Intel(R) Xeon(R) Processor @ 2.60GHz, 2 cores", "created": "2026-11-23T10:04:31Z", "seed": 7,
        "kernel": "sequential", "device": "cpu", "threads": 1, "clients": len(sites), "parameters": 18,
        "task": "heart-disease", "classes": list(classes), "model": "logistic",
        "sites": {name: _site(*records) for name, records in sites.items()} if len(sites) <= 100 else {},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lines = [_line(number, len(sites), given) for number in range(1, rounds + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    total = np.sum(list(histograms.values()), axis=0)
    record = {
        "schema": 1, "status": "completed", "run_dir": str(folder), "rounds": rounds, "metrics": _scalars(total),
        "guarantee": given.to_dict(), "model_sha256": "5f1c0a9e" * 8, "seconds": 6.12, "clients_per_second": 13.1,
        "released": {
            "histogram": total.tolist(),
            "roc": [list(point) for point in metrics_from(total).get("roc", ())],
            "per_site": {
                name: {"histogram": counts} | _scalars(np.array(counts))
                for name, counts in histograms.items()
                if len(histograms) <= 100
            },
        },
        "error": None,
    }  # fmt: skip
    if finished:
        (folder / "result.json").write_text(json.dumps(record | (result or {})))
    if private:
        _write_private(folder / "private", list(sites), rounds)
    return folder


def without_privacy() -> Guarantee:
    """The guarantee of a run without any mechanism."""
    return no_privacy(excludes_extra=("the exact curves and comparisons in private/, which the simulation computed",))


def _scalars(counts: Any) -> dict[str, Any]:
    return {name: value for name, value in metrics_from(counts).items() if name != "roc"}


def _site(train: int, test: int) -> dict[str, Any]:
    rate = min(1.0, 32 / train)
    return {
        "train_records": train, "test_records": test, "sampling_rate": rate, "steps_per_round": int(np.ceil(1 / rate)),
        "noise_multiplier": 1.2 + 9.4 * rate,
    }  # fmt: skip


def _line(number: int, clients: int, given: Guarantee) -> dict[str, Any]:
    line = {"round": number, "clients": clients, "failed": 0, "seconds": 0.2, "bytes_up": 288, "bytes_down": 288}
    return line if given.epsilon is None else line | {"epsilon": given.epsilon * (number / 20) ** 0.56}


def _write_private(folder: Path, sites: list[str], rounds: int) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "key").write_text("00" * 32 + "\n")
    draws = np.random.default_rng(3)
    levels = {name: draws.uniform(0.70, 0.86) for name in sites}
    shown = sites if len(sites) <= 10 else []

    def wander(level: float, number: int) -> float:
        return float(np.clip(level - 0.25 * np.exp(-number / 3.5) + draws.normal(0, 0.011), 0, 1))

    with (folder / "curves.jsonl").open("w") as file:
        for number in range(1, rounds + 1):
            point = {
                "round": number,
                "loss": float(0.46 + 0.22 * np.exp(-number / 4) + draws.normal(0, 0.004)),
                "accuracy": wander(0.803, number),
                "auc": wander(0.877, number),
                "sites": {
                    name: {"accuracy": wander(levels[name], number), "auc": wander(levels[name] + 0.05, number)}
                    for name in shown
                },
            }
            file.write(json.dumps(point) + "\n")

    def row(model: str, kind: str, fall: float, home: str | None = None) -> dict[str, Any]:
        at = {
            name: {
                "accuracy": round(levels[name] - (0 if name == home else fall) + draws.normal(0, 0.012), 4),
                "auc": None
                if name == "Switzerland" and home
                else round(levels[name] + 0.05 - fall + draws.normal(0, 0.01), 4),
            }
            for name in sites
        }
        mean = float(np.mean([entry["accuracy"] for entry in at.values()]))
        return {"model": model, "kind": kind, "sites": at, "all": {"accuracy": mean, "auc": mean + 0.07 - fall / 3}}

    rows = [row("federated, epsilon 2", "federated", 0.004), row("federated, without privacy", "reference", -0.006)]
    rows += [row(f"{name} alone", "lone", float(draws.uniform(0.04, 0.13)), name) for name in sites[:20]]
    (folder / "comparison.json").write_text(json.dumps({"sites": sites, "rows": rows}))
