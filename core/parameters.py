"""A model's tensors as one flat vector: reset, delta, norm, clip and sum are then one operation each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import RunError

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

Arrays = Mapping[str, NDArray[np.generic]]

_STRETCH = 2**16


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each named tensor lies in the flat vector, and what it must look like."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, arrays: Arrays) -> Layout:
        """Return the layout of named arrays, in their order."""
        return cls(
            names=tuple(arrays),
            shapes=tuple(array.shape for array in arrays.values()),
            dtypes=tuple(array.dtype.str for array in arrays.values()),
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """Number of elements of the flat vector."""
        return sum(self.sizes)

    @cached_property
    def whole(self) -> NDArray[np.bool_]:
        """Which values of the flat vector are whole numbers, such as a count of batches."""
        return np.repeat(np.array([np.dtype(dtype).kind in "iub" for dtype in self.dtypes], dtype=bool), self.sizes)

    def check(self, arrays: Arrays) -> None:
        """Raise RunError `reply-invalid` unless names, shapes and types are those of the layout."""
        if set(arrays) != set(self.names):
            odd = sorted(set(arrays) ^ set(self.names))[0]
            raise RunError("reply-invalid", f"tensor {odd!r} is missing or was not asked for")
        for name, shape, dtype in zip(self.names, self.shapes, self.dtypes, strict=True):
            array = arrays[name]
            if array.shape != shape or array.dtype.str != dtype:
                raise RunError(
                    "reply-invalid",
                    f"tensor {name!r} is {array.dtype} {list(array.shape)}, not {np.dtype(dtype)} {list(shape)}",
                )

    def flatten(self, arrays: Arrays) -> NDArray[np.float64]:
        """Return the float64 vector [size] of checked arrays, whatever order they come in."""
        pieces = self.pieces(arrays)
        return np.concatenate(pieces, dtype=np.float64) if pieces else np.zeros(0)

    def pieces(self, arrays: Arrays) -> list[NDArray[np.generic]]:
        """Return checked arrays as flat vectors in the layout's order, each of its own type."""
        self.check(arrays)
        return [arrays[name].reshape(-1) for name in self.names]

    def unflatten(self, vector: NDArray[np.float64]) -> dict[str, NDArray[np.generic]]:
        """Return the named arrays of a float64 vector [size]; integer tensors are rounded to the nearest."""
        return self.unflatten_by(lambda start, stop: vector[start:stop])

    def unflatten_by(self, between: Callable[[int, int], NDArray[np.float64]]) -> dict[str, NDArray[np.generic]]:
        """Return the named arrays of a vector that is asked for in stretches, each [stop - start] and float64."""
        result: dict[str, NDArray[np.generic]] = {}
        begin = 0
        for name, shape, dtype, size in zip(self.names, self.shapes, self.dtypes, self.sizes, strict=True):
            made = np.empty(size, dtype)
            for start in range(0, size, _STRETCH):
                stop = min(start + _STRETCH, size)
                stretch = between(begin + start, begin + stop)
                made[start:stop] = np.rint(stretch) if made.dtype.kind in "iub" else stretch
            begin += size
            result[name] = made.reshape(shape)
        return result


def arrays_of(record: ArrayRecord) -> dict[str, NDArray[np.generic]]:
    """Return the named numpy arrays of a Flower record; those of `record_of` are read-only views of what it took."""
    from .live_array import LiveArray

    return {
        name: array.live if isinstance(array, LiveArray) else np.asarray(array.numpy())
        for name, array in record.items()
    }


def record_of(arrays: Arrays) -> ArrayRecord:
    """Return the Flower record of named numpy arrays, which nobody may write to from then on."""
    from flwr.app import ArrayRecord

    from .live_array import LiveArray

    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = LiveArray(np.asarray(array))
    return record


def digest(arrays: Arrays) -> str:
    """Return the SHA-256 of names, types, shapes and bytes, in hexadecimal."""
    state = hashlib.sha256()
    for name in sorted(arrays):
        # ascontiguousarray would turn a scalar into a vector of one.
        array = np.asarray(arrays[name], order="C")
        state.update(f"{len(name)}:{name}{array.dtype.str}{array.shape}".encode())
        state.update(array.reshape(-1).view(np.uint8).data)
    return state.hexdigest()
