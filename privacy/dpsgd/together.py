"""The Poisson batches of many clients that take their steps together: each draws what it draws alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.keys import Stream
from ..mechanism import RecordLevelPlan


class Batches(NamedTuple):
    """Batches of clients [steps, clients]: `counts`, and `records` [steps, clients, most] of which so many count.

    A client that takes fewer steps than another has empty batches after its last.
    """

    records: NDArray[np.int64]
    counts: NDArray[np.int64]


def batches_together(plans: Sequence[RecordLevelPlan], streams: Sequence[Stream]) -> Batches:
    """Return one round's batches, those that `passes.poisson_batches` draws from each stream for its plan."""
    steps = np.array([plan.steps_per_round for plan in plans])
    sizes = np.array([plan.records for plan in plans])
    rates = np.array([plan.sampling_rate for plan in plans])
    # All draws in a row: client by client, of each step by step.
    lengths = steps * sizes
    uniforms = np.concatenate([stream.uniforms(int(length)) for stream, length in zip(streams, lengths, strict=True)])
    drawn = np.flatnonzero(uniforms < np.repeat(rates, lengths))
    ends = np.cumsum(lengths)
    client = np.searchsorted(ends, drawn, side="right")
    step, record = np.divmod(drawn - (ends - lengths)[client], sizes[client])
    counts = np.zeros((int(steps.max(initial=0)), len(plans)), np.int64)
    np.add.at(counts, (step, client), 1)
    # A batch's records follow one another, so a record's place is its distance from the first.
    firsts = np.flatnonzero(np.diff(client * len(counts) + step, prepend=-1))
    places = np.arange(len(drawn)) - np.repeat(firsts, np.diff(firsts, append=len(drawn)))
    records = np.zeros((*counts.shape, int(counts.max(initial=0))), np.int64)
    records[step, client, places] = record
    return Batches(records=records, counts=counts)
