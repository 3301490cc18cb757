"""The index of an authority: a line of JSON for each certificate that it ever issued."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from . import pem
from .certificates import Role

INDEX = "index.jsonl"


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A line of the index: a certificate that the authority has issued, and when (ISO 8601, UTC) it was revoked."""

    serial: str
    name: str
    role: Role
    hosts: tuple[str, ...] = ()
    issued: str
    expires: str
    key_fingerprint: str
    revoked: str | None = None
    folder: str | None = None

    def state(self, now: datetime) -> str:
        """Return "revoked", "expired" or "valid"."""
        if self.revoked:
            return "revoked"
        return "valid" if now <= datetime.fromisoformat(self.expires) else "expired"

    def to_dict(self, now: datetime) -> dict[str, Any]:
        """Return what may be shown, with the state."""
        shown = {key: value for key, value in asdict(self).items() if key != "folder"}
        return {**shown, "hosts": list(self.hosts), "state": self.state(now)}


def read_index(folder: Path) -> list[Issued]:
    """Return the lines of an authority's index, oldest first; InputError if it is missing or damaged."""
    path = folder / INDEX
    mend = "restore it from the authority's backup"
    content = pem.read(path, what="the index of certificates", mend=mend)
    try:
        lines = [json.loads(line) for line in content.splitlines()]
        return [Issued(**{**line, "hosts": tuple(line["hosts"])}) for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError("identity-unreadable", f"{path}: the index is damaged; {mend}") from error


def write_index(folder: Path, index: Sequence[Issued]) -> None:
    """Write the index whole; whoever calls holds the authority's lock."""
    lines = "".join(json.dumps(asdict(each)) + "\n" for each in index)
    pem.write(folder / INDEX, lines.encode(), mode=0o600)
