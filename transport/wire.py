"""Frames as bytes, and their limits.

A frame is a `Frame` of federation.proto. The one kind that is frequent, a piece of a message, is written and read here
byte by byte: one copy each way, between the message's own buffer and what gRPC sends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError, Message

from ..core.errors import RunError
from .federation_pb2 import Farewell, Frame, Head

PROTOCOL = 1
"""The version that this side speaks; `OLDEST` is the oldest that it still understands."""
OLDEST = 1

METHOD = "/bract.transport.v1.Federation/Join"
DESCRIBE = "/bract.transport.v1.Federation/Describe"
PIECE = 1 << 20
"""Bytes of each piece of a message but its last."""
FRAME = PIECE + (1 << 12)
"""Bytes of the largest frame."""
CONTROL = 1 << 16
"""Bytes of the largest frame that is no piece."""
MANIFEST = 4 << 20
"""Bytes of the longest manifest: some 30,000 tensors."""
_TAG = 0x0A


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one side takes, in bytes and seconds.

    `message_bytes` is the size of one message. Uploads in flight take together at most `upload_bytes`, or there is only
    one. `greeting` is how long the first frame may take.
    """

    message_bytes: int = 8 << 30
    upload_bytes: int = 64 << 20
    uploads: int = 2
    streams: int = 2_000
    greeting: float = 10.0


def piece(parts: Iterable[memoryview], size: int) -> bytes:
    """Return the frame of a piece that is so many bytes long, given in parts."""
    prefix = bytearray([_TAG])
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    prefix.append(size)
    return b"".join((prefix, *parts))


def control(**kind: Message) -> bytes:
    """Return a frame of the one kind that is named."""
    frame: bytes = Frame(**kind).SerializeToString()
    return frame


def farewell(code: str, sentence: str = "", *, final: bool = False) -> bytes:
    """Return the last frame of a stream."""
    return control(farewell=Farewell(code=code, sentence=sentence[:1000], final=final))


def read(raw: bytes) -> Frame | memoryview:
    """Return what a frame holds: the bytes of a piece, or a Frame of any other kind; RunError `frame-invalid`."""
    if raw[:1] == bytes([_TAG]):
        size, start = 0, 1
        while start < min(len(raw), 5):
            byte = raw[start]
            size |= (byte & 0x7F) << 7 * (start - 1)
            start += 1
            if byte < 0x80:
                break
        if not 0 < size == len(raw) - start or size > PIECE:
            raise RunError("frame-invalid", f"a piece of {len(raw)} bytes is not as long as it says")
        return memoryview(raw)[start:]
    if len(raw) > CONTROL:
        raise RunError("frame-invalid", f"a frame of {len(raw)} bytes that is no piece of a message")
    try:
        frame: Frame = Frame.FromString(raw)
    except DecodeError as error:
        raise RunError("frame-invalid", "a frame is not in the form of the protocol") from error
    if frame.WhichOneof("kind") in (None, "piece"):
        raise RunError("frame-invalid", "a frame is of no kind that this version knows")
    return frame


def head_of(head: Head) -> dict[str, int | str] | None:
    """Return a ledger's head as the JSON object that a site makes of it, None for one without ledger."""
    return {"sequence": head.sequence, "mac": head.mac} if head.mac else None


def shown(text: str, longest: int = 200) -> str:
    """Return a text of the other side as it may be shown: in one line, without control characters, not too long."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:longest])
