"""A recording of one training step: the operations beneath autograd, in their order, with their numbers left open.

Autograd's own work (its graph, its checks, a thread's hand-over) takes longer than a small model's arithmetic, and
does the same at each step. What a step does is a function of its tensors' shapes alone, unless the model looks at
numbers: such a model is not recorded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What hands a tensor's numbers to Python, past every operation.
_LOOKS = frozenset(("tolist", "numpy", "item", "data_ptr", "untyped_storage", "__array__", "__dlpack__"))
_OPEN = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
# Operations that read a tensor's numbers and keep them as plain ones.
_READERS = ("aten::_pack_padded_sequence", "aten::_local_scalar_dense", "aten::is_nonzero")


class NotRecordable(Exception):
    """The step follows from numbers, or from more than its tensors."""


@dataclass(frozen=True)
class Value:
    """The place of a tensor in a recording."""

    index: int


@dataclass(frozen=True)
class Operation:
    """One operation: tensors among its arguments and results are `Value`s."""

    target: Any
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    results: tuple[Value | None, ...]
    alone: bool
    """Whether the result is one tensor and no tuple."""

    @property
    def values(self) -> list[Value]:
        """The tensors among the arguments."""
        return list(_values((self.arguments, tuple(self.keywords))))

    @property
    def is_random(self) -> bool:
        """Whether it draws from a generator."""
        return torch.Tag.nondeterministic_seeded in getattr(self.target, "tags", ())

    @property
    def changes(self) -> bool:
        """Whether it writes into an argument."""
        return isinstance(self.target, torch._ops.OpOverload) and bool(self.target._schema.is_mutable)


@dataclass(kw_only=True)
class Recording:
    """A step's operations on `inputs` and `targets`; `fixed` tensors were there before, such as parameters.

    `wanted` holds the place of what is asked for, such as each parameter's gradient, None for one that has none;
    `tensors` are all of them as they were, by place.
    """

    inputs: Value
    targets: Value
    fixed: dict[int, Tensor]
    operations: list[Operation] = field(default_factory=list)
    wanted: list[Value | None] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def same_steps(self, other: Recording) -> bool:
        """Return whether both hold the same operations on the same tensors, those that were there before included."""
        return (
            self.operations == other.operations
            and self.wanted == other.wanted
            and self.fixed.keys() == other.fixed.keys()
            and all(
                tensor is other.fixed[index] or _equal(tensor, other.fixed[index])
                for index, tensor in self.fixed.items()
            )
        )


def record(
    step: Callable[[Tensor, Tensor], Tensor],
    module: nn.Module,
    parameters: Sequence[nn.Parameter],
    inputs: Tensor,
    targets: Tensor,
) -> Recording:
    """Return the recording of `step(inputs, targets)`, a scalar, and of its gradients by the parameters, wanted.

    Raises NotRecordable, or whatever the step raises. Buffers that the step moves are put back.
    """

    def gradients(inputs: Tensor, targets: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(step(inputs, targets), parameters, allow_unused=True)

    return record_call(gradients, module, inputs, targets)


def record_call(
    call: Callable[[Tensor, Tensor], Sequence[Tensor | None]], module: nn.Module, inputs: Tensor, targets: Tensor
) -> Recording:
    """Return the recording of `call(inputs, targets)` and of the tensors that it returns, wanted; raises as `record`.

    What it writes into tensors that were there before, it writes again.
    """
    recorder = _Recorder(inputs, targets)
    with _unchanged(module), _NoLooking(), recorder:
        found = call(inputs, targets)
    return recorder.finished(found)


class _NoLooking(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _LOOKS:
            raise NotRecordable(f"the model calls {func.__name__}")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Tensors are known by their identity, so each is kept until the end.
        self._kept: list[Tensor] = []
        self._places: dict[int, int] = {}
        self._recording = Recording(inputs=self._new(inputs), targets=self._new(targets), fixed={})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's compiler, which would take seconds to import, has nothing to skip here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(tag in func.tags for tag in _OPEN) or func._schema.name in _READERS:
            raise NotRecordable(f"the model follows from numbers, by {func}")
        keywords = kwargs or {}
        if keywords.get("generator") is not None:
            raise NotRecordable("the model draws from a generator of its own")
        arguments = self._placed(args)
        named = tuple((name, self._placed(value)) for name, value in sorted(keywords.items()))
        out = func(*args, **keywords)
        alone = not isinstance(out, tuple | list)
        results = tuple(self._result(each) if isinstance(each, Tensor) else None for each in ((out,) if alone else out))
        self._recording.operations.append(Operation(func, arguments, named, results, alone))
        return out

    def finished(self, wanted: Sequence[Tensor | None]) -> Recording:
        recording = self._recording
        for tensor in wanted:
            if tensor is not None and id(tensor) not in self._places:
                raise NotRecordable("a gradient comes from outside the step")
            recording.wanted.append(None if tensor is None else Value(self._places[id(tensor)]))
        recording.tensors = self._kept
        return recording

    def _new(self, tensor: Tensor) -> Value:
        self._places[id(tensor)] = len(self._kept)
        self._kept.append(tensor)
        return Value(len(self._kept) - 1)

    def _result(self, tensor: Tensor) -> Value:
        # An operation in place returns its argument.
        return Value(self._places[id(tensor)]) if id(tensor) in self._places else self._new(tensor)

    def _placed(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._places:
                place = self._new(value)
                self._recording.fixed[place.index] = value
            return Value(self._places[id(value)])
        if isinstance(value, tuple | list):
            return tuple(self._placed(each) for each in value)
        return value


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Put buffers back; raise NotRecordable if the step drew Python's or numpy's random numbers, or kept something."""
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    drawn, described = (random.getstate(), _numpy_state()), _described(module)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
    if (random.getstate(), _numpy_state()) != drawn:
        raise NotRecordable("the model draws random numbers from Python or numpy")
    if _described(module) != described:
        raise NotRecordable("the model's attributes change from step to step")


def _numpy_state() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    return (state[1].tobytes(), *state[2:])


def _described(module: nn.Module) -> list[dict[str, str]]:
    """Return what the parts of a module keep beside tensors, as far as it prints."""
    kept = ("_parameters", "_buffers", "_modules")
    return [
        {
            name: f"{type(value).__name__} {id(value)}" if isinstance(value, Tensor) else repr(value)
            for name, value in vars(part).items()
            if name not in kept and not name.endswith("_hooks")
        }
        for part in module.modules()
    ]


def _values(value: Any) -> Iterator[Value]:
    if isinstance(value, Value):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from _values(each)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
