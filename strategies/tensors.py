"""What sessions of local rules do with live tensors; the only part of a strategy that needs torch itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.parameters import Arrays


def add_to_gradient(parameter: Tensor, term: Tensor, factor: float = 1.0) -> None:
    """Add factor · term to a parameter's gradient; one that the loss does not reach has the gradient zero."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(term, alpha=factor)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return detached copies by name."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def tensors_like(arrays: Arrays, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return arrays as tensors of the device and type of their namesakes, zeros where there is no array."""
    return {
        name: torch.zeros_like(tensor, requires_grad=False)
        if name not in arrays
        else torch.from_numpy(np.array(arrays[name])).to(device=tensor.device, dtype=tensor.dtype)
        for name, tensor in tensors.items()
    }


def arrays_like(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.generic]]:
    """Return tensors as arrays; bfloat16, which numpy lacks, as float32."""
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    return {
        # Channels-last weights leave in the order of every other tensor.
        name: np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy(), order="C")
        for name, tensor in detached.items()
    }


def flat(tensor: Tensor) -> NDArray[np.generic]:
    """Return a tensor as a flat array in the order of its dimensions: its own memory where that is on the processor."""
    detached = tensor.detach()
    array: NDArray[np.generic] = (detached.float() if tensor.dtype == torch.bfloat16 else detached).cpu().numpy()
    return array.reshape(-1)


@torch.no_grad()
def put(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into tensors, in place."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
