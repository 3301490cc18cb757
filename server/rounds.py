"""The round loop: drives any Flower Strategy over any RoundGrid, one cohort a round, until the end or the budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from ..core import flower
from ..core.errors import RunError
from ..core.parameters import Arrays, Layout, arrays_of, digest, record_of
from ..privacy.release import EvaluationPlan
from ..strategies.state import load_strategy_state, strategy_state
from .checkpoint import Checkpoint
from .cohort import CohortSampler
from .evaluation import evaluate
from .events import ClientFailed, ClientReplied, Evaluated, Listener, Notice, RoundFinished, RoundStarted
from .grid import CohortGrid, Exchange, RoundGrid

# What of the progress is counted along the way, besides the model.
_COUNTED = (
    "trained",
    "skipped",
    "best",
    "best_round",
    "best_arrays",
    "best_histograms",
    "histograms",
    "evaluated_round",
)


class Budget(Protocol):
    """What the rounds spend. A cohort is charged before its data is touched, whether or not it replies."""

    def allows(self, cohort: Sequence[str]) -> bool:
        """Return whether these clients may train once more."""

    def charge(self, cohort: Sequence[str]) -> None:
        """Count one round of training for these clients."""

    def epsilon(self) -> float | None:
        """Return the largest epsilon of all clients so far, None where there is no privacy to account for."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was spent."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was spent."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How the loop decides: when to evaluate, when to stop early, which share of a cohort must reply."""

    rounds: int
    quorum: float
    evaluate_every: int = 0
    patience: int = 0


@dataclass(kw_only=True)
class Progress:
    """Where the loop stands; all of it is in the checkpoint."""

    round: int
    arrays: dict[str, NDArray[np.generic]]
    trained: int = 0
    skipped: int = 0
    best: float | None = None
    best_round: int = 0
    best_arrays: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    best_histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    evaluated_round: int = 0


