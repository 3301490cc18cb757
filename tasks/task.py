"""What a task is: a model, the records of each client, a loss for each example, and metrics.

A record's tensors and its split depend on that record and on published constants alone. Were a mean, a
vocabulary or a shuffled split taken from the data, one record would move the others, and no clipping bounds that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..core.keys import Key

if TYPE_CHECKING:
    import torchmetrics


@dataclass(frozen=True)
class Examples:
    """Records as tensors: `inputs` [n, ...] and `targets` [n] (int64, the index of the class)."""

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if self.targets.dtype != torch.int64 or self.targets.ndim != 1:
            raise ValueError(f"targets must be int64 of shape [n], not {self.targets.dtype} {list(self.targets.shape)}")
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs for {len(self.targets)} targets")

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, indices: Sequence[int] | Tensor) -> Self:
        """Return a copy of the records at `indices` (integers, or one boolean for each record)."""
        index = indices if isinstance(indices, Tensor) else torch.tensor(list(indices), dtype=torch.int64)
        return type(self)(self.inputs[index], self.targets[index])


@dataclass(frozen=True)
class SiteData:
    """One client's records: `train` for training only, `test` for evaluation only."""

    train: Examples
    test: Examples

    @classmethod
    def split(cls, examples: Examples, record_ids: Sequence[str], *, fold: int = 0, folds: int = 5) -> Self:
        """Return `examples` split by `is_test` of each record's id."""
        test = torch.tensor([is_test(record, fold=fold, folds=folds) for record in record_ids], dtype=torch.bool)
        if len(test) != len(examples):
            raise ValueError(f"{len(test)} ids for {len(examples)} records")
        return cls(train=examples.select(~test), test=examples.select(test))


@runtime_checkable
class Task(Protocol):
    """What is learned. `tasks.classification.Classification` gives the last three methods."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, at least two; of two, the second is the positive one."""
        ...

    def model(self) -> nn.Module:
        """Return a new model; its initial weights are drawn from torch's global generator (see `initial_model`)."""
        ...

    def partitions(self, source: Path | None) -> Mapping[str, SiteData]:
        """Return the natural clients of a simulation, by name, in order; `source` is `task.data`.

        For very many clients a `tasks.pool.Pool` takes far less memory than a dict.
        """
        ...

    def site(self, path: Path) -> SiteData:
        """Return the records of one real client, from the file that its owner names."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example, [n], never their mean."""
        ...

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return the probability of each class, [n, classes]; rows sum to one."""
        ...

    def metrics(self) -> dict[str, torchmetrics.Metric]:
        """Return new metrics by name, each updated with (probabilities, targets)."""
        ...


def is_test(record_id: str, *, fold: int = 0, folds: int = 5) -> bool:
    """Return whether a record is a test record: SHA-256 of its id, modulo `folds`, equals `fold`.

    A fixed, published function of the record alone: a fifth of the records with the default, and each record in
    exactly one of the folds 0 to folds - 1.
    """
    return int.from_bytes(hashlib.sha256(f"bract split {record_id}".encode()).digest()[:8], "big") % folds == fold


def check_folds(fold: int, folds: int) -> None:
    """Raise InputError unless 0 <= fold < folds and folds >= 2: the keys `task.fold` and `task.folds`."""
    if type(folds) is not int or folds < 2:
        raise InputError("experiment-value", f"task.folds = {folds!r}: must be a whole number of at least 2")
    if type(fold) is not int or not 0 <= fold < folds:
        raise InputError("experiment-value", f"task.fold = {fold!r}: must be a whole number from 0 to {folds - 1}")


def initial_model(make: Callable[[], Any], seed: int) -> Any:
    """Return what `make` returns, its initial weights drawn from a public seed.

    torch's global generator, which modules draw from, is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Key.from_seed(seed).child("initial model").integer())
        return make()
