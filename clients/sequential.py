"""The sequential kernel: one client after the other, one step after the other. The reference, and a real client's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..core.keys import Key
from ..privacy.dpsgd import DPSGD, poisson_batches
from ..privacy.mechanism import RecordLevelPlan
from ..tasks.task import Examples
from .local_model import LocalModel
from .training import LocalTraining

Loss = Callable[[Tensor, Tensor], Tensor]


def train(
    model: LocalModel,
    loss: Loss,
    examples: Examples,
    training: LocalTraining,
    *,
    plan: RecordLevelPlan | None,
    key: Key,
) -> None:
    """Train the module in place for one round, with DP-SGD if there is a plan.

    All randomness comes from `key`: batches, noise, and the seed of torch's generator (dropout), which is put back.
    """
    optimizer = training.make_optimizer(model.parameters)
    model.module.train()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(key.child("dropout").integer())
        if plan is None:
            for batch in shuffled_batches(len(examples), training, key.child("batches")):
                optimizer.zero_grad()
                inputs, targets = _on_device(examples, batch, model.device)
                loss(model.module(inputs), targets).mean().backward()
                optimizer.step()
        else:
            with DPSGD(model.module, optimizer, plan=plan, noise=key.child("noise").stream()) as private:
                for batch in poisson_batches(plan, key.child("batches").stream()):
                    inputs, targets = _on_device(examples, batch, model.device)
                    private.step(inputs, targets, loss)


@torch.no_grad()
def predict(model: LocalModel, probabilities: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Return the probabilities [n, classes] of inputs [n, ...], on the CPU."""
    model.module.eval()
    outputs = [
        probabilities(model.module(batch.to(model.device))).float().cpu() for batch in inputs.split(1024) if len(batch)
    ]
    return torch.cat(outputs) if outputs else torch.zeros(0, 0)


def shuffled_batches(records: int, training: LocalTraining, key: Key) -> Iterator[Tensor]:
    """Yield index batches of `training.epochs` passes over the records, each in a new order."""
    for epoch in range(training.epochs):
        order = torch.from_numpy(key.child(epoch).stream().permutation(records))
        yield from order.split(training.batch_size)


def _on_device(examples: Examples, batch: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return examples.inputs[batch].to(device), examples.targets[batch].to(device)
