"""A client from its start to its end: ask what the server runs, hold it against the policy, build the site, serve.

Nothing that a server says is built before the owner's policy allows it. A server that comes back with another run is
asked again, and the site built anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import grpc

from ...core.errors import BractError, InputError, RunError
from ...core.keys import Key
from ...experiment import Experiment
from ...privacy.ledger.ledger import Ledger
from ...privacy.policy import Policy
from ...transport.announcement import Announcement
from ...transport.channel import refuse_insecure, split_address
from ...transport.credentials import channel_credentials
from ...transport.handshake import diagnose
from ...transport.identities import Identity, Reminder
from ...transport.wire import Limits
from ..site.site import Site
from ..site.state import LOG_FILE, SiteLog
from ..training import choose_device
from .describe import describe
from .link import Link
from .patience import Backoff, Patience
from .proposal import pinned, proposed, refuse_another, refuse_foreign_options, refuse_unlisted
from .screen import Screen
from .stream import Shown
from .watched import Watched

# Beside the model a message holds names, a config and what the strategy sends; the site counts all that is in it.
_HEADROOM = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the owner wants of a client, checked by `Client`.

    `identity` is the folder of its identity, None without certificates; `expected` the one experiment to take part in;
    `connect_for` in seconds, None for ever; `seeded` draws all randomness from the experiment's seed.
    """

    server: str
    policy: Policy
    state: Path
    identity: Path | None = None
    name: str | None = None
    data_set: str | None = None
    code: Path | None = None
    expected: Path | None = None
    keep: bool = False
    seeded: bool = False
    device: str = "auto"
    connect_for: float | None = 300.0
    backoff: Backoff = field(default_factory=Backoff)


