"""A worker process: one thread that serves chunks until the other end closes."""

from __future__ import annotations

import ctypes
import pickle
import signal
import sys
from multiprocessing.connection import Connection

from ...core import flower
from ...core.collector import sparing
from ...core.errors import RunError
from ..recipe import Recipe
from .worker import Fetch, Worker


def work(connection: Connection, recipe: Recipe) -> None:
    """Serve chunks until the other end closes; what a chunk's client raises is that client's failure."""
    from ...clients.training import reproducible

    # Ctrl-C reaches the whole group of processes; the main process decides when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with reproducible(), flower.quiet():
        try:
            worker = worker_of(recipe)
        except Exception as error:
            connection.recv_bytes()
            connection.send_bytes(pickle.dumps(_portable(error)))
            return
        with sparing():
            _serve(connection, worker)


def _serve(connection: Connection, worker: Worker) -> None:
    while True:
        try:
            chunk = pickle.loads(connection.recv_bytes())
            connection.send_bytes(pickle.dumps(worker.serve(chunk), protocol=pickle.HIGHEST_PROTOCOL))
        except (EOFError, OSError):  # the main process is done, or was killed: nobody asks any more
            return


def worker_of(recipe: Recipe, *, fetch: Fetch = pickle.loads) -> Worker:
    """Return the worker of a process that does nothing else; `fetch` makes a content of what a chunk holds of it.

    Raises whatever the recipe raises.
    """
    keep_memory()
    if recipe.folder is not None:
        # A fold of the user's own class is found by its module's name.
        sys.path.insert(0, str(recipe.folder.resolve()))
    flower.identify_process(run_id=1)
    federation = recipe.build()
    return Worker(federation.app, federation.group, isolate=recipe.isolate, fetch=fetch)


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
