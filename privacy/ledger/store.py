"""The SQLite file of a ledger: its tables, its pragmas, and its failures as refusals."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from ...core.errors import BractError, Refusal
from .chain import Entry

FILE = "ledger.sqlite"
APPLICATION_ID = 0x62726163  # "brac"
VERSION = 1

_TABLES = """
CREATE TABLE entries (sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, body TEXT NOT NULL, mac BLOB NOT NULL) STRICT;
CREATE TABLE seal (one INTEGER PRIMARY KEY CHECK (one = 1), sequence INTEGER NOT NULL, mac BLOB NOT NULL) STRICT;
CREATE TABLE secrets (sequence INTEGER PRIMARY KEY, secret BLOB NOT NULL) STRICT;
"""
_WAIT = 60.0


def create(path: Path) -> None:
    """Make an empty ledger file that its owner alone may read."""
    path.unlink(missing_ok=True)
    # The files that SQLite puts beside it take over its permissions.
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.executescript(
            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION};"
            f"PRAGMA journal_mode = WAL; {_TABLES}"
        )
    finally:
        connection.close()


def connect(path: Path) -> sqlite3.Connection:
    """Open a ledger file; Refusal if it is none, or of another version."""
    # Transactions are written out, and a lock of the ledger keeps its threads apart.
    connection = sqlite3.connect(
        f"file:{quote(str(path.resolve()))}?mode=rw",
        uri=True,
        timeout=_WAIT,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        ((found,),) = connection.execute("PRAGMA application_id").fetchall()
        ((version,),) = connection.execute("PRAGMA user_version").fetchall()
        if (found, version) != (APPLICATION_ID, VERSION):
            raise Refusal(
                "ledger-unreadable", f"{path}: is no ledger of this version of bract; restore the one that was here"
            )
        for pragma in (
            "synchronous = FULL",
            "fullfsync = ON",
            "checkpoint_fullfsync = ON",
            "secure_delete = ON",
            "trusted_schema = OFF",
        ):
            connection.execute(f"PRAGMA {pragma}")
        # A process that was killed may have left wiped bytes in the write-ahead log.
        checkpoint(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def entries(connection: sqlite3.Connection, *, after: int) -> Iterator[Entry]:
    """Yield the entries after a number, in order."""
    rows = connection.execute(
        "SELECT sequence, kind, body, mac FROM entries WHERE sequence > ? ORDER BY sequence", (after,)
    )
    for sequence, kind, body, mac in rows:
        yield Entry(sequence=sequence, kind=kind, body=body, mac=mac)


def seal(connection: sqlite3.Connection) -> tuple[object, object] | None:
    """Return the number and the MAC that end the chain."""
    row: tuple[object, object] | None = connection.execute("SELECT sequence, mac FROM seal").fetchone()
    return row


def secrets_held(connection: sqlite3.Connection) -> dict[int, bytes]:
    """Return the secret bytes of the reservations that are not committed."""
    return dict(connection.execute("SELECT sequence, secret FROM secrets").fetchall())


def checkpoint(connection: sqlite3.Connection) -> None:
    """Move the write-ahead log into the file and empty it: it still holds what was wiped since.

    Where it cannot (another process reads, the disk is full) the next one does: nothing is lost by it.
    """
    with suppress(sqlite3.OperationalError):
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


@contextmanager
def transaction(connection: sqlite3.Connection, kind: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[None]:
    """Run a transaction: the whole of it is on the disk, or nothing is."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        raise


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Turn what SQLite and the file system say into a Refusal: no ledger, no training."""
    try:
        yield
    except BractError:
        raise
    except sqlite3.OperationalError as error:
        raise Refusal(
            "ledger-unwritable",
            f"{folder / FILE}: cannot be written or locked ({error}); free the disk or the file, nothing was trained",
        ) from error
    except sqlite3.DatabaseError as error:
        raise Refusal(
            "ledger-unreadable", f"{folder / FILE}: is no ledger ({error}); restore the one that was here"
        ) from error
    except OSError as error:
        raise Refusal(
            "ledger-unwritable",
            f"{error.filename or folder}: cannot be written ({error.strerror}); nothing was trained or sent",
        ) from error
