"""The round loop: drives any Flower Strategy over any RoundGrid, one cohort a round, until the end or the budget."""

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
from ..privacy.guarantee import finite
from ..privacy.release import EvaluationPlan
from ..strategies.asynchronous import Asynchronous
from ..strategies.compression import Compression
from ..strategies.state import load_strategy_state, remember_strategy, strategy_state
from .checkpoint import Checkpoint
from .cohort import CohortSampler
from .cohort_grid import CohortGrid, SealedGrid
from .evaluation import evaluate
from .events import ClientFailed, ClientReplied, Evaluated, Listener, Notice, RoundFinished, RoundStarted
from .grid import Exchange, RoundGrid
from .private_aggregation import PrivateAggregation
from .progress import COUNTED, Budget, Progress, Rules

_TELLING = ("clients", "failed", "bytes_up", "bytes_down", "virtual_time", "seconds")


@dataclass(kw_only=True)
class RoundLoop:
    """Everything that a run of rounds needs; `run` goes through them.

    `clients` maps node ids to names, in order, and may grow; `population` returns who may be drawn in a round and
    `connected` those that are there, both by default all clients. `remember_clients` returns what puts clients' states
    back to what they are when it is called. `virtual_time` is that of simulated clients. `after_round` gets the
    progress and what makes the checkpoint. A round of an `Asynchronous` strategy is one step of the server. `private`
    where each round is charged, by a site or by the server: then a strategy may send no more than its round's messages.
    """

    strategy: Strategy
    grid: RoundGrid
    clients: Mapping[int, str]
    sampler: CohortSampler
    budget: Budget
    rules: Rules
    evaluation: EvaluationPlan | None
    emit: Listener
    private: bool = False
    aggregation: PrivateAggregation | None = None
    compression: Compression | None = None
    strategy_evaluates: bool = False
    strategy_seed: int = 0
    population: Callable[[int], Sequence[int]] | None = None
    connected: Callable[[], Mapping[int, str]] | None = None
    client_states: Callable[[], dict[str, Any]] = dict
    remember_clients: Callable[[], Callable[[], None]] = lambda: lambda: None
    virtual_time: Callable[[], float | None] = lambda: None
    should_stop: Callable[[], bool] = lambda: False
    after_round: Callable[[Progress, Callable[[], Checkpoint]], None] = lambda progress, make: None
    on_strategy_error: Callable[[Exception], None] = lambda error: None

    def run(self, progress: Progress) -> str:
        """Run the rounds after `progress.round`; return "completed", "stopped-early" or "budget-exhausted".

        `progress` is up to date with the last whole round, also when this raises.
        """
        layout = Layout.of(progress.arrays)
        while progress.round < self.rules.rounds:
            number = progress.round + 1
            cohort = self._draw(number)
            names = [self.clients[node] for node in cohort]
            if not self.budget.allows(names):
                self.emit(Notice(text=f"round {number} would exceed the privacy budget; stopping after {number - 1}"))
                return "budget-exhausted"
            started, spent = time.perf_counter(), self.budget.state_dict()
            self.emit(RoundStarted(round=number, cohort=self._awaited(cohort)))
            self.budget.charge(names)
            put_strategy_back, forget_round = self._remember(), self.remember_clients()
            try:
                progress.arrays, record = self._train(number, cohort, progress.arrays, layout)
            except BaseException:
                # Nothing of it was released, and a resumed run trains it on the same model with the same noise.
                self.budget.load_state_dict(spent)
                forget_round()
                put_strategy_back()
                raise
            progress.round = number
            progress.trained += record["clients"]
            progress.skipped += record.pop("skipped")
            progress.bytes_up += record["bytes_up"]
            progress.bytes_down += record["bytes_down"]
            evaluated = record.pop("evaluated", None)
            if evaluated is not None:
                progress.strategy_metrics = evaluated
            if self.rules.evaluate_every and number % self.rules.evaluate_every == 0:
                record |= self.evaluate(progress)
            epsilon = self.budget.epsilon()
            # Next to no noise gives no epsilon, which JSON could not say either.
            known = {"virtual_time": self.virtual_time(), "epsilon": None if epsilon is None else finite(epsilon)}
            record = {
                "round": number,
                **record,
                **{name: value for name, value in known.items() if value is not None},
                "seconds": round(time.perf_counter() - started, 4),
            }
            if self.aggregation is not None:
                # They tell the size of a cohort that must stay secret.
                record = {name: value for name, value in record.items() if name not in _TELLING}
            self.emit(RoundFinished(round=number, record=record))
            self.after_round(progress, lambda: self.checkpoint(progress))
            evaluated = progress.evaluated_round == number
            if self.rules.patience and evaluated and number - progress.best_round >= self.rules.patience:
                self.emit(Notice(text=f"stopped early: the model of round {progress.best_round} was the best"))
                return "stopped-early"
            if self.should_stop():
                raise KeyboardInterrupt
        learnt = progress.trained > 0 if self.aggregation is not None else progress.skipped < progress.round
        if progress.round and not learnt:
            raise RunError("quorum-missed", "no round had a quorum of clients that replied, so nothing was learned")
        return "completed"

    def _draw(self, number: int) -> list[int]:
        """Return who is sent a message in this round, and pays for it, whenever the reply comes."""
        population = list(self.clients if self.population is None else self.population(number))
        if isinstance(self.strategy, Asynchronous):
            return list(self._call(self.strategy.draw, number, population))
        # Of a population of fixed size some places may be nobody's.
        return [node for node in self.sampler.draw(number, population) if node in self.clients]

    def _awaited(self, cohort: Sequence[int]) -> int:
        """Return how many replies the round waits for."""
        return self.strategy.buffer if isinstance(self.strategy, Asynchronous) else len(cohort)

    def _quorate(self, replies: Sequence[Message], asked: int) -> bool:
        if self.aggregation is not None:
            # That a client fails may follow from its records, so it counts as there, with an update of zero; and an
            # empty cohort is released as noise.
            return len(replies) >= self.rules.quorum * asked
        good = sum(reply.has_content() for reply in replies)
        return good > 0 and good >= self.rules.quorum * asked

    def evaluate(self, progress: Progress) -> dict[str, Any]:
        """Release metrics of the current model, remember the best, and return them."""
        if self.evaluation is None:
            return {}
        number = progress.round
        config = {"server-round": number, "model-version": digest(progress.arrays)}
        there = self.clients if self.connected is None else self.connected()
        found = evaluate(self.grid, there, record_of(progress.arrays), self.evaluation, config)
        if found is None:
            return {}
        progress.histograms, progress.evaluated_round = dict(found.histograms), number
        self.emit(Evaluated(round=number, metrics=found.metrics))
        score = found.metrics.get("accuracy")
        if score is not None and (progress.best is None or score > progress.best):
            progress.best, progress.best_round = score, number
            progress.best_arrays, progress.best_histograms = dict(progress.arrays), dict(found.histograms)
        return dict(found.metrics)

    def evaluate_at_the_end(self, progress: Progress) -> None:
        """Release metrics of the last model, unless they are there or an earlier model is the one that is kept."""
        kept = self.rules.patience > 0 and progress.best_arrays
        if not kept and progress.evaluated_round != progress.round:
            self.evaluate(progress)

    def checkpoint(self, progress: Progress) -> Checkpoint:
        """Return everything from which `restore` goes on."""
        return Checkpoint(
            round=progress.round,
            arrays=dict(progress.arrays),
            strategy=strategy_state(self.strategy),
            progress={name: getattr(progress, name) for name in COUNTED}
            | {
                "budget": self.budget.state_dict(),
                "aggregation": self.aggregation.state_dict() if self.aggregation else {},
            },
            clients=self.client_states(),
        )

    def restore(self, checkpoint: Checkpoint) -> Progress:
        """Put strategy and budget back, and return the progress to go on from."""
        load_strategy_state(self.strategy, checkpoint.strategy)
        self.budget.load_state_dict(checkpoint.progress["budget"])
        if self.aggregation is not None:
            self.aggregation.load_state_dict(checkpoint.progress["aggregation"])
        kept = {name: checkpoint.progress[name] for name in COUNTED}
        return Progress(round=checkpoint.round, arrays=checkpoint.arrays, **kept)

    def _remember(self) -> Callable[[], None]:
        """Return what puts strategy and clipping norm back: a round may fail after both have taken it up."""
        put_back = self._call(remember_strategy, self.strategy)
        aggregation = self.aggregation
        norm = aggregation.state_dict() if aggregation is not None else {}

        def all_back() -> None:
            if aggregation is not None:
                aggregation.load_state_dict(norm)
            self._call(put_back)

        return all_back

    def _train(
        self, number: int, cohort: Sequence[int], arrays: dict[str, NDArray[np.generic]], layout: Layout
    ) -> tuple[dict[str, NDArray[np.generic]], dict[str, Any]]:
        """Train one cohort and return the new model and the round's record; below the quorum the model stays."""
        record: dict[str, Any] = {"clients": 0, "failed": 0, "bytes_down": 0, "bytes_up": 0, "skipped": False}
        awaited = self._awaited(cohort)
        if not awaited and self.aggregation is None:
            return arrays, record
        name = type(self.strategy).__name__
        private = name if self.private or self.aggregation is not None else None
        view = CohortGrid(self.grid, cohort, compression=self.compression, private=private)
        shown = view if self.aggregation is None else SealedGrid(view, name)
        # The global `random` is what Flower's strategies draw from; seeded by round, a resumed run draws the same.
        with flower.seeded_random(self.strategy_seed + number):
            messages = self._configure(number, arrays, shown)
            fold = self._call(self.strategy.fold) if hasattr(self.strategy, "fold") else None
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
                    self._call(self.strategy.skip_train, number, replies)
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
                aggregate, metrics = self._call(self.strategy.aggregate_total, number, total)  # type: ignore[attr-defined]
            else:
                aggregate, metrics = self._call(self.strategy.aggregate_train, number, replies)
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

    def _configure(self, number: int, arrays: Arrays, view: RoundGrid) -> Iterable[Message]:
        config = ConfigRecord({"server-round": number, "model-version": digest(arrays)})
        messages = self._call(self.strategy.configure_train, number, record_of(arrays), config, view)
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
        messages = self._call(self.strategy.configure_evaluate, number, record_of(arrays), config, view)
        replies = list(view.exchange(messages))
        return dict(self._call(self.strategy.aggregate_evaluate, number, replies) or {})

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

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
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
