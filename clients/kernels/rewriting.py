"""What becomes of a recorded step before it is repeated: less is done, and it comes to the same.

Each function takes a recording and returns another. Names of tensors that share memory become one, constants are kept,
what nobody asks for goes, and activations are overwritten where nobody reads them again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from .deferred import DeferredLinear
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
            names[only_result(operation)] = operation.values[0]
        elif operation.target is aten.t.default:
            source, result = operation.values[0], only_result(operation)
            if source in sources or source in transposes:
                names[result] = sources.get(source) or transposes[source]
            else:
                sources[result], transposes[source] = source, result
                kept.append(operation)
        else:
            kept.append(operation)
    return replace(recording, operations=kept, wanted=[_named(each, names) for each in recording.wanted])


def with_constants(recording: Recording) -> Recording:
    """Return the recording with what follows from shapes alone as tensors that were there before."""
    fixed, changed = dict(recording.fixed), {v for each in recording.operations if each.changes for v in each.values}
    constants: set[Value] = set()
    kept = []
    for each in recording.operations:
        constant = each.target in _FILLED or (each.target in _FOLDED and set(each.values) <= constants)
        if constant and not changed & {*each.values, *each.results}:
            constants.add(only_result(each))
            fixed[only_result(each).index] = recording.tensors[only_result(each).index].detach()
        else:
            kept.append(each)
    return replace(recording, operations=kept, fixed=fixed)


def without_the_unused(recording: Recording) -> Recording:
    """Return the recording without what no gradient, no change and no draw of random numbers needs."""
    wanted = {value for value in recording.wanted if value is not None}
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
            names[only_result(each)] = place = names.get(first, first)
            if each.target is aten.relu.default:
                operation = replace(operation, target=aten.relu_.default, results=(place,))
            else:
                keywords = (("grad_input", place),)
                operation = replace(
                    operation, target=aten.threshold_backward.grad_input, keywords=keywords, results=(place,)
                )
        kept.append(operation)
    return replace(recording, operations=kept, wanted=[_named(each, names) for each in recording.wanted])


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


def only_result(operation: Operation) -> Value:
    """Return the one tensor that an operation makes."""
    result = operation.results[0]
    assert result is not None
    return result


def _named(value: Value | None, names: Mapping[Value, Value]) -> Value | None:
    return None if value is None else names.get(value, value)
