"""Channels-last: the order of an image's numbers in which the processor's convolutions and poolings are fast."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def prefers_channels_last(module: nn.Module, inputs: Tensor) -> bool:
    """Return whether a module on the processor takes images [n, channels, height, width] channels-last.

    It is tried out: a module that calls `view` on its input or after a convolution does not. A fixed rule, so every
    process that trains this module chooses the same.
    """
    convolves = any(isinstance(layer, nn.Conv2d) for layer in module.modules())
    if not convolves or inputs.dim() != 4 or inputs.device.type != "cpu" or not inputs.is_floating_point():
        return False
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            module(inputs[:2].to(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    finally:
        module.train(training)
    return True
