"""Which kernel trains a model: the reference, or the quickest that takes its steps."""

from __future__ import annotations

from typing import Literal

import torch

from ...core.errors import InputError
from ...privacy.dpsgd.passes import Loss
from ...strategies.local_rule import LocalRule, Untouched
from ...tasks.task import Examples
from ..local_model import LocalModel
from ..training import Kernel, LocalTraining
from . import sequential, traced
from .recording import NotRecordable

# The largest batch on which a model is tried out: whoever asks for full batches may ask for millions.
_TRIED = 32
# By the name that a LocalTraining gives; each is called as `sequential.train` says.
KERNELS = {"sequential": sequential.train, "traced": traced.train}


def choose_kernel(
    wanted: Literal["auto"] | Kernel,
    model: LocalModel,
    loss: Loss,
    like: Examples,
    training: LocalTraining,
    rule: LocalRule,
    *,
    private: bool,
    place: str = "",
) -> Kernel:
    """Return the kernel that trains a model on examples like these: a fixed rule, the same in every process.

    "auto" is the traced one wherever it can train, on a processor. `private` says that there is record-level privacy,
    `place` where the kernel was asked for. Raises InputError where the traced one is asked for and cannot train.
    """
    if wanted == "sequential":
        return "sequential"
    reason = _unfit(training, rule, private=private)
    if reason is None and len(like):
        # Of a size that does not follow from the records, so that a client with few chooses as all others do.
        records = torch.arange(min(training.batch_size, _TRIED)) % len(like)
        try:
            batch = Examples(like.inputs[records], like.targets[records])
            traced.prepare(model, loss, training, batch)
        except NotRecordable as error:
            reason = str(error)
        else:
            return "traced" if wanted == "traced" or model.device.type == "cpu" else "sequential"
    if wanted == "traced" and reason:
        raise InputError(
            "experiment-conflict", f'simulation.kernel = "traced": {reason}; use "auto" or "sequential"{place}'
        )
    return "sequential"


def _unfit(training: LocalTraining, rule: LocalRule, *, private: bool) -> str | None:
    if private:
        return "record-level privacy clips each example's gradient, which it does not do"
    if rule.session is not Untouched:
        return "the strategy corrects the gradients of each step"
    if training.optimizer != "sgd" or training.momentum or training.l2:
        return "it takes steps of plain SGD, without momentum and without L2"
    return None