@dataclass(kw_only=True)
class RoundLoop:
    """Everything that a run of rounds needs; `run` goes through them.

    `clients` maps node ids to names, in order. `remember_clients` returns what puts clients' states back to what they
    are when it is called. `after_round` gets the progress and what makes the checkpoint.
    """

    strategy: Strategy
    grid: RoundGrid
    clients: Mapping[int, str]
    sampler: CohortSampler
    budget: Budget
    rules: Rules
    evaluation: EvaluationPlan | None
    emit: Listener
    strategy_evaluates: bool = False
    strategy_seed: int = 0
    client_states: Callable[[], dict[str, Any]] = dict
    remember_clients: Callable[[], Callable[[], None]] = lambda: lambda: None
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
            cohort = self.sampler.draw(number, list(self.clients))
            names = [self.clients[node] for node in cohort]
            if not self.budget.allows(names):
                self.emit(Notice(text=f"round {number} would exceed the privacy budget; stopping after {number - 1}"))
                return "budget-exhausted"
            started, spent = time.perf_counter(), self.budget.state_dict()
            self.emit(RoundStarted(round=number, cohort=len(cohort)))
            self.budget.charge(names)
            forget_round = self.remember_clients()
            try:
                progress.arrays, record = self._train(number, cohort, progress.arrays, layout)
            except BaseException:
                # Nothing of it was released, and a resumed run trains it on the same model with the same noise.
                self.budget.load_state_dict(spent)
                forget_round()
                raise
            progress.round = number
            progress.trained += record["clients"]
            progress.skipped += bool(cohort) and not self._quorate(record["clients"], len(cohort))
            if self.rules.evaluate_every and number % self.rules.evaluate_every == 0:
                record |= self.evaluate(progress)
            epsilon = self.budget.epsilon()
            record = {
                "round": number,
                **record,
                **({} if epsilon is None else {"epsilon": epsilon}),
                "seconds": round(time.perf_counter() - started, 4),
            }
            self.emit(RoundFinished(round=number, record=record))
            self.after_round(progress, lambda: self.checkpoint(progress))
            evaluated = progress.evaluated_round == number
            if self.rules.patience and evaluated and number - progress.best_round >= self.rules.patience:
                self.emit(Notice(text=f"stopped early: the model of round {progress.best_round} was the best"))
                return "stopped-early"
            if self.should_stop():
                raise KeyboardInterrupt
        if progress.skipped and progress.skipped == progress.round:
            raise RunError("quorum-missed", "no round had a quorum of clients that replied, so nothing was learned")
        return "completed"

    def _quorate(self, replied: int, asked: int) -> bool:
        return replied > 0 and replied >= self.rules.quorum * asked

    def evaluate(self, progress: Progress) -> dict[str, Any]:
        """Release metrics of the current model, remember the best, and return them."""
        if self.evaluation is None:
            return {}
        number = progress.round
        config = {"server-round": number, "model-version": digest(progress.arrays)}
        found = evaluate(self.grid, self.clients, record_of(progress.arrays), self.evaluation, config)
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
            progress={name: getattr(progress, name) for name in _COUNTED} | {"budget": self.budget.state_dict()},
            clients=self.client_states(),
        )

    def restore(self, checkpoint: Checkpoint) -> Progress:
        """Put strategy and budget back, and return the progress to go on from."""
        load_strategy_state(self.strategy, checkpoint.strategy)
        self.budget.load_state_dict(checkpoint.progress["budget"])
        kept = {name: checkpoint.progress[name] for name in _COUNTED}
        return Progress(round=checkpoint.round, arrays=checkpoint.arrays, **kept)

    def _train(
        self, number: int, cohort: Sequence[int], arrays: dict[str, NDArray[np.generic]], layout: Layout
    ) -> tuple[dict[str, NDArray[np.generic]], dict[str, Any]]:
        """Train one cohort and return the new model and the round's record; below the quorum the model stays."""
        size = sum(array.nbytes for array in arrays.values())
        record: dict[str, Any] = {"clients": 0, "failed": 0, "bytes_down": size * len(cohort), "bytes_up": 0}
        if not cohort:
            return arrays, record
        view = CohortGrid(self.grid, cohort)
        # The global `random` is what Flower's strategies draw from; seeded by round, a resumed run draws the same.
        with flower.seeded_random(self.strategy_seed + number):
            messages = self._configure(number, arrays, view)
            fold = self._call(self.strategy.fold) if hasattr(self.strategy, "fold") else None
            exchange = view.exchange(messages, fold=fold)
            replies = self._receive(number, exchange)
            good = [reply for reply in replies if reply.has_content()]
            record |= {"clients": len(good), "failed": len(replies) - len(good), "bytes_up": size * len(good)}
            if not self._quorate(len(good), len(cohort)):
                self.emit(
                    Notice(
                        text=f"round {number}: {len(good)} of {len(cohort)} clients replied, below the quorum; "
                        "the model stays as it was"
                    )
                )
                return arrays, record
            if exchange.total is not None:
                aggregate, metrics = self._call(self.strategy.aggregate_total, number, exchange.total)  # type: ignore[attr-defined]
            else:
                aggregate, metrics = self._call(self.strategy.aggregate_train, number, replies)
            for remark in getattr(self.strategy, "remarks", ()):
                self.emit(Notice(text=f"round {number}: {remark}"))
            if aggregate is not None:
                arrays = self._checked(aggregate, layout)
            record |= dict(metrics or {})
            if self.strategy_evaluates:
                record |= self._strategy_metrics(number, arrays, view)
        return arrays, record

    def _configure(self, number: int, arrays: Arrays, view: CohortGrid) -> Iterable[Message]:
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
            self.on_strategy_error(error)
            name = type(self.strategy).__name__
            raise RunError(
                "strategy-failed", f"strategy {name} raised {type(error).__name__} in {method.__name__}: {error}"
            ) from error
