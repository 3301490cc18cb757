"""Codec: one client's update as bytes, and back, for one model; `compression` says what it is for.

Both sides know the length of each part beforehand: it tells nothing about the records, and a reply of another length
is refused unread.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from ..core.errors import RunError
from ..core.keys import Key
from ..core.live_array import LiveArray
from ..core.parameters import Arrays, Layout
from .local_rule import statistics_of
from .quantization import dequantize, packed_bytes, quantize, read_codes, write_codes
from .sparse import kept, largest, positions_bytes, read_positions, write_positions

# A reply holds the encoding under this name, and under "arrays" only what travels whole.
ENCODED = "compressed"

_Form = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a client sends in place of its model's arrays, and what it keeps for its next update (with top-k)."""

    records: Mapping[str, Arrays]
    memory: NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True)
class Codec:
    """How updates of one model are encoded: the share `top_k` of coordinates is kept, of each so many `bits`.

    Whole numbers and running statistics, which no gradient moves, travel whole.
    """

    layout: Layout
    top_k: float | None
    bits: int | None

    @cached_property
    def _parts(self) -> Mapping[str, _Form]:
        """The type and shape of each part of an encoding."""
        parts: dict[str, _Form] = {}
        if self.top_k is not None:
            parts["positions"] = ("uint8", (positions_bytes(self.count, self.size),))
        if self.bits is not None:
            parts["scales"] = ("float32", (len(self._dense.names),))
            parts["values"] = ("uint8", (packed_bytes(self.count, self.bits),))
        else:
            parts["values"] = ("float32", (self.count,))
        return parts

    @property
    def size(self) -> int:
        """The number of coordinates that are compressed."""
        return self._dense.size

    @cached_property
    def count(self) -> int:
        """The number of coordinates that are sent."""
        return self.size if self.top_k is None else kept(self.top_k, self.size)

    @property
    def nbytes(self) -> int:
        """The bytes of one encoded update: the same for every update."""
        parts = sum(np.dtype(dtype).itemsize * shape[0] for dtype, shape in self._parts.values())
        return parts + layout_bytes(self._whole)

    def encode(self, model: Arrays, received: Arrays, memory: NDArray[np.float32] | None, key: Key) -> Encoded:
        """Return the encoding of a trained model's difference to the one received, plus the memory [size].

        `key` is the client's own for this purpose: quantization draws from it. Raises RunError `value-out-of-range`
        if a difference does not fit into 32 bits.
        """
        update = self._flat(model) - self._flat(received)
        if memory is not None:
            update += memory
        with np.errstate(over="ignore"):
            vector = update.astype(np.float32)
        if not np.isfinite(vector).all():
            raise RunError("value-out-of-range", "an update with its error memory is too large for 32 bits")
        positions = largest(vector, self.count)
        parts: dict[str, NDArray[Any]] = {}
        if self.top_k is not None:
            parts["positions"] = write_positions(positions, self.size)
        values, bits = vector[positions], self.bits
        if bits is None:
            parts["values"] = values
        else:
            borders = self._borders(positions)
            parts["scales"], codes = quantize(values, borders, bits, key.stream())
            parts["values"] = write_codes(codes, bits)
            values = dequantize(parts["scales"], codes, borders, bits)
        records: dict[str, Arrays] = {ENCODED: parts}
        if self._whole.names:
            records["arrays"] = {name: model[name] for name in self._whole.names}
        if self.top_k is None:
            return Encoded(records=records, memory=None)
        update[positions] -= values
        return Encoded(records=records, memory=update.astype(np.float32))

    def decode(self, encoded: Any, whole: Any, received: Arrays) -> dict[str, NDArray[np.generic]]:
        """Return the model that `encode` stands for; `encoded` and `whole` are a reply's records, of any form."""
        parts = _read(encoded, self._parts)
        wanted = {
            name: (str(np.dtype(dtype)), shape)
            for name, dtype, shape in zip(self._whole.names, self._whole.dtypes, self._whole.shapes, strict=True)
        }
        model = _read(whole, wanted) if wanted or whole is not None else {}
        positions = np.arange(self.size)
        if self.top_k is not None:
            positions = read_positions(parts["positions"], self.count, self.size)
        values, bits = parts["values"], self.bits
        if bits is not None:
            if not (np.isfinite(parts["scales"]) & (parts["scales"] >= 0)).all():
                raise RunError("reply-invalid", "a compressed update holds a scale that is no number, or below 0")
            codes = read_codes(parts["values"], bits, self.count)
            values = dequantize(parts["scales"], codes, self._borders(positions), bits)
        _refuse_not_finite(values)
        vector = self._flat(received)
        vector[positions] += values
        with np.errstate(over="ignore"):
            model |= self._dense.unflatten(vector)
        for name in self.layout.names:
            if model[name].dtype.kind == "f" and not np.isfinite(model[name]).all():
                raise RunError("value-out-of-range", f"tensor {name!r} holds a number that is not finite")
        return {name: model[name] for name in self.layout.names}

    @cached_property
    def _dense(self) -> Layout:
        return self._some(compressed=True)

    @cached_property
    def _whole(self) -> Layout:
        return self._some(compressed=False)

    def _some(self, *, compressed: bool) -> Layout:
        """Return the layout of the tensors that are compressed, or of those that travel whole."""
        layout = self.layout
        tensors = zip(layout.names, layout.shapes, layout.dtypes, strict=True)
        chosen = [tensor for tensor in tensors if _compressible(*tensor) is compressed]
        names, shapes, dtypes = zip(*chosen, strict=True) if chosen else ((), (), ())
        return Layout(names=names, shapes=shapes, dtypes=dtypes)

    def _flat(self, arrays: Arrays) -> NDArray[np.float64]:
        return self._dense.flatten({name: arrays[name] for name in self._dense.names})

    def _borders(self, positions: NDArray[np.int64]) -> list[int]:
        """Return where in ascending positions each tensor begins, and where the last one ends."""
        ends = np.cumsum(self._dense.sizes)
        return [0, *np.searchsorted(positions, ends).tolist()]


