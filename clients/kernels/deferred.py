"""A linear layer whose steps are kept as the low-rank product that they are, and put into its weights together.

A step of SGD on a batch H [rows, in] with gradients D [rows, out] of what the layer returns changes its weights W by
−η·Dᵀ·H, whose rank is that of the batch. So what the layer returns after some steps is
H·Wᵀ = H·W₀ᵀ − η·Σ (H·Hₛᵀ)·Dₛ, where W₀ are the weights before them: exactly plain SGD, but W is written once for
many steps, by one large product.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Weights of fewer numbers stay in a core's cache from step to step, and need not wait.
_SMALLEST = 2**18
# Below so many steps at a time there is nothing to gain.
_FEWEST = 4


def steps_together(outputs: int, inputs: int, rows: int) -> int:
    """Return for how many steps of so many rows a layer's weights may wait; 0 where they had better not.

    Up to the rank at which what is computed more, rank² · (inputs + outputs), is half of the steps' own products.
    """
    if inputs * outputs < _SMALLEST:
        return 0
    steps = inputs * outputs // (2 * (inputs + outputs)) // max(1, rows)
    return steps if steps >= _FEWEST else 0


class DeferredLinear:
    """The weights [out, in] of a layer within a recorded step of learning rate `rate`; `rows` examples may wait."""

    def __init__(self, weight: Tensor, *, rate: float, rows: int) -> None:
        self._weight, self._rate, self._room, self._rows = weight, rate, rows, 0
        self._inputs = weight.new_empty(rows, weight.shape[1])
        self._gradients = weight.new_empty(rows, weight.shape[0])

    def begin(self) -> None:
        """Begin with the weights as they are."""
        self._rows = 0

    def forward(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """Return inputs · Wᵀ + bias, [rows, out]."""
        rows, weight = self._rows, self._weight
        out = inputs @ weight.t() if bias is None else torch.addmm(bias, inputs, weight.t())
        if rows:
            out.addmm_(inputs @ self._inputs[:rows].t(), self._gradients[:rows], alpha=-self._rate)
        return out

    def backward(self, gradients: Tensor) -> Tensor:
        """Return gradients · W, [rows, in]: the gradient of the inputs."""
        out, rows = gradients @ self._weight, self._rows
        if rows:
            out.addmm_(gradients @ self._gradients[:rows].t(), self._inputs[:rows], alpha=-self._rate)
        return out

    def step(self, gradients: Tensor, inputs: Tensor) -> None:
        """Take a step on a batch: keep it, and put all that are kept into the weights when there is no more room."""
        stop = self._rows + len(gradients)
        self._inputs[self._rows : stop] = inputs
        self._gradients[self._rows : stop] = gradients
        self._rows = stop
        if stop == self._room:
            self.settle()

    def settle(self) -> None:
        """Put all steps into the weights."""
        rows, self._rows = self._rows, 0
        if rows:
            self._weight.addmm_(self._gradients[:rows].t(), self._inputs[:rows], alpha=-self._rate)
