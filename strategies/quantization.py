"""Stochastic uniform quantization: numbers as codes of b bits, right in expectation.

Alistarh, Grubic, Li, Tomioka & Vojnović, "QSGD: communication-efficient SGD via gradient quantization and encoding",
NeurIPS 2017, section 3.1, with the largest magnitude of each tensor as its scale (their section 4 does so in practice).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..core.errors import RunError
from ..core.keys import Stream

FEWEST_BITS, MOST_BITS = 2, 16
_BLOCK = 2**16  # values packed at once: whole bytes for any width, and few enough for the processor's cache


def levels(bits: int) -> int:
    """Return how many steps lie between 0 and the scale: codes go from minus to plus as many."""
    return int(2 ** (bits - 1) - 1)


def quantize(
    values: NDArray[np.float32], borders: Sequence[int], bits: int, stream: Stream
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the scales [pieces] and codes [size] of values [size]; each is rounded up or down at random.

    A piece goes from one border to the next. A value v under the scale s lies between two multiples of s / levels, and
    is rounded to the upper with the probability that makes its expectation v: `dequantize` is unbiased.
    """
    pieces = list(_pieces(borders))
    scales = np.array([np.abs(values[piece]).max(initial=0) for piece in pieces], np.float32)
    codes = stream.uniforms(len(values))
    most = levels(bits)
    for scale, piece in zip(scales.tolist(), pieces, strict=True):
        if scale:
            codes[piece] += values[piece].astype(np.float64) / scale * most
        np.floor(codes[piece], out=codes[piece])
    # A sum just below a whole number may have been rounded up to it.
    return scales, np.clip(codes, -most, most).astype(np.int64)


def dequantize(
    scales: NDArray[np.float32], codes: NDArray[np.int64], borders: Sequence[int], bits: int
) -> NDArray[np.float32]:
    """Return the values [size] that codes stand for: the same bits on every machine."""
    values = codes.astype(np.float64)
    for scale, piece in zip(scales.tolist(), _pieces(borders), strict=True):
        values[piece] *= scale
    return (values / levels(bits)).astype(np.float32)


def write_codes(codes: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Return codes in `packed_bytes` bytes."""
    return pack(codes + levels(bits), bits)


def read_codes(written: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """Return the codes [count] that `write_codes` wrote; raises RunError `reply-invalid` for one that is none."""
    codes = unpack(written, bits, count) - levels(bits)
    if (codes > levels(bits)).any():
        raise RunError("reply-invalid", f"an update holds a code that no quantization to {bits} bits makes")
    return codes


def packed_bytes(count: int, bits: int) -> int:
    """Return the number of bytes of `count` packed numbers."""
    return -(-count * bits // 8)


def pack(numbers: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """Return the lowest bits (at most 32) of each number, one after the other, in `packed_bytes` bytes."""
    packed = [np.zeros(0, np.uint8)]
    for start in range(0, len(numbers) if bits else 0, _BLOCK):
        octets = numbers[start : start + _BLOCK].astype("<u4").view(np.uint8).reshape(-1, 4)
        packed.append(np.packbits(np.unpackbits(octets, axis=1, count=bits, bitorder="little"), bitorder="little"))
    return np.concatenate(packed)


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """Return the numbers [count] that `pack` packed; raises RunError `reply-invalid` for another number of bytes."""
    if packed.shape != (packed_bytes(count, bits),):
        raise RunError("reply-invalid", "an update holds another number of packed values than was asked for")
    numbers = np.zeros(count, np.int64)
    for start in range(0, count if bits else 0, _BLOCK):
        block = min(_BLOCK, count - start)
        octets = packed[start * bits // 8 :][: packed_bytes(block, bits)]
        each = np.unpackbits(octets, count=block * bits, bitorder="little").reshape(block, bits)
        padded = np.pad(np.packbits(each, axis=1, bitorder="little"), ((0, 0), (0, 4 - -(-bits // 8))))
        numbers[start : start + block] = padded.view("<u4").reshape(-1)
    return numbers


def _pieces(borders: Sequence[int]) -> Iterator[slice]:
    return (slice(start, end) for start, end in pairwise(borders))
