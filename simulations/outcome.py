"""The end of a run: comparison, model, result.json."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import nn

from ..core.errors import BractError
from ..server.evaluation import Evaluation
from ..server.events import Listener
from ..server.progress import Progress
from ..server.result import Result
from .assembly import Assembly
from .comparison import MOST_SITES, compare

SCHEMA = 1


def conclude(
    assembly: Assembly,
    progress: Progress,
    *,
    status: str,
    error: BractError | None,
    keeps_best: bool,
    started: float,
    training_seconds: float,
    make_strategy: Callable[[], Strategy],
    emit: Listener,
) -> Result:
    """Write what the run leaves, and return its result.

    `keeps_best` takes the model that was evaluated best; `started` is the run's time.monotonic().
    """
    directory, experiment = assembly.directory, assembly.experiment
    arrays, histograms = progress.arrays, progress.histograms
    if keeps_best and progress.best_arrays:
        arrays, histograms = progress.best_arrays, progress.best_histograms
    elif progress.evaluated_round != progress.round:
        histograms = {}
    guarantee = assembly.plan.guarantee(experiment, assembly.accounts.rounds)
    if status not in ("interrupted", "failed") and assembly.task and _wants_comparison(assembly):
        compared = compare(
            experiment,
            assembly.task,
            assembly.data,
            assembly.federation,
            arrays,
            make_strategy=make_strategy,
            label="federated" if guarantee.epsilon is None else f"federated, epsilon {guarantee.epsilon:.2g}",
            key=assembly.key.child("comparison"),
            emit=emit,
        )
        directory.write_json("private/comparison.json", compared)
    module = assembly.federation.module(arrays).cpu().eval()
    evaluation = Evaluation(histograms=histograms) if histograms else None
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "status": status,
        "run_dir": str(directory.path),
        "rounds": progress.round,
        "metrics": evaluation.metrics if evaluation else dict(progress.strategy_metrics),
        "guarantee": guarantee.to_dict(),
        "model_sha256": directory.save_model(_state(module)),
        "seconds": round(time.monotonic() - started, 3),
        **_traffic(assembly, progress),
        "clients_per_second": round(_trained(assembly, progress) / training_seconds, 3),
        "released": evaluation.to_dict() if evaluation else None,
        "error": {"code": error.code, "sentence": error.sentence} if error else None,
    }
    directory.write_json("result.json", record)
    return Result(run_dir=directory.path, record=record, guarantee=guarantee, module=module)


def _traffic(assembly: Assembly, progress: Progress) -> dict[str, int]:
    """Return the bytes of all rounds' training; the expected ones where they would tell the size of a secret cohort."""
    trained, traffic = _trained(assembly, progress), assembly.federation.traffic
    down, up = progress.bytes_down, progress.bytes_up
    if assembly.plan.aggregate is not None:
        down, up = round(trained * traffic.down), round(trained * traffic.up)
    saved = {"bytes_saved": round(trained * traffic.saved)} if assembly.federation.compression else {}
    return {"bytes_up": up, "bytes_down": down, **saved}


def _trained(assembly: Assembly, progress: Progress) -> int:
    """Return how many times a client was trained; the expected number where cohorts are secret."""
    aggregate = assembly.plan.aggregate
    return progress.trained if aggregate is None else aggregate.cohort * progress.round


def _wants_comparison(assembly: Assembly) -> bool:
    if assembly.experiment.privacy.unit == "client":
        return False
    wanted = assembly.experiment.simulation.baselines
    return 1 < len(assembly.data) <= MOST_SITES if wanted == "auto" else wanted


def _state(module: nn.Module) -> dict[str, NDArray[np.generic]]:
    # numpy has no bfloat16; float32 holds its values exactly.
    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in module.state_dict().items()
    }
