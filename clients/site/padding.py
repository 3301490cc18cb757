"""A site's records as the number that its owner declared: what is missing or unusable is a record of no contribution.

A rate of sampling, a number of steps or a weight that followed the true number would tell it, and a failure that one
bad row causes would tell of that row. So rows are tried before a site joins, and all that is public follows the
declared number. A pad is a record of zeros with the target PAD, whose loss is zero whatever the model puts out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...core.errors import InputError, Refusal
from ...tasks.task import Examples, SiteData, Task

if TYPE_CHECKING:
    import torchmetrics

PAD = -1
_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Padded:
    """A task whose pads lose nothing."""

    task: Task

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.task.classes

    def model(self) -> nn.Module:
        """Return the task's new model."""
        return self.task.model()

    def partitions(self, source: Path | None) -> Mapping[str, SiteData]:
        """Return the task's virtual clients."""
        return self.task.partitions(source)

    def site(self, path: Path) -> SiteData:
        """Return the records of one real client, unpadded."""
        return self.task.site(path)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each example, [n]; a pad's is zero, and so is its gradient."""
        real = targets != PAD
        losses = self.task.loss(outputs, torch.where(real, targets, 0))
        return torch.where(real, losses, 0.0)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return the probability of each class, [n, classes]."""
        return self.task.probabilities(outputs)

    def metrics(self) -> dict[str, torchmetrics.Metric]:
        """Return the task's metrics."""
        return self.task.metrics()


@dataclass(frozen=True, kw_only=True)
class PaddedData:
    """What is trained on, `records` of them with pads, and what is tested on; `unusable` is for the owner's eyes."""

    data: SiteData
    unusable: int
    missing: int


def padded(task: Task, module: nn.Module, data: SiteData, *, records: int, place: str) -> PaddedData:
    """Return a site's data with exactly `records` training records, tried out one by one on a module on the CPU.

    A bad record keeps its place, so that it moves no other. Errors: Refusal `data-undeclared` if there are more,
    InputError if none can be used or the model takes no record of zeros. `place` is where the number was declared.
    """
    train, test = data.train, data.test
    if len(train) > records:
        raise Refusal(
            "data-undeclared",
            f"records = {records}: the data set holds {len(train)} training records; declare at least as many{place}",
        )
    module.eval()
    fits = _trial(task, module)
    good, good_test = _usable(train, fits), _usable(test, fits)
    if not good.any():
        raise InputError("data-empty", f"none of the {len(train)} training records can be used by the task's model")
    blank = torch.zeros_like(train.inputs[:1])
    if not _usable(Examples(blank, torch.zeros(1, dtype=torch.int64)), fits).all():
        raise InputError(
            "plugin-invalid", "task.model: cannot take a record of zeros, which stands for a record without any content"
        )
    inputs = torch.cat([train.inputs, blank.expand(records - len(train), *blank.shape[1:])])
    targets = torch.cat([train.targets, torch.full((records - len(train),), PAD)])
    bad = torch.cat([~good, torch.zeros(records - len(train), dtype=torch.bool)])
    inputs[bad] = blank
    targets[bad] = PAD
    return PaddedData(
        data=SiteData(train=Examples(inputs, targets), test=test.select(good_test)),
        unusable=int((~good).sum() + (~good_test).sum()),
        missing=records - len(train),
    )


def _trial(task: Task, module: nn.Module) -> Callable[[Examples], Tensor]:
    def fits(examples: Examples) -> Tensor:
        """Return which of some records the model can take, [n]; raises what the model raises."""
        outputs = module(examples.inputs)
        losses = task.loss(outputs, examples.targets)
        task.probabilities(outputs)
        if losses.shape != examples.targets.shape:
            raise ValueError(f"a loss of shape {list(losses.shape)} for {len(examples)} records")
        flat = examples.inputs.reshape(len(examples), -1)
        known = (examples.targets >= 0) & (examples.targets < len(task.classes))
        return torch.isfinite(losses) & torch.isfinite(flat).all(dim=1) & known

    return fits


@torch.no_grad()
def _usable(examples: Examples, fits: Callable[[Examples], Tensor]) -> Tensor:
    def of(indices: Tensor) -> Tensor:
        try:
            return fits(examples.select(indices))
        except Exception:  # whatever the model raises for a record that it cannot take
            if len(indices) == 1:
                return torch.zeros(1, dtype=torch.bool)
            half = len(indices) // 2
            return torch.cat([of(indices[:half]), of(indices[half:])])

    found = [of(indices) for indices in torch.arange(len(examples)).split(_CHUNK) if len(indices)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.bool)
