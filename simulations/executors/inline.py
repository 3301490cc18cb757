"""The executor that is a worker in this process: so many clients at a time, when the first of their replies is due."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from ...clients.group import ClientGroup
from ...server.grid import Arrival
from ...strategies.fold import Fold, Total
from ..federation import Federation
from .executor import Call, Watch
from .orders import Outcome, arrival_of, chunk_for, orders_of
from .worker import Worker

# Stacks of which it asks for as many clients at once, so that those of one length go together.
_STACKS = 8


class InlineWorker:
    """Clients served here in groups; the total comes with the last reply."""

    def __init__(
        self, federation: Federation, group: ClientGroup, *, log: Callable[[str], None], watch: Watch | None = None
    ) -> None:
        self._worker = Worker(federation.app, group, isolate=False, fetch=lambda content: content)
        self._width, self._log, self._watch = group.width * (_STACKS if group.width > 1 else 1), log, watch
        self._exchanges = 0

    def run(self, calls: Iterable[Call], *, fold: Fold | None) -> Iterator[Arrival]:
        """Yield the outcome of each call, in order."""
        self._exchanges += 1
        number, coming = self._exchanges, iter(calls)
        part = list(islice(coming, self._width))
        while part:
            outcomes = self._served(part, number, fold)
            following = list(islice(coming, self._width))
            for place, (call, outcome) in enumerate(zip(part, outcomes, strict=True)):
                last = not following and place == len(part) - 1
                total = self._total(part, number) if last and fold is not None else None
                yield arrival_of(call, outcome, total=total, log=self._log, watch=self._watch)
            part = following

    def close(self) -> None:
        """Nothing was started."""

    def _served(self, part: list[Call], number: int, fold: Fold | None) -> list[Outcome]:
        orders, contents = orders_of(part, first=1)
        chunk = chunk_for(part, number, timed=self._watch is not None)
        served = self._worker.serve(chunk.holding(tuple(orders), contents, fold))
        assert isinstance(served, list)
        return served

    def _total(self, part: list[Call], number: int) -> Total | None:
        total = self._worker.serve(chunk_for(part, number, timed=False))
        assert not isinstance(total, list)
        return total
