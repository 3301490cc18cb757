"""What a site keeps in its state directory beside the ledger: its log, its data sets' random ids, clients' states.

All files are for their owner alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import secrets
import traceback
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict

from ...core import flower
from ...core.errors import Refusal
from ...core.trees import pack, unpack
from ...privacy.ledger.replies import sync

LOG_FILE = "site.log"
IDS_FILE = "data-sets.json"
LOCK_FILE = "site.lock"
CONTEXTS = "contexts"
_LOG_BYTES = 10_000_000


class StateLock:
    """The one site that is open in a state directory, in any process: held until it is closed or its process ends.

    Refusal `ledger-unwritable` if another one holds it. The ledger itself may be read, and opened, beside it.
    """

    def __init__(self, state: Path) -> None:
        path = state / LOCK_FILE
        try:
            # Not inherited by programs that this process starts, which would hold it beyond its end.
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Refusal("ledger-unwritable", f"{path}: cannot be written ({error.strerror})") from error
        try:
            # Of the open file, not of the process: two sites in one process exclude each other too.
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._handle)
            raise Refusal(
                "ledger-unwritable",
                f"STATE = {state}: another bract client is at work in it; end that one, or give this one a state "
                "directory of its own",
            ) from error

    def release(self) -> None:
        """Let the next one in."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class SiteLog:
    """The owner's log, `site.log`: full texts and traces, which never leave. A hostile server cannot fill the disk."""

    def __init__(self, state: Path) -> None:
        self._handler = _PrivateFile(state / LOG_FILE, maxBytes=_LOG_BYTES, backupCount=1, delay=True, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._logger = logging.Logger("bract.site")
        self._logger.addHandler(self._handler)

    def note(self, text: str) -> None:
        """Write a line."""
        self._logger.info(text)

    def failure(self, text: str, error: Exception) -> None:
        """Write a line and the trace of an error."""
        self._logger.error("%s\n%s", text, "".join(traceback.format_exception(error)).rstrip())

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


class _PrivateFile(RotatingFileHandler):
    def _open(self) -> io.TextIOWrapper:
        handle = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return os.fdopen(handle, "a", encoding=self.encoding)

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop what cannot be written, on a full disk say: logging would print it, and it may hold records."""


def data_id(state: Path, name: str) -> str:
    """Return the random id under which a server knows a data set: drawn once, and no function of data or name."""
    path = state / IDS_FILE
    try:
        known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        if name not in known:
            known[name] = secrets.token_hex(16)
            write_private(path, json.dumps(known, indent=1).encode())
        return known[name]
    except (OSError, ValueError, AttributeError) as error:
        raise Refusal(
            "ledger-unreadable", f"{path}: cannot be read or written ({error}); restore or delete it"
        ) from error


def pack_reply(reply: Message, kept: RecordDict) -> bytes:
    """Return the bytes that the ledger commits: a reply's records, and what the client keeps once it has left."""
    return pack({"reply": flower.state_to_tree(reply.content), "kept": flower.state_to_tree(kept)})


def unpack_reply(packed: bytes, message: Message) -> tuple[Message, RecordDict]:
    """Return the reply to a message, and what the client keeps, from the bytes that were committed."""
    tree = unpack(packed)
    return Message(flower.tree_to_state(tree["reply"]), reply_to=message), flower.tree_to_state(tree["kept"])


class KeptStates:
    """What a client keeps between rounds, for each run: a file that follows the latest committed reply.

    The reply holds it too, so a kill between commit and file loses nothing that the server asks for again.
    """

    def __init__(self, state: Path) -> None:
        self._folder = state / CONTEXTS

    def load(self, run: str) -> tuple[int, RecordDict]:
        """Return the number of the reservation that a run's state stems from (0 before any), and the state."""
        path = self._path(run)
        if not path.exists():
            return 0, RecordDict()
        tree: dict[str, Any] = unpack(path.read_bytes())
        return int(tree["sequence"]), flower.tree_to_state(tree["kept"])

    def follow(self, run: str, sequence: int, kept: RecordDict) -> None:
        """Put down the state after a reservation, unless a later one's is there."""
        if not kept or sequence < self.load(run)[0]:
            return
        self._folder.mkdir(mode=0o700, exist_ok=True)
        write_private(self._path(run), pack({"sequence": sequence, "kept": flower.state_to_tree(kept)}))

    def _path(self, run: str) -> Path:
        # A server names its runs, and may not name files.
        return self._folder / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.state"


def write_private(path: Path, content: bytes) -> None:
    """Write a file for its owner alone, so that a kill leaves the old content or the new."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync(path.parent)
