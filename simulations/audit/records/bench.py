"""A bench for records: a first step of a site, repeated with the same batch and noise while records change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....core.keys import Key
from .subject import Subject

OUTLIER = 1e4
_RECORDS = 3
_ROUNDS = 20
_ROUNDING = 2.0**-20
"""Sixteen times float32's unit: sums of a batch, noise and a division are rounded on the way."""

Sum = NDArray[np.float64]
Change = AbstractContextManager[None]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A site's first step with a batch that is not empty: `drawn` are some of its records."""

    subject: Subject
    site: str
    round: int
    drawn: tuple[int, ...]
    batch: int

    @property
    def floating(self) -> bool:
        """Whether inputs are numbers that can be made outliers."""
        return self.subject.probe.inputs(self.site).is_floating_point()

    def sum(self, *, without: int | None = None, alone: int | None = None) -> Sum:
        """Return the noised sum in units of C: of all records, without one, or of one alone."""
        with ExitStack() as silence:
            if without is not None:
                silence.enter_context(self.subject.probe.silence(self.site, record=without))
            if alone is not None:
                silence.enter_context(self.subject.probe.silence(self.site, but=alone))
            return self._step()

    def noise(self) -> Sum:
        """Return the noised sum, in units of C, of no record."""
        with self.subject.probe.silence(self.site):
            return self._step()

    def moved(self, before: Sum, *, without: int | None = None) -> tuple[float, float]:
        """Return how far the sum is from another one, and how much of it may be rounding."""
        after = self.sum(without=without)
        return self.distance(after, before, after, before)

    def distance(self, one: Sum, other: Sum, *sums: Sum) -> tuple[float, float]:
        """Return |one - other| and what the rounding of `sums` may make of it."""
        finite = [np.linalg.norm(each) for each in sums if np.isfinite(each).all()]
        return float(np.linalg.norm(one - other)), _ROUNDING * float(sum(finite) + len(sums) * self.batch)

    def outlier(self, record: int) -> Tensor:
        """Return inputs of size 1e4 in a direction of their own."""
        inputs = self.subject.probe.inputs(self.site)
        key = self.subject.key.child("outlier", self.site, record)
        drawn = torch.randn(inputs.shape[1:], generator=_generator(key), dtype=torch.float64)
        return (drawn / drawn.abs().max().clamp(min=1e-9) * OUTLIER).to(inputs.dtype)

    def outliers(self, record: int) -> Iterator[Change]:
        """Yield contexts in which a record is an outlier."""
        yield self.loss(record, OUTLIER)
        yield self.loss(record, -OUTLIER)
        if self.floating:
            yield self.inputs(record, self.outlier(record))
            yield self.inputs(record, -self.outlier(record))

    def bad(self, record: int, value: float) -> Iterator[Change]:
        """Yield contexts in which a record's loss or inputs are a number that is none."""
        yield self.loss(record, value)
        if self.floating:
            yield self.inputs(record, torch.full_like(self.subject.probe.inputs(self.site)[record], value))

    def inputs(self, record: int, values: Tensor) -> Change:
        """Change a record's inputs for a while."""
        return self.subject.probe.changed(self.site, record, values)

    def loss(self, record: int, factor: float) -> Change:
        """Multiply a record's loss for a while."""
        return self.subject.probe.scaled(self.site, record, factor)

    def _step(self) -> Sum:
        (step,) = self.subject.replay(self.site, round=self.round, limit=1, whole=True).steps
        assert step.whole is not None
        return step.whole * (self.subject.denominator(self.site) / self.subject.mechanisms[self.site].clipping_norm)


def benches(subject: Subject) -> Iterator[Bench]:
    """Yield a bench for each audited site, on its first round whose first batch is not empty."""
    for site in subject.data:
        for number in range(1, _ROUNDS + 1):
            (step,) = subject.replay(site, round=number, limit=1).steps
            if len(step.drawn):
                some = np.unique(step.drawn)[:: max(1, len(step.drawn) // _RECORDS)][:_RECORDS]
                drawn = tuple(int(record) for record in some)
                yield Bench(subject=subject, site=site, round=number, drawn=drawn, batch=len(step.drawn))
                break


def _generator(key: Key) -> torch.Generator:
    return torch.Generator().manual_seed(key.integer())
