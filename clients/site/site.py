"""A site: one data set of one owner, under the owner's policy and ledger, answering a server's messages.

The order of things is the guarantee: a message is checked and held against the policy, the ledger reserves (and draws
the bytes from which noise and batches expand), the work is done, the gate lets the reply pass, the ledger commits it,
and only then it leaves. Whatever goes wrong leaves as a code and a fixed sentence; the text goes to the site's log.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from flwr.app import Context, Message

from ... import __version__
from ...core.errors import Refusal, RunError
from ...core.keys import Key
from ...experiment import Experiment
from ...privacy.ledger.book import Request, Reservation
from ...privacy.ledger.chain import Head
from ...privacy.ledger.ledger import Ledger
from ...privacy.policy import Policy
from ...tasks.task import Task
from ...transport.wire import PROTOCOL
from ..gate import release_error
from ..training import reproducible
from .admission import Mechanisms, admit
from .building import Built, build
from .incoming import config_of, digest_of, refuse_malformed, size_of
from .request import MessageRequest, RunRequest
from .state import KeptStates, SiteLog, StateLock, data_id, pack_reply, unpack_reply


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a site is with a message: a stage, and for training the public number of its steps."""

    stage: Literal["reserved", "committed"]
    steps: int | None


class Site:
    """One data set's site; `open` makes it. One message at a time."""

    def __init__(
        self,
        *,
        policy: Policy,
        data: str,
        server: str | None,
        ledger: Ledger,
        built: Built,
        log: SiteLog,
        state: Path,
        lock: StateLock,
        seeded: Key | None = None,
    ) -> None:
        self._policy, self._data, self._server = policy, data, server
        self._ledger, self._built, self._log, self._seeded = ledger, built, log, seeded
        self._kept, self._state_lock = KeptStates(state), lock
        self._id = data_id(state, data)
        self._lock = threading.Lock()
        self.refusal: Refusal | None = None
        """The latest refusal of policy or ledger, for the owner's screen and the exit status."""

    @classmethod
    def open(
        cls,
        state: Path,
        policy: Policy,
        experiment: Experiment,
        *,
        data: str | None = None,
        server: str | None = None,
        task: Task | None = None,
        strategy: object | None = None,
        seeded: Key | None = None,
    ) -> Self:
        """Build what the experiment describes on this site's data, if the policy allows it; nothing is charged.

        `data` is the owner's name of the data set (by default the only one), `server` the name in the certificate of
        who will ask. `task` and `strategy` are objects to use instead of what the experiment names. Code comes from
        the experiment's folder, which is the site's own. With `seeded`, `Key.from_seed(seed).child("site", name)`, all
        randomness is that of the simulated client of that name, instead of the ledger's secret bytes: the ledger
        charges as ever, but towards whoever knows the seed nothing is private.

        Errors, for the owner's screen: Refusal from policy, ledger or the declared number of records, or because
        another site is open on this state directory, in whatever process; InputError for what cannot be built.
        """
        ledger = Ledger.open(state)
        lock: StateLock | None = None
        try:
            lock = StateLock(state)
            name = policy.choose(data)
            log = SiteLog(state)
            built = build(experiment, policy, name, server=server, log=log.note, task=task, strategy=strategy)
            _declare(ledger, policy, name)
            site = cls(
                policy=policy,
                data=name,
                server=server,
                ledger=ledger,
                built=built,
                log=log,
                state=state,
                lock=lock,
                seeded=seeded,
            )
        except BaseException:
            if lock is not None:
                lock.release()
            ledger.close()
            raise
        log.note(f"opened {name}: {built.remark}")
        if seeded is not None:
            log.note("noise and batches follow from a seed: what leaves is not private towards anyone who knows it")
        return site

    def close(self) -> None:
        """Close the ledger and the log, and let another site open the state directory."""
        self._state_lock.release()
        self._ledger.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def remark(self) -> str:
        """What the owner may know of the records: how many are padded or unusable. Not to be sent."""
        return self._built.remark

    def hello(self) -> dict[str, Any]:
        """Return what a server is told when the site joins: all of it public, none of it from the records."""
        table, allow, head = self._policy.data[self._data], self._policy.allow, self._ledger.head()
        return {
            "protocol": PROTOCOL,
            "bract": __version__,
            "task": self._built.task_name,
            "strategy": self._built.strategy_name,
            "data": self._id,
            "records": table.records,
            "unit": table.unit,
            "relation": table.relation,
            "updates": [each for each in allow.updates if each in self._built.updates],
            "metrics": allow.metrics,
            "epochs": allow.epochs,
            "message_bytes": allow.message_bytes,
            "seeded": self._seeded is not None,
            "ledger": {"sequence": head.sequence, "mac": head.mac},
        }

    def head(self) -> Head:
        """Return the ledger's last entry, which travels beside each reply."""
        return self._ledger.head()

    def refuse_rollback(self, head: Head) -> None:
        """Raise Refusal unless the ledger holds the entry that the server has seen."""
        self._ledger.refuse_rollback(head)

    def forget_replies(self, run: str, up_to_round: int) -> None:
        """Delete the replies of rounds that the server has checkpointed."""
        self._ledger.forget_replies(self._data, run, up_to_round)

    def handle(self, message: Message, *, progress: Callable[[Progress], None] = lambda each: None) -> Message:
        """Return the reply to a message, or an error reply: the code of a failure and its fixed sentence.

        A message that was answered gets the same bytes again. `progress` is told what may be sent on.
        """
        with self._lock:
            try:
                return self._answer(message, progress)
            except Exception as error:
                self.refusal = error if isinstance(error, Refusal) else self.refusal
                self._log.failure(f"message {message.metadata.message_id[:200]!r} was not answered", error)
                return release_error(message, error)

    def _answer(self, message: Message, progress: Callable[[Progress], None]) -> Message:
        built, request = self._built, self._checked(message)
        mechanisms = admit(
            request,
            policy=self._policy,
            data=self._data,
            server=self._server,
            is_app=built.is_app,
            classes=built.classes,
            coordinates=built.work.layout.size,
            options=built.options,
            settings={**built.work.settings, **({"seeded": True} if self._seeded is not None else {})},
        )
        self._refuse_other_experiment(request.run)
        steps = mechanisms.training.steps_per_round if mechanisms.training and request.phase == "train" else None
        if mechanisms.plan is None:
            return self._work(message, request, mechanisms, None)
        reservation = self._reserve(message, request, mechanisms)
        if reservation.reply is not None:
            return self._leave(message, request, reservation.sequence, reservation.reply)
        progress(Progress(stage="reserved", steps=steps))
        reply = self._work(message, request, mechanisms, reservation)
        progress(Progress(stage="committed", steps=steps))
        return reply

    def _checked(self, message: Message) -> MessageRequest:
        """Return what a message asks; RunError unless its size and form are those of this site's model."""
        limit, metadata = self._policy.allow.message_bytes, message.metadata
        config = config_of(message)
        size = size_of(message)
        if size > limit:
            raise self._policy.refusal(
                "allow",
                "message_bytes",
                why=f"a message of {size} bytes came, and {limit} are allowed",
                write=f"message_bytes = {size}",
            )
        request = MessageRequest.parse(config, phase=metadata.message_type, message_id=metadata.message_id)
        work = self._built.work
        refuse_malformed(message, layout=work.layout, beside=work.receives if request.phase == "train" else ())
        return request

    def _refuse_other_experiment(self, run: RunRequest) -> None:
        built = self._built
        for asked, here in (
            (run.task, (built.task_name,)),
            (run.strategy, (built.strategy_name,)),
            (run.update, built.updates),
        ):
            if asked not in here:
                raise RunError(
                    "request-invalid",
                    f"run {run.run}: asks for {asked}, and this site was opened for {' or '.join(here)}",
                )

    def _reserve(self, message: Message, request: MessageRequest, mechanisms: Mechanisms) -> Reservation:
        assert mechanisms.plan is not None
        return self._ledger.reserve(
            Request(
                data_set=self._data,
                data_digest=self._built.data_digest,
                run=request.run.run,
                plan=mechanisms.plan,
                round=request.round,
                model_version=request.model_version,
                phase=request.phase,
                message_id=request.message_id,
                message_digest=digest_of(message),
                event=mechanisms.events[request.phase],
            )
        )

    def _work(
        self, message: Message, request: MessageRequest, mechanisms: Mechanisms, reservation: Reservation | None
    ) -> Message:
        """Do the work and commit it; without a budget there is nothing to commit, and no noise to repeat."""
        run = request.run.run
        sequence, kept = self._kept.load(run)
        context = Context(
            run_id=message.metadata.run_id,
            node_id=message.metadata.dst_node_id,
            node_config=dict(self._built.node_config),
            state=kept,
            run_config=dict(self._built.run_config),
        )
        key = self._seeded or (Key.fresh() if reservation is None else reservation.key)
        # A seeded site's bytes are those of a simulation, which has one thread a client.
        with reproducible(threads=None if self._seeded is None else 1):
            reply = self._built.work.answer(message, context, request, mechanisms, key)
        packed = pack_reply(reply, context.state)
        if reservation is None:
            return self._leave(message, request, sequence, packed)
        return self._leave(message, request, reservation.sequence, self._ledger.commit(reservation, packed))

    def _leave(self, message: Message, request: MessageRequest, sequence: int, packed: bytes) -> Message:
        """Return the reply that the bytes hold, the client's state put down before."""
        reply, kept = unpack_reply(packed, message)
        if request.phase == "train":
            self._kept.follow(request.run.run, sequence, kept)
        return reply


def _declare(ledger: Ledger, policy: Policy, name: str) -> None:
    """Tell the ledger the owner's budget; Refusal if one is known and the policy has none any more."""
    budget = policy.data[name].budget(name)
    if budget is not None:
        ledger.declare(budget)
    elif name in ledger.data_sets():
        raise Refusal(
            "ledger-budget",
            f"data.{name}.epsilon: missing, but the ledger holds a budget for {name}, which releases without one would "
            f"void; write epsilon and delta{policy.place('data', name)}",
        )
