"""SGD: torch's own step, bit for bit, without what torch.optim does around it.

torch.optim wraps each step in hooks, profiling and checks that take longer than a small model's arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SGD:
    """v ← μ·v + g + λ·x and x ← x − η·v, with v = g + λ·x at the first step (Sutskever et al. 2013, as in torch)."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, learning_rate: float, momentum: float = 0.0, l2: float = 0.0
    ) -> None:
        self._parameters = list(parameters)
        self._learning_rate, self._momentum, self._l2 = learning_rate, momentum, l2
        self._velocity: dict[int, Tensor] = {}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        moved: list[tuple[int, Tensor, Tensor]] = [
            (index, parameter, parameter.grad)
            for index, parameter in enumerate(self._parameters)
            if parameter.grad is not None
        ]
        if not moved:
            return
        tensors = [tensor for _, tensor, _ in moved]
        steps = [gradient for _, _, gradient in moved]
        if self._l2:
            steps = list(torch._foreach_add(steps, tensors, alpha=self._l2))
        if self._momentum:
            steps = [self._moving(index, step) for (index, _, _), step in zip(moved, steps, strict=True)]
        torch._foreach_add_(tensors, steps, alpha=-self._learning_rate)

    def _moving(self, index: int, step: Tensor) -> Tensor:
        if index in self._velocity:
            self._velocity[index].mul_(self._momentum).add_(step)
        else:
            self._velocity[index] = step.clone()
        return self._velocity[index]
