"""Channels-last: the order of an image's numbers in which the processor's convolutions and poolings are fast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..local_model import LocalModel


def memory_format(model: LocalModel, inputs: Tensor) -> torch.memory_format:
    """Return the order of numbers in which a model takes inputs like these [n, ...], found out once.

    Where it is channels-last, the module's weights are put into it too: else each convolution would do so anew.
    """
    if model.channels_last is None:
        model.channels_last = _takes_channels_last(model.module, inputs[:2].to(model.device))
        if model.channels_last:
            model.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return torch.channels_last if model.channels_last else torch.contiguous_format


def in_order(inputs: Tensor, order: torch.memory_format) -> Tensor:
    """Return inputs [n, ...] with their numbers in an order."""
    if order is torch.contiguous_format:
        return inputs.contiguous()
    # For images of one channel `contiguous` changes nothing, and a convolution then keeps to torch's own order.
    return inputs.clone(memory_format=order)


def _takes_channels_last(module: nn.Module, inputs: Tensor) -> bool:
    """Return whether a module on the processor takes images [n, channels, height, width] channels-last.

    It is tried out: a module that calls `view` on its input or after a convolution does not. A fixed rule, so every
    process that trains this module chooses the same.
    """
    convolves = any(isinstance(layer, nn.Conv2d) for layer in module.modules())
    if not convolves or inputs.dim() != 4 or inputs.device.type != "cpu":
        return False
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            module(in_order(inputs, torch.channels_last))
    except RuntimeError:
        return False
    finally:
        module.train(training)
    return True
