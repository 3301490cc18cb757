"""The roster: every client by name, whether it is there, and what is on its way to it. Lives in the listener's loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flwr.app import Message

from ...core import flower
from ...transport.federation_pb2 import Forget
from ...transport.greeting import Hello
from ...transport.wire import control
from ..grid import Arrival
from .errands import ClientStatus, Deadlines, Delivery, Errand, Mailbox

if TYPE_CHECKING:
    from .session import Session

MOST_TRIES = 5
Noticed = Callable[[str, str, str, str], None]
"""Called with what happened ("joined", "left", "refused", "failed"), whose name, a code and a sentence."""


@dataclass(kw_only=True, eq=False)
class Client:
    """A client that has joined, or that a message waits for."""

    node: int
    name: str = ""
    session: Session | None = None
    hello: Hello | None = None
    since: float
    errands: dict[str, Errand] = field(default_factory=dict)
    abandoned: set[str] = field(default_factory=set)
    stage: str = ""
    steps: int = 0

    @property
    def busy(self) -> bool:
        """Whether it holds a message without having offered its reply: it gets them one by one."""
        return bool(self.abandoned) or any(errand.state != "waiting" for errand in self.errands.values())

    def next(self) -> Errand | None:
        """Return what to send it now."""
        return None if self.busy else next(iter(self.errands.values()), None)


class Roster:
    """Who is there, and which messages are in flight. `now` is a monotonic clock in seconds."""

    def __init__(self, deadlines: Deadlines, now: Callable[[], float], notice: Noticed) -> None:
        self.deadlines = deadlines
        self.clients: dict[int, Client] = {}
        self.heads: dict[tuple[str, str], Mapping[str, Any]] = {}
        self.now = now
        self.notice = notice
        self.forget: Forget | None = None

    def join(self, session: Session, name: str, hello: Hello, holds: Iterable[str]) -> Client:
        """Put a session in a client's place, in that of an older one if there is one."""
        node = flower.node_id(name)
        client = self.clients.setdefault(node, Client(node=node, since=self.now()))
        if client.session is not None:
            older = client.session
            self.leave(client, older, "client-replaced")
            older.end("client-replaced", f"another process joined as {name}", final=True)
        client.name, client.session, client.hello, client.since = name, session, hello, self.now()
        client.stage, client.steps = "", 0
        held = set(holds)
        for errand in client.errands.values():
            errand.state = "sent" if errand.id in held and errand.tries else "waiting"
        self.notice("joined", name, "", f"with bract {hello.bract}")
        return client

    def leave(self, client: Client, session: Session, code: str) -> None:
        """Take note that a session ended; what it had not answered waits for its client to come back."""
        if client.session is not session:
            return
        client.session, client.since = None, self.now()
        client.abandoned.clear()
        for errand in list(client.errands.values()):
            errand.mailbox.withdraw(errand)
            errand.state = "waiting"
            if errand.tries >= MOST_TRIES:
                self.fail(errand, "client-lost", f"the client broke off {MOST_TRIES} times with this message")
        self.notice("left", client.name, code, "")

    def send(self, errands: Iterable[Errand]) -> None:
        """Put messages on their way."""
        for errand in errands:
            client = self.clients.setdefault(errand.node, Client(node=errand.node, since=self.now()))
            known = client.errands.get(errand.id)
            if known is not None:
                self.fail(known, "client-late", "the same message was sent again")
            errand.mailbox.flying.add(errand)
            client.errands[errand.id] = errand
            if errand.id in client.abandoned:
                # It still works on it, for an exchange that was given up.
                client.abandoned.discard(errand.id)
                errand.state, errand.tries = "sent", 1
            if client.session is not None:
                client.session.wake()

    def deliver(self, errand: Errand, reply: Message, size: int | None = None) -> None:
        """Put a reply down, which ends the errand."""
        if errand.state == "done":
            return
        errand.state = "done"
        client = self.clients[errand.node]
        client.errands.pop(errand.id, None)
        errand.mailbox.flying.discard(errand)
        errand.mailbox.inbox.put(Delivery(arrival=Arrival(instruction=errand.message, reply=reply), size=size))
        if client.session is not None:
            client.session.wake()

    def fail(self, errand: Errand, code: str, sentence: str) -> None:
        """End an errand with an error reply in its client's name, so that nothing waits for it."""
        if errand.state == "done":
            return
        self.drop(errand)
        self.notice("failed", self.clients[errand.node].name, code, sentence)
        self.deliver(errand, flower.error_reply(errand.message, code, sentence))

    def drop(self, errand: Errand) -> None:
        """Let go of what an errand holds; a client that works on it is not given more until it says that it is done."""
        client = self.clients[errand.node]
        errand.mailbox.withdraw(errand)
        if errand.state in ("sent", "offered", "uploading") and client.session is not None:
            client.abandoned.add(errand.id)
            if errand.state != "sent":
                client.session.reject(errand)

    def abandon(self, mailbox: Mailbox) -> None:
        """End all errands of a mailbox without a word: nobody takes their replies any more."""
        for errand in list(mailbox.flying):
            self.drop(errand)
            errand.state = "done"
            client = self.clients[errand.node]
            client.errands.pop(errand.id, None)
            mailbox.flying.discard(errand)
            if client.session is not None:
                client.session.wake()

    def tick(self) -> None:
        """End what has lasted too long."""
        now, limits = self.now(), self.deadlines
        for client in list(self.clients.values()):
            session = client.session
            if session is not None and session.stalled(limits.stall_after):
                self.leave(client, session, "client-stalled")
                session.end("client-stalled", f"nothing was heard for {limits.stall_after:g} s")
            for errand in list(client.errands.values()):
                away = None if client.session is not None else now - max(client.since, errand.created)
                kept = errand.kept and errand.state in ("offered", "uploading")
                if errand.deadline is not None and now >= errand.deadline and not kept:
                    code = "client-late" if away is None else "client-lost"
                    self.fail(errand, code, "the client did not reply before the round's deadline")
                elif away is not None and away >= limits.connect_for:
                    self.fail(errand, "client-lost", f"the client was away for {limits.connect_for:g} s")

    def status(self) -> list[ClientStatus]:
        """Return where each client is, by name."""
        return sorted((self._status(client) for client in self.clients.values()), key=lambda each: each.name)

    def _status(self, client: Client) -> ClientStatus:
        states = {errand.state for errand in client.errands.values()}
        if client.session is None:
            state = "away"
        elif "uploading" in states:
            state = "uploading"
        elif "offered" in states:
            state = "waiting"
        elif client.session.sending:
            state = "receiving"
        else:
            state = "working" if client.busy else "idle"
        return ClientStatus(
            name=client.name,
            node=client.node,
            state=state,  # type: ignore[arg-type]
            seconds=self.now() - client.since,
            stage=client.stage,
            steps=client.steps,
            capabilities=dict(client.hello.capabilities) if client.hello else {},
        )

    def tell_to_forget(self, run: str, up_to_round: int) -> None:
        """Tell all clients, now and when they join, that a checkpoint holds these rounds."""
        self.forget = Forget(run=run, round=up_to_round)
        for client in self.clients.values():
            if client.session is not None:
                client.session.say(control(forget=self.forget))
