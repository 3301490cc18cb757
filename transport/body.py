"""A message as bytes: a manifest, and the raw segments that it names, straight from and into contiguous buffers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from flwr.app import Error, RecordDict
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from ..core.errors import RunError
from .ahead import STRETCH, Ahead
from .federation_pb2 import Header, Manifest, Segment
from .records import Segments, read_records, segments_of, write_records
from .wire import MANIFEST, PIECE, piece, shown

ALIGNED = 64
_NOTHING = memoryview(bytes(ALIGNED))
_CHUNK = 16 << 20


@dataclass(kw_only=True)
class Digests:
    """The SHA-256 of arrays that several messages share: a broadcast is read once, whatever each is wrapped in."""

    known: dict[int, tuple[object, bytes]] = field(default_factory=dict)

    def of(self, owner: object, data: memoryview) -> bytes:
        """Return the digest of an object's bytes."""
        if id(owner) not in self.known:
            # The object is kept, so that no other gets its id.
            self.known[id(owner)] = owner, hashlib.sha256(data).digest()
        return self.known[id(owner)][1]


@dataclass(frozen=True, kw_only=True)
class Body:
    """A message's content to be sent, any number of times: the manifest and views of the senders' own buffers."""

    manifest: bytes
    segments: tuple[memoryview, ...]
    sha256: bytes
    size: int

    @classmethod
    def of(cls, content: RecordDict, digests: Digests | None = None) -> Body:
        """Return the body of records; RunError `reply-invalid` for what cannot be sent."""
        digests = digests or Digests()
        segments: list[memoryview] = []

        def keep(owner: object, data: memoryview) -> Segment:
            segments.append(data)
            return Segment(size=data.nbytes, sha256=digests.of(owner, data))

        return cls._of(Manifest(records=write_records(content, keep)), segments)

    @classmethod
    def of_error(cls, error: Error) -> Body:
        """Return the body of an error reply."""
        manifest = Manifest()
        manifest.failure.code, manifest.failure.reason = error.code, (error.reason or "")[:1000]
        return cls._of(manifest, [])

    @classmethod
    def _of(cls, manifest: Manifest, segments: list[memoryview]) -> Body:
        written = manifest.SerializeToString(deterministic=True)
        if len(written) > MANIFEST:
            raise RunError("message-too-large", f"a manifest of {len(written)} bytes; {MANIFEST} are the most")
        size = len(written)
        for data in segments:
            size = aligned(size) + data.nbytes
        return cls(manifest=written, segments=tuple(segments), sha256=hashlib.sha256(written).digest(), size=size)

    def pieces(self) -> Iterator[bytes]:
        """Return the frames of the pieces, each made when it is asked for."""
        parts: list[memoryview] = []
        held = 0
        for data in self._parts():
            while len(data):
                taken = data[: PIECE - held]
                data = data[len(taken) :]
                parts.append(taken)
                held += len(taken)
                if held == PIECE:
                    yield piece(parts, held)
                    parts, held = [], 0
        if held:
            yield piece(parts, held)

    def _parts(self) -> Iterator[memoryview]:
        yield memoryview(self.manifest)
        end = len(self.manifest)
        for data in self.segments:
            yield _NOTHING[: aligned(end) - end]
            yield data
            end = aligned(end) + data.nbytes


