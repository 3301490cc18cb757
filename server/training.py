"""The training of one round: a cohort's messages, its replies, and the model that the strategy makes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from ..core import flower
from ..core.errors import BractError, RunError
from ..core.parameters import Arrays, Layout, arrays_of, digest, record_of
from ..strategies.asynchronous import Asynchronous
from ..strategies.compression import Compression
from .cohort_grid import CohortGrid, SealedGrid
from .events import ClientFailed, ClientReplied, Listener, Notice
from .grid import Exchange, RoundGrid
from .private_aggregation import PrivateAggregation
from .progress import Rules


@dataclass(kw_only=True)
class RoundTraining:
    """What the training of a round needs; `train` does it.

    `clients` maps node ids to names, in order, and may grow. `private` where each round is charged, by a site or by the
    server: then a strategy may send no more than its round's messages.
    """

    strategy: Strategy
    grid: RoundGrid
    clients: Mapping[int, str]
    rules: Rules
    emit: Listener
    private: bool = False
    aggregation: PrivateAggregation | None = None
    compression: Compression | None = None
    strategy_evaluates: bool = False
    strategy_seed: int = 0
    should_stop: Callable[[], bool] = lambda: False
    on_strategy_error: Callable[[Exception], None] = lambda error: None

    def train(
        self, number: int, cohort: Sequence[int], arrays: dict[str, NDArray[np.generic]], layout: Layout
    ) -> tuple[dict[str, NDArray[np.generic]], dict[str, Any]]:
        """Train one cohort and return the new model and the round's record; below the quorum the model stays."""
        record: dict[str, Any] = {"clients": 0, "failed": 0, "bytes_down": 0, "bytes_up": 0, "skipped": False}
        awaited = self.awaited(cohort)
        if not awaited and self.aggregation is None:
            return arrays, record
        name = type(self.strategy).__name__
        private = name if self.private or self.aggregation is not None else None
        view = CohortGrid(self.grid, cohort, compression=self.compression, private=private)
        shown = view if self.aggregation is None else SealedGrid(view, name)
        # The global `random` is what Flower's strategies draw from; seeded by round, a resumed run draws the same.
        with flower.seeded_random(self.strategy_seed + number):
            messages = self._configure(number, arrays, shown)
            fold = self.call(self.strategy.fold) if hasattr(self.strategy, "fold") else None
            if self.aggregation is not None:
                fold = clipped = self.aggregation.fold(arrays, self.strategy, fold)
                record["clipping_norm"] = clipped.clipping_norm
            asynchronous = isinstance(self.strategy, Asynchronous)
            exchange = view.exchange(messages, fold=fold, until=awaited if asynchronous else None)
            replies = self._receive(number, exchange)
            good = [reply for reply in replies if reply.has_content()]
            record |= {"clients": len(good), "failed": len(replies) - len(good)}
            record |= {"bytes_down": view.bytes_down, "bytes_up": view.bytes_up}
            if not self._quorate(replies, awaited):
                record["skipped"] = True
                if isinstance(self.strategy, Asynchronous):
                    self.call(self.strategy.skip_train, number, replies)
                self.emit(
                    Notice(
                        text=f"round {number}: {len(good)} of {awaited} clients replied, below the quorum; "
                        "the model stays as it was"
                    )
                )
                return arrays, record
            total = exchange.total
            if self.aggregation is not None:
                total = self.aggregation.release(number, clipped, total)
            if total is not None:
                aggregate, metrics = self.call(self.strategy.aggregate_total, number, total)  # type: ignore[attr-defined]
            else:
                aggregate, metrics = self.call(self.strategy.aggregate_train, number, replies)
            for remark in getattr(self.strategy, "remarks", ()):
                self.emit(Notice(text=f"round {number}: {remark}"))
            if aggregate is not None:
                arrays = self._checked(aggregate, layout)
            record |= {**(metrics or {}), "skipped": False, "evaluated": None}
            if self.strategy_evaluates:
                found = self._strategy_metrics(number, arrays, view)
                single = {name: value for name, value in found.items() if isinstance(value, int | float)}
                record |= {**found, "evaluated": single}
        return arrays, record

    def awaited(self, cohort: Sequence[int]) -> int:
        """Return how many replies the round waits for."""
        return self.strategy.buffer if isinstance(self.strategy, Asynchronous) else len(cohort)

    def call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a strategy's method returns; what it raises is the strategy's failure, as RunError."""
        try:
            return method(*arguments)
        except Exception as error:  # a strategy is the user's code
            if isinstance(error, BractError) and error.code == "strategy-failed":
                raise
            self.on_strategy_error(error)
            name = type(self.strategy).__name__
            raise RunError(
                "strategy-failed", f"strategy {name} raised {type(error).__name__} in {method.__name__}: {error}"
            ) from error

    def _configure(self, number: int, arrays: Arrays, view: RoundGrid) -> Iterable[Message]:
        config = ConfigRecord({"server-round": number, "model-version": digest(arrays)})
        messages = self.call(self.strategy.configure_train, number, record_of(arrays), config, view)
        return list(messages)

    def _receive(self, number: int, exchange: Exchange) -> list[Message]:
        replies = []
        before = time.perf_counter()
        for reply in exchange:
            now = time.perf_counter()
            name = self.clients[reply.metadata.src_node_id]
            if reply.has_error():
                code, sentence = flower.code_and_sentence(reply.error)
                self.emit(ClientFailed(round=number, client=name, code=code, sentence=sentence))
            else:
                self.emit(ClientReplied(round=number, client=name, seconds=now - before))
            before = now
            replies.append(reply)
            if self.should_stop():
                raise KeyboardInterrupt
        return replies

    def _strategy_metrics(self, number: int, arrays: Arrays, view: CohortGrid) -> dict[str, Any]:
        """Evaluate as the strategy does: for a Flower ClientApp, whose metrics bract knows nothing of."""
        config = ConfigRecord({"server-round": number})
        messages = self.call(self.strategy.configure_evaluate, number, record_of(arrays), config, view)
        replies = list(view.exchange(messages))
        return dict(self.call(self.strategy.aggregate_evaluate, number, replies) or {})

    def _checked(self, arrays: ArrayRecord, layout: Layout) -> dict[str, NDArray[np.generic]]:
        """Return the aggregate in the model's order and types; a strategy may have left both."""
        found = arrays_of(arrays)
        try:
            typed = {
                name: np.asarray(found[name]).astype(dtype, copy=False)
                for name, dtype in zip(layout.names, layout.dtypes, strict=True)
            }
            layout.check(typed)
        except (KeyError, RunError) as error:
            name = type(self.strategy).__name__
            raise RunError("strategy-failed", f"strategy {name} returned a model of another form ({error})") from error
        return typed

    def _quorate(self, replies: Sequence[Message], asked: int) -> bool:
        if self.aggregation is not None:
            # That a client fails may follow from its records, so it counts as there, with an update of zero; and an
            # empty cohort is released as noise.
            return len(replies) >= self.rules.quorum * asked
        good = sum(reply.has_content() for reply in replies)
        return good > 0 and good >= self.rules.quorum * asked
