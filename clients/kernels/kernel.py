"""Which kernel trains a model: the reference, or the quickest that takes its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ...core.errors import InputError
from ...privacy.dpsgd.passes import Loss
from ...privacy.mechanism import RecordLevelPlan
from ...strategies.local_rule import LocalRule, Untouched
from ...tasks.task import Examples
from ..local_model import LocalModel
from ..training import Kernel, LocalTraining
from . import sequential, stacked, traced
from .memory_format import memory_format
from .recording import NotRecordable
from .stack_form import Form

# The largest batch on which a model is tried out: whoever asks for full batches may ask for millions.
_TRIED = 32
# By the name that a LocalTraining gives; each is called as `sequential.train` says.
# One client by itself is no stack.
KERNELS = {"sequential": sequential.train, "traced": traced.train, "stacked": traced.train}


@dataclass(frozen=True, kw_only=True)
class Together:
    """Clients whom one process trains: so many a round, of whom nobody has more than `longest` records.

    Under record-level privacy `plan` is that of one of them, who all clip alike.
    """

    cohort: int
    longest: int
    plan: RecordLevelPlan | None = None


def choose_kernel(
    wanted: Literal["auto"] | Kernel,
    model: LocalModel,
    loss: Loss,
    like: Examples,
    training: LocalTraining,
    rule: LocalRule,
    *,
    private: bool,
    together: Together | None = None,
    place: str = "",
) -> Kernel:
    """Return the kernel that trains a model on examples like these: a fixed rule, the same in every process.

    "auto" is on a processor the stacked one for small models in large cohorts, and else the traced one, wherever they
    can train; of one client's private steps the traced one repeats those of book-keeping, to the last bit. `together`
    says of which clients a process trains many at once; one by itself never takes the stacked one. `private` says that
    there is record-level privacy, `place` where the kernel was asked for. Raises InputError where a kernel is asked for
    that cannot train.
    """
    # Found out in every process before it evaluates or trains, so that all of them round alike.
    memory_format(model, like.inputs)
    if wanted == "sequential":
        return "sequential"
    if private:
        return _for_private_steps(wanted, model, loss, like, training, rule, together=together, place=place)
    reason = _unfit(training, rule)
    if reason is None and len(like):
        tries: list[tuple[Kernel, Callable[[], object]]] = []
        if together is not None:
            form = Form.of(model, training, like, together.longest)
            if wanted == "stacked" or (wanted == "auto" and form.pays(model, together.cohort)):
                tries.append(("stacked", lambda: stacked.prepare(model, loss, training, like, form)))
        if wanted == "traced" or together is None or (wanted == "auto" and model.device.type == "cpu"):
            tries.append(("traced", lambda: traced.prepare(model, loss, training, _batch(like, training))))
        for kernel, prepare in tries:
            try:
                prepare()
            except NotRecordable as error:
                reason = str(error)
            else:
                return kernel if wanted == kernel or model.device.type == "cpu" else "sequential"
    if reason and (wanted == "traced" or (wanted == "stacked" and together is not None)):
        raise _refused(wanted, reason, place)
    return "sequential"


def _for_private_steps(
    wanted: str,
    model: LocalModel,
    loss: Loss,
    like: Examples,
    training: LocalTraining,
    rule: LocalRule,
    *,
    together: Together | None,
    place: str,
) -> Kernel:
    from .dp_engines import dp_engine

    if together is not None and together.plan is not None and wanted in ("auto", "stacked"):
        form = Form.of(model, training, like, together.longest, private=True)
        reason = _unfit(training, rule)
        if training.dp_engine != "auto":
            reason = "train.dp_engine names what computes the clipped sums"
        if reason is None and (wanted == "stacked" or form.pays(model, together.cohort)):
            from . import private_stack

            try:
                private_stack.prepare(model, loss, training, like, form, together.plan)
                return "stacked"
            except NotRecordable as error:
                reason = str(error)
        if wanted == "stacked":
            raise _refused(wanted, reason or "", place)

    recorded = model.device.type == "cpu" and dp_engine(model, like.inputs[:2], training) == "bookkeeping"
    if wanted == "traced" and not recorded:
        raise _refused(wanted, "of private steps it repeats those of book-keeping on a processor", place)
    return "traced" if recorded else "sequential"


def _refused(wanted: str, reason: str, place: str) -> InputError:
    return InputError(
        "experiment-conflict", f'simulation.kernel = "{wanted}": {reason}; use "auto" or "sequential"{place}'
    )


def _batch(like: Examples, training: LocalTraining) -> Examples:
    # Of a size that does not follow from the records, so that a client with few chooses as all others do.
    records = torch.arange(min(training.batch_size, _TRIED)) % len(like)
    return Examples(like.inputs[records], like.targets[records])


def _unfit(training: LocalTraining, rule: LocalRule) -> str | None:
    if rule.session is not Untouched:
        return "the strategy corrects the gradients of each step"
    if training.optimizer != "sgd" or training.momentum or training.l2:
        return "it takes steps of plain SGD, without momentum and without L2"
    return None
