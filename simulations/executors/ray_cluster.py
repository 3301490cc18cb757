"""Ray: the same workers as actors of a cluster, which Ray starts here where no address is given.

A model is put into Ray's store once a round, and each actor keeps one exact total until there is nothing left to do, so
no result depends on where an actor runs. The records and the run's key travel to each node with the recipe: a cluster
is the experimenter's own.
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ...clients.training import reproducible
from ...core import flower
from ...core.errors import InputError, RunError
from ...server.grid import Arrival
from ...strategies.fold import Fold, Total
from ..recipe import Recipe
from .executor import Call, Watch
from .orders import Chunk, Dealing, Outcome, arrival_of, chunk_for, orders_of
from .worker_process import worker_of


class Actor:
    """What Ray runs in a process of its own: a worker, which gets contents from Ray's store."""

    def __init__(self, recipe: Recipe) -> None:
        # For the life of the process, which does nothing else.
        self._contexts = (reproducible(), flower.quiet())
        for context in self._contexts:
            context.__enter__()
        self._worker = worker_of(recipe, fetch=find_ray().get)

    def serve(self, chunk: Chunk) -> list[Outcome] | Total | None:
        """Return what a worker returns."""
        return self._worker.serve(chunk)


class RayCluster:
    """An executor of so many actors, by default one a processor of the cluster, started at the first call.

    `address` is a cluster's; "auto" is one that runs on this machine, None starts one.
    """

    def __init__(
        self,
        recipe: Recipe,
        count: int | None,
        *,
        address: str | None,
        dealing: Dealing,
        log: Callable[[str], None],
        watch: Watch | None = None,
    ) -> None:
        """Raises InputError if Ray is not installed."""
        self._ray = find_ray()
        self._recipe, self._count, self._address, self._log, self._watch = recipe, count, address, log, watch
        self._dealing = dealing
        self._actors: list[Any] = []
        self._exchanges = self._contents = 0
        self._connected = False

    def run(self, calls: Iterable[Call], *, fold: Fold | None) -> Iterator[Arrival]:
        """Yield the outcome of each call in order; the total comes with the last. Raises RunError."""
        known = list(calls)
        if not known:
            return
        self._start()
        try:
            yield from self._run(known, fold)
        except self._ray.exceptions.RayTaskError as error:
            raise RunError("internal", f"a Ray worker could not serve: {error.cause}") from error
        except self._ray.exceptions.RayError as error:
            self.close()
            raise RunError(
                "internal", f"a Ray worker was lost ({type(error).__name__}); go on with --resume RUN"
            ) from error

    def close(self) -> None:
        """End the actors, and leave the cluster."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._connected:
            self._ray.shutdown()
            self._connected = False

    def _run(self, known: list[Call], fold: Fold | None) -> Iterator[Arrival]:
        orders, found = orders_of(known, first=self._contents + 1)
        self._contents += len(found)
        self._exchanges += 1
        about = chunk_for(known, self._exchanges, timed=self._watch is not None)
        stored = {number: self._ray.put(content) for number, content in found.items()}
        chunks, outcomes = deque(self._dealing.chunks(orders, len(self._actors))), dict[int, Outcome]()
        has = [set[int]() for _ in self._actors]
        began = [False] * len(self._actors)
        running: dict[Any, int] = {}

        def give(index: int) -> None:
            part = chunks.popleft()
            needed = {order.content for order in part}
            contents = {number: stored[number] for number in needed - has[index]}
            chunk = about.holding(part, contents, None if began[index] else fold)
            running[self._actors[index].serve.remote(chunk)] = index
            has[index], began[index] = needed, True

        for index in range(min(len(self._actors), len(chunks))):
            give(index)
        upcoming, last = 0, len(known) - 1
        while running:
            (ready,), _ = self._ray.wait(list(running), num_returns=1)
            index = running.pop(ready)
            outcomes.update((outcome.number, outcome) for outcome in self._ray.get(ready))
            if chunks:
                give(index)
            while upcoming < last and upcoming in outcomes:
                yield self._arrival(known[upcoming], outcomes.pop(upcoming), None)
                upcoming += 1
        total = None if fold is None else self._total(began, fold)
        for number in range(upcoming, last + 1):
            yield self._arrival(known[number], outcomes.pop(number), total if number == last else None)

    def _total(self, began: list[bool], fold: Fold) -> Total:
        asked = Chunk(exchange=self._exchanges)
        kept = [actor.serve.remote(asked) for actor, did in zip(self._actors, began, strict=True) if did]
        # What comes from Ray's store is read-only.
        total = fold.start()
        for part in self._ray.get(kept):
            total.merge(part)
        return total

    def _arrival(self, call: Call, outcome: Outcome, total: Total | None) -> Arrival:
        return arrival_of(call, outcome, total=total, log=self._log, watch=self._watch)

    def _start(self) -> None:
        if self._actors:
            return
        ray = self._ray
        if not ray.is_initialized():
            try:
                ray.init(address=self._address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            except Exception as error:  # Ray raises ConnectionError, ValueError and others
                where = f'simulation.ray_address = "{self._address}"' if self._address else "simulation.executor = ray"
                raise InputError(
                    "device-missing", f"{where}: Ray does not start or answer there ({type(error).__name__})"
                ) from error
            self._connected = True
        # Put once, not sent to each.
        recipe = ray.put(self._recipe)
        there = ray.cluster_resources()
        gpus = int(there.get("GPU", 0)) if self._recipe.gpus else 0
        count = self._count or max(1, gpus or int(there.get("CPU", 1)))
        # Ray shows each actor its own GPU alone, which is then its first.
        made = ray.remote(num_cpus=1, num_gpus=min(1.0, gpus / count))(Actor)
        self._actors = [made.remote(recipe) for _ in range(count)]


def find_ray() -> Any:
    """Return the module; InputError if Ray is not installed."""
    # Ray reports its use, and warns of a change that concerns GPUs, unless it is told otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise InputError(
            "plugin-missing",
            'simulation.executor = "ray": Ray is not installed; `pip install ray` into this environment',
        ) from error
