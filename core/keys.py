"""Secret, keyed randomness: every draw is a function of (key, purpose), never of a global generator.

A key is 32 bytes. Children are derived with HMAC-SHA256 over the length-prefixed path, so no two paths collide.
A stream expands a key with AES-256 in counter mode (NIST SP 800-38A): whoever does not hold the key cannot tell
its output from uniform bits. Normal deviates come from Box and Muller's transform (1958): in float64 of 53-bit
uniforms, in float32 of 63 bits for the radius and 32 for the angle.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

KEY_BYTES = 32
_BLOCK = 2**15
_PAIRS = 2**14


@dataclass(frozen=True)
class Key:
    """32 secret bytes (or, by `from_seed`, public ones) from which randomness is derived by purpose."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(self.secret)}")

    @classmethod
    def fresh(cls) -> Key:
        """Return a key from the operating system's generator."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_seed(cls, seed: int) -> Key:
        """Return the public key of a seed: reproducible, and private towards nobody who knows the seed."""
        return cls(hashlib.sha256(f"bract public seed {seed}".encode()).digest())

    def child(self, *path: str | int) -> Key:
        """Return the key for a purpose, such as `key.child("noise", round, client)`."""
        message = b"".join(map(_prefixed, path))
        return Key(hmac.digest(self.secret, message, "sha256"))

    def stream(self) -> Stream:
        """Return the stream of this key, from its beginning."""
        return Stream(self)

    def integer(self, bits: int = 63) -> int:
        """Return an integer of at most 63 bits for libraries that take nothing but a seed."""
        return int.from_bytes(self.child("integer").secret[:8], "big") >> (64 - bits)


# Most parts are purposes and rounds, which come again for each client.
@lru_cache(maxsize=256, typed=True)
def _prefixed(part: str | int) -> bytes:
    kind = b"i" if isinstance(part, int) else b"s"
    raw = str(part).encode()
    return kind + len(raw).to_bytes(4, "big") + raw


class _Scratch(NamedTuple):
    """Memory of `Stream.single_blocks`, kept from call to call: getting it anew costs a model's step a fifth more."""

    zeros: memoryview
    raw: bytearray
    radii: NDArray[np.float32]
    pair: NDArray[np.float32]

    @classmethod
    def of(cls, pairs: int) -> _Scratch:
        """Return what blocks of so many pairs take; the cipher asks for 15 bytes more than it writes."""
        zeros, raw = memoryview(bytes(12 * pairs)), bytearray(12 * pairs + 15)
        return cls(zeros, raw, np.empty(pairs, np.float32), np.empty(2 * pairs, np.float32))


