"""Replies of a site as files: on the disk before the ledger lets them leave, and kept until it forgets them."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

FOLDER = "replies"


def path_of(state: Path, sequence: int, sha256: str) -> Path:
    """Return where the reply to a reservation lies; its hash is in the name, so two replies never share a file."""
    return state / FOLDER / f"{sequence:012d}-{sha256[:16]}.reply"


def write(state: Path, sequence: int, reply: bytes) -> str:
    """Write a reply, with its file and its folder on the disk before this returns; return its SHA-256."""
    sha256 = hashlib.sha256(reply).hexdigest()
    path = path_of(state, sequence, sha256)
    # Two that answer the same message must not write into one file.
    partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(reply)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return sha256


def read(state: Path, sequence: int, sha256: str) -> bytes | None:
    """Return the reply that was committed with this hash, or None if the file is lost or changed."""
    try:
        reply = path_of(state, sequence, sha256).read_bytes()
    except FileNotFoundError:
        return None
    return reply if hashlib.sha256(reply).hexdigest() == sha256 else None


def forget(state: Path, sequences: set[int]) -> None:
    """Delete all files that belong to these reservations, half-written ones included."""
    for path in (state / FOLDER).iterdir():
        number = path.name.partition("-")[0]
        if number.isdecimal() and int(number) in sequences:
            path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Put the names that a folder holds on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