class Incoming:
    """A message that arrives piece by piece in one buffer, which its arrays are then views of."""

    def __init__(self, header: Header, *, limit: int) -> None:
        """Make room for what a header announces; RunError `message-too-large` or `frame-invalid`."""
        if header.size > limit:
            raise RunError("message-too-large", f"a message of {header.size} bytes; {limit} are allowed here")
        if header.manifest > min(header.size, MANIFEST):
            raise RunError("frame-invalid", f"a manifest of {header.manifest} bytes in {header.size}")
        self.header = header
        self._room = np.empty(header.size + ALIGNED, np.uint8)
        start = -self._room.ctypes.data % ALIGNED
        self._buffer = self._room[start : start + header.size]
        self._view = self._buffer.data
        self._filled = 0
        self._ahead: Ahead | None = None
        self._asked = 0

    @property
    def remaining(self) -> int:
        """Bytes that are still to come."""
        return self.header.size - self._filled

    def add(self, data: memoryview) -> None:
        """Take the next piece; RunError `frame-invalid` if it is not as long as it must be."""
        if len(data) != min(PIECE, self.remaining):
            raise RunError("frame-invalid", f"a piece of {len(data)} bytes, with {self.remaining} to come")
        self._view[self._filled : self._filled + len(data)] = data
        self._filled += len(data)

    @property
    def worth_hashing(self) -> bool:
        """Whether enough has arrived since `hash_ahead` for another turn of it."""
        return self._filled - max(self._asked, self.header.manifest) >= STRETCH

    def hash_ahead(self) -> None:
        """Hash what has arrived so far, in any thread, while further pieces are added."""
        self._asked = self._filled
        if self._ahead is None:
            self._ahead = Ahead(self._buffer, self._places())
        self._ahead.go_on(self._asked)

    def content(self) -> RecordDict | Error:
        """Return what arrived, once whole: verified, its arrays read-only views of the buffer.

        RunError `message-damaged` if a digest does not fit, `frame-invalid` if it is malformed.
        """
        manifest = self._manifest
        self.hash_ahead()
        segments = _Cut(self._buffer, self.header.manifest, self._verify)
        if manifest.HasField("failure"):
            found: RecordDict | Error = Error(manifest.failure.code, shown(manifest.failure.reason, 1000))
        else:
            found = read_records(manifest.records, segments)
        segments.finish()
        return found

    @cached_property
    def _manifest(self) -> Manifest:
        written = self._view[: self.header.manifest]
        if hashlib.sha256(written).digest() != self.header.sha256:
            raise RunError("message-damaged", "the manifest does not have its SHA-256")
        try:
            manifest: Manifest = Manifest.FromString(bytes(written))
        except DecodeError as error:
            raise RunError("frame-invalid", "a manifest is not in the form of the protocol") from error
        return manifest

    def _places(self) -> list[tuple[int, int]]:
        """Return where the segments will lie; those of a message of which `content` will say what is wrong may lack."""
        found, end = list[tuple[int, int]](), self.header.manifest
        try:
            manifest = self._manifest
        except RunError:
            return []
        for segment in segments_of(manifest.records):
            start = aligned(end)
            end = start + segment.size
            if end > self._buffer.size:
                break
            found.append((start, segment.size))
        return found

    def _verify(self, start: int, segment: Segment) -> None:
        assert self._ahead is not None
        if self._ahead.digest(start, segment.size) != segment.sha256:
            raise RunError("message-damaged", "a segment does not have its SHA-256")


class _Cut(Segments):
    """The segments of a buffer, cut one after the other; `check` is given the start of each before it is read."""

    def __init__(self, buffer: NDArray[np.uint8], start: int, check: Callable[[int, Segment], None]) -> None:
        self._buffer, self._end, self._check = buffer, start, check

    def take(self, segment: Segment, size: int) -> NDArray[np.uint8]:
        start = aligned(self._end)
        if segment.size != size or start + size > self._buffer.size:
            raise RunError("frame-invalid", f"a segment of {segment.size} bytes where {size} belong")
        self._end = start + size
        self._check(start, segment)
        return self._buffer[start : self._end]

    def rest(self) -> int:
        return self._buffer.size - self._end

    def finish(self) -> None:
        if self._end != self._buffer.size:
            raise RunError("frame-invalid", f"{self._buffer.size - self._end} bytes that no segment names")


def aligned(offset: int) -> int:
    """Return the next multiple of 64: tensors lie where processors read them fast."""
    return -(-offset // ALIGNED) * ALIGNED
