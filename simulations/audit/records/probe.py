"""The probe: sees which records each step of the real kernel draws and what it releases, and can silence records.

It sits in the two places that the kernel leaves to others. The task's loss: a record's target is its number, so that
the loss sees who was drawn. The strategy's session, whose `correct` sees each step's gradient when it is clipped and
noised. A record that is silenced has the gradient zero, and so contributes nothing (the zero-out neighbour).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchmetrics
from flwr.app import Message
from numpy.typing import NDArray
from torch import Tensor, nn

from ....strategies.local_rule import LocalRound, LocalRule, LocalSession, Sent
from ....tasks.task import Examples, SiteData, Task

KEPT = 512
"""Values that are kept of each tensor of a step; of all of them the sum of squares is."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: the records drawn, and of each trained tensor the released gradient: first values, squares, size.

    `whole` holds all values, where they were asked for.
    """

    drawn: NDArray[np.int64]
    values: Mapping[str, NDArray[np.float64]]
    squares: Mapping[str, float]
    sizes: Mapping[str, int]
    whole: NDArray[np.float64] | None = None


@dataclass(kw_only=True)
class Visit:
    """One train message to a site: its steps, and the reply, None if the probe ended it early."""

    site: str
    round: int
    steps: list[Step] = field(default_factory=list)
    message: Message | None = None
    reply: Message | None = None


class Enough(Exception):
    """The probe has seen the steps that it was to see."""


class Probe:
    """A task's loss over records that are known by number; `data` are the sites whose targets are these numbers."""

    def __init__(self, task: Task, data: Mapping[str, SiteData], device: torch.device) -> None:
        self.task = task
        self._first: dict[str, int] = {}
        numbers = 0
        self.data: dict[str, SiteData] = {}
        for name, site in data.items():
            self._first[name] = numbers
            ids = torch.arange(numbers, numbers + len(site.train))
            # Copies: outliers are written into them.
            self.data[name] = replace(site, train=Examples(site.train.inputs.clone(), ids))
            numbers += len(site.train)
        self._targets = torch.cat([site.train.targets for site in data.values()]).to(device)
        self._silent = torch.zeros(numbers, dtype=torch.bool, device=device)
        self._scale = torch.ones(numbers, device=device)
        self._visit = Visit(site="", round=0)
        self._drawn: list[NDArray[np.int64]] = []
        self._limit: int | None = None
        self._whole = False

    def begin(self, visit: Visit, *, limit: int | None = None, whole: bool = False) -> None:
        """Note what comes next under a visit, and end it after `limit` steps."""
        self._visit, self._drawn, self._limit, self._whole = visit, [], limit, whole

    @contextmanager
    def silence(self, site: str | None = None, *, record: int | None = None, but: int | None = None) -> Iterator[None]:
        """Let records contribute nothing for a while: one of a site, all of it (but one), or all of all sites."""
        before = self._silent.clone()
        if site is None:
            self._silent[:] = True
        elif record is not None:
            self._silent[self._first[site] + record] = True
        else:
            first = self._first[site]
            self._silent[first : first + len(self.data[site].train)] = True
            if but is not None:
                self._silent[first + but] = False
        try:
            yield
        finally:
            self._silent.copy_(before)

    @contextmanager
    def scaled(self, site: str, record: int, factor: float) -> Iterator[None]:
        """Multiply a record's loss for a while."""
        place = self._first[site] + record
        self._scale[place] = factor
        try:
            yield
        finally:
            self._scale[place] = 1.0

    @contextmanager
    def changed(self, site: str, record: int, values: Tensor) -> Iterator[None]:
        """Change a record's inputs for a while."""
        inputs = self.inputs(site)
        before = inputs[record].clone()
        inputs[record] = values
        try:
            yield
        finally:
            inputs[record] = before

    def inputs(self, site: str) -> Tensor:
        """Return the inputs [n, ...] of a site, to be written into."""
        return self.data[site].train.inputs

    def watched(self, rule: LocalRule) -> LocalRule:
        """Return a strategy's local rule that lets the probe see each step first."""

        def session(round: LocalRound) -> LocalSession:
            return Seeing(partial(self.end_step, {**round.parameters, **round.personal}), rule.session(round))

        return replace(rule, session=session)

    def loss(self, outputs: Tensor, numbers: Tensor) -> Tensor:
        """Return the task's loss of each record, zero of those that are silenced."""
        first = self._first[self._visit.site]
        self._drawn.append(numbers.cpu().numpy() - first)
        losses = self.task.loss(outputs, self._targets[numbers])
        if losses.shape != numbers.shape:
            return losses
        return torch.where(self._silent[numbers], torch.zeros_like(losses), losses * self._scale[numbers])

    def end_step(self, tensors: Mapping[str, Tensor]) -> None:
        """Note one step's released gradients."""
        gradients = {name: _gradient(tensor) for name, tensor in tensors.items()}
        self._visit.steps.append(
            Step(
                drawn=np.concatenate([np.zeros(0, np.int64), *self._drawn]),
                values={name: values[:KEPT].copy() for name, values in gradients.items()},
                squares={name: float(values @ values) for name, values in gradients.items()},
                sizes={name: values.size for name, values in gradients.items()},
                whole=np.concatenate(list(gradients.values())) if self._whole else None,
            )
        )
        self._drawn = []
        if self._limit is not None and len(self._visit.steps) >= self._limit:
            raise Enough


class ProbedTask:
    """The experiment's task, but for its loss, which is the probe's."""

    def __init__(self, probe: Probe) -> None:
        self._probe, self._task = probe, probe.task
        self.classes = probe.task.classes

    def model(self) -> nn.Module:
        """Return the task's model."""
        return self._task.model()

    def partitions(self, source: Path | None) -> Mapping[str, SiteData]:
        """Return the task's partitions."""
        return self._task.partitions(source)

    def site(self, path: Path) -> SiteData:
        """Return the task's site."""
        return self._task.site(path)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the probe's loss: targets are the numbers of records."""
        return self._probe.loss(outputs, targets)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return the task's probabilities."""
        return self._task.probabilities(outputs)

    def metrics(self) -> dict[str, torchmetrics.Metric]:
        """Return the task's metrics."""
        return self._task.metrics()


class Seeing:
    """A session that calls `see` when a step's gradients are clipped and noised, before another corrects them."""

    def __init__(self, see: Callable[[], None], session: LocalSession | None = None) -> None:
        self._see, self._session = see, session

    def correct(self) -> None:
        """See the gradients, and let them be corrected."""
        self._see()
        if self._session is not None:
            self._session.correct()

    def finish(self) -> Sent:
        """Send what the other session sends."""
        return Sent() if self._session is None else self._session.finish()


def _gradient(tensor: Tensor) -> NDArray[np.float64]:
    if tensor.grad is None:
        return np.zeros(tensor.numel())
    values: NDArray[np.float64] = tensor.grad.detach().cpu().double().view(-1).numpy()
    return values
