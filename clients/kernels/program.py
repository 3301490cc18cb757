"""Recordings, rewritten, as Python that repeats them without autograd: a step of plain SGD, or any call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .recording import NotRecordable, Operation, Recording, Value, record_call
from .rewriting import overwriting, with_constants, without_aliases, without_the_unused
from .stepping import with_steps

aten: Any = torch.ops.aten

# Calls of an operation by its full name are several times slower than torch's own functions.
_QUICK: dict[Any, Callable[..., Any]] = {
    aten.addmm.default: torch.addmm,
    aten.mm.default: torch.mm,
    aten.t.default: torch.t,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
    aten._log_softmax.default: torch._log_softmax,
    aten.sum.dim_IntList: torch.sum,
    aten.view.default: Tensor.view,
}


class Program:
    """A step on batches of one size: `begin`, then `step` for each, then `settle`.

    It moves the parameters that it was recorded with, by the learning rate `rate`. `source` is the step as Python;
    `draws` says whether it takes random numbers from torch's generators.
    """

    def __init__(self, recording: Recording, parameters: Sequence[Tensor], *, rate: float) -> None:
        lean = without_the_unused(with_constants(without_aliases(recording)))
        stepped = with_steps(lean, parameters, rate=rate)
        self._deferred = stepped.deferred
        self.draws = any(each.is_random for each in stepped.recording.operations)
        self.source, scope = _written(overwriting(without_the_unused(stepped.recording)))
        exec(compile(self.source, "<recorded step>", "exec"), scope)
        self.step: Callable[[Tensor, Tensor], None] = scope["step"]

    def begin(self) -> None:
        """Begin with the parameters as they are."""
        for linear in self._deferred:
            linear.begin()

    def settle(self) -> None:
        """Put the steps that waited into the parameters."""
        for linear in self._deferred:
            linear.settle()


class RecordedCall:
    """A recorded call on batches of one size: `call(inputs, targets)` returns the one tensor that was wanted.

    `source` and `draws` are as a program's.
    """

    def __init__(self, recording: Recording) -> None:
        lean = overwriting(without_the_unused(with_constants(without_aliases(recording))))
        self.draws = any(each.is_random for each in lean.operations)
        (wanted,) = lean.wanted
        self.source, scope = _written(lean, wanted)
        exec(compile(self.source, "<recorded call>", "exec"), scope)
        self.call: Callable[[Tensor, Tensor], Tensor] = scope["step"]


def recorded_call(
    call: Callable[[Tensor, Tensor], Sequence[Tensor | None]], module: nn.Module, inputs: Tensor, targets: Tensor
) -> RecordedCall:
    """Return a call of a module that returns one tensor, recorded.

    Raises NotRecordable if what it does follows from a batch's numbers, or from random ones, or whatever it raises.
    """
    recording = record_call(call, module, inputs, targets)
    if not recording.same_steps(record_call(call, module, torch.zeros_like(inputs), targets)):
        raise NotRecordable("the model does other things for other numbers")
    recorded = RecordedCall(recording)
    if recorded.draws:
        raise NotRecordable("the model draws random numbers")
    return recorded


def _written(recording: Recording, result: Value | None = None) -> tuple[str, dict[str, Any]]:
    """Return the step as a Python function of the batch that returns a result, and what it refers to by name."""
    scope: dict[str, Any] = {_name(Value(place)): tensor.detach() for place, tensor in recording.fixed.items()}
    last = {value: each for each in recording.operations for value in (*each.values, *each.results) if value}
    lasting = {recording.inputs, recording.targets, result, *(Value(place) for place in recording.fixed)}
    lines = []
    for number, each in enumerate(recording.operations):
        scope[f"f{number}"] = _QUICK.get(each.target, each.target) if _is_torch(each) else each.target
        lines.append(_line(number, each, scope))
        # What is freed early is used again while it is still in the processor's cache.
        done = sorted({value.index for value in last if last[value] is each and value not in lasting})
        lines.extend(f"del {_name(Value(index))}" for index in done)
    if result is not None:
        lines.append(f"return {_name(result)}")
    head = f"def step({_name(recording.inputs)}, {_name(recording.targets)}):"
    return "\n".join([head, *(f"    {line}" for line in lines or ["pass"]), ""]), scope


def _is_torch(operation: Operation) -> bool:
    return isinstance(operation.target, torch._ops.OpOverload)


def _line(number: int, operation: Operation, scope: dict[str, Any]) -> str:
    arguments = [_written_argument(each, scope) for each in operation.arguments]
    arguments += [f"{name}={_written_argument(value, scope)}" for name, value in operation.keywords]
    call = f"f{number}({', '.join(arguments)})"
    if not operation.results:
        return call
    # What was there before the step is only ever changed in place: its name stays bound outside the function.
    names = ["_" if value is None or _name(value) in scope else _name(value) for value in operation.results]
    return f"{names[0]} = {call}" if operation.alone else f"{', '.join(names)}, = {call}"


def _written_argument(value: Any, scope: dict[str, Any]) -> str:
    if isinstance(value, Value):
        return _name(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_written_argument(each, scope) for each in value)}]"
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    # A number that is not finite, a type, a device: by name.
    for name, known in scope.items():
        if known is value:
            return name
    name = f"c{len(scope)}"
    scope[name] = value
    return name


def _name(value: Value) -> str:
    return f"v{value.index}"
