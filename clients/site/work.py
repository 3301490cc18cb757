"""What a site runs for a message: bract's own training of a task, or a Flower ClientApp, behind one interface.

Neither knows of policy or ledger. Both send by way of the gate, whose weight is 1, or where updates are raw (or clipped
by a trusted server) the declared number of records.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from flwr.app import Context, Message, MetricRecord
from flwr.clientapp import ClientApp

from ...core.errors import RunError
from ...core.keys import Key
from ...core.parameters import Arrays, Layout, arrays_of, digest, record_of
from ...privacy.local import LocalPlan
from ...strategies.compression import MEMORY, Compression
from ...strategies.local_rule import LocalRule, Sent
from ...tasks.task import SiteData, Task
from ..app import client_app
from ..gate import Gate, kept_of
from ..local_model import LocalModel
from ..noised import noised_update
from ..owner import Site as Owner
from ..training import LocalTraining
from .admission import Mechanisms
from .incoming import ARRAYS
from .request import MessageRequest

# That code fails on some records may follow from them, so towards the server it counts as no change.
_HIDDEN = "training failed and counts as no change: {}: {}"
_ZERO = "records on which the code failed count as zero, {} times in this message: {}"
# What a local rule must not name.
_TAKEN = ("arrays", "config", "metrics", "num-examples", "personal")


class Work(Protocol):
    """What answers an admitted message; `settings` is what it is made of, for the digest of a run's plan."""

    @property
    def layout(self) -> Layout:
        """The tensors that travel."""
        ...

    @property
    def receives(self) -> tuple[str, ...]:
        """The records of arrays that come beside the model in a train message."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What fixes the work besides the request, as JSON knows it."""
        ...

    def answer(
        self, message: Message, context: Context, request: MessageRequest, mechanisms: Mechanisms, key: Key
    ) -> Message:
        """Return the gate's reply; what a client keeps is put into the context. Raises RunError.

        `key` may be that of this message alone, or that of the site: each draw also follows from the message.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TaskWork:
    """bract's own training; `data` is padded to the declared number of records, and `log` the site's own."""

    name: str
    task: Task
    data: SiteData
    model: LocalModel
    training: LocalTraining
    rule: LocalRule
    compression: Compression | None
    withhold_counts: bool
    settings: Mapping[str, Any]
    log: Callable[[str], None]

    @property
    def layout(self) -> Layout:
        """The model's shared tensors."""
        return self.model.layout

    @property
    def receives(self) -> tuple[str, ...]:
        """What the strategy's local rule receives."""
        return self.rule.receives

    def answer(
        self, message: Message, context: Context, request: MessageRequest, mechanisms: Mechanisms, key: Key
    ) -> Message:
        """Train or evaluate with batches and noise from `key`."""
        hidden: list[str] = []

        def hide(error: Exception) -> None:
            hidden.append("" if hidden else "".join(traceback.format_exception(error)))

        owner = Owner(
            name=self.name,
            data=self.data,
            key=key,
            plan=mechanisms.training,
            evaluation=mechanisms.evaluation,
            local=mechanisms.local,
            hide=hide,
        )
        training = replace(self.training, epochs=request.run.epochs, batch_size=request.run.batch_size)
        gate = Gate(
            layout=self.layout,
            withhold_counts=self.withhold_counts,
            rule=self.rule,
            compression=self.compression,
        )
        app = client_app({self.name: owner}, self.task, training, self.model, gate)
        try:
            return app(message, context)
        except Exception as error:
            if mechanisms.local is None or request.phase != "train":
                raise
            self.log(_HIDDEN.format(type(error).__name__, error))
            failed = key.child("failed", request.round, digest(gate.admit(message)))
            return _no_change(gate, message, context, mechanisms.local, failed, records=len(self.data.train))
        finally:
            if hidden:
                self.log(_ZERO.format(len(hidden), hidden[0]))


@dataclass(frozen=True, kw_only=True)
class AppWork:
    """A Flower ClientApp: only the model's tensors are taken of its replies, and finite numbers where metrics are raw.

    `log` is the site's own, and takes the failures that a noised reply hides.
    """

    app: ClientApp
    layout: Layout
    records: int
    settings: Mapping[str, Any]
    log: Callable[[str], None]
    receives: tuple[str, ...] = field(default=(), init=False)

    def answer(
        self, message: Message, context: Context, request: MessageRequest, mechanisms: Mechanisms, key: Key
    ) -> Message:
        """Call the app; a noised update is clipped and noised here, whatever the app did."""
        if mechanisms.local is not None and request.phase == "train":
            return self._noised(message, context, request, mechanisms.local, key)
        reply = self.app(message, context)
        numbers = _numbers(reply) if mechanisms.evaluation is not None else {}
        gate = Gate(layout=self.layout, withhold_counts=False, rule=LocalRule(reports=tuple(numbers)))
        if request.phase == "evaluate":
            return gate.release_metrics(message, numbers, records=self.records)
        update = _arrays(reply)
        return gate.release_update(message, update, records=self.records, sent=Sent(numbers=numbers))

    def _noised(
        self, message: Message, context: Context, request: MessageRequest, plan: LocalPlan, key: Key
    ) -> Message:
        gate = Gate(layout=self.layout, withhold_counts=True)
        model, update = gate.admit(message), None
        try:
            update = _arrays(self.app(message, context))
        except Exception as error:
            self.log(_HIDDEN.format(type(error).__name__, error))
        stream = key.child("train", request.round, digest(model), "local noise").stream()
        released = noised_update(model, update, layout=self.layout, plan=plan, stream=stream)
        return gate.release_update(message, released, records=self.records)


def _no_change(gate: Gate, message: Message, context: Context, plan: LocalPlan, key: Key, *, records: int) -> Message:
    """Return the reply of a client that changed nothing, which is made as any other is."""
    received = gate.admit(message)
    stream = key.child("local noise").stream()
    released = noised_update(received, None, layout=gate.layout, plan=plan, stream=stream)
    if gate.compression is None:
        return gate.release_update(message, released, records=records)
    memory: Any = kept_of(context.state, (MEMORY,)).get(MEMORY, {}).get(MEMORY)
    encoded = gate.compression.codec(gate.layout).encode(released, received, memory, key.child("compression"))
    if encoded.memory is not None:
        context.state[MEMORY] = record_of({MEMORY: encoded.memory})
    return gate.release_update(message, released, records=records, encoded=encoded.records)


def _arrays(reply: Message) -> Arrays:
    if not reply.has_content() or ARRAYS not in reply.content:
        raise RunError("reply-invalid", f"the app's reply holds no record {ARRAYS!r}")
    return arrays_of(reply.content[ARRAYS])  # type: ignore[arg-type]


def _numbers(reply: Message) -> dict[str, float]:
    """Return the finite numbers of an app's metrics, without those that bract names itself."""
    found: dict[str, float] = {}
    for record in reply.content.values() if reply.has_content() else ():
        if isinstance(record, MetricRecord):
            for name, value in record.items():
                if isinstance(value, int | float) and math.isfinite(value) and name not in _TAKEN:
                    found[name] = float(value)
    return found
