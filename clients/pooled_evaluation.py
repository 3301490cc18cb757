"""The exact histograms of many clients' test records at once, which lie in one pool."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..privacy.release import EvaluationPlan, cells
from ..tasks.task import Examples, Task
from .kernels import sequential
from .local_model import LocalModel

# Records that go through the model together. Blocks are counted from the pool's beginning, whoever is asked for: a
# product may round by its number of rows, and no count may follow from how clients were dealt out to processes.
_BLOCK = 1024


def histograms(
    model: LocalModel,
    task: Task,
    pool: Examples,
    begins: NDArray[np.int64],
    sizes: NDArray[np.int64],
    plan: EvaluationPlan,
) -> NDArray[np.int64]:
    """Return the counts [clients, cells] of records of a pool, the k-th client's being the `sizes[k]` from `begins[k]`.

    They are exact, whatever the plan.
    """
    ends = np.cumsum(sizes)
    rows = np.repeat(begins - (ends - sizes), sizes) + np.arange(ends[-1])
    owners = np.repeat(np.arange(len(sizes)), sizes)
    blocks, places = np.unique(rows // _BLOCK, return_inverse=True)
    found = np.full((len(blocks), _BLOCK), -1)
    for line, block in zip(found, blocks.tolist(), strict=True):
        records = slice(block * _BLOCK, (block + 1) * _BLOCK)
        targets = pool.targets[records]
        probabilities = sequential.predict(model, task.probabilities, pool.inputs[records], classes=plan.classes)
        line[: len(targets)] = cells(probabilities, targets, plan)
    of_rows, width = found[places, rows % _BLOCK], math.prod(plan.shape)
    counted = of_rows >= 0
    flat = np.bincount(owners[counted] * width + of_rows[counted], minlength=len(sizes) * width)
    return flat.reshape(len(sizes), width)
