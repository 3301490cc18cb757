"""A model's output for one record must not depend on the other records of its batch: seen by trying it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.errors import InputError


def refuse_mixing(module: nn.Module, like: Tensor) -> None:
    """Raise InputError `model-not-private` if a record's output moves with its neighbours in the batch.

    `like` [n, ...] gives the shape and type of inputs; its values are not used. Layers that are known to mix records
    are replaced before (`privacy.layers`); this finds the ones of the user's own code, such as `x - x.mean(0)`.
    """
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(0)
    shape = like.shape[1:]
    if like.is_floating_point():
        first, second, third = (torch.randn(shape, generator=generator).to(like.dtype) for _ in range(3))
        # One far away and one close by: a weight between records may see either alone.
        some, others = [second, third, second], [5 * third, 1.25 * first, 0 * first]
    else:
        first = torch.zeros(shape, dtype=like.dtype)
        some, others = [first + 1] * 3, [first] * 3
    was_training = module.training
    module.train()
    try:
        one = _first_output(module, torch.stack([first, *some]).to(device))
        other = _first_output(module, torch.stack([first, *others]).to(device))
    finally:
        module.train(was_training)
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise InputError(
            "model-not-private",
            "train.model: its output for a record depends on the others of the batch, so no clipping bounds what one "
            "record does; compute nothing across the first dimension",
        )


@torch.no_grad()
def _first_output(module: nn.Module, batch: Tensor) -> Tensor:
    """Return the first record's output; dropout draws the same both times."""
    devices = [batch.device] if batch.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        output: Tensor = module(batch)[0]
        return output.float()
