"""The chain of a ledger: each entry carries a MAC over itself and its predecessor under the site's key.

HMAC-SHA256 (FIPS 198-1). A seal, a MAC over the number and the MAC of the last entry, ends the chain, so that a tail
cannot be cut off unnoticed. Who holds the key can write any chain; who can put back an older copy of the whole ledger
is found out only by `Head`, which the server keeps.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import Refusal

KEY_FILE = "ledger.key"
KEY_BYTES = 32
START = bytes(32)
"""What stands for the predecessor of the first entry."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """The number and the MAC of a ledger's last entry: what travels to the server and comes back in its hello."""

    sequence: int
    mac: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {"sequence": self.sequence, "mac": self.mac}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Head:
        """Return the head of a JSON object that `to_dict` made."""
        return cls(sequence=int(value["sequence"]), mac=str(value["mac"]))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the ledger: `body` is canonical JSON."""

    sequence: int
    kind: str
    body: str
    mac: bytes


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What `verify` found wrong, and at which entry (None: not at one of them)."""

    sequence: int | None
    what: str


@dataclass(frozen=True)
class SiteKey:
    """The 32 bytes under which a site's chain is made."""

    secret: bytes = field(repr=False)

    def entry(self, previous: bytes, sequence: int, kind: str, body: str) -> bytes:
        """Return the MAC of an entry after one whose MAC is `previous`."""
        return self.mac("entry", previous, sequence.to_bytes(8, "big"), kind.encode(), body.encode())

    def seal(self, sequence: int, mac: bytes) -> bytes:
        """Return the seal of a chain that ends with this entry."""
        return self.mac("seal", sequence.to_bytes(8, "big"), mac)

    def mac(self, purpose: str, *parts: bytes) -> bytes:
        """Return the MAC of length-prefixed parts, so that no two lists of parts are one text."""
        text = b"".join(len(part).to_bytes(8, "big") + part for part in (purpose.encode(), *parts))
        return hmac.new(self.secret, text, hashlib.sha256).digest()


def same(one: bytes, other: object) -> bool:
    """Compare a MAC with what a file holds, without telling by time where they differ."""
    return isinstance(other, bytes) and hmac.compare_digest(one, other)


def flaws(key: SiteKey, entries: Iterable[Entry], seal: tuple[object, object] | None) -> Iterator[Finding]:
    """Yield what is wrong with a whole chain and its seal (number of the last entry, MAC), in order."""
    previous, last = START, 0
    for entry in entries:
        if entry.sequence != last + 1:
            yield Finding(sequence=entry.sequence, what=f"entries {last + 1} to {entry.sequence - 1} are missing")
        if not same(key.entry(previous, entry.sequence, entry.kind, entry.body), entry.mac):
            yield Finding(
                sequence=entry.sequence, what="its MAC does not fit: it, or the entry before it, was changed or moved"
            )
        previous, last = entry.mac, entry.sequence
    if seal is None:
        yield Finding(sequence=None, what="the seal of the last entry is missing")
    elif not (seal[0] == last and same(key.seal(last, previous), seal[1])):
        yield Finding(
            sequence=None, what=f"the seal is not that of entry {last}: entries after it were cut off, or added to it"
        )


def write_key(folder: Path) -> SiteKey:
    """Make the key file of a new ledger, readable by its owner alone; FileExistsError if there is one."""
    secret = secrets.token_bytes(KEY_BYTES)
    handle = os.open(folder / KEY_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    return SiteKey(secret)


def read_key(folder: Path) -> SiteKey:
    """Return the key of a ledger; Refusal if it is missing, not 32 bytes long, or open to other users."""
    path = folder / KEY_FILE
    try:
        with open(path, "rb") as file:
            mode, secret = os.fstat(file.fileno()).st_mode, file.read(KEY_BYTES + 1)
    except OSError as error:
        raise Refusal(
            "ledger-unreadable",
            f"{path}: cannot be read ({error.strerror}); restore the key that belongs to the ledger",
        ) from error
    if len(secret) != KEY_BYTES:
        raise Refusal("ledger-unreadable", f"{path}: is no ledger's key; restore the one that belongs to the ledger")
    if mode & 0o077:
        raise Refusal("ledger-unreadable", f"{path}: other users may read it; run chmod 600 on it")
    return SiteKey(secret)
