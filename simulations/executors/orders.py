"""Calls and their outcomes as they travel between processes: small, with each content apart and once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict

from ...core import flower
from ...server.grid import Arrival
from ...strategies.fold import Fold, Total
from .executor import Call, CallTimes, Watch

# A worker is given this share of its share of what is left (guided self-scheduling, Polychronopoulos and Kuck 1987).
SHARES_PER_WORKER = 2


@dataclass(frozen=True, kw_only=True)
class Order:
    """One call as it travels to a worker; its content was sent before, once for all calls that share it."""

    index: int
    content: int
    client: str
    node: int
    kind: str
    node_config: dict[str, Any]
    run_config: dict[str, Any]
    state: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Calls for one worker. No orders: hand over the total, and start another.

    `contents` holds what the worker has not got yet, as its executor sends it. `fold` comes with a worker's first chunk
    of an exchange.
    """

    exchange: int
    orders: tuple[Order, ...] = ()
    contents: dict[int, Any] | None = None
    fold: Fold | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One call as it comes back: the content that was not folded, or an error, and the client's new state.

    `folded_bytes` is the size of the arrays that were folded; None where there is no fold.
    """

    index: int
    content: RecordDict | None
    error: tuple[str, str] | None
    state: dict[str, Any]
    trace: str | None
    folded_bytes: int | None = None
    times: CallTimes | None = None


Orders = tuple[Order, ...]


def orders_of(calls: Sequence[Call], *, first: int) -> tuple[list[Order], dict[int, RecordDict]]:
    """Return calls as orders, and their contents by number, from `first` on: one that calls share is there once."""
    numbers: dict[int, int] = {}
    contents: dict[int, RecordDict] = {}
    orders = []
    for index, call in enumerate(calls):
        content, metadata = call.message.content, call.message.metadata
        if id(content) not in numbers:
            number = numbers[id(content)] = first + len(contents)
            contents[number] = content
        orders.append(
            Order(
                index=index,
                content=numbers[id(content)],
                client=call.client,
                node=metadata.dst_node_id,
                kind=metadata.message_type,
                node_config=dict(call.context.node_config),
                run_config=dict(call.context.run_config),
                state=flower.state_to_tree(call.context.state),
            )
        )
    return orders, contents


def chunked(orders: Sequence[Order], workers: int) -> Iterator[Orders]:
    """Yield orders in chunks that shrink, so that all workers end together: each a share of what is left then."""
    start = 0
    while start < len(orders):
        size = max(1, (len(orders) - start) // (workers * SHARES_PER_WORKER))
        yield tuple(orders[start : start + size])
        start += size


def arrival_of(
    call: Call, outcome: Outcome, *, total: Total | None, log: Callable[[str], None], watch: Watch | None
) -> Arrival:
    """Return what came of a call, and put the client's new state into its context."""
    if outcome.trace:
        log(outcome.trace)
    if outcome.times is not None and watch is not None:
        watch(outcome.times)
    call.context.state = flower.tree_to_state(outcome.state)
    if outcome.error is not None:
        reply = flower.error_reply(call.message, *outcome.error)
    else:
        reply = Message(outcome.content or RecordDict(), reply_to=call.message)
    return Arrival(instruction=call.message, reply=reply, folded_bytes=outcome.folded_bytes, total=total)
