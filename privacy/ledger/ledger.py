"""The owner's ledger: what the runs of a site have spent on each data set, for ever.

One SQLite file a site, in WAL mode with synchronous=FULL: what a call has returned is on the disk. Three rules:

- Reserve before the data is touched: `reserve` charges the event and draws 32 fresh bytes from the operating system,
  from which the noise and the batches of this message expand. The same request after a crash gets the same bytes and
  is charged once; any other is charged anew.
- Commit before the reply leaves: `commit` puts the reply on the disk, then the entry that holds its hash, and wipes the
  bytes. What it returns may leave; nothing else may.
- Every entry is chained (privacy/ledger/chain.py), and no call goes on over a chain that does not fit.

privacy/ledger/spending.py says what is counted. Nothing here needs NumPy, and only sampled events import it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from ...core.errors import InputError, Refusal
from . import admission, replies, store
from .book import Book, DataSetBudget, Request, Reservation, Spending
from .chain import KEY_BYTES, KEY_FILE, Entry, Finding, Head, SiteKey, flaws, read_key, same, write_key
from .events import canonical


class Ledger:
    """The ledger in a site's state directory; safe for threads and for several processes."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, key: SiteKey, clock: Callable[[], float]) -> None:
        self._folder, self._connection, self._key, self._clock = folder, connection, key, clock
        self._book = Book()
        self._lock = threading.RLock()

    @classmethod
    def create(cls, folder: Path, *, clock: Callable[[], float] = time.time) -> Self:
        """Make the ledger, its key and the folder of its replies; InputError if there is one, or was one."""
        for name in (store.FILE, KEY_FILE):
            if (folder / name).exists():
                raise InputError("ledger-exists", f"STATE = {folder}: already holds {name}; what is spent stays spent")
        with store.refusing(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / replies.FOLDER).mkdir(exist_ok=True, mode=0o700)
            partial = folder / f"{store.FILE}.partial"
            # Refuses if another process is about to make one; only then may a failure clear away what is here.
            key = write_key(folder)
            try:
                store.create(partial)
                made = cls(folder, store.connect(partial), key, clock)
                with made._writing(new=True) as append:
                    append("init", {"ledger": secrets.token_hex(16)})
                made.close()
                os.replace(partial, folder / store.FILE)
                replies.sync(folder)
            except BaseException:
                for path in (partial, folder / KEY_FILE):
                    path.unlink(missing_ok=True)
                raise
        return cls.open(folder, clock=clock)

    @classmethod
    def open(cls, folder: Path, *, clock: Callable[[], float] = time.time) -> Self:
        """Open a ledger; Refusal if there is none, or it cannot be read. Its chain is checked at the first call."""
        if not (folder / store.FILE).is_file():
            raise Refusal(
                "ledger-missing",
                f"STATE = {folder}: holds no {store.FILE}; `bract ledger init {folder}` makes one",
            )
        key = read_key(folder)
        with store.refusing(folder):
            return cls(folder, store.connect(folder / store.FILE), key, clock)

    def close(self) -> None:
        """Close the file; a ledger that is not closed loses nothing."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def declare(self, budget: DataSetBudget) -> None:
        """Record the owner's budget for a data set, if it is news.

        Errors: Refusal if unit or relation of a budget would change that was drawn on.
        """
        with self._writing() as append:
            known = self._book.budgets.get(budget.name)
            if known == budget:
                return
            admission.check_budget(self._book, budget)
            append("budget", asdict(budget))

    def reserve(self, request: Request) -> Reservation:
        """Charge a request, or find it charged before; its reply if it was committed.

        Errors: Refusal if the budget, the plan of the run or the message's own past say no.
        """
        with self._writing() as append:
            book = self._book
            admission.check_message(book, request)
            earlier = book.by_message.get((request.data_set, request.run, request.message_id), [])
            answered = [number for number in earlier if number in book.replies]
            found = answered[0] if answered else book.by_content.get(request.content)
            if found is not None:
                admission.check_same(book, request, book.reserved[found])
                return self._reserved_before(found)
            admission.check(book, request)
            if (request.data_set, request.run) not in book.plans:
                append("plan", {"data_set": request.data_set, "run": request.run, "plan": request.plan.to_dict()})
            secret = secrets.token_bytes(KEY_BYTES)
            # A secret that was put in its place would be a known noise.
            mac = self._key.mac("secret", secret).hex()
            sequence = append("reserve", request.to_dict() | {"secret_mac": mac})
            self._connection.execute("INSERT INTO secrets VALUES (?, ?)", (sequence, secret))
        return Reservation(sequence=sequence, secret=secret, reply=None)

    def commit(self, reservation: Reservation, reply: bytes) -> bytes:
        """Put a reply on the disk and record it; return the bytes that may leave (an earlier reply if there is one)."""
        number = reservation.sequence
        with store.refusing(self._folder):
            sha256 = replies.write(self._folder, number, reply)
        with self._writing() as append:
            if number not in self._book.reserved:
                raise ValueError(f"reservation = {number}: is none of this ledger")
            known = self._book.replies.get(number)
            gone = self._book.is_forgotten(number)
            if gone or known not in (None, sha256):
                replies.path_of(self._folder, number, sha256).unlink(missing_ok=True)
            if gone or known is not None:
                earlier = self._reserved_before(number).reply
                assert earlier is not None
                return earlier
            append("commit", {"reservation": number, "reply_sha256": sha256, "reply_bytes": len(reply)})
            self._connection.execute("DELETE FROM secrets WHERE sequence = ?", (number,))
        self._wipe()
        return reply

    def forget_replies(self, data_set: str, run: str, up_to_round: int) -> None:
        """Delete the replies of rounds that the server has checkpointed, and the bytes of what was never committed.

        What a server says of rounds or runs that this data set never saw is not recorded.
        """
        with self._writing() as append:
            of_run = {number: held.round for number, held in self._book.reserved_of(data_set, run).items()}
            up_to_round = min(up_to_round, max(of_run.values(), default=-1))
            if up_to_round > self._book.forgotten.get((data_set, run), -1):
                append("forget", {"data_set": data_set, "run": run, "up_to_round": up_to_round})
            gone = {number for number, round in of_run.items() if round <= up_to_round}
            self._connection.executemany("DELETE FROM secrets WHERE sequence = ?", [(number,) for number in gone])
        self._wipe()
        with store.refusing(self._folder):
            replies.forget(self._folder, gone)

    def head(self) -> Head:
        """Return what travels with each reply and comes back in the server's hello."""
        with self._reading():
            return Head(sequence=self._book.sequence, mac=self._book.mac.hex())

    def refuse_rollback(self, head: Head) -> None:
        """Raise Refusal unless this ledger holds the entry that the server has seen: else an older copy is back."""
        with self._reading():
            latest = self._book.sequence
            # A server may say any number; SQLite takes 64 bits.
            known = min(max(head.sequence, -1), latest)
            row = self._connection.execute("SELECT mac FROM entries WHERE sequence = ?", (known,)).fetchone()
        if head.sequence > latest:
            raise Refusal(
                "ledger-rolled-back",
                f"{self._folder / store.FILE}: ends with entry {latest}, but the server has seen entry "
                f"{head.sequence}; restore the latest copy of the ledger",
            )
        if row is None or row[0].hex() != head.mac:
            raise Refusal(
                "ledger-rolled-back",
                f"{self._folder / store.FILE}: its entry {head.sequence} is not the one that the server has seen; "
                "restore the ledger that this site used then",
            )

    def data_sets(self) -> tuple[str, ...]:
        """Return the names of the data sets that have a budget."""
        with self._reading():
            return tuple(sorted(self._book.budgets))

    def spending(self, data_set: str) -> Spending:
        """Return what a data set has spent and what is left; Refusal if it has no budget."""
        with self._reading():
            admission.check_declared(self._book, data_set)
            return self._book.spending(data_set)

    def verify(self) -> list[Finding]:
        """Return all that is wrong with the chain, the replies and the secrets; an empty list if nothing is."""
        with self._lock, store.refusing(self._folder), store.transaction(self._connection, "DEFERRED"):
            entries = list(store.entries(self._connection, after=0))
            found = list(flaws(self._key, entries, store.seal(self._connection)))
            book = Book()
            for entry in entries:
                try:
                    book.add(entry)
                except (KeyError, TypeError, ValueError) as error:
                    found.append(Finding(sequence=entry.sequence, what=f"it cannot be read ({error})"))
            held = store.secrets_held(self._connection)
        for number in book.reserved:
            kept = not book.is_forgotten(number)
            sha256, secret = book.replies.get(number), held.pop(number, None)
            if kept and sha256 is not None and replies.read(self._folder, number, sha256) is None:
                found.append(Finding(sequence=number, what="its reply is lost or changed"))
            if kept and sha256 is None and not self._is_secret(book, number, secret):
                found.append(Finding(sequence=number, what="its secret bytes are lost or changed"))
            if secret is not None and (sha256 is not None or not kept):
                found.append(Finding(sequence=number, what="its secret bytes were not wiped"))
        found += [Finding(sequence=number, what="secret bytes of no reservation") for number in held]
        return found

    def _reserved_before(self, number: int) -> Reservation:
        if self._book.is_forgotten(number):
            raise Refusal(
                "reply-forgotten",
                f"message {self._book.reserved[number].message_id}: the server said that it has the reply, which is "
                "deleted; resume the run from its latest checkpoint",
            )
        sha256 = self._book.replies.get(number)
        if sha256 is None:
            secret = store.secrets_held(self._connection).get(number)
            if not self._is_secret(self._book, number, secret):
                raise self._tampered(number, "its secret bytes are lost or changed")
            return Reservation(sequence=number, secret=secret, reply=None)
        reply = replies.read(self._folder, number, sha256)
        if reply is None:
            path = replies.path_of(self._folder, number, sha256)
            raise Refusal("ledger-unreadable", f"{path}: the reply is lost or changed; restore it, or start a new run")
        return Reservation(sequence=number, secret=None, reply=reply)

    def _is_secret(self, book: Book, number: int, secret: bytes | None) -> bool:
        return secret is not None and self._key.mac("secret", secret).hex() == book.reserved[number].secret_mac

    def _wipe(self) -> None:
        with self._lock:
            store.checkpoint(self._connection)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock, store.refusing(self._folder), store.transaction(self._connection, "DEFERRED"):
            self._catch_up()
            yield

    @contextlib.contextmanager
    def _writing(self, *, new: bool = False) -> Iterator[Callable[[str, dict[str, Any]], int]]:
        """Hold the only right to write, and give what appends an entry and returns its number."""
        with self._lock, store.refusing(self._folder), store.transaction(self._connection, "IMMEDIATE"):
            if not new:
                self._catch_up()
            sequence, previous = self._book.sequence, self._book.mac

            def append(kind: str, body: dict[str, Any]) -> int:
                nonlocal sequence, previous
                when = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="seconds")
                sequence, text = sequence + 1, canonical(body | {"time": when})
                previous = self._key.entry(previous, sequence, kind, text)
                self._connection.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", (sequence, kind, text, previous))
                return sequence

            yield append
            if sequence != self._book.sequence:
                mac = self._key.seal(sequence, previous)
                self._connection.execute("INSERT OR REPLACE INTO seal VALUES (1, ?, ?)", (sequence, mac))

    def _catch_up(self) -> None:
        """Take in what was written since, by any process; Refusal where the chain does not fit."""
        book = self._book
        if book.sequence:
            row = self._connection.execute("SELECT mac FROM entries WHERE sequence = ?", (book.sequence,)).fetchone()
            if row is None or not same(book.mac, row[0]):
                raise self._tampered(book.sequence, "was changed or removed since this process read it")
        for entry in store.entries(self._connection, after=book.sequence):
            if entry.sequence != book.sequence + 1 or not same(self._mac_of(book.mac, entry), entry.mac):
                raise self._tampered(entry.sequence, "its MAC does not fit: entries were changed, removed or moved")
            try:
                book.add(entry)
            except (KeyError, TypeError, ValueError) as error:
                raise self._tampered(entry.sequence, f"it cannot be read ({error})") from error
        if store.seal(self._connection) != (book.sequence, self._key.seal(book.sequence, book.mac)):
            raise self._tampered(
                book.sequence, "the seal is not that of the last entry: the tail was cut off or added to"
            )

    def _mac_of(self, previous: bytes, entry: Entry) -> bytes:
        return self._key.entry(previous, entry.sequence, entry.kind, entry.body)

    def _tampered(self, sequence: int, what: str) -> Refusal:
        return Refusal(
            "ledger-tampered",
            f"{self._folder / store.FILE}: entry {sequence}: {what}; run `bract ledger verify {self._folder}`",
        )
