"""Calls and their outcomes as they travel between processes: small, with each content apart and once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from ...core import flower
from ...server.grid import Arrival
from ...strategies.fold import Fold, Total
from .executor import Call, CallTimes, Watch

# A worker is given this share of its share of what is left (guided self-scheduling, Polychronopoulos and Kuck 1987).
SHARES_PER_WORKER = 2


class Order(NamedTuple):
    """One call as it travels to a worker; its content was sent before, once for all calls that share it."""

    number: int
    content: int
    client: str
    node: int
    kind: str
    partition: int
    state: Mapping[str, Any]


Orders = tuple[Order, ...]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Calls for one worker. No orders: hand over the total, and start another.

    `contents` holds what the worker has not got yet, as its executor sends it. `fold` comes with a worker's first chunk
    of an exchange. With `timed`, the outcomes say when they were come by.
    """

    exchange: int
    orders: Orders = ()
    contents: dict[int, Any] | None = None
    fold: Fold | None = None
    partitions: int = 0
    run_config: Mapping[str, Any] | None = None
    timed: bool = False

    def holding(self, orders: Orders, contents: dict[int, Any], fold: Fold | None) -> Chunk:
        """Return a chunk of the same exchange."""
        return replace(self, orders=orders, contents=contents, fold=fold)


class Outcome(NamedTuple):
    """One call as it comes back: the content that was not folded, or an error, and the client's new state.

    A content that is only one record of numbers comes as these. `folded_bytes` is the size of the arrays that were
    folded; None where there is no fold.
    """

    number: int
    content: RecordDict | Mapping[str, Any] | None
    error: tuple[str, str] | None
    state: Mapping[str, Any]
    trace: str | None
    folded_bytes: int | None = None
    times: CallTimes | None = None


def orders_of(calls: Sequence[Call], *, first: int) -> tuple[list[Order], dict[int, RecordDict]]:
    """Return calls as orders, and their contents by number, from `first` on: one that calls share is there once."""
    numbers: dict[int, int] = {}
    contents: dict[int, RecordDict] = {}
    orders = []
    for index, call in enumerate(calls):
        content, contexts, node = call.message.content, call.contexts, call.node
        number = numbers.get(id(content))
        if number is None:
            number = numbers[id(content)] = first + len(contents)
            contents[number] = content
        kind = call.message.metadata.message_type
        orders.append(Order(index, number, call.client, node, kind, contexts.partition(node), contexts.tree(node)))
    return orders, contents


def chunk_for(calls: Sequence[Call], exchange: int, *, timed: bool) -> Chunk:
    """Return the chunk without orders of an exchange of these calls."""
    contexts = calls[0].contexts
    return Chunk(exchange=exchange, partitions=len(contexts.names), run_config=contexts.run_config, timed=timed)


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """How orders are dealt out: longest first, in chunks that shrink, so that all workers end together.

    A chunk is a multiple of `width`, as far as there are so many. `records` are the clients' numbers of records, by
    theirs, where they are known.
    """

    width: int = 1
    records: NDArray[np.int64] | None = field(default=None, repr=False)

    def chunks(self, orders: Sequence[Order], workers: int) -> Iterator[Orders]:
        """Yield the chunks: each takes a share of the work that is left then."""
        # An order takes time of its own too: about that of one record.
        takes = np.ones(len(orders))
        if self.records is not None:
            takes += self.records[[order.partition for order in orders]]
        longest = np.argsort(-takes, kind="stable")
        done, start = np.concatenate([[0.0], np.cumsum(takes[longest])]), 0
        while start < len(orders):
            share = (done[-1] - done[start]) / (workers * SHARES_PER_WORKER)
            ahead = int(np.searchsorted(done, done[start] + share, side="right")) - 1 - start
            size = self.width * max(1, round(ahead / self.width))
            yield tuple(orders[place] for place in longest[start : start + size])
            start += size


def arrival_of(
    call: Call, outcome: Outcome, *, total: Total | None, log: Callable[[str], None], watch: Watch | None
) -> Arrival:
    """Return what came of a call, and put the client's new state into its context."""
    if outcome.trace:
        log(outcome.trace)
    if outcome.times is not None and watch is not None:
        watch(outcome.times)
    call.contexts.put(call.node, outcome.state)
    if outcome.error is not None:
        reply = flower.error_reply(call.message, *outcome.error)
    else:
        content = outcome.content
        made = content if isinstance(content, RecordDict) else flower.numbers_record(content or {})
        reply = flower.reply(call.message, made)
    return Arrival(instruction=call.message, reply=reply, folded_bytes=outcome.folded_bytes, total=total)
