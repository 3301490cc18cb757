"""The round loop: drives any Flower Strategy over any RoundGrid, one cohort a round, until the end or the budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.errors import RunError
from ..core.parameters import Layout, digest, record_of
from ..privacy.guarantee import finite
from ..privacy.release import EvaluationPlan
from ..strategies.asynchronous import Asynchronous
from ..strategies.state import load_strategy_state, remember_strategy, strategy_state
from .checkpoint import Checkpoint
from .cohort import CohortSampler
from .evaluation import evaluate
from .events import Aggregated, Evaluated, Notice, RoundFinished, RoundStarted
from .progress import COUNTED, Budget, Progress
from .training import RoundTraining

_TELLING = ("clients", "failed", "bytes_up", "bytes_down", "virtual_time", "seconds")


@dataclass(kw_only=True)
class RoundLoop(RoundTraining):
    """Everything that a run of rounds needs; `run` goes through them.

    `population` returns who may be drawn in a round and `connected` those that are there, both by default all clients.
    `remember_clients` returns what puts clients' states back to what they are when it is called. `virtual_time` is that
    of simulated clients. `after_round` gets the progress and what makes the checkpoint. A round of an
    `Asynchronous` strategy is one step of the server.
    """

    sampler: CohortSampler
    budget: Budget
    evaluation: EvaluationPlan | None
    population: Callable[[int], Sequence[int]] | None = None
    connected: Callable[[], Mapping[int, str]] | None = None
    client_states: Callable[[], dict[str, Any]] = dict
    remember_clients: Callable[[], Callable[[], None]] = lambda: lambda: None
    virtual_time: Callable[[], float | None] = lambda: None
    after_round: Callable[[Progress, Callable[[], Checkpoint]], None] = lambda progress, make: None

    def run(self, progress: Progress) -> str:
        """Run the rounds after `progress.round`; return "completed", "stopped-early" or "budget-exhausted".

        `progress` is up to date with the last whole round, also when this raises.
        """
        while progress.pending is not None or progress.round < self.rules.rounds:
            if progress.pending is None and not self._trained(progress):
                return "budget-exhausted"
            self._finish(progress)
            evaluated = progress.evaluated_round == progress.round
            if self.rules.patience and evaluated and progress.round - progress.best_round >= self.rules.patience:
                self.emit(Notice(text=f"stopped early: the model of round {progress.best_round} was the best"))
                return "stopped-early"
            if self.should_stop():
                raise KeyboardInterrupt
        learnt = progress.trained > 0 if self.aggregation is not None else progress.skipped < progress.round
        if progress.round and not learnt:
            raise RunError("quorum-missed", "no round had a quorum of clients that replied, so nothing was learned")
        return "completed"

    def _trained(self, progress: Progress) -> bool:
        """Train the next round and leave its record in `progress.pending`; False if the budget does not allow it."""
        number = progress.round + 1
        cohort = self._draw(number)
        names = [self.clients[node] for node in cohort]
        if not self.budget.allows(names):
            self.emit(Notice(text=f"round {number} would exceed the privacy budget; stopping after {number - 1}"))
            return False
        started, spent = time.perf_counter(), self.budget.state_dict()
        self.emit(RoundStarted(round=number, cohort=self.awaited(cohort)))
        self.budget.charge(names)
        put_strategy_back, forget_round = self._remember(), self.remember_clients()
        try:
            progress.arrays, record = self.train(number, cohort, progress.arrays, Layout.of(progress.arrays))
        except BaseException:
            # Nothing of it was released, and a resumed run trains it on the same model with the same noise.
            self.budget.load_state_dict(spent)
            forget_round()
            put_strategy_back()
            raise
        self.emit(Aggregated(round=number))
        progress.round = number
        progress.trained += record["clients"]
        progress.skipped += record.pop("skipped")
        progress.bytes_up += record["bytes_up"]
        progress.bytes_down += record["bytes_down"]
        evaluated = record.pop("evaluated", None)
        if evaluated is not None:
            progress.strategy_metrics = evaluated
        progress.pending = {**record, "seconds": time.perf_counter() - started}
        return True

    def _finish(self, progress: Progress) -> None:
        """Evaluate the model of a round that was trained, and tell of it."""
        number, started, record = progress.round, time.perf_counter(), dict(progress.pending or {})
        if self.rules.evaluate_every and number % self.rules.evaluate_every == 0:
            record |= self.evaluate(progress)
        epsilon = self.budget.epsilon()
        # Next to no noise gives no epsilon, which JSON could not say either.
        known = {"virtual_time": self.virtual_time(), "epsilon": None if epsilon is None else finite(epsilon)}
        seconds = round(record.pop("seconds") + time.perf_counter() - started, 4)
        known = {name: value for name, value in known.items() if value is not None}
        record = {"round": number, **record, **known, "seconds": seconds}
        if self.aggregation is not None:
            # They tell the size of a cohort that must stay secret.
            record = {name: value for name, value in record.items() if name not in _TELLING}
        self.emit(RoundFinished(round=number, record=record))
        progress.pending = None
        self.after_round(progress, lambda: self.checkpoint(progress))

    def _draw(self, number: int) -> list[int]:
        """Return who is sent a message in this round, and pays for it, whenever the reply comes."""
        population = list(self.clients) if self.population is None else self.population(number)
        if isinstance(self.strategy, Asynchronous):
            return list(self.call(self.strategy.draw, number, list(population)))
        # Of a population of fixed size some places may be nobody's.
        return [node for node in self.sampler.draw(number, population) if node in self.clients]

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
        put_back = self.call(remember_strategy, self.strategy)
        aggregation = self.aggregation
        norm = aggregation.state_dict() if aggregation is not None else {}

        def all_back() -> None:
            if aggregation is not None:
                aggregation.load_state_dict(norm)
            self.call(put_back)

        return all_back
