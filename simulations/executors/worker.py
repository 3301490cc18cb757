"""A worker: what a process keeps that serves chunks of calls, and the running total of an exchange."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from ...clients.group import ClientGroup
from ...core import flower
from ...core.parameters import record_of
from ...server.grid import fold_in
from ...strategies.fold import Fold, Total
from ..contexts import context_of
from .executor import CallTimes, answer
from .orders import Chunk, Order, Outcome

Fetch = Callable[[Any], RecordDict]
_TOGETHER = ("train", "evaluate")


class Worker:
    """One thread, a resident model, and what its clients sent in an exchange so far.

    `group` answers for many of bract's own clients at once; the app answers for the others. `fetch` makes a content of
    what a chunk holds of it.
    """

    def __init__(self, app: ClientApp, group: ClientGroup | None, *, isolate: bool, fetch: Fetch) -> None:
        self._app, self._group, self._isolate, self._fetch = app, group, isolate, fetch
        self._contents: dict[int, RecordDict] = {}
        self._exchange = 0
        self._fold: Fold | None = None
        self._total: Total | None = None

    def serve(self, chunk: Chunk) -> list[Outcome] | Total | None:
        """Return the outcomes of a chunk's calls, or the total of all that were served since it was last asked for."""
        if chunk.exchange != self._exchange:
            self._exchange, self._fold = chunk.exchange, chunk.fold
            self._total = self._start()
        if not chunk.orders:
            total, self._total = self._total, self._start()
            return total
        needed = {order.content for order in chunk.orders}
        self._contents = {number: content for number, content in self._contents.items() if number in needed}
        self._contents |= {number: self._fetch(content) for number, content in (chunk.contents or {}).items()}
        outcomes: list[Outcome] = []
        for (content, kind, state), orders in groupby(
            chunk.orders, lambda order: (order.content, order.kind, bool(order.state))
        ):
            if self._group is not None and kind in _TOGETHER and not state:
                outcomes += self._together(self._group, self._contents[content], kind, list(orders), chunk)
            else:
                outcomes += [self._alone(order, chunk) for order in orders]
        return outcomes

    def _start(self) -> Total | None:
        return self._fold.start() if self._fold is not None else None

    def _together(
        self, group: ClientGroup, content: RecordDict, kind: str, orders: list[Order], chunk: Chunk
    ) -> Iterator[Outcome]:
        names = [order.client for order in orders]
        answers = group.answers(kind, content, names, fold=self._fold, total=self._total)
        size = None if self._fold is None else group.nbytes
        began = time.perf_counter()
        for order, found in zip(orders, answers, strict=True):
            times = None
            if chunk.timed:
                ended = began + found.seconds
                times = _times(order, began, ended - found.fold_seconds, ended)
                began = ended
            if found.arrays is None:
                summed = size if found.summed else None
                yield Outcome(order.number, found.numbers, found.error, {}, found.trace, summed, times)
                continue
            metrics = MetricRecord(dict(found.numbers or {}))
            reply = RecordDict({"arrays": record_of(found.arrays), "metrics": metrics})
            message = Message(content, order.node, order.kind)
            yield self._outcome(order, message, flower.reply(message, reply), {}, None, times)

    def _alone(self, order: Order, chunk: Chunk) -> Outcome:
        message = Message(self._contents[order.content], order.node, order.kind)
        context = context_of(
            order.client,
            order.node,
            order.partition,
            chunk.partitions,
            flower.tree_to_state(order.state),
            chunk.run_config or {},
        )
        began = time.perf_counter()
        reply, trace = answer(self._app, order.client, message, context, isolate=self._isolate)
        answered = time.perf_counter()
        outcome = self._outcome(order, message, reply, flower.state_to_tree(context.state), trace, None)
        return outcome._replace(times=_times(order, began, answered, time.perf_counter()) if chunk.timed else None)

    def _outcome(
        self,
        order: Order,
        message: Message,
        reply: Message,
        state: dict[str, Any],
        trace: str | None,
        times: CallTimes | None,
    ) -> Outcome:
        folded_bytes = None
        if self._fold is not None and self._total is not None:
            reply, folded_bytes = fold_in(self._fold, self._total, message, reply)
        error = flower.code_and_sentence(reply.error) if reply.has_error() else None
        return Outcome(order.number, None if error else reply.content, error, state, trace, folded_bytes, times)


def _times(order: Order, began: float, answered: float, ended: float) -> CallTimes:
    return CallTimes(
        client=order.client, kind=order.kind, process=os.getpid(), began=began, answered=answered, ended=ended
    )
