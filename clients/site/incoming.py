"""What comes into a site, checked before any of it is used: its size, the names of its records, the form of its arrays.

Flower's arrays hold numpy files, whose headers are read here without making room for what they claim.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from ...core.errors import RunError
from ...core.live_array import LiveArray
from ...core.parameters import Layout, arrays_of, digest
from ...privacy.ledger.events import canonical
from .request import CONFIG

ARRAYS = "arrays"
_LONGEST_HEADER = 10_000


def config_of(message: Message) -> Mapping[str, Any]:
    """Return the config record of a message; RunError `request-invalid` if there is none, or no content."""
    if not message.has_content():
        raise RunError("request-invalid", "the message holds an error and no content")
    config = message.content.get(CONFIG)
    if not isinstance(config, ConfigRecord):
        raise RunError("request-invalid", f"the message holds no config record {CONFIG!r}")
    return dict(config)


def size_of(message: Message) -> int:
    """Return how many bytes a message's content holds, names included."""
    return sum(len(name) + _record_size(record) for name, record in message.content.items())


def refuse_malformed(message: Message, *, layout: Layout, beside: tuple[str, ...]) -> None:
    """Raise RunError unless a message holds its config, the model's arrays, and those that the strategy sends beside.

    Each array must say in its own header that it has the shape and the type of its namesake in the model; only then it
    is loaded, and each of its numbers must be finite.
    """
    expected = {ARRAYS, CONFIG, *beside}
    for name in sorted(set(message.content) ^ expected):
        raise RunError("request-invalid", f"record {name[:80]!r}: is missing, or was not asked for")
    for name in sorted(expected - {CONFIG}):
        record = message.content[name]
        if not isinstance(record, ArrayRecord) or set(record) != set(layout.names):
            raise RunError("reply-invalid", f"record {name!r} does not hold the model's tensors")
        for tensor, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes, strict=True):
            found = _form(record[tensor])
            if found != (shape, dtype):
                raise RunError("reply-invalid", f"tensor {tensor!r} of {name!r} is {found}, not {(shape, dtype)}")
        for tensor, array in arrays_of(record).items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise RunError("value-out-of-range", f"tensor {tensor!r} of {name!r} holds a number that is not finite")


def digest_of(message: Message) -> str:
    """Return the SHA-256 of a checked message's kind and content: what makes two messages one."""
    content: dict[str, Any] = {}
    for name, record in message.content.items():
        content[name] = digest(arrays_of(record)) if isinstance(record, ArrayRecord) else dict(record)
    try:
        text = canonical(_plain({"kind": message.metadata.message_type, "content": content}))
    except (TypeError, ValueError) as error:
        raise RunError("request-invalid", "the config holds a number that is not finite") from error
    return hashlib.sha256(text.encode()).hexdigest()


def _form(array: Array) -> tuple[tuple[int, ...], str] | None:
    """Return shape and type of an array as it would be loaded, None if it would not."""
    if isinstance(array, LiveArray):
        return array.live.shape, array.live.dtype.str
    if array.stype != "numpy.ndarray":
        return None
    stream = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(stream, max_header_size=_LONGEST_HEADER)
    except (KeyError, ValueError, SyntaxError):
        return None
    if dtype.hasobject or len(array.data) - stream.tell() != dtype.itemsize * math.prod(shape):
        return None
    return tuple(shape), dtype.str


def _record_size(record: Any) -> int:
    if isinstance(record, ArrayRecord):
        return sum(len(name) + _array_size(array) for name, array in record.items())
    return sum(len(key) + _value_size(value) for key, value in record.items())


def _array_size(array: Array) -> int:
    return int(array.live.nbytes) if isinstance(array, LiveArray) else len(array.data)


def _value_size(value: Any) -> int:
    if isinstance(value, list):
        return sum(_value_size(item) for item in value)
    return len(value) if isinstance(value, str | bytes) else 8


def _plain(value: Any) -> Any:
    """Return a value as JSON knows it, different ones differently."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {"bytes": value.hex()} if isinstance(value, bytes) else value
