"""What becomes of a recorded step before it is repeated: less is done, and rounding apart it comes to the same.

Each function takes a recording and returns another. Names of tensors that share memory become one, constants are kept,
what nobody asks for goes, activations are overwritten where nobody reads them again, and linear layers' steps are
taken in one product, or put off (`deferred.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .deferred import DeferredLinear, steps_together
from .recording import Operation, Recording, Value

aten: Any = torch.ops.aten

_FILLED = (aten.ones_like.default, aten.zeros_like.default)
_FOLDED = (aten.expand.default, aten.div.Scalar, aten.mul.Scalar, aten.view.default)
# What returns a tensor of its own, which the next operation may overwrite.
_FRESH = (
    aten.addmm.default,
    aten.mm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.max_pool2d_with_indices_backward.default,
)


def without_aliases(recording: Recording) -> Recording:
    """Return the recording without detached copies, and with each transpose once; that of a transpose is its source."""
    names: dict[Value, Value] = {}
    sources: dict[Value, Value] = {}
    transposes: dict[Value, Value] = {}
    kept = []
    for each in recording.operations:
        operation = renamed(each, names)
        if operation.target is aten.detach.default:
            names[_only(operation)] = operation.values[0]
        elif operation.target is aten.t.default:
            source, result = operation.values[0], _only(operation)
            if source in sources or source in transposes:
                names[result] = sources.get(source) or transposes[source]
            else:
                sources[result], transposes[source] = source, result
                kept.append(operation)
        else:
            kept.append(operation)
    return replace(recording, operations=kept, gradients=[_named(each, names) for each in recording.gradients])


def with_constants(recording: Recording) -> Recording:
    """Return the recording with what follows from shapes alone as tensors that were there before."""
    fixed, changed = dict(recording.fixed), {v for each in recording.operations if each.changes for v in each.values}
    constants: set[Value] = set()
    kept = []
    for each in recording.operations:
        constant = each.target in _FILLED or (each.target in _FOLDED and set(each.values) <= constants)
        if constant and not changed & {*each.values, *each.results}:
            constants.add(_only(each))
            fixed[_only(each).index] = recording.tensors[_only(each).index].detach()
        else:
            kept.append(each)
    return replace(recording, operations=kept, fixed=fixed)


def without_the_unused(recording: Recording) -> Recording:
    """Return the recording without what no gradient, no change and no draw of random numbers needs."""
    wanted = {value for value in recording.gradients if value is not None}
    kept: list[Operation] = []
    for each in reversed(recording.operations):
        if not each.results or each.changes or each.is_random or wanted & set(each.results):
            wanted |= set(each.values)
            kept.append(each)
    return replace(recording, operations=kept[::-1])


def overwriting(recording: Recording) -> Recording:
    """Return the recording with ReLU and its gradient in the memory of what they are of, where nobody else reads it."""
    readers = readers_of(recording)
    makers = {value: each for each in recording.operations for value in each.results if value is not None}
    names: dict[Value, Value] = {}
    kept = []
    for each in recording.operations:
        first = each.values[0] if each.values else None
        mine = first is not None and len(readers[first]) == 1 and first in makers and _is_fresh(makers[first])
        operation = renamed(each, names)
        if mine and first is not None and each.target in (aten.relu.default, aten.threshold_backward.default):
            names[_only(each)] = place = names.get(first, first)
            if each.target is aten.relu.default:
                operation = replace(operation, target=aten.relu_.default, results=(place,))
            else:
                keywords = (("grad_input", place),)
                operation = replace(
                    operation, target=aten.threshold_backward.grad_input, keywords=keywords, results=(place,)
                )
        kept.append(operation)
    return replace(recording, operations=kept, gradients=[_named(each, names) for each in recording.gradients])


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
    """Return the layers whose weights a step uses once forward and once back, and in nothing else."""
    readers = readers_of(recording)
    makers = {value: each for each in recording.operations for value in each.results if value is not None}
    places = {id(tensor): Value(index) for index, tensor in recording.fixed.items()}
    found = []
    for parameter, gradient in zip(parameters, recording.gradients, strict=True):
        weight = places.get(id(parameter))
        if weight is None or gradient is None or parameter.dim() != 2 or readers[gradient] or gradient not in makers:
            continue
        product = makers[gradient]
        if product.target is not aten.mm.default or product.keywords:
            continue
        left, inputs = product.arguments
        turned = makers.get(left)
        transposed = [each for each in readers[weight] if each.target is aten.t.default]
        if turned is None or turned.target is not aten.t.default or len(transposed) != 1:
            continue
        gradients = turned.values[0]
        forwards, others = readers[_only(transposed[0])], [each for each in readers[weight] if each not in transposed]
        backwards = [each for each in others if _is(each, aten.mm.default, gradients, weight)]
        if len(forwards) != 1 or backwards != others or len(backwards) > 1:
            continue
        forward = forwards[0]
        bias = forward.arguments[0] if forward.target is aten.addmm.default else None
        expected = (inputs, _only(transposed[0])) if bias is None else (bias, inputs, _only(transposed[0]))
        if not _is(forward, aten.mm.default if bias is None else aten.addmm.default, *expected):
            continue
        found.append(
            Linear(
                weight=parameter,
                forward=forward,
                backward=backwards[0] if backwards else None,
                gradient=product,
                inputs=inputs,
                gradients=gradients,
                bias=bias,
                rows=recording.tensors[inputs.index].shape[0],
            )
        )
    return found


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
        for parameter, gradient in zip(parameters, recording.gradients, strict=True)
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


def readers_of(recording: Recording) -> Mapping[Value, list[Operation]]:
    """Return the operations that read each tensor."""
    found: defaultdict[Value, list[Operation]] = defaultdict(list)
    for each in recording.operations:
        for value in set(each.values):
            found[value].append(each)
    return found


def renamed(operation: Operation, names: Mapping[Value, Value]) -> Operation:
    """Return an operation whose tensors go by other names."""

    def of(value: Any) -> Any:
        if isinstance(value, Value):
            return names.get(value, value)
        return tuple(of(each) for each in value) if isinstance(value, tuple) else value

    return replace(
        operation,
        arguments=of(operation.arguments),
        keywords=tuple((name, of(value)) for name, value in operation.keywords),
        results=of(operation.results),
    )


def _is_fresh(operation: Operation) -> bool:
    return operation.target in _FRESH or isinstance(getattr(operation.target, "__self__", None), DeferredLinear)


def _call(target: Callable[..., Any], *arguments: Any, **keywords: Any) -> Operation:
    return Operation(target, arguments, tuple(keywords.items()), (), alone=True)


def _is(operation: Operation, target: Any, *arguments: Any) -> bool:
    return operation.target is target and operation.arguments == arguments and not operation.keywords


def _only(operation: Operation) -> Value:
    result = operation.results[0]
    assert result is not None
    return result


def _named(value: Value | None, names: Mapping[Value, Value]) -> Value | None:
    return None if value is None else names.get(value, value)
