"""The two engines of DP-SGD, book-keeping and Opacus', and the fixed rule that chooses between them.

Importing this imports Opacus, which takes seconds: who trains without record-level privacy has no need of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from ...core.errors import InputError
from ...core.keys import Stream
from ...privacy.dpsgd.bookkeeping import BookKeeping, supports, unknown_layer
from ...privacy.dpsgd.dpsgd import DPSGD
from ...privacy.dpsgd.noised_sum import NoisedSum
from ...privacy.dpsgd.passes import Hide, trained_layers
from ...privacy.mechanism import RecordLevelPlan
from ..local_model import LocalModel
from ..training import LocalTraining
from .recorded_passes import RecordedPasses


def dp_engine(model: LocalModel, like: Tensor, training: LocalTraining) -> Literal["bookkeeping", "opacus"]:
    """Return which engine computes the clipped gradients of a model on inputs like these [n, ...].

    A fixed rule, the same in every process. Raises InputError `model-not-private` where `train.dp_engine` asks for
    book-keeping and the model does not go with it.
    """
    if training.dp_engine == "opacus":
        return "opacus"
    if model.bookkeeping is None:
        model.bookkeeping = supports(model.module, like)
    if training.dp_engine == "bookkeeping" and not model.bookkeeping:
        why = unknown_layer(model.module) or "its clipped sums differ from those of autograd, one example at a time"
        raise InputError("model-not-private", f'train.dp_engine = "bookkeeping": {why}; use "auto" or "opacus"')
    return "bookkeeping" if model.bookkeeping else "opacus"


def private_steps(
    model: LocalModel,
    like: Tensor,
    training: LocalTraining,
    plan: RecordLevelPlan,
    noise: Stream,
    correct: Callable[[], None],
    hide: Hide | None,
) -> BookKeeping | DPSGD:
    """Return the context manager whose `step` takes one private step, on inputs like these [n, ...]."""
    if dp_engine(model, like, training) == "bookkeeping":
        if model.noised_sum is None:
            model.noised_sum = NoisedSum([p for _, own in trained_layers(model.module) for p in own])
        recorded = training.kernel == "traced" and model.device.type == "cpu"
        return BookKeeping(
            model.module,
            training.make_optimizer(model.parameters),
            plan=plan,
            noise=noise,
            correct=correct,
            hide=hide,
            summed=model.noised_sum,
            quick=RecordedPasses(model, plan) if recorded else None,
        )
    wrapped = training.make_torch_optimizer(model.parameters)
    return DPSGD(model.module, wrapped, plan=plan, noise=noise, correct=correct, hide=hide)
