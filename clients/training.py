"""LocalTraining: the declarative description of what one client does in one round; kernels execute it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from ..core.errors import InputError
from .sgd import SGD

if TYPE_CHECKING:
    from ..experiment import TrainTable


Kernel = Literal["sequential", "traced", "stacked"]


class Optimizer(Protocol):
    """What a kernel asks of an optimizer."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def step(self) -> object:
        """Move every parameter that has a gradient."""


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """One client's round: epochs over its records, the optimizer's step, and which tensors it concerns.

    Patterns are shell patterns over tensor names (`head.*`). `buffers` None means every floating-point buffer
    travels, as without privacy it must for batch normalization; under privacy none may. `precision` is that of the
    model's products in plain training (torch's autocast); parameters, losses and steps are float32 all the same.
    `kernel` is what executes it.
    """

    epochs: int = 1
    batch_size: int = 32
    optimizer: Literal["sgd", "adam", "adagrad"] = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.0
    l2: float = 0.0
    personal: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    buffers: tuple[str, ...] | None = None
    dp_engine: Literal["auto", "bookkeeping", "opacus"] = "auto"
    precision: Literal["float32", "bf16"] = "float32"
    kernel: Kernel = "sequential"

    @classmethod
    def of(cls, table: TrainTable, *, private: bool) -> LocalTraining:
        """Return the description that [train] gives; `private` when no buffer may leave."""
        return cls(
            epochs=table.epochs,
            batch_size=table.batch_size,
            optimizer=table.optimizer,
            learning_rate=table.learning_rate,
            momentum=table.momentum,
            l2=table.l2,
            personal=table.personal,
            frozen=table.frozen,
            buffers=() if private else table.buffers,
            dp_engine=table.dp_engine,
        )

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return a new optimizer, the quickest that takes torch's steps bit for bit."""
        if self.optimizer != "sgd":
            return self.make_torch_optimizer(parameters)
        return SGD(list(parameters), learning_rate=self.learning_rate, momentum=self.momentum, l2=self.l2)

    def make_torch_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return a new optimizer of torch's, which Opacus can wrap.

        Its L2 term is added to the gradient in the step, after any clipping and noise.
        """
        parameters = list(parameters)
        match self.optimizer:
            case "adam":
                return torch.optim.Adam(parameters, lr=self.learning_rate, weight_decay=self.l2)
            case "adagrad":
                return torch.optim.Adagrad(parameters, lr=self.learning_rate, weight_decay=self.l2)
            case _:
                return torch.optim.SGD(parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.l2)


def choose_device(name: str) -> torch.device:
    """Return the device of `train.device`: "auto" is CUDA where there is one. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # cuBLAS is deterministic only with a fixed workspace, which it reads when CUDA is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError, by device
        raise InputError("device-missing", f'train.device = "{name}": there is no such device here') from error
    return device


@contextmanager
def reproducible(*, threads: int | None = 1) -> Iterator[None]:
    """Make training a function of its input: deterministic algorithms and so many threads; put both back afterwards.

    With one thread it is the same function on every machine of a kind; None leaves torch its number, which is quicker
    for large models, and the same bytes wherever that number is the same.
    """
    before, deterministic = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.set_num_threads(threads or before)
    # torch.use_deterministic_algorithms does the same, and imports torch's compiler, which takes seconds.
    torch.set_deterministic_debug_mode("warn")
    # Else torch writes NaN into each new tensor before its first use, which takes a sixth of a small model's time.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = fill
        torch.set_num_threads(before)
        torch.set_deterministic_debug_mode(deterministic)
