"""A worker process: one thread, a resident model, and the running total of what its clients sent in an exchange."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ...core import flower
from ...core.errors import RunError
from ...server.grid import fold_in
from ...strategies.fold import Fold, Total
from ..recipe import Recipe
from .executor import Call, CallTimes, answer
from .orders import Chunk, Order, Outcome

Fetch = Callable[[Any], RecordDict]


def work(connection: Connection, recipe: Recipe) -> None:
    """Serve chunks until the other end closes; what a chunk's client raises is that client's failure."""
    from ...clients.training import reproducible

    # Ctrl-C reaches the whole group of processes; the main process decides when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with reproducible(), flower.quiet():
        try:
            worker = Worker.build(recipe)
        except Exception as error:
            connection.recv_bytes()
            connection.send_bytes(pickle.dumps(_portable(error)))
            return
        while True:
            try:
                chunk: Chunk = pickle.loads(connection.recv_bytes())
                connection.send_bytes(pickle.dumps(worker.serve(chunk), protocol=pickle.HIGHEST_PROTOCOL))
            except (EOFError, OSError):  # the main process is done, or was killed: nobody asks any more
                return


class Worker:
    """What a worker process keeps from chunk to chunk."""

    def __init__(self, app: ClientApp, *, isolate: bool, fetch: Fetch) -> None:
        self._app, self._isolate, self._fetch = app, isolate, fetch
        self._contents: dict[int, RecordDict] = {}
        self._exchange = 0
        self._fold: Fold | None = None
        self._total: Total | None = None

    @classmethod
    def build(cls, recipe: Recipe, *, fetch: Fetch = pickle.loads) -> Worker:
        """Return the worker of a process that does nothing else; `fetch` makes a content of what a chunk holds of it.

        Raises whatever the recipe raises.
        """
        keep_memory()
        if recipe.folder is not None:
            # A fold of the user's own class is found by its module's name.
            sys.path.insert(0, str(recipe.folder.resolve()))
        flower.identify_process(run_id=1)
        return cls(recipe.build().app, isolate=recipe.isolate, fetch=fetch)

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
        return [self._serve(order) for order in chunk.orders]

    def _start(self) -> Total | None:
        return self._fold.start() if self._fold is not None else None

    def _serve(self, order: Order) -> Outcome:
        message = Message(self._contents[order.content], order.node, order.kind)
        context = Context(
            run_id=1,
            node_id=order.node,
            node_config=order.node_config,
            state=flower.tree_to_state(order.state),
            run_config=order.run_config,
        )
        began = time.perf_counter()
        reply, trace = answer(
            self._app, Call(client=order.client, message=message, context=context), isolate=self._isolate
        )
        answered = time.perf_counter()
        folded_bytes = None
        if self._fold is not None and self._total is not None:
            reply, folded_bytes = fold_in(self._fold, self._total, message, reply)
        error = flower.code_and_sentence(reply.error) if reply.has_error() else None
        return Outcome(
            index=order.index,
            content=None if error else reply.content,
            error=error,
            state=flower.state_to_tree(context.state),
            trace=trace,
            folded_bytes=folded_bytes,
            times=CallTimes(
                client=order.client,
                kind=order.kind,
                process=os.getpid(),
                began=began,
                answered=answered,
                ended=time.perf_counter(),
            ),
        )


def keep_memory() -> None:
    """Have the allocator keep what is freed: it would return each gradient to the system, and page it in again."""
    trim_threshold, mmap_threshold = -1, -3
    try:
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 2**30)
        library.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):  # not the GNU C library
        pass


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RunError("internal", f"a worker process could not start: {type(error).__name__}: {error}")
    return error
