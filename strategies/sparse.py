"""Sparse vectors: which coordinates are the largest, and their positions in few bytes.

Sorted positions are written as Elias (1974) and Fano (1971) do: the low bits of each as they are, the high ones in
unary, within half a bit of the shortest code for positions of which nothing is known; or as a bitmap where that is
shorter. Either way the length follows from their number and the vector's, so a reader knows it beforehand.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..core.errors import RunError
from .quantization import pack, packed_bytes, unpack

Positions = NDArray[np.int64]


def kept(share: float, size: int) -> int:
    """Return how many of `size` coordinates a share is: at least one."""
    return min(size, max(1, round(share * size)))


def largest(values: NDArray[np.float32], count: int) -> Positions:
    """Return the positions [count], ascending, of the values [size] that are largest in magnitude.

    Of equal ones the first are taken, so that the choice is the same on every machine.
    """
    if count >= len(values):
        return np.arange(len(values))
    magnitudes = np.abs(values)
    least = np.partition(magnitudes, len(values) - count)[len(values) - count]
    above = np.flatnonzero(magnitudes > least)
    ties = np.flatnonzero(magnitudes == least)[: count - len(above)]
    return np.sort(np.concatenate([above, ties]))


def positions_bytes(count: int, size: int) -> int:
    """Return the number of bytes that `count` positions in a vector of `size` take."""
    if count == size:
        return 0
    low = _low_bits(count, size)
    return min(-(-size // 8), packed_bytes(count, low) + -(-_unary_bits(count, size, low) // 8))


def write_positions(positions: Positions, size: int) -> NDArray[np.uint8]:
    """Return ascending positions below `size` as `positions_bytes` bytes; of all of them none needs to be written."""
    count = len(positions)
    if count == size:
        return np.zeros(0, np.uint8)
    if _is_bitmap(count, size):
        return _bitmap(positions, size)
    low = _low_bits(count, size)
    unary = _bitmap((positions >> low) + np.arange(count), _unary_bits(count, size, low))
    return np.concatenate([pack(positions & ((1 << low) - 1), low), unary])


def read_positions(written: NDArray[np.uint8], count: int, size: int) -> Positions:
    """Return the positions that `write_positions` wrote; raises RunError `reply-invalid`.

    They are `count` different ones below `size`, or it raises. Needs memory for `size` bytes at most.
    """
    if written.shape != (positions_bytes(count, size),):
        raise RunError("reply-invalid", "the positions of a sparse update have another length than was asked for")
    if count == size:
        return np.arange(size)
    if _is_bitmap(count, size):
        positions = _ones(written)
        if len(positions) != count:
            raise RunError("reply-invalid", f"a sparse update names {len(positions)} coordinates, not {count}")
    else:
        low = _low_bits(count, size)
        border = packed_bytes(count, low)
        ones = _ones(written[border:])
        if len(ones) != count:
            raise RunError("reply-invalid", f"a sparse update names {len(ones)} coordinates, not {count}")
        positions = ((ones - np.arange(count)) << low) | unpack(written[:border], low, count)
    if count and (positions[-1] >= size or not (np.diff(positions) > 0).all()):
        raise RunError("reply-invalid", "a sparse update names a coordinate twice, or one that the model has not")
    return positions


def _low_bits(count: int, size: int) -> int:
    return (size // count).bit_length() - 1 if count else 0


def _unary_bits(count: int, size: int, low: int) -> int:
    return count + ((size - 1) >> low)


def _is_bitmap(count: int, size: int) -> bool:
    return positions_bytes(count, size) == -(-size // 8)


def _bitmap(positions: Positions, size: int) -> NDArray[np.uint8]:
    bits = np.zeros(size, np.uint8)
    bits[positions] = 1
    return np.packbits(bits, bitorder="little")


def _ones(bitmap: NDArray[np.uint8]) -> Positions:
    return np.flatnonzero(np.unpackbits(bitmap, bitorder="little"))
