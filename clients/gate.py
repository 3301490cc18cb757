"""The gate: the one door through which messages come in and replies leave.

What comes in is checked against the model. What leaves is exactly what a mechanism covered, or what the experiment
declares as released in the clear; errors leave as a code and a fixed sentence, never with the text of an exception.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from ..core import flower
from ..core.errors import CATALOGUE, BractError, RunError
from ..core.parameters import Arrays, Layout, arrays_of, record_of
from ..strategies.compression import Compression
from ..strategies.fedavg import COUNT_KEY
from ..strategies.local_rule import PLAIN, LocalRule, Sent

HISTOGRAM_KEY = "histogram"
# Codes of failures that say nothing about a record; any other leaves as `client-failed`.
_PUBLIC_CODES = (
    "reply-invalid",
    "value-out-of-range",
    "metrics-withheld",
    "request-invalid",
    "policy-refused",
    "budget-exhausted",
    "run-plan-changed",
    "message-changed",
    "reply-forgotten",
    "ledger-budget",
    "ledger-missing",
    "ledger-unreadable",
    "ledger-unwritable",
    "ledger-tampered",
    "ledger-rolled-back",
)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What may pass: tensors of this layout, counts of records only where they are not withheld, and what `rule` names.

    Each record of arrays that the rule sends or receives has the model's layout, and each number is finite.
    """

    layout: Layout
    withhold_counts: bool
    rule: LocalRule = PLAIN
    compression: Compression | None = None

    def admit(self, message: Message) -> dict[str, NDArray[np.generic]]:
        """Return the arrays of a message; raises RunError unless they are finite and fit the model."""
        return self.admit_arrays(message.content)

    def admit_arrays(self, content: RecordDict) -> dict[str, NDArray[np.generic]]:
        """Return the arrays of a message's content; raises RunError unless they are finite and fit the model."""
        arrays = arrays_of(content["arrays"])  # type: ignore[arg-type]
        self.check(arrays)
        return arrays

    def admit_beside(self, message: Message) -> dict[str, Arrays]:
        """Return the records of arrays that the rule receives beside the model, checked like it."""
        received: dict[str, Arrays] = {}
        for name in self.rule.receives:
            record = message.content.get(name)
            if not isinstance(record, ArrayRecord):
                raise RunError("reply-invalid", f"the message holds no record {name!r}, which the strategy sends")
            received[name] = arrays_of(record)
            self.check(received[name])
        return received

    def release_update(
        self,
        message: Message,
        arrays: Arrays,
        *,
        records: int,
        sent: Sent | None = None,
        encoded: Mapping[str, Arrays] | None = None,
    ) -> Message:
        """Return the reply to a train message: the model's shared tensors, a weight, and exactly what the rule names.

        The weight is the number of records, or 1 where counts are withheld. What `compression` made of the tensors
        goes in their place.
        """
        if (encoded is None) != (self.compression is None):
            raise RunError("reply-invalid", "the update is compressed, and was not asked to be, or the other way round")
        sent = sent or Sent()
        self.check(arrays)
        for kind, found, named in (
            ("record", sent.arrays, self.rule.sends),
            ("number", sent.numbers, self.rule.reports),
        ):
            for name in sorted(set(found) ^ set(named)):
                raise RunError("reply-invalid", f"the {kind} {name!r} is missing or was not declared by the strategy")
        for beside in sent.arrays.values():
            self.check(beside)
        for name, value in sent.numbers.items():
            if not math.isfinite(value):
                raise RunError("value-out-of-range", f"the number {name!r} is not finite")
        weight = 1 if self.withhold_counts else records
        content = RecordDict(
            {
                **{name: record_of(part) for name, part in (encoded or {"arrays": arrays}).items()},
                **{name: record_of(beside) for name, beside in sent.arrays.items()},
                "metrics": MetricRecord({COUNT_KEY: weight, **sent.numbers}),
            }
        )
        return Message(content, reply_to=message)

    def release_histogram(self, message: Message, released: NDArray[np.int64]) -> Message:
        """Return the reply to an evaluate message: a histogram that the release mechanism made."""
        metrics = MetricRecord({HISTOGRAM_KEY: [int(count) for count in released.ravel()]})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    def release_metrics(self, message: Message, numbers: Mapping[str, float], *, records: int) -> Message:
        """Return the reply to an evaluate message that is answered in the clear: numbers that the rule names."""
        for name in sorted(set(numbers) ^ set(self.rule.reports)):
            raise RunError("reply-invalid", f"the number {name!r} is missing or was not declared")
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise RunError("value-out-of-range", f"the number {name!r} is not finite")
        return Message(RecordDict({"metrics": MetricRecord({COUNT_KEY: records, **numbers})}), reply_to=message)

    def check(self, arrays: Arrays) -> None:
        """Raise RunError unless arrays are finite and fit the model."""
        self.layout.check(arrays)
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise RunError("value-out-of-range", f"tensor {name!r} holds a number that is not finite")


def release_error(message: Message, error: Exception) -> Message:
    """Return the error reply to a message: a code and the catalogue's own words."""
    return flower.error_reply(message, *public_words(error))


def public_words(error: Exception) -> tuple[str, str]:
    """Return the code and the catalogue's sentence for an error: all of it that may leave."""
    code = error.code if isinstance(error, BractError) and error.code in _PUBLIC_CODES else "client-failed"
    return code, CATALOGUE[code].meaning.rstrip(".")


def histogram_of(content: RecordDict, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the histogram of an evaluate reply; raises RunError `reply-invalid` if it has another shape."""
    for record in content.values():
        if isinstance(record, MetricRecord) and isinstance(record.get(HISTOGRAM_KEY), list):
            counts = np.asarray(record[HISTOGRAM_KEY], dtype=np.int64)
            if counts.size == int(np.prod(shape)):
                return counts.reshape(shape)
    raise RunError("reply-invalid", "the reply holds no histogram of the planned shape")


def kept_of(state: Mapping[str, object], names: Iterable[str]) -> dict[str, Arrays]:
    """Return the records of arrays with these names that a client kept in its Flower context."""
    records = {name: state.get(name) for name in names}
    return {name: arrays_of(record) for name, record in records.items() if isinstance(record, ArrayRecord)}