class Client:
    """A site's end of a federation; raises InputError or Refusal at once for what is wrong on this side."""

    def __init__(
        self, wishes: Wishes, screen: Screen, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._wishes, self._screen, self._clock = wishes, screen, clock
        self._host, self._port = split_address(wishes.server)
        self._identity = self._loaded()
        self._reminder = Reminder(wishes.identity, role="client", clock=clock) if wishes.identity else None
        if self._identity is None or wishes.seeded:
            refuse_insecure(wishes.server)
        self.name = self._named()
        _refuse_missing_device(wishes.device)
        self._data = wishes.policy.choose(wishes.data_set)
        wishes.policy.path_of(self._data)
        self._folder = wishes.code or wishes.policy.folder
        self._expected = (
            None if wishes.expected is None else pinned(wishes.expected, folder=self._folder, device=wishes.device)
        )
        # Opened only to say at once what is wrong with it, before a server is asked.
        with Ledger.open(wishes.state) as ledger:
            ledger.head()
        self._link: Link | None = None
        self._stopped = threading.Event()
        self.linked = False
        """Whether `stop` ends `run` by itself; at other times the thread of `run` has to be interrupted."""
        self._warn()

    @property
    def busy(self) -> bool:
        """Whether the site still works on a message, which no end of the process waits for: it is begun again."""
        return self._link is not None and self._link.busy

    def stop(self) -> None:
        """End `run` from any thread or from a signal's handler."""
        self._stopped.set()
        if self._link is not None:
            self._link.stop()

    def run(self) -> str:
        """Serve to the end; return "finished" or "stopped". Raises BractError.

        Errors: Refusal of the policy or the ledger, also of single messages, once the federation has ended.
        """
        try:
            return self._run()
        except BractError:
            raise
        except Exception as error:
            self._note("the client ended", error)
            # Its text may hold records, and a screen may be collected.
            where = self._wishes.state / LOG_FILE
            raise RunError("internal", f"{type(error).__name__} was not foreseen; the trace is in {where}") from error

    def _run(self) -> str:
        before: Announcement | None = None
        while not self._stopped.is_set():
            said = self._ask()
            if said is None:
                break
            # A server that says the same again means the run of its welcome, whatever its number.
            ended = self._serve(said, any_run=said == before)
            before = said
            if ended != "changed":
                return ended
            self._screen("changed", "the server has begun another run; asking what it is")
        return "stopped"

    def _ask(self) -> Announcement | None:
        """Return what the server announces, asked for until it answers; None if the client was stopped meanwhile."""
        patience = self._patience()
        while not self._stopped.is_set():
            self._warn()
            answer = describe(self._wishes.server, self._shown)
            if isinstance(answer, Announcement):
                return answer
            self._stopped.wait(patience.failed(answer, patience.diagnosed()))
        return None

    def _serve(self, said: Announcement, *, any_run: bool) -> str:
        wishes, screen = self._wishes, self._screen
        experiment = self._experiment(said)
        screen("building", f"run {said.run}: building the site", fields={"run": said.run})
        seeded = None
        if wishes.seeded:
            seeded = Key.from_seed(experiment.experiment.seed).child("site", self.name)
            screen.warn(
                "seeded", "--seeded: noise and batches follow from a seed that the server knows: this protects nobody"
            )
        server = None if self._identity is None else self._host
        site = Site.open(wishes.state, wishes.policy, experiment, data=self._data, server=server, seeded=seeded)
        try:
            watched = Watched(site, screen, warn=self._warn)
            self._link = Link(
                watched,
                wishes.server,
                self._shown,
                name=self.name,
                limits=Limits(message_bytes=wishes.policy.allow.message_bytes + _HEADROOM),
                backoff=wishes.backoff,
                connect_for=self._patient_for,
                keep=wishes.keep,
                notice=lambda text: screen("waiting", text, level="warning"),
                takes=lambda run: any_run or run == said.number,
                connected=lambda: self._connected(said),
                diagnose=self._diagnose,
                failed=self._failed,
            )
            if self._stopped.is_set():
                return "stopped"
            self.linked = True
            try:
                ended = self._link.run()
            finally:
                self.linked = False
            if ended == "changed" and self._link.busy:
                screen("finishing", "ending the round that is under way before the site is built anew")
            if ended != "stopped":
                self._link.finish()
            if ended == "finished" and watched.refusal is not None:
                raise watched.refusal
            return ended
        finally:
            if not self.busy:
                site.close()

    def _experiment(self, said: Announcement) -> Experiment:
        experiment = proposed(said.experiment, folder=self._folder, device=self._wishes.device)
        refuse_unlisted(experiment, self._wishes.policy)
        if self._expected is not None:
            refuse_another(experiment, self._expected)
        else:
            refuse_foreign_options(experiment, self._wishes.policy, self._data)
        return experiment

    def _connected(self, said: Announcement) -> None:
        self._warn()
        text = f"connected to {self._wishes.server} as {self.name}, run {said.run}"
        fields = {"server": self._wishes.server, "name": self.name, "run": said.run}
        self._screen("connected", text, fields=fields)

    def _note(self, what: str, error: BaseException) -> None:
        log = SiteLog(self._wishes.state)
        log.failure(what, error if isinstance(error, Exception) else RuntimeError(repr(error)))
        log.close()

    def _failed(self, what: str, error: BaseException) -> None:
        """Note an error whose text may hold records: in the owner's log, and on the screen that there was one."""
        self._note(what, error)
        self._screen.warn("not-answered", f"{what} was not answered; site.log in the state directory says why")

    @property
    def _patient_for(self) -> float | None:
        return None if self._wishes.keep else self._wishes.connect_for

    def _patience(self) -> Patience:
        return Patience(
            self._wishes.server,
            backoff=self._wishes.backoff,
            seconds=self._patient_for,
            diagnose=self._diagnose,
            notice=lambda text: self._screen("waiting", text, level="warning"),
        )

    def _diagnose(self) -> BractError | None:
        if self._identity is None:
            return None
        return diagnose(self._host, self._port, self._identity, now=self._clock())

    @property
    def _shown(self) -> Shown:
        return None if self._identity is None else self._credentials

    def _credentials(self) -> grpc.ChannelCredentials:
        """Return gRPC's credentials from the identity as it lies on the disk, which may have been renewed."""
        assert self._identity is not None
        try:
            self._identity = self._loaded() or self._identity
        except InputError as error:
            self._screen.warn("identity", f"{error.sentence}; going on with the one that was read before")
        return channel_credentials(self._identity)

    def _loaded(self) -> Identity | None:
        folder = self._wishes.identity
        return None if folder is None else Identity.load(folder, role="client", now=self._clock())

    def _warn(self) -> None:
        """Say once a day that a certificate is about to expire."""
        sentence = None if self._reminder is None else self._reminder()
        if sentence is not None:
            self._screen.warn("identity", sentence)

    def _named(self) -> str:
        """Return the site's name: its certificate's, or without one what the owner says. Raises InputError."""
        wishes, own = self._wishes, self._wishes.policy.site.name
        name = self._identity.name if self._identity else wishes.name or own
        if name is None:
            raise InputError("policy-value", "--name: missing; without an identity give --name, or write site.name")
        for key, given in (("--name", wishes.name), ("site.name", own)):
            if given is not None and given != name:
                place = wishes.policy.place("site", "name") if key == "site.name" else ""
                whose = "--identity" if self._identity else "--name"
                raise InputError("policy-value", f'{key} = "{given}": {whose} is that of {name}; drop one{place}')
        return name


def _refuse_missing_device(name: str) -> None:
    try:
        choose_device(name)
    except InputError as error:
        raise InputError("device-missing", f"--device {name}: there is no such device here") from error
