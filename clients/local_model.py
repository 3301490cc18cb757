"""The resident model of a process: which tensors travel, which stay, and how a client's state is put into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..core.errors import InputError
from ..core.parameters import Arrays, Layout
from ..strategies.tensors import arrays_like, flat
from ..tasks.task import Task, initial_model
from .training import LocalTraining

if TYPE_CHECKING:
    from ..privacy.dpsgd.noised_sum import NoisedSum
    from .kernels.private_stack import PrivateStack
    from .kernels.program import Program
    from .kernels.recorded_passes import RecordedPass
    from .kernels.stacked import Stack


class LocalModel:
    """A module whose tensors are shared, personal, or at rest (frozen parameters, buffers that do not travel).

    One module serves all virtual clients of a process: `load` makes it one client's. Buffers that match
    `training.personal` stay with the client too, unless `keep_buffers` is False: under privacy no mechanism covers
    what they would carry into its metrics.
    """

    def __init__(
        self,
        module: nn.Module,
        training: LocalTraining,
        *,
        device: torch.device | None = None,
        keep_buffers: bool = True,
    ) -> None:
        _refuse_unused_patterns(module, training)
        for name, parameter in module.named_parameters():
            if _matches(name, training.frozen):
                parameter.requires_grad_(False)
        self.module = module.to(device or torch.device("cpu"))
        self.device = device or torch.device("cpu")
        parameters = dict(self.module.named_parameters())
        trainable = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
        buffers = dict(self.module.named_buffers())
        travelling = dict(_travelling_buffers(self.module, training))
        self.personal: dict[str, Tensor] = {
            name: tensor
            for name, tensor in {**trainable, **(buffers if keep_buffers else {})}.items()
            if _matches(name, training.personal)
        }
        self.shared: dict[str, Tensor] = {
            name: tensor for name, tensor in {**trainable, **travelling}.items() if name not in self.personal
        }
        if not any(isinstance(tensor, nn.Parameter) for tensor in self.shared.values()):
            raise InputError("experiment-conflict", "train.personal and train.frozen leave no parameter to share")
        at_rest = {name: buffer for name, buffer in buffers.items() if name not in travelling}
        # What a client changes and does not send is put back before the next client trains.
        self._initial = {name: tensor.detach().clone() for name, tensor in {**at_rest, **self.personal}.items()}
        self.layout = Layout.of(self.shared_arrays())
        # Found out at the first training: whether the module takes images channels-last.
        self.channels_last: bool | None = None
        # Found out at the first private training: whether book-keeping gives the module's clipped sums.
        self.bookkeeping: bool | None = None
        # Made by the traced kernel at the first training with batches of a form; None where there cannot be one.
        self.programs: dict[tuple[object, ...], Program | None] = {}
        # Likewise by book-keeping, with the memory that its sums are written into.
        self.passes: dict[tuple[object, ...], RecordedPass | None] = {}
        self.passes_seen: dict[tuple[object, ...], int] = {}
        self.noised_sum: NoisedSum | None = None
        # Likewise by the stacked kernel.
        self.stacks: dict[tuple[object, ...], Stack | None] = {}
        self.private_stacks: dict[tuple[object, ...], PrivateStack | None] = {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained: shared and personal ones."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @property
    def trained(self) -> dict[str, Tensor]:
        """What travels and is trained: the shared tensors without buffers."""
        return {name: tensor for name, tensor in self.shared.items() if isinstance(tensor, nn.Parameter)}

    def load(self, shared: Arrays, personal: Arrays | None = None) -> None:
        """Make the module a client's: shared tensors as sent, personal ones as it kept them, all else initial."""
        tensors = dict(self.module.named_buffers()) | self.personal
        with torch.no_grad():
            for name, initial in self._initial.items():
                tensors[name].copy_(initial)
            _copy(self.shared, shared)
            if personal:
                _copy(self.personal, personal)

    def shared_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return copies of the tensors that travel."""
        return arrays_like(self.shared)

    def shared_pieces(self) -> list[NDArray[np.generic]]:
        """Return the tensors that travel as flat arrays in the layout's order: on the processor, the live ones."""
        return [flat(self.shared[name]) for name in self.layout.names]

    def beside(self, arrays: Arrays) -> dict[str, NDArray[np.generic]]:
        """Return arrays laid out like what travels: those given, zeros for the rest."""
        rest = {name: np.zeros_like(array) for name, array in self.shared_arrays().items() if name not in arrays}
        return {**rest, **arrays}

    def personal_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return copies of the tensors that stay with the client."""
        return arrays_like(self.personal)


def _copy(tensors: Mapping[str, Tensor], arrays: Arrays) -> None:
    for name, tensor in tensors.items():
        if tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16:
            # Arrays from a message are read-only, of which torch would warn.
            np.copyto(tensor.detach().numpy(), arrays[name])
        else:
            tensor.copy_(torch.from_numpy(np.array(arrays[name])))


def _travelling_buffers(module: nn.Module, training: LocalTraining) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in module.named_buffers():
        if training.buffers is None:
            if buffer.is_floating_point():
                yield name, buffer
        elif _matches(name, training.buffers):
            yield name, buffer


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_unused_patterns(module: nn.Module, training: LocalTraining) -> None:
    parameters = [name for name, _ in module.named_parameters()]
    buffers = [name for name, _ in module.named_buffers()]
    for key, patterns, names in (
        ("personal", training.personal, parameters + buffers),
        ("frozen", training.frozen, parameters),
        ("buffers", training.buffers or (), buffers),
    ):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InputError(
                    "experiment-value",
                    f'train.{key} = "{pattern}": matches no tensor; the model has {", ".join(names[:8]) or "none"}',
                )


def build_module(task: Task, *, seed: int, private: bool) -> tuple[nn.Module, list[str]]:
    """Return a task's module with the public seed's initial weights, and what was changed to make it private."""
    module: nn.Module = initial_model(task.model, seed)
    if not private:
        return module, []
    # Opacus takes seconds to import.
    from ..privacy.dpsgd.layers import make_private

    return make_private(module)
