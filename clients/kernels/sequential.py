"""The sequential kernel: one client after the other, one step after the other. The reference, and a real client's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import RunError
from ...core.keys import Key
from ...privacy.dpsgd.passes import Hide, Loss, poisson_batches
from ...privacy.mechanism import RecordLevelPlan
from ...strategies.local_rule import LocalSession
from ...tasks.task import Examples
from ..local_model import LocalModel
from ..training import LocalTraining, Optimizer
from .memory_format import in_order, memory_format


def train(
    model: LocalModel,
    loss: Loss,
    examples: Examples,
    training: LocalTraining,
    *,
    plan: RecordLevelPlan | None,
    key: Key,
    session: LocalSession | None = None,
    hide: Hide | None = None,
) -> None:
    """Train the module in place for one round, with DP-SGD if there is a plan; `session` corrects each gradient.

    All randomness comes from `key`: batches, noise, and the seed of torch's generator (dropout), which is put back.
    With `hide`, an example on which the model or the loss raises under a plan counts as zero, and `hide` is told.
    """
    correct = session.correct if session else _leave
    model.module.train()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        seed_generators(model.device, key.child("dropout").integer())
        if plan is None:
            optimizer = training.make_optimizer(model.parameters)
            order = memory_format(model, examples.inputs)
            for batch in shuffled_batches(len(examples), training, key):
                inputs, targets = on_device(examples, batch, model.device)
                take_step(model, loss, training, optimizer, in_order(inputs, order), targets, correct)
        else:
            from .dp_engines import private_steps

            like, noise = examples.inputs[:2], key.child("noise").stream()
            with private_steps(model, like, training, plan, noise, correct, hide) as private:
                order = memory_format(model, examples.inputs) if private.any_order else torch.contiguous_format
                for batch in poisson_batches(plan, key.child("batches").stream()):
                    inputs, targets = on_device(examples, batch, model.device)
                    private.step(in_order(inputs, order), targets, loss)


@torch.no_grad()
def predict(
    model: LocalModel,
    probabilities: Callable[[Tensor], Tensor],
    inputs: Tensor,
    *,
    classes: int,
    hide: Hide | None = None,
) -> Tensor:
    """Return the probabilities [n, classes] of inputs [n, ...], on the CPU.

    With `hide`, an example on which the model raises has NaN for all of them, and `hide` is told.
    """
    model.module.eval()

    def of(batch: Tensor) -> Tensor:
        found = probabilities(model.module(batch.to(model.device))).float().cpu()
        if found.shape != (len(batch), classes):
            shape = list(found.shape)
            raise RunError("plugin-invalid", f"task.probabilities: {shape}, not [{len(batch)}, {classes}]")
        return found

    def singly(batch: Tensor) -> Iterator[Tensor]:
        for one in batch.split(1):
            try:
                yield of(one)
            except Exception as error:  # what a model raises may follow from this record
                assert hide is not None
                hide(error)
                yield torch.full((1, classes), torch.nan)

    outputs: list[Tensor] = []
    for batch in inputs.split(1024) if len(inputs) else ():
        try:
            outputs.append(of(batch))
        except Exception:
            if hide is None:
                raise
            outputs.extend(singly(batch))
    return torch.cat(outputs) if outputs else torch.zeros(0, classes)


@torch.no_grad()
def mean_loss(model: LocalModel, loss: Loss, examples: Examples) -> float:
    """Return the mean loss of the module on examples, as it stands: exact, and so for nobody else under privacy."""
    model.module.eval()
    total = 0.0
    for indices in torch.arange(len(examples)).split(1024):
        inputs, targets = on_device(examples, indices, model.device)
        total += float(loss(model.module(inputs), targets).double().sum())
    return total / max(1, len(examples))


def steps_of(records: int, training: LocalTraining, plan: RecordLevelPlan | None) -> int:
    """Return how many steps `train` takes; under privacy that is the plan's number."""
    return plan.steps_per_round if plan else training.epochs * -(-records // training.batch_size)


def shuffled_batches(records: int, training: LocalTraining, key: Key) -> Iterator[Tensor]:
    """Yield index batches of `training.epochs` passes over the records, each in a new order."""
    for order in shuffled(records, training, key):
        yield from order.split(training.batch_size)


def shuffled(records: int, training: LocalTraining, key: Key) -> Iterator[Tensor]:
    """Yield a new order of the records for each of `training.epochs` passes over them."""
    for epoch in range(training.epochs):
        yield torch.from_numpy(order_of(records, key, epoch))


def order_of(records: int, key: Key, epoch: int) -> NDArray[np.int64]:
    """Return the order in which an epoch goes through the records; `key` is the client's of the round."""
    return key.child("batches", epoch).stream().permutation(records)


def take_step(
    model: LocalModel,
    loss: Loss,
    training: LocalTraining,
    optimizer: Optimizer,
    inputs: Tensor,
    targets: Tensor,
    correct: Callable[[], None] = lambda: None,
) -> None:
    """Take one plain step on a batch, inputs [n, ...] and targets [n]; `correct` changes the gradients first."""
    optimizer.zero_grad()
    loss(outputs_of(model, inputs, training), targets).mean().backward()
    correct()
    optimizer.step()


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed the generators of the processor and of the device: `torch.manual_seed` seeds all there are, and is slow."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def outputs_of(model: LocalModel, inputs: Tensor, training: LocalTraining) -> Tensor:
    """Return what the module makes of a batch while it is trained, in float32 whatever its products' precision."""
    if training.precision == "float32":
        outputs: Tensor = model.module(inputs)
        return outputs
    # Each product is of this step's weights: nothing is kept from one step to the next.
    with torch.autocast(model.device.type, dtype=torch.bfloat16, cache_enabled=False):
        rounded: Tensor = model.module(inputs)
    return rounded.float()


def _leave() -> None:
    """Correct nothing."""


def on_device(examples: Examples, batch: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the inputs and the targets of some examples."""
    # Twice as quick as indexing.
    return examples.inputs.index_select(0, batch).to(device), examples.targets.index_select(0, batch).to(device)