def single_rows(streams: Sequence[Stream], count: int) -> NDArray[np.float32]:
    """Return `count` standard normal float32 of each stream [streams, count], together those of `single_normals`."""
    if not streams or not 0 < count <= 2 * _PAIRS:
        return np.array([stream.single_normals(count) for stream in streams], np.float32).reshape(len(streams), count)
    half = -(-count // 2)
    raw = np.frombuffer(b"".join(stream.bytes(12 * half) for stream in streams), np.uint8).reshape(len(streams), -1)
    rows = np.empty((len(streams), 2 * half), np.float32)
    words, angles = raw[:, : 8 * half].view("<i8"), raw[:, 8 * half :].view("<i4")
    _box_muller(words, angles, np.empty(words.shape, np.float32), rows[:, :half], rows[:, half:])
    return rows[:, :count]


def _box_muller(
    words: NDArray[np.int64],
    angles: NDArray[np.int32],
    radius: NDArray[np.float32],
    cosines: NDArray[np.float32],
    sines: NDArray[np.float32],
) -> None:
    """Write the normals of signed words into `cosines` and `sines`, using `radius`; all are of one shape."""
    # Signed words: the processor turns them into floats several times as fast as unsigned ones.
    np.copyto(radius, words, casting="unsafe")
    # −2 ln |v / 2^63| = ln(2^126 / v²), without its infinity at 0.
    radius *= radius
    radius += np.float32(0.5)
    np.divide(np.float32(2.0**126), radius, out=radius)
    np.sqrt(np.log(radius, out=radius), out=radius)
    np.copyto(sines, angles, casting="unsafe")
    sines *= np.float32(np.pi * 2.0**-31)
    np.cos(sines, out=cosines)
    np.sin(sines, out=sines)
    cosines *= radius
    sines *= radius


class Stream:
    """The AES-256-CTR key stream of one key; each call takes the next bytes of it."""

    def __init__(self, key: Key) -> None:
        # A key's stream is used for nothing else, so the counter may start at zero.
        self._cipher = Cipher(algorithms.AES256(key.child("stream").secret), modes.CTR(bytes(16))).encryptor()
        self._scratch: _Scratch | None = None

    def bytes(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        return self._cipher.update(bytes(count))

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return the next `count` unsigned 64-bit words."""
        return np.frombuffer(self.bytes(8 * count), dtype="<u8").astype(np.uint64, copy=False)

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """Return `count` uniform float64 in (0, 1]: (k + 1/2) · 2^-53 of 53 random bits k, rounded to float64."""
        return ((self.words(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normals(self, count: int) -> NDArray[np.float64]:
        """Return `count` standard normal float64."""
        normals = np.empty(count + count % 2)
        # In blocks that stay in the processor's cache: three times as fast for a large model.
        for block in np.split(normals, range(_BLOCK, len(normals), _BLOCK)):
            half = len(block) // 2
            uniforms = self.uniforms(len(block))
            radius, angle = uniforms[:half], uniforms[half:]
            np.sqrt(-2.0 * np.log(radius, out=radius), out=radius)
            angle *= 2.0 * np.pi
            np.multiply(np.cos(angle), radius, out=block[:half])
            np.multiply(np.sin(angle), radius, out=block[half:])
        return normals[:count]

    def single_normals(self, count: int) -> NDArray[np.float32]:
        """Return `count` standard normal float32; see `single_blocks`."""
        normals, first = np.empty(count, np.float32), 0
        for block in self.single_blocks(count):
            normals[first : first + len(block)] = block
            first += len(block)
        return normals

    def single_blocks(self, count: int) -> Iterator[NDArray[np.float32]]:
        """Yield `count` standard normal float32 in blocks of 32,768, each valid until the next is asked for.

        A block of m numbers takes 12 bytes of the stream for each of ⌈m/2⌉ pairs: first a signed 64-bit word v each,
        for the radius √(−2 ln |v / 2⁶³|), then a signed 32-bit word w each, for the angle π·w / 2³¹; the cosines are
        its first half, the sines its second.

        Tails reach √(2·63·ln 2) = 9.3 deviations; a real normal lies beyond with probability 10⁻²⁰. All steps are
        rounded to float32: a number is off by a few 10⁻⁷ of its pair's radius, whose square is a multiple of 2⁻²³
        where it is small (and zero with probability 2⁻²⁵). An epsilon is proved of real numbers; what floating-point
        noise leaks besides (Mironov 2012) it does not cover.
        """
        if self._scratch is None or 2 * len(self._scratch.radii) < min(count, 2 * _PAIRS):
            self._scratch = _Scratch.of(min(_PAIRS, -(-count // 2)))
        zeros, raw, radii, pair = self._scratch
        for first in range(0, count, 2 * _PAIRS):
            size = min(2 * _PAIRS, count - first)
            half = -(-size // 2)
            self._cipher.update_into(zeros[: 12 * half], raw)
            radii_words, angle_words = np.frombuffer(raw, "<i8", half), np.frombuffer(raw, "<i4", half, 8 * half)
            _box_muller(radii_words, angle_words, radii[:half], pair[:half], pair[half : 2 * half])
            yield pair[:size]

    def bernoulli(self, count: int, rate: float) -> NDArray[np.bool_]:
        """Return `count` independent draws that are true with probability `rate`: a Poisson sample of indices."""
        return self.uniforms(count) < rate

    def permutation(self, count: int) -> NDArray[np.int64]:
        """Return a uniform permutation of range(count) (two of 64-bit sort keys are equal with negligible chance)."""
        return np.argsort(self.words(count), kind="stable").astype(np.int64, copy=False)

    def sample(self, population: int, count: int) -> NDArray[np.int64]:
        """Return `count` distinct integers of range(population), all of them at most; every set is equally likely.

        The first distinct ones of a sequence of uniform draws: its cost is that of the sample, not of the population.
        """
        count = min(count, population)
        limit = 2**64 - 2**64 % population
        found: NDArray[np.int64] = np.empty(0, np.int64)
        while len(found) < count:
            words = self.words(2 * (count - len(found)) + 16)
            if limit < 2**64:
                words = words[words < np.uint64(limit)]
            drawn = np.concatenate([found, (words % np.uint64(population)).astype(np.int64)])
            _, firsts = np.unique(drawn, return_index=True)
            found = drawn[np.sort(firsts)][:count]
        return found

    def below(self, bound: int) -> int:
        """Return one uniform integer in [0, bound), exactly, by rejection."""
        if bound < 1:
            raise ValueError("bound must be at least 1")
        width = (bound.bit_length() + 7) // 8
        limit = (256**width // bound) * bound
        while True:
            draw = int.from_bytes(self.bytes(width), "big")
            if draw < limit:
                return draw % bound
