"""The Poisson batches of many clients that take their steps together: each draws what it draws alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ...core.keys import Stream
from ..mechanism import RecordLevelPlan

# Draws that are made at once: those of a whole round might not fit into memory.
_DRAWS = 2**20

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]
"""A batch of each client: records [clients, most], and how many of them count [clients]."""


def batches_together(plans: Sequence[RecordLevelPlan], streams: Sequence[Stream]) -> Iterator[Batch]:
    """Yield one round's batches by step, those that `passes.poisson_batches` draws from each stream for its plan.

    A client that takes fewer steps than another has empty batches after its last.
    """
    steps = np.array([plan.steps_per_round for plan in plans])
    sizes = np.array([plan.records for plan in plans])
    rates = np.array([plan.sampling_rate for plan in plans])
    at_once = max(1, _DRAWS // max(1, int(sizes.sum())))
    for first in range(0, int(steps.max(initial=0)), at_once):
        yield from _drawn(np.clip(steps - first, 0, at_once), sizes, rates, streams)


def _drawn(
    steps: NDArray[np.int64], sizes: NDArray[np.int64], rates: NDArray[np.float64], streams: Sequence[Stream]
) -> Iterator[Batch]:
    """Yield each client's batches of its next `steps`."""
    # All draws in a row: client by client, of each step by step.
    lengths = steps * sizes
    uniforms = np.concatenate([stream.uniforms(int(length)) for stream, length in zip(streams, lengths, strict=True)])
    drawn = np.flatnonzero(uniforms < np.repeat(rates, lengths))
    ends = np.cumsum(lengths)
    client = np.searchsorted(ends, drawn, side="right")
    step, record = np.divmod(drawn - (ends - lengths)[client], sizes[client])
    counts = np.zeros((int(steps.max(initial=0)), len(sizes)), np.int64)
    np.add.at(counts, (step, client), 1)
    # A batch's records follow one another, so a record's place is its distance from the first.
    firsts = np.flatnonzero(np.diff(client * len(counts) + step, prepend=-1))
    places = np.arange(len(drawn)) - np.repeat(firsts, np.diff(firsts, append=len(drawn)))
    records = np.zeros((*counts.shape, int(counts.max(initial=0))), np.int64)
    records[step, client, places] = record
    yield from zip(records, counts, strict=True)
