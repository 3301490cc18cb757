"""Compression of updates: what a client sends in place of its model, and how the server makes the model of it again.

A client sends its difference to the model that it received: only the largest coordinates (top-k), or codes of a few
bits (quantization), or codes of the largest. With top-k it remembers what it left out and adds it to its next update
(error feedback: Stich, Cordonnier & Jaggi, "Sparsified SGD with memory", NeurIPS 2018, Algorithm 1; both together are
Qsparse-local-SGD: Basu, Data, Karakus & Diggavi, NeurIPS 2019). Quantization alone is unbiased and needs no memory.

The server decodes a reply before any fold or strategy sees it, with the message that it answers: the model that was
sent and the bytes of the reply determine the decoded model, float by float. Both sides know the length of each part
beforehand, so it tells nothing about the records, and a reply of another length is refused unread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import Message, RecordDict

from ..core.parameters import Layout, arrays_of, record_of
from .codec import ENCODED, Codec
from .fold import Fold, Total
from .robust import Robust

if TYPE_CHECKING:
    from ..experiment import CompressionTable, Experiment

# What a client keeps between rounds, in its Flower context.
MEMORY = "error-memory"
# Robust rules of Flower's, by class.
_ROBUST_IN_FLOWER = {"FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan"}


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What both sides agree on: the share of coordinates that is kept, and the bits of each. Picklable."""

    top_k: float | None = None
    bits: int | None = None

    @classmethod
    def of(cls, table: CompressionTable) -> Compression | None:
        """Return the compression that [compression] describes, None if it is empty."""
        if table.top_k is None and table.bits is None:
            return None
        return cls(top_k=table.top_k, bits=table.bits)

    def codec(self, layout: Layout) -> Codec:
        """Return how updates of a model of this layout are encoded."""
        return Codec(layout=layout, top_k=self.top_k, bits=self.bits)

    def decode(self, instruction: Message, content: RecordDict) -> RecordDict:
        """Return a reply's records with the model's arrays in place of their encoding.

        `instruction` is the message that it answers. Raises RunError: `reply-invalid` for whatever the codec did not
        write, before memory beyond the model's size is taken, and `value-out-of-range` for a model that is not finite.
        """
        received = arrays_of(instruction.content["arrays"])  # type: ignore[arg-type]
        codec = self.codec(Layout.of(received))
        model = codec.decode(content.get(ENCODED), content.get("arrays"), received)
        rest = {name: record for name, record in content.items() if name not in (ENCODED, "arrays")}
        return RecordDict({"arrays": record_of(model), **rest})


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """A fold of encoded replies: the server, or a worker that folds on its own, decodes each and then adds it."""

    compression: Compression
    fold: Fold

    def start(self) -> Total:
        """Return the fold's empty total."""
        return self.fold.start()

    def add(self, total: Total, content: RecordDict) -> None:
        """Add a reply that is decoded already."""
        self.fold.add(total, content)


# Why compression leaves a guarantee as it is, by the unit that is protected; see `refuse_unproven`.
_PROOFS = {
    "none": "there is no guarantee",
    "record": "the client compresses what its mechanism has released: post-processing",
    "client": "the server clips the decoded update, or the client compresses what its mechanism has released",
}


def refuse_unproven(experiment: Experiment) -> None:
    """Raise InputError unless the guarantee of the experiment is proven to hold under its compression.

    Where the client noises (each step by DP-SGD, or its whole update), the encoding is a function of what the
    mechanism released, of the model received, of coins that look at no record, and of the error memory; that is such
    a function of earlier rounds. It is post-processing, which costs nothing (Dwork & Roth, "The algorithmic
    foundations of differential privacy", 2014, Proposition 2.1).

    Where the server noises, clipping comes last: whatever a client sends, its decoded update is clipped to the norm C
    before it is added (`clipped_sum.ClippedSum`), so the sensitivity of each round's sum is C. The error memory makes a
    client's update depend on which earlier rounds it was in. Given what was released and the other clients' coins, the
    output with the client is then a mixture of those with fixed updates of norm at most C; the divergence is jointly
    convex, so the accountant's pair for one fixed update dominates it, in each round and adaptively over them.
    """
    table = experiment.compression
    unit = experiment.privacy.unit
    if Compression.of(table) is not None and unit not in _PROOFS:
        key = "top_k" if table.top_k is not None else "bits"
        raise experiment.conflict("compression", key, why=f'privacy.unit = "{unit}" is not proven to hold under it')


def refuse_unsuited(experiment: Experiment, strategy: object) -> None:
    """Raise InputError for top-k under a rule that trusts what most clients agree on.

    Where each client sends other coordinates, most of them seem to agree that a coordinate does not move.
    """
    names = {base.__name__ for base in type(strategy).__mro__ if base.__module__.startswith("flwr.")}
    if experiment.compression.top_k is not None and (isinstance(strategy, Robust) or names & _ROBUST_IN_FLOWER):
        why = f"{type(strategy).__name__} takes coordinates that a client leaves out for its vote; use compression.bits"
        raise experiment.conflict("compression", "top_k", why=why)
