"""A client's replies on their way in: offered, permitted, received, verified and put down, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Error, Message, RecordDict

from ...core import flower
from ...core.errors import RunError
from ...transport.federation_pb2 import Header, Permit, Receipt
from ...transport.receiving import Receiving
from ...transport.wire import Limits, control, head_of
from .errands import Errand, Waiting
from .roster import MOST_TRIES, Client, Roster


class Uploads:
    """What comes over one stream; `say` sends a control frame to its client."""

    def __init__(self, roster: Roster, limits: Limits, say: Callable[[bytes], None]) -> None:
        self._roster, self._limits, self._say = roster, limits, say
        self._current: _Upload | None = None
        self._swallow = False

    def stalled(self, seconds: float) -> bool:
        """Return whether a reply under way has not moved for so long."""
        return self._current is not None and self._roster.now() - self._current.moved > seconds

    def reject(self, client: Client, errand: Errand) -> None:
        """Tell the client that a reply which it offered, or is sending, is not wanted any more."""
        client.abandoned.discard(errand.id)
        if self._current is not None and self._current.errand is errand:
            self.give_back()
            self._swallow = True
        self.receipt(errand.id, "reply-unknown")

    def offer(self, client: Client, header: Header) -> None:
        """Put a reply that a client offers in line, or tell it that nobody waits for it."""
        if self._current is not None:
            raise RunError("frame-invalid", "a second upload before the first has ended")
        self._swallow = False
        errand = client.errands.get(header.message)
        if errand is None or errand.state != "sent":
            client.abandoned.discard(header.message)
            self.receipt(header.message[:200], "reply-unknown")
        elif header.size > self._limits.message_bytes:
            limit = self._limits.message_bytes
            self._fail(errand, RunError("message-too-large", f"a reply of {header.size} bytes; {limit} are allowed"))
        else:
            errand.state = "offered"
            errand.mailbox.ask(
                Waiting(errand=errand, size=header.size, granted=lambda: self._granted(client, errand, header))
            )

    def _granted(self, client: Client, errand: Errand, header: Header) -> None:
        try:
            incoming = Receiving(header, limit=self._limits.message_bytes)
        except (RunError, MemoryError) as error:
            errand.mailbox.release(header.size)
            known = error if isinstance(error, RunError) else RunError("message-too-large", "the server has no memory")
            self._fail(errand, known)
            return
        errand.state = "uploading"
        self._current = _Upload(client=client, errand=errand, incoming=incoming, moved=self._roster.now())
        self._say(control(permit=Permit(message=errand.id)))
        if not header.size:
            self._settle(self._current, RecordDict())

    async def piece(self, data: memoryview) -> None:
        """Take a piece of the reply that was permitted; RunError `frame-invalid` if there is none."""
        upload = self._current
        if upload is None:
            if self._swallow:
                return
            raise RunError("frame-invalid", "a piece of a message that was not permitted")
        upload.incoming.add(data)
        upload.moved = self._roster.now()
        if upload.incoming.remaining:
            return
        try:
            found = await upload.incoming.content()
        except RunError as error:
            if self._current is not upload:
                return
            errand = upload.errand
            self.give_back()
            errand.tries += 1
            if error.code == "message-damaged" and errand.tries < MOST_TRIES:
                errand.state = "sent"
                self.receipt(errand.id, error.code)
            else:
                self._fail(errand, error)
            return
        if self._current is upload:
            self._settle(upload, found)

    def _settle(self, upload: _Upload, found: RecordDict | Error) -> None:
        """Put down a reply that is whole and verified, and its permit with it."""
        client, errand, header = upload.client, upload.errand, upload.incoming.header
        assert client.hello is not None
        self._current = None
        head = head_of(header.ledger)
        if head is not None:
            self._roster.heads[client.name, client.hello.data] = head
        self.receipt(errand.id, "")
        if isinstance(found, Error):
            self._roster.notice("failed", client.name, *flower.code_and_sentence(found))
        # The server's own message is what is replied to: what the client says of sender and receiver is never read.
        self._roster.deliver(errand, Message(found, reply_to=errand.message), header.size)

    def _fail(self, errand: Errand, error: RunError) -> None:
        """Take a reply that cannot be read for the client's failure."""
        errand.state = "waiting"
        self.receipt(errand.id, error.code)
        self._roster.fail(errand, error.code, error.sentence)

    def receipt(self, message: str, code: str) -> None:
        """Tell the client that a reply is here, or by which code it is not wanted."""
        self._say(control(receipt=Receipt(message=message, code=code)))

    def give_back(self) -> None:
        """Give up the reply under way, and its permit."""
        if self._current is not None:
            self._current.errand.mailbox.release(self._current.incoming.header.size)
            self._current = None


@dataclass(kw_only=True)
class _Upload:
    client: Client
    errand: Errand
    incoming: Receiving
    moved: float
