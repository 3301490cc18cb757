"""Executors: where the virtual clients of one exchange run, here in this process.

An executor gets calls in the order of their messages and hands over their outcomes in that order, so that no strategy
can tell one executor from another.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ...clients.gate import release_error
from ...core import flower
from ...server.grid import Arrival
from ...strategies.fold import Fold
from ..contexts import ClientContexts


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One message for one client, whose state `contexts` holds."""

    client: str
    node: int
    message: Message
    contexts: ClientContexts


@dataclass(frozen=True, kw_only=True)
class CallTimes:
    """When a call began, was answered and was folded, in seconds of `time.perf_counter`, and in which process."""

    client: str
    kind: str
    process: int
    began: float
    answered: float
    ended: float


Watch = Callable[[CallTimes], None]


class Executor(Protocol):
    """Runs calls; with a fold it may return totals instead of arrays."""

    def run(self, calls: Iterable[Call], *, fold: Fold | None) -> Iterator[Arrival]:
        """Yield the outcome of each call, in order."""

    def close(self) -> None:
        """End whatever the executor started."""


class InlineExecutor:
    """One client after the other in this process, each when its reply is asked for."""

    def __init__(
        self, app: ClientApp, *, log: Callable[[str], None], isolate: bool = False, watch: Watch | None = None
    ) -> None:
        self._app = app
        self._watch = watch
        self._log = log
        self._isolate = isolate

    def run(self, calls: Iterable[Call], *, fold: Fold | None) -> Iterator[Arrival]:
        """Yield each reply whole: the exchange folds it."""
        for call in calls:
            began = time.perf_counter()
            reply, trace = answer(
                self._app, call.client, call.message, call.contexts.of(call.node), isolate=self._isolate
            )
            call.contexts.settle(call.node)
            if trace:
                self._log(trace)
            if self._watch is not None:
                now, kind = time.perf_counter(), call.message.metadata.message_type
                self._watch(
                    CallTimes(client=call.client, kind=kind, process=os.getpid(), began=began, answered=now, ended=now)
                )
            yield Arrival(instruction=call.message, reply=reply)

    def close(self) -> None:
        """Nothing was started."""


def answer(
    app: ClientApp, client: str, message: Message, context: Context, *, isolate: bool
) -> tuple[Message, str | None]:
    """Return a client's reply, and the trace of what it raised, which stays on its side.

    `isolate` gives the client its own copy of the message's records, for an app that may change what it is sent.
    """
    if isolate:
        message.content = flower.copy_records(message.content)
    try:
        return app(message, context), None
    except Exception as error:  # whatever a client raises is that client's failure
        return release_error(message, error), f"{client}: {''.join(traceback.format_exception(error))}"
