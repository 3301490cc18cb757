"""The end of a run: model, result.json."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import BractError
from ..privacy.guarantee import Guarantee
from .evaluation import Evaluation
from .progress import Progress
from .result import Result
from .setting import Setting

SCHEMA = 1

Arrays = dict[str, NDArray[np.generic]]
Histograms = dict[str, NDArray[np.int64]]


def kept(progress: Progress, *, keeps_best: bool) -> tuple[Arrays, Histograms]:
    """Return the model that a run leaves, and what was released of it; `keeps_best` takes the one that scored best."""
    if keeps_best and progress.best_arrays:
        return progress.best_arrays, progress.best_histograms
    return progress.arrays, progress.histograms if progress.evaluated_round == progress.round else {}


def conclude(
    setting: Setting,
    progress: Progress,
    *,
    status: str,
    error: BractError | None,
    guarantee: Guarantee,
    keeps_best: bool,
    seconds: float,
    training_seconds: float,
) -> Result:
    """Write what the run leaves, and return its result."""
    # With the module torch is there; a run without one needs none until here.
    from ..strategies.tensors import arrays_like

    directory = setting.directory
    arrays, histograms = kept(progress, keeps_best=keeps_best)
    module = setting.module(arrays).cpu().eval()
    evaluation = Evaluation(histograms=histograms) if histograms else None
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "status": status,
        "run_dir": str(directory.path),
        "rounds": progress.round,
        "metrics": evaluation.metrics if evaluation else dict(progress.strategy_metrics),
        "guarantee": guarantee.to_dict(),
        "model_sha256": directory.save_model(arrays_like(module.state_dict())),
        "seconds": round(seconds, 3),
        **_traffic(setting, progress),
        "clients_per_second": round(_trained(setting, progress) / training_seconds, 3),
        "released": evaluation.to_dict() if evaluation else None,
        "error": {"code": error.code, "sentence": error.sentence} if error else None,
    }
    directory.write_json("result.json", record)
    return Result(run_dir=directory.path, record=record, guarantee=guarantee, module=module)


def _traffic(setting: Setting, progress: Progress) -> dict[str, int]:
    """Return the bytes of all rounds' training; the expected ones where they would tell the size of a secret cohort."""
    trained, traffic = _trained(setting, progress), setting.traffic
    down, up = progress.bytes_down, progress.bytes_up
    if setting.aggregate is not None:
        down, up = round(trained * traffic.down), round(trained * traffic.up)
    saved = {"bytes_saved": round(trained * traffic.saved)} if setting.compression else {}
    return {"bytes_up": up, "bytes_down": down, **saved}


def _trained(setting: Setting, progress: Progress) -> int:
    """Return how many times a client was trained; the expected number where cohorts are secret."""
    return progress.trained if setting.aggregate is None else setting.aggregate.cohort * progress.round
