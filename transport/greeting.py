"""Hello: what a client tells a server when it joins. All of it is public."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import RunError
from . import federation_pb2 as pb
from .federation_pb2 import Head
from .records import read_values, write_values
from .wire import OLDEST, PROTOCOL, head_of, shown

_OWN = ("protocol", "bract", "task", "data", "ledger")


@dataclass(frozen=True, kw_only=True)
class Hello:
    """A client's first words. `ledger` is the head of its ledger as a JSON object, `capabilities` what it allows.

    `name` is believed only where there are no certificates.
    """

    bract: str
    task: str = ""
    data: str = ""
    ledger: Mapping[str, Any] | None = None
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    protocol: int = PROTOCOL

    @classmethod
    def of(cls, public: Mapping[str, Any], *, name: str = "") -> Hello:
        """Return the hello of what `Site.hello()` says: five keys that all have, the rest as capabilities."""
        rest = {key: value for key, value in public.items() if key not in _OWN and value is not None}
        return cls(
            bract=str(public.get("bract", "")),
            task=str(public.get("task", "")),
            data=str(public.get("data", "")),
            ledger=public.get("ledger"),
            capabilities=rest,
            name=name,
        )

    def write(self, *, instance: bytes, holds: Sequence[str]) -> pb.Hello:
        """Return the message that says so."""
        return pb.Hello(
            protocol=self.protocol,
            bract=self.bract,
            name=self.name,
            instance=instance,
            task=self.task,
            data=self.data,
            ledger=head_from(self.ledger),
            capabilities=write_values(dict(self.capabilities), _small),
            holds=holds,
        )

    @classmethod
    def read(cls, said: pb.Hello) -> Hello:
        """Return what was said; RunError `frame-invalid`."""
        return cls(
            protocol=said.protocol,
            bract=shown(said.bract),
            name=said.name,
            task=shown(said.task),
            data=shown(said.data),
            ledger=head_of(said.ledger),
            capabilities=read_values(said.capabilities),
        )


def refuse_version(protocol: int, theirs: str, ours: str, *, side: str) -> None:
    """Raise RunError `protocol-unsupported` unless the other side, "server" or "client", speaks what this side does."""
    if not OLDEST <= protocol <= PROTOCOL:
        raise RunError(
            "protocol-unsupported",
            f"the {side} (bract {shown(theirs, 40)}) speaks protocol {protocol}, this side (bract {ours}) "
            f"{OLDEST} to {PROTOCOL}; install a version that both have",
        )


def head_from(head: Mapping[str, Any] | None) -> Head:
    """Return a ledger's head as it is sent."""
    return Head(sequence=head["sequence"], mac=head["mac"]) if head else Head()


def _small(owner: object, data: memoryview) -> pb.Segment:
    raise TypeError("a hello holds no bytes and no lists of numbers")
