"""Flower's records in a manifest, and back. What is large is a segment of raw bytes, the rest a field."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from ..core.errors import RunError
from .federation_pb2 import Blobs, Record, Segment, Tensor, Texts, Value
from .tensors import array_of, raw_of, size_of

_KINDS: tuple[tuple[type[Any], Any], ...] = (
    (ArrayRecord, Record.ARRAYS),
    (MetricRecord, Record.METRICS),
    (ConfigRecord, Record.CONFIG),
)
# Python's numbers take five times as much, so that a list of a whole message's size would fill a server's memory.
_LONGEST_LIST = 16 << 20
_LISTS = {"integers": "<i8", "reals": "<f8", "truths": "|b1"}

Keep = Callable[[object, memoryview], Segment]


class Segments(Protocol):
    """The segments that arrived, in their order."""

    def take(self, segment: Segment, size: int) -> NDArray[np.uint8]:
        """Return the bytes of the next segment, which must be so many; RunError."""

    def rest(self) -> int:
        """Return how many bytes are left."""


def write_records(content: RecordDict, keep: Keep) -> Iterable[Record]:
    """Return the records of a manifest; `keep` is given each segment and the object whose bytes it holds."""
    for name, record in content.items():
        (kind,) = (number for known, number in _KINDS if isinstance(record, known))
        if isinstance(record, ArrayRecord):
            tensors = []
            for tensor, array in record.items():
                dtype, shape, data = raw_of(array)
                tensors.append(Tensor(name=tensor, dtype=dtype, shape=shape, segment=keep(array, data)))
            yield Record(name=name, kind=kind, tensors=tensors)
        else:
            yield Record(name=name, kind=kind, values=write_values(dict(record), keep))


def read_records(records: Iterable[Record], segments: Segments) -> RecordDict:
    """Return the records of a manifest; RunError `frame-invalid` for what Flower would not take."""
    content = RecordDict()
    for record in records:
        if record.name in content:
            raise RunError("frame-invalid", "two records of one name")
        made: ArrayRecord | MetricRecord | ConfigRecord
        if record.kind == Record.ARRAYS:
            made = ArrayRecord()
            for tensor in record.tensors:
                if tensor.name in made or len(tensor.shape) > 64:
                    raise RunError("frame-invalid", "two tensors of one name, or one of more than 64 dimensions")
                size = size_of(tensor.dtype, tensor.shape)
                raw = segments.take(tensor.segment, size)
                try:
                    made[tensor.name] = array_of(tensor.dtype, tensor.shape, raw)
                except (ValueError, OverflowError) as error:
                    raise RunError("frame-invalid", "a tensor is of a shape that numpy does not know") from error
        else:
            values = read_values(record.values, segments)
            try:
                made = MetricRecord(values) if record.kind == Record.METRICS else ConfigRecord(values)
            except (TypeError, ValueError) as error:
                raise RunError("frame-invalid", "a record holds values that Flower does not know") from error
        content[record.name] = made
    return content


def segments_of(records: Iterable[Record]) -> Iterator[Segment]:
    """Yield the segments of a manifest in the order in which they lie; nothing of it was checked yet."""
    for record in records:
        for tensor in record.tensors:
            yield tensor.segment
        for value in record.values:
            kind = value.WhichOneof("kind")
            content = getattr(value, kind) if kind else None
            if isinstance(content, Segment):
                yield content


def write_values(values: dict[str, Any], keep: Keep) -> list[Value]:
    """Return the values of a metric or config record; RunError `reply-invalid` for what cannot be sent."""
    written = []
    for key, value in values.items():
        try:
            written.append(Value(key=key, **_written(value, keep)))
        except (TypeError, ValueError, OverflowError) as error:
            raise RunError("reply-invalid", f"value {key[:80]!r} cannot be sent: {type(value).__name__}") from error
    return written


def read_values(values: Iterable[Value], segments: Segments | None = None) -> dict[str, Any]:
    """Return the values by key; RunError `frame-invalid`."""
    found: dict[str, Any] = {}
    for value in values:
        kind = value.WhichOneof("kind")
        if kind is None or value.key in found:
            raise RunError("frame-invalid", "a value of no kind, or two of one name")
        content = getattr(value, kind)
        if isinstance(content, Segment):
            if segments is None or content.size > segments.rest():
                raise RunError("frame-invalid", "a value is longer than its message")
            if kind != "bytes" and content.size > _LONGEST_LIST:
                raise RunError("frame-invalid", f"a list of {content.size} bytes; what is longer is sent as an array")
            raw = segments.take(content, content.size)
            if kind == "bytes":
                content = raw.tobytes()
            elif raw.size % np.dtype(_LISTS[kind]).itemsize:
                raise RunError("frame-invalid", "a list ends within a number")
            else:
                content = raw.view(_LISTS[kind]).tolist()
        elif kind in ("texts", "blobs"):
            content = list(content.items)
        found[value.key] = content
    return found


def _written(value: Any, keep: Keep) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"truth": value}
    if isinstance(value, int):
        return {"integer": value}
    if isinstance(value, float):
        return {"real": value}
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, bytes):
        return {"bytes": keep(value, memoryview(value))}
    if not isinstance(value, list):
        raise TypeError("no value that Flower knows")
    kinds = {type(item) for item in value}
    # An empty list says not of what, and Flower takes any.
    if kinds <= {str}:
        return {"texts": Texts(items=value)}
    if kinds == {bytes}:
        return {"blobs": Blobs(items=value)}
    name = {frozenset({bool}): "truths", frozenset({int}): "integers"}.get(frozenset(kinds), "reals")
    if not kinds <= {bool, int, float} or (name == "reals" and kinds - {float}):
        raise TypeError("a list of several types")
    if np.dtype(_LISTS[name]).itemsize * len(value) > _LONGEST_LIST:
        raise ValueError("a list that should be an array")
    return {name: keep(value, np.array(value, _LISTS[name]).view(np.uint8).data)}
