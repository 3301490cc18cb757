"""Tensors as raw bytes: which types cross the wire, and bfloat16, which numpy does not know."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray

from ..core.errors import RunError
from ..core.live_array import LiveArray

BFLOAT16 = "bfloat16"
_LONGEST_HEADER = 10_000
_KINDS = "biufc"


class Bfloat16Array(LiveArray):
    """A Flower Array that crosses the wire as bfloat16, the upper 16 bits of float32, and is float32 to whom reads it.

    `bits` is uint16. Every bfloat16 is a float32, so reading loses nothing.
    """

    __qualname__ = "Array"

    def __init__(self, bits: NDArray[np.uint16]) -> None:
        held = bits.view()
        held.flags.writeable = False
        self.__dict__.update(bits=held, dtype=BFLOAT16, shape=tuple(bits.shape), stype="numpy.ndarray")

    @property
    def live(self) -> NDArray[np.float32]:  # type: ignore[override]
        """The values as float32: made on each reading."""
        bits: NDArray[np.uint16] = self.__dict__["bits"]
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)

    def numpy(self) -> NDArray[np.float32]:
        """Return the values as float32."""
        return self.live

    def __reduce__(self) -> tuple[type[Bfloat16Array], tuple[NDArray[np.uint16]]]:
        return Bfloat16Array, (self.__dict__["bits"],)


def bfloat16(values: NDArray[np.float32]) -> Bfloat16Array:
    """Return float32 values rounded to the nearest bfloat16, ties to even; what is not finite stays so."""
    raw = np.asarray(values, dtype=np.float32, order="C").view(np.uint32)
    rounded = (raw + (np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    kept = np.where(np.isfinite(values), rounded, (raw >> np.uint32(16)) | (np.isnan(values) * np.uint32(0x40)))
    return Bfloat16Array(kept.astype(np.uint16))


def raw_of(array: Array) -> tuple[str, tuple[int, ...], memoryview]:
    """Return type, shape and bytes of an array, the bytes uncopied where they are contiguous.

    RunError `reply-invalid` for what numpy holds no numbers of.
    """
    if isinstance(array, Bfloat16Array):
        return BFLOAT16, array.shape, _bytes(array.__dict__["bits"])
    if isinstance(array, LiveArray):
        found = array.live
    elif array.stype == "numpy.ndarray":
        found = _numpy_file(array.data)
    else:
        raise RunError("reply-invalid", f"an array is serialised as {shown_type(array.stype)}, which cannot be sent")
    if found.dtype.kind not in _KINDS:
        raise RunError("reply-invalid", f"an array of type {found.dtype} cannot be sent")
    little = found.astype(found.dtype.newbyteorder("<"), copy=False)
    return little.dtype.str, tuple(little.shape), _bytes(little)


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor; RunError `frame-invalid` for a type that does not cross the wire."""
    return _dtype(dtype).itemsize * math.prod(shape)


def array_of(dtype: str, shape: Sequence[int], raw: NDArray[np.uint8]) -> LiveArray:
    """Return the array over received bytes [n], without a copy; n is what `size_of` says."""
    found = raw.view(_dtype(dtype)).reshape(tuple(shape))
    return Bfloat16Array(found) if dtype == BFLOAT16 else LiveArray(found)


def shown_type(stype: str) -> str:
    """Return how an array says that it is serialised, short."""
    return repr(str(stype)[:40])


def _dtype(name: str) -> np.dtype[np.generic]:
    if name == BFLOAT16:
        return np.dtype("<u2")
    try:
        found = np.dtype(name) if len(name) <= 4 else None
    except (TypeError, ValueError, SyntaxError):
        found = None
    if found is None or found.kind not in _KINDS or found.newbyteorder("<").str != name:
        raise RunError("frame-invalid", f"a tensor is of type {name[:40]!r}, which does not cross the wire")
    return found


def _bytes(array: NDArray[np.generic]) -> memoryview:
    # ascontiguousarray would turn a scalar into a vector of one.
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data


def _numpy_file(data: bytes) -> NDArray[np.generic]:
    """Return the array of a numpy file as a view of its bytes."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream, max_header_size=_LONGEST_HEADER)
        if dtype.hasobject:
            raise ValueError("objects")
        flat: NDArray[np.generic] = np.frombuffer(data, dtype, math.prod(shape), offset=stream.tell())
        return flat.reshape(shape, order="F" if fortran else "C")
    except (KeyError, ValueError, SyntaxError) as error:
        raise RunError("reply-invalid", "an array is not a numpy file that can be sent") from error