def layout_bytes(layout: Layout) -> int:
    """Return the bytes of a model's tensors."""
    return sum(size * np.dtype(dtype).itemsize for size, dtype in zip(layout.sizes, layout.dtypes, strict=True))


def _compressible(name: str, shape: tuple[int, ...], dtype: str) -> bool:
    one = Layout(names=(name,), shapes=(shape,), dtypes=(dtype,))
    return np.dtype(dtype).kind == "f" and not statistics_of(one).any()


def _read(record: Any, wanted: Mapping[str, _Form]) -> dict[str, NDArray[Any]]:
    """Return a reply's arrays once each has the type and shape that is wanted, and just as many bytes."""
    if not isinstance(record, ArrayRecord) or set(record) != set(wanted):
        raise RunError("reply-invalid", f"a compressed update must hold {', '.join(wanted) or 'nothing'}")
    return {name: _array(name, record[name], *form) for name, form in wanted.items()}


def _array(name: str, array: Array, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if isinstance(array, LiveArray):
        if (str(array.live.dtype), array.live.shape) == (dtype, shape):
            return array.live
    elif array.stype == "numpy.ndarray":
        # numpy would make room for whatever a header claims, so the header is read first.
        stream = io.BytesIO(array.data)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with suppress(ValueError, SyntaxError):
            if np.lib.format.read_magic(stream) == (1, 0):
                found, _, kind = np.lib.format.read_array_header_1_0(stream)
                if (str(kind), tuple(found)) == (dtype, shape) and len(array.data) == stream.tell() + size:
                    return np.asarray(array.numpy())
    raise RunError("reply-invalid", f"part {name!r} of a compressed update is not {dtype} {list(shape)}")


def _refuse_not_finite(values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise RunError("reply-invalid", "a compressed update holds a number that is not finite")
