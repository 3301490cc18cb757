"""The passes of book-keeping DP-SGD, recorded once for each size of batch and repeated without autograd.

What is repeated is one pass: outputs, norms, clipping factors and the clipped sum. Sampler, noise, denominator and step
are the engine's own. A pass that is not repeated to the last bit, or whose examples are not all finite, is the engine's
own too, so no result tells whether it was recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...privacy.dpsgd.bookkeeping import BookKeeping, cleaning_of
from ...privacy.dpsgd.gradients import Clean, unchanged
from ...privacy.dpsgd.passes import Loss
from ...privacy.mechanism import RecordLevelPlan
from ..local_model import LocalModel
from .program import RecordedCall, recorded_call
from .recording import NotRecordable

# A larger batch takes so long that autograd's own work is nothing to it.
_MOST = 32
# Poisson batches are of many sizes, and recording one takes as long as some passes: it must come up so often before.
_TIMES = 3


@dataclass(frozen=True, kw_only=True)
class RecordedPass:
    """A pass on batches of one form, and the parameters whose sums it writes.

    `recorded` returns the least clipping factor.
    """

    recorded: RecordedCall
    parameters: Sequence[Tensor]


class RecordedPasses:
    """A model's passes under plans that clip as this one; the model keeps what was recorded."""

    def __init__(self, model: LocalModel, plan: RecordLevelPlan) -> None:
        self._model = model
        self._clipping = (plan.clipping_norm, plan.per_layer)

    def __call__(self, engine: BookKeeping, inputs: Tensor, targets: Tensor, loss: Loss) -> bool:
        """Take a pass for the engine, if it can be repeated; return whether it was."""
        form = (inputs.shape, inputs.dtype, targets.shape, targets.dtype, self._clipping)
        known, seen = self._model.passes, self._model.passes_seen
        if form not in known:
            seen[form] = seen.get(form, 0) + 1
            if len(inputs) > _MOST or seen[form] < _TIMES:
                return False
            try:
                # What it draws here, it draws again.
                with torch.random.fork_rng(devices=[]):
                    known[form] = _prepared(self._model, engine, inputs, targets, loss)
            except NotRecordable:
                known[form] = None
        found = known[form]
        if found is None:
            return False
        try:
            with torch.inference_mode():
                least = float(found.recorded.call(inputs, targets))
        except Exception:  # whatever it is, the engine raises it again, and knows what to do
            return False
        # Else a product with a number that is not finite may be in the sum.
        if not least > 0:
            return False
        engine.put(found.parameters)
        return True


def _prepared(model: LocalModel, engine: BookKeeping, inputs: Tensor, targets: Tensor, loss: Loss) -> RecordedPass:
    """Return the pass for batches like this one, once it was seen to come to the same; raises NotRecordable."""

    def call(inputs: Tensor, targets: Tensor) -> list[Tensor]:
        engine.forget()
        factors = engine.add_clipped(inputs, targets, loss, cleaning=_none)
        if not factors:
            raise NotRecordable("the loss reaches no parameter")
        return [torch.stack([factor.amin() for factor in factors]).amin()]

    try:
        recorded = recorded_call(call, model.module, inputs, targets)
        engine.forget()
        engine.add_clipped(inputs, targets, loss, cleaning=cleaning_of)
        expected = {p: part.clone() for p, part in engine.parts.items()}
        for part in engine.parts.values():
            part.fill_(torch.nan)
        with torch.inference_mode():
            recorded.call(inputs, targets)
    except NotRecordable:
        raise
    except Exception as error:  # whatever a model or a loss raises, the engine raises again
        raise NotRecordable(f"a pass of it fails: {type(error).__name__}") from error
    if not all(torch.equal(engine.parts[p], part) for p, part in expected.items()):
        raise NotRecordable("its sums differ from those of autograd")
    return RecordedPass(recorded=recorded, parameters=tuple(expected))


def _none(factors: Sequence[Tensor]) -> Clean:
    return unchanged
