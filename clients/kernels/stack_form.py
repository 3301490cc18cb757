"""How a stack of clients is laid out, and when it pays: fixed rules, so that no result depends on the processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...tasks.task import Examples
from ..local_model import LocalModel
from ..training import LocalTraining

# Of what a stack's parameters, or one batch of it, may take, so that they stay near the processor.
_NUMBERS = 2**20
_MOST, _LEAST = 128, 2
# Parameters of a model whose steps are so short that stacks of it pay for themselves.
_SMALL = 2**14
# How many clients must be there to fill a stack that pays for itself.
_COHORT = 64
# By how many deviations a Poisson batch may be larger than expected without a second pass.
_DEVIATIONS = 3


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a stack is laid out: so many clients, each with so many examples in a batch or, under privacy, in a pass."""

    width: int
    batch: int

    @classmethod
    def of(
        cls, model: LocalModel, training: LocalTraining, like: Examples, longest: int, *, private: bool = False
    ) -> Form:
        """Return the form for examples like these, of which a client has `longest` at most."""
        batch = min(training.batch_size, longest)
        numbers = like.inputs[:1].numel()
        if private:
            batch = min(longest, batch + math.ceil(_DEVIATIONS * math.sqrt(batch)))
            # Each example's gradient is written out.
            numbers = max(numbers, model.layout.size)
        numbers = max(1, model.layout.size, max(1, batch) * numbers)
        return cls(width=max(_LEAST, min(_MOST, _NUMBERS // numbers)), batch=max(1, batch))

    def pays(self, model: LocalModel, cohort: int) -> bool:
        """Return whether stacks are quicker than one client at a time: a fixed rule over public sizes."""
        small = model.layout.size <= _SMALL and self.width >= _COHORT
        return small and cohort >= _COHORT and model.device.type == "cpu"
