"""The announcement: what a server tells a client before it joins: the run's name and the experiment, never code."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from .. import __version__
from ..core.errors import RunError
from . import federation_pb2 as pb
from .greeting import refuse_version
from .wire import PROTOCOL, shown

LARGEST = 1 << 20
"""Bytes of the largest announcement that a client reads."""


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """A server's run: its name, the same after a resume, and its experiment as TOML.

    A client holds the experiment against its owner's policy before it builds anything of it.
    """

    run: str
    experiment: str

    @property
    def number(self) -> int:
        """The run's number, which a welcome holds: 63 bits of SHA-256 of its name.

        A client that meets another one knows that the server's run is no longer the one that it was told of.
        """
        return int.from_bytes(hashlib.sha256(f"bract run {self.run}".encode()).digest()[:8], "big") >> 1

    def write(self) -> bytes:
        """Return the answer to a question."""
        said = pb.Announcement(protocol=PROTOCOL, bract=__version__, run=self.run, experiment=self.experiment)
        raw: bytes = said.SerializeToString()
        return raw

    @classmethod
    def read(cls, raw: bytes) -> Announcement:
        """Return what was answered; RunError `frame-invalid` or `protocol-unsupported`."""
        try:
            said = pb.Announcement.FromString(raw[: LARGEST + 1])
        except DecodeError as error:
            raise RunError("frame-invalid", "the server's announcement is not in the form of the protocol") from error
        if len(raw) > LARGEST or not said.run:
            raise RunError("frame-invalid", "the server's announcement names no run, or is too large")
        refuse_version(said.protocol, said.bract, __version__, side="server")
        return cls(run=shown(said.run), experiment=said.experiment)


def question() -> bytes:
    """Return what a client asks."""
    raw: bytes = pb.Question(protocol=PROTOCOL, bract=__version__).SerializeToString()
    return raw


def refuse_question(raw: bytes) -> None:
    """Raise RunError `frame-invalid` or `protocol-unsupported` unless a client that asks so is understood."""
    try:
        said = pb.Question.FromString(raw)
    except DecodeError as error:
        raise RunError("frame-invalid", "a question is not in the form of the protocol") from error
    refuse_version(said.protocol, said.bract, __version__, side="client")
