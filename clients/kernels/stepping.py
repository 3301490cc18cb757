"""The steps of plain SGD at the end of a recorded step: linear layers' in one product each, or put off together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .deferred import DeferredLinear, steps_together
from .recording import Operation, Recording, Value
from .rewriting import only_result, readers_of

aten: Any = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer's part in a step: its weights, its products, and what its gradient Dᵀ·H is made of."""

    weight: Tensor
    forward: Operation
    backward: Operation | None
    gradient: Operation
    inputs: Value
    gradients: Value
    bias: Value | None
    rows: int

    @property
    def together(self) -> int:
        """For how many steps its weights may wait; 0 where they had better not."""
        outputs, inputs = self.weight.shape
        return steps_together(outputs, inputs, self.rows)


def linear_layers(recording: Recording, parameters: Sequence[Tensor]) -> list[Linear]:
    """Return the layers whose weights a step uses once forward and at most once back, and in nothing else."""
    readers = readers_of(recording)
    makers = {value: each for each in recording.operations for value in each.results if value is not None}
    places = {id(tensor): Value(index) for index, tensor in recording.fixed.items()}
    found = []
    for parameter, gradient in zip(parameters, recording.wanted, strict=True):
        product, weight = makers.get(gradient) if gradient else None, places.get(id(parameter))
        if gradient is None or product is None or weight is None or readers[gradient]:
            continue
        # The gradient is Dᵀ·H, with H what the layer was given and D the gradient of what it returned.
        turned, inputs = product.arguments if product.target is aten.mm.default else (None, None)
        turn = makers.get(turned) if turned else None
        if turn is None or turn.target is not aten.t.default:
            continue
        uses = _uses(readers, weight, inputs, turn.values[0])
        if uses is None:
            continue
        forward, backward = uses
        found.append(
            Linear(
                weight=parameter,
                forward=forward,
                backward=backward,
                gradient=product,
                inputs=inputs,
                gradients=turn.values[0],
                bias=forward.arguments[0] if forward.target is aten.addmm.default else None,
                rows=recording.tensors[inputs.index].shape[0],
            )
        )
    return found


def _uses(
    readers: Mapping[Value, list[Operation]], weight: Value, inputs: Value, gradients: Value
) -> tuple[Operation, Operation | None] | None:
    """Return H·Wᵀ, with a bias or without, and D·W if it is there; None if the weights are used for anything else."""
    turns = [each for each in readers[weight] if each.target is aten.t.default]
    others = [each for each in readers[weight] if each not in turns]
    forwards = readers[only_result(turns[0])] if len(turns) == 1 else []
    if len(forwards) != 1 or not _is_product(forwards[0], inputs, only_result(turns[0])):
        return None
    if not others:
        return forwards[0], None
    backward = others[0]
    alone = len(others) == 1 and backward.target is aten.mm.default and _is_product(backward, gradients, weight)
    return (forwards[0], backward) if alone else None


def _is_product(operation: Operation, left: Value, right: Value) -> bool:
    return (
        operation.target in (aten.mm.default, aten.addmm.default)
        and operation.arguments[-2:] == (left, right)
        and not operation.keywords
    )


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """A recording that moves its parameters, and the layers in it whose steps wait."""

    recording: Recording
    deferred: list[DeferredLinear]


def with_steps(recording: Recording, parameters: Sequence[Tensor], *, rate: float) -> Stepped:
    """Return the recording with the steps of plain SGD at its end."""
    layers = linear_layers(recording, parameters)
    replaced: dict[Operation, Operation | None] = {}
    steps: list[Operation] = []
    deferred = []
    for layer in layers:
        replaced[layer.gradient] = None
        if not layer.together:
            turned = layer.gradient.arguments[0]
            steps.append(_call(layer.weight.detach().addmm_, turned, layer.inputs, alpha=-rate))
            continue
        linear = DeferredLinear(layer.weight.detach(), rate=rate, rows=layer.together * layer.rows)
        deferred.append(linear)
        replaced[layer.forward] = replace(
            layer.forward, target=linear.forward, arguments=(layer.inputs, layer.bias), keywords=()
        )
        if layer.backward is not None:
            replaced[layer.backward] = replace(layer.backward, target=linear.backward, arguments=(layer.gradients,))
        steps.append(_call(linear.step, layer.gradients, layer.inputs))
    own = {id(layer.weight) for layer in layers}
    rest = [
        (parameter.detach(), gradient)
        for parameter, gradient in zip(parameters, recording.wanted, strict=True)
        if gradient is not None and id(parameter) not in own
    ]
    if rest:
        moved = _Together([parameter for parameter, _ in rest], rate)
        steps.append(_call(moved, tuple(gradient for _, gradient in rest)))
    operations = [replaced.get(each, each) for each in recording.operations]
    whole = [*(each for each in operations if each is not None), *steps]
    return Stepped(recording=replace(recording, operations=whole), deferred=deferred)


class _Together:
    """Moves parameters by their gradients in one call."""

    def __init__(self, parameters: list[Tensor], rate: float) -> None:
        self._parameters, self._rate = parameters, rate

    def __call__(self, gradients: list[Tensor]) -> None:
        torch._foreach_add_(self._parameters, gradients, alpha=-self._rate)


def _call(target: Callable[..., Any], *arguments: Any, **keywords: Any) -> Operation:
    return Operation(target, arguments, tuple(keywords.items()), (), alone=True)
