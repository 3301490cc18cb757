"""What both engines do alike: draw Poisson batches, take a batch in passes, tell a module's layers apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...core.keys import Stream
from ..mechanism import RecordLevelPlan

Loss = Callable[[Tensor, Tensor], Tensor]
Hide = Callable[[Exception], None]
"""Is told of what code raised on one example, which may follow from it."""


def poisson_batches(plan: RecordLevelPlan, stream: Stream) -> Iterator[Tensor]:
    """Yield one round's batches, int64 indices: each record in each batch independently with plan.sampling_rate.

    A batch may be empty; it is a step like any other.
    """
    for _ in range(plan.steps_per_round):
        yield torch.from_numpy(stream.bernoulli(plan.records, plan.sampling_rate).nonzero()[0])


def take_passes(
    take: Callable[[Tensor, Tensor, Loss], None],
    begin: Callable[[], None],
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    size: int | None,
    hide: Hide | None,
) -> None:
    """Begin a sum, and add the examples to it by passes of at most `size` (None: all at once).

    With `hide`, where a pass raises the sum is begun anew with one example at a time, and one that raises is left out:
    each adds what it adds alone, or nothing, whatever the others do. Without, what a pass raises is raised.
    """
    begin()
    size = size or max(1, len(inputs))
    try:
        for first in range(0, len(inputs), size):
            take(inputs[first : first + size], targets[first : first + size], loss)
    except Exception:
        if hide is None:
            raise
    else:
        return
    begin()
    for one in range(len(inputs)):
        try:
            take(inputs[one : one + 1], targets[one : one + 1], loss)
        except Exception as error:  # what a model or a loss raises may follow from this record
            hide(error)


def trained_layers(module: nn.Module) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Return the modules that own trained parameters, with these; one that two share goes with the first."""
    seen: set[nn.Parameter] = set()
    layers = []
    for part in module.modules():
        own = [p for p in part.parameters(recurse=False) if p.requires_grad and p not in seen]
        seen.update(own)
        if own:
            layers.append((part, own))
    return layers
