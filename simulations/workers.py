"""Worker processes: persistent, one thread each, with a resident model; a killed one is replaced.

Chunks of calls go to whoever is free, and come back as replies and, with a fold, one exact total a chunk. Replies are
handed over in the order of their messages and totals add exactly, so no result depends on the number of workers.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ..core import flower
from ..core.errors import RunError
from ..server.grid import Arrival, fold_in
from ..strategies.fold import Fold, Total
from .executors import Call, answer
from .recipe import Recipe

# A call that ends this many workers is taken for a failure of that client.
MOST_DEATHS = 2
CHUNKS_PER_WORKER = 4
PRELOAD = ["bract.simulations.workers"]


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
class Outcome:
    """One call as it comes back: the content that was not folded, or an error, and the client's new state."""

    index: int
    content: RecordDict | None
    error: tuple[str, str] | None
    state: dict[str, Any]
    trace: str | None


@dataclass(kw_only=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    contents: set[int] = field(default_factory=set)
    chunk: list[Order] | None = None


class WorkerPool:
    """An executor of so many worker processes, started at the first call."""

    def __init__(self, recipe: Recipe, count: int, *, log: Callable[[str], None]) -> None:
        self._recipe, self._count, self._log = recipe, count, log
        self._workers: list[_Worker] = []
        self._contents = 0

    @property
    def process_ids(self) -> list[int]:
        """The ids of the worker processes that are there."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def run(self, calls: Iterable[Call], *, fold: Fold | None) -> Iterator[Arrival]:
        """Yield the outcome of each call in order; a chunk's total comes with its last reply."""
        known = list(calls)
        if not known:
            return
        contents, chunks = self._chunks(known)
        deaths: dict[int, int] = {}
        done: dict[int, tuple[Outcome, Total | None]] = {}
        upcoming = 0
        try:
            while upcoming < len(known):
                self._fill(chunks, contents, fold)
                for outcomes, total in self._collect(chunks, deaths):
                    for outcome in outcomes:
                        done[outcome.index] = (outcome, total if outcome is outcomes[-1] else None)
                while upcoming in done:
                    outcome, total = done.pop(upcoming)
                    yield self._arrival(known[upcoming], outcome, folded=fold is not None, total=total)
                    upcoming += 1
        finally:
            # An exchange that is left early must not hand its late replies to the next one.
            for worker in self._workers:
                if worker.chunk is not None:
                    self._end(worker)
            self._workers = [worker for worker in self._workers if worker.process.is_alive()]

    def close(self) -> None:
        """End the worker processes."""
        for worker in self._workers:
            self._end(worker)
        self._workers = []

    def _chunks(self, calls: Sequence[Call]) -> tuple[dict[int, bytes], deque[list[Order]]]:
        """Return contents by number, pickled once each, and the calls in chunks of one size."""
        numbers: dict[int, int] = {}
        contents: dict[int, bytes] = {}
        orders = []
        for index, call in enumerate(calls):
            content, metadata = call.message.content, call.message.metadata
            if id(content) not in numbers:
                self._contents += 1
                numbers[id(content)] = self._contents
                contents[self._contents] = pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL)
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
        size = max(1, -(-len(orders) // (self._count * CHUNKS_PER_WORKER)))
        return contents, deque(orders[start : start + size] for start in range(0, len(orders), size))

    def _fill(self, chunks: deque[list[Order]], contents: dict[int, bytes], fold: Fold | None) -> None:
        """Give every free worker a chunk, starting workers while there are fewer than may be."""
        while len(self._workers) < min(self._count, len(chunks) + sum(w.chunk is not None for w in self._workers)):
            self._workers.append(self._start())
        for worker in self._workers:
            if worker.chunk is not None or not chunks:
                continue
            chunk = chunks.popleft()
            needed = {order.content for order in chunk}
            try:
                worker.connection.send_bytes(
                    pickle.dumps(({number: contents[number] for number in needed - worker.contents}, chunk, fold))
                )
            except OSError:
                # It died while it was idle: the next turn replaces it.
                chunks.appendleft(chunk)
                self._end(worker)
                continue
            worker.contents, worker.chunk = needed, chunk
        self._workers = [worker for worker in self._workers if worker.process.is_alive() or worker.chunk is not None]

    def _collect(
        self, chunks: deque[list[Order]], deaths: dict[int, int]
    ) -> Iterator[tuple[list[Outcome], Total | None]]:
        """Wait for a worker, and yield what came; the chunk of one that died goes back, one call at a time."""
        busy = {worker.connection: worker for worker in self._workers if worker.chunk is not None}
        for connection in wait(list(busy)):
            worker = busy[connection]  # type: ignore[index]
            chunk = worker.chunk or []
            worker.chunk = None
            try:
                result = pickle.loads(worker.connection.recv_bytes())
            except (EOFError, OSError, pickle.UnpicklingError):
                self._end(worker)
                self._workers.remove(worker)
                self._log(f"a worker process ended while it trained {', '.join(order.client for order in chunk)}")
                for order in reversed(chunk):
                    deaths[order.index] = deaths.get(order.index, 0) + (1 if len(chunk) == 1 else 0)
                    if deaths[order.index] >= MOST_DEATHS:
                        yield [_lost(order)], None
                    else:
                        chunks.appendleft([order])
                continue
            if isinstance(result, BaseException):
                raise result
            yield result

    def _arrival(self, call: Call, outcome: Outcome, *, folded: bool, total: Total | None) -> Arrival:
        if outcome.trace:
            self._log(outcome.trace)
        call.context.state = flower.tree_to_state(outcome.state)
        if outcome.error is not None:
            reply = flower.error_reply(call.message, *outcome.error)
        else:
            reply = Message(outcome.content or RecordDict(), reply_to=call.message)
        return Arrival(instruction=call.message, reply=reply, folded=folded, total=total)

    def _start(self) -> _Worker:
        # forkserver: a fork of this process would copy its threads' locks; spawn would import everything each time.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, self._recipe), daemon=True)
        with _nameless_main():
            process.start()
        there.close()
        return _Worker(process=process, connection=here)

    def _end(self, worker: _Worker) -> None:
        worker.connection.close()
        worker.process.terminate()
        worker.process.join(timeout=5)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def work(connection: Connection, recipe: Recipe) -> None:
    """Serve chunks until the other end closes; what a chunk's client raises is that client's failure."""
    from ..clients.training import reproducible

    # Ctrl-C reaches the whole group of processes; the main process decides when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if recipe.folder is not None:
        # A fold of the user's own class is found by its module's name.
        sys.path.insert(0, str(recipe.folder.resolve()))
    with reproducible(), flower.quiet():
        flower.identify_process(run_id=1)
        try:
            federation = recipe.build()
        except Exception as error:
            connection.recv_bytes()
            connection.send_bytes(pickle.dumps(_portable(error)))
            return
        contents: dict[int, RecordDict] = {}
        while True:
            try:
                sent, chunk, fold = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                return
            needed = {order.content for order in chunk}
            contents = {number: content for number, content in contents.items() if number in needed}
            contents |= {number: pickle.loads(content) for number, content in sent.items()}
            total = fold.start() if fold is not None else None
            outcomes = [
                _serve(federation.app, order, contents[order.content], fold, total, isolate=recipe.isolate)
                for order in chunk
            ]
            try:
                connection.send_bytes(pickle.dumps((outcomes, total), protocol=pickle.HIGHEST_PROTOCOL))
            except OSError:  # the main process was killed: nobody asks any more
                return


def _serve(
    app: ClientApp, order: Order, content: RecordDict, fold: Fold | None, total: Total | None, *, isolate: bool
) -> Outcome:
    message = Message(content, order.node, order.kind)
    context = Context(
        run_id=1,
        node_id=order.node,
        node_config=order.node_config,
        state=flower.tree_to_state(order.state),
        run_config=order.run_config,
    )
    reply, trace = answer(app, Call(client=order.client, message=message, context=context), isolate=isolate)
    if fold is not None and total is not None:
        reply = fold_in(fold, total, message, reply)
    error = flower.code_and_sentence(reply.error) if reply.has_error() else None
    return Outcome(
        index=order.index,
        content=None if error else reply.content,
        error=error,
        state=flower.state_to_tree(context.state),
        trace=trace,
    )


@contextmanager
def _nameless_main() -> Iterator[None]:
    """Keep a worker from importing the user's script, which may have no guard and would simulate again."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _lost(order: Order) -> Outcome:
    sentence = "the client's process ended each time it was tried"
    return Outcome(index=order.index, content=None, error=("client-failed", sentence), state=order.state, trace=None)


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RunError("internal", f"a worker process could not start: {type(error).__name__}: {error}")
    return error
