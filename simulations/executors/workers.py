"""Worker processes: persistent, one thread each, with a resident model; a killed one is replaced.

Chunks of calls go to whoever is free, and come back as replies; with a fold, each worker keeps one exact total until
there is nothing left to do. Replies are handed over in the order of their messages and totals add exactly, so no result
depends on the number of workers.
"""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType

from ...server.grid import Arrival
from ...strategies.fold import Fold, Total
from ..recipe import Recipe
from .executor import Call, Watch
from .orders import Chunk, Dealing, Order, Orders, Outcome, arrival_of, chunk_for, orders_of
from .worker_process import work

# A call that ends this many workers is taken for a failure of that client.
MOST_DEATHS = 2
MOST_ASKED = 2
# Bytes that a pipe takes whether or not the other end reads.
SENT_AHEAD = 2**15
PRELOAD = ["bract.simulations.executors.worker_process"]


@dataclass(kw_only=True)
class _Worker:
    """A process, what it is asked for and has not answered, in order (no orders: its total), and what its total holds.

    `adds` says that it was given more since it was last asked for its total.
    """

    process: BaseProcess
    connection: Connection
    place: int
    contents: set[int] = field(default_factory=set)
    exchange: int = 0
    asked: deque[Orders] = field(default_factory=deque)
    kept: list[Orders] = field(default_factory=list)
    adds: bool = False


@dataclass(kw_only=True)
class _Exchange:
    """One batch of calls: what waits, what came back, and how often each call ended a worker."""

    number: int
    about: Chunk
    fold: Fold | None
    contents: dict[int, bytes]
    chunks: deque[Orders]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    deaths: dict[int, int] = field(default_factory=dict)
    total: Total | None = None


class WorkerPool:
    """An executor of so many worker processes, started at the first call."""

    def __init__(
        self,
        recipe: Recipe,
        count: int,
        *,
        dealing: Dealing,
        log: Callable[[str], None],
        watch: Watch | None = None,
    ) -> None:
        self._recipe, self._count, self._dealing, self._log, self._watch = recipe, count, dealing, log, watch
        self._workers: list[_Worker] = []
        self._contents = 0
        self._exchanges = 0

    @property
    def process_ids(self) -> list[int]:
        """The ids of the worker processes that are there."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def run(self, calls: Iterable[Call], *, fold: Fold | None) -> Iterator[Arrival]:
        """Yield the outcome of each call in order; the total comes with the last."""
        known = list(calls)
        if not known:
            return
        exchange = self._open(known, fold)
        upcoming, last = 0, len(known) - 1
        try:
            while upcoming <= last:
                self._fill(exchange)
                self._collect(exchange)
                while upcoming in exchange.outcomes and (upcoming < last or self._finished(exchange)):
                    total = exchange.total if upcoming == last else None
                    outcome = exchange.outcomes[upcoming]
                    yield self._arrival(known[upcoming], outcome, total=total)
                    upcoming += 1
        finally:
            # An exchange that is left early must not hand its late replies to the next one.
            for worker in self._workers:
                if worker.asked:
                    self._end(worker)
                worker.kept, worker.adds = [], False
            self._workers = [worker for worker in self._workers if worker.process.is_alive()]

    def close(self) -> None:
        """End the worker processes."""
        for worker in self._workers:
            self._end(worker)
        self._workers = []

    def _open(self, calls: Sequence[Call], fold: Fold | None) -> _Exchange:
        """Return the exchange: contents by number, pickled once each, and the calls in chunks."""
        orders, found = orders_of(calls, first=self._contents + 1)
        self._contents += len(found)
        contents = {
            number: pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL) for number, content in found.items()
        }
        chunks = deque(self._dealing.chunks(orders, self._count))
        self._exchanges += 1
        about = chunk_for(calls, self._exchanges, timed=self._watch is not None)
        return _Exchange(number=self._exchanges, about=about, fold=fold, contents=contents, chunks=chunks)

    def _finished(self, exchange: _Exchange) -> bool:
        """Return whether nothing waits, nobody is busy, and no total is still with its worker."""
        return not exchange.chunks and not any(worker.asked or worker.kept for worker in self._workers)

    def _fill(self, exchange: _Exchange) -> None:
        """Have every worker hold two requests, and last that for its total; start workers if there may be more.

        One that waited for its next request to be sent would do nothing meanwhile.
        """
        busy = sum(len(worker.asked) for worker in self._workers)
        while len(self._workers) < min(self._count, len(exchange.chunks) + busy):
            self._workers.append(self._start())
        for depth in range(MOST_ASKED):
            for worker in self._workers:
                if len(worker.asked) == depth:
                    self._ask(worker, exchange)
        self._workers = [worker for worker in self._workers if worker.process.is_alive() or worker.asked]

    def _ask(self, worker: _Worker, exchange: _Exchange) -> None:
        """Send a worker the next chunk, or the request for its total, if there is any and it can be sent at once."""
        if not exchange.chunks and not worker.adds:
            return
        orders = exchange.chunks.popleft() if exchange.chunks else ()
        needed = {order.content for order in orders}
        chunk = exchange.about.holding(
            orders,
            {number: exchange.contents[number] for number in needed - worker.contents},
            exchange.fold if worker.exchange != exchange.number else None,
        )
        sent = pickle.dumps(chunk, protocol=pickle.HIGHEST_PROTOCOL)
        if worker.asked and len(sent) > SENT_AHEAD:
            # Sending it would wait for the worker, which may itself wait for its answer to be read.
            exchange.chunks.appendleft(orders)
            return
        try:
            worker.connection.send_bytes(sent)
        except OSError:
            # It died: if it was asked for anything, that is seen when its answers are read.
            self._give_back([orders], exchange)
            if not worker.asked:
                self._give_back(worker.kept, exchange)
                self._end(worker)
            return
        worker.exchange, worker.contents = exchange.number, needed or worker.contents
        worker.asked.append(orders)
        worker.adds = bool(orders) and exchange.fold is not None

    def _collect(self, exchange: _Exchange) -> None:
        """Wait for a worker, and take what came; the chunk of one that died goes back, one call at a time."""
        busy = {worker.connection: worker for worker in self._workers if worker.asked}
        for connection in wait(list(busy)):
            worker = busy[connection]  # type: ignore[index]
            try:
                answer = pickle.loads(worker.connection.recv_bytes())
            except (EOFError, OSError, pickle.UnpicklingError):
                self._end(worker)
                self._workers.remove(worker)
                first, *others = worker.asked
                self._log(f"a worker process ended while it trained {', '.join(order.client for order in first)}")
                self._give_back([*worker.kept, *others], exchange)
                self._try_again(first, exchange)
                continue
            if isinstance(answer, BaseException):
                raise answer
            orders = worker.asked.popleft()
            if not orders:
                worker.kept = []
                self._add(answer, exchange)
                continue
            exchange.outcomes.update((outcome.number, outcome) for outcome in answer)
            if exchange.fold is not None:
                worker.kept.append(orders)

    def _give_back(self, lost: Iterable[Orders], exchange: _Exchange) -> None:
        """Have others do what a worker lost: chunks that it never began, and those whose total it kept."""
        exchange.chunks.extendleft(chunk for chunk in lost if chunk)

    def _try_again(self, orders: Orders, exchange: _Exchange) -> None:
        for order in reversed(orders):
            deaths = exchange.deaths[order.number] = exchange.deaths.get(order.number, 0) + (len(orders) == 1)
            if deaths >= MOST_DEATHS:
                exchange.outcomes[order.number] = _lost(order)
            else:
                exchange.chunks.appendleft((order,))

    def _add(self, total: Total | None, exchange: _Exchange) -> None:
        if exchange.total is None:
            exchange.total = total
        elif total is not None:
            exchange.total.merge(total)

    def _arrival(self, call: Call, outcome: Outcome, *, total: Total | None) -> Arrival:
        return arrival_of(call, outcome, total=total, log=self._log, watch=self._watch)

    def _start(self) -> _Worker:
        # forkserver: a fork of this process would copy its threads' locks; spawn would import everything each time.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        here, there = context.Pipe()
        taken = {worker.place for worker in self._workers}
        place = next(number for number in itertools.count() if number not in taken)
        process = context.Process(target=work, args=(there, self._recipe.placed(place)), daemon=True)
        with _nameless_main():
            process.start()
        there.close()
        return _Worker(process=process, connection=here, place=place)

    def _end(self, worker: _Worker) -> None:
        worker.connection.close()
        worker.process.terminate()
        worker.process.join(timeout=5)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


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
    return Outcome(order.number, None, ("client-failed", sentence), order.state, None)
