"""A run from its first round to its result: what a simulation and a federation do alike."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable, Iterable

from flwr.serverapp.strategy import Strategy

from ..core.errors import BractError
from ..core.keys import Key
from ..core.parameters import Layout
from ..experiment import Experiment
from ..strategies.registry import load_strategy, refuse_unserved, take_whole_cohorts
from ..strategies.state import refuse_unsaveable
from . import checkpoint as checkpoints
from .checkpoint import Checkpoint
from .cohort import CohortSampler
from .events import Checkpointed, Event, Listener, Notice, Phase, RoundFinished, RunFinished, RunStarted
from .outcome import conclude, kept
from .plan import refuse_what_is_not_offered
from .private_aggregation import PrivateAggregation
from .progress import Progress, Rules
from .result import Result
from .rounds import RoundLoop
from .run_directory import RunDirectory
from .setting import Setting


class TrainingRun:
    """One run of one experiment: its strategy, its listeners, its rounds, and what they leave.

    `strategy` is an object to use instead of what the experiment names. Raises InputError for what does not go
    together.
    """

    def __init__(
        self, experiment: Experiment, *, strategy: Strategy | None = None, listeners: Iterable[Listener] = ()
    ) -> None:
        self.experiment = experiment
        self._given = copy.deepcopy(strategy)
        self._listeners = list(listeners)
        self._directory: RunDirectory | None = None
        self._saved_at = 0.0
        self.strategy = self.make_strategy()
        if not experiment.clients.app:
            refuse_unserved(self.strategy)
        refuse_what_is_not_offered(experiment, self.strategy)
        refuse_unsaveable(self.strategy)

    def make_strategy(self) -> Strategy:
        """Return the experiment's strategy as it is before the first round."""
        table, experiment = self.experiment.strategy, self.experiment
        if self._given is not None:
            strategy: Strategy = copy.deepcopy(self._given)
        else:
            place = experiment.place("strategy", "name")
            strategy = load_strategy(table.name, table.own, folder=experiment.folder, place=place)
        take_whole_cohorts(strategy)
        return strategy

    def emit(self, event: Event) -> None:
        """Tell the listeners, and write down what is released."""
        if isinstance(event, RoundFinished) and self._directory is not None:
            self._directory.append("metrics.jsonl", event.record)
        for listener in self._listeners:
            listener(event)

    def execute(
        self, setting: Setting, *, resumed: bool, should_stop: Callable[[], bool], started: float
    ) -> tuple[Result, BractError | None]:
        """Run to the end or to an interruption; `started` is the run's time.monotonic().

        Returns the result, which is on disk, and the error of a run that failed.
        """
        self._directory = directory = setting.directory
        loop = self._loop(setting, should_stop)
        progress = self._start(setting, loop, resumed=resumed)
        self.emit(
            RunStarted(
                name=self.experiment.experiment.name,
                rounds=loop.rules.rounds,
                clients=len(loop.clients),
                first_round=progress.round + 1,
                run_dir=directory.path,
                guarantee=setting.guarantee(),
            )
        )
        for note in setting.notes:
            self.emit(Notice(text=note))
        training, error = time.monotonic(), None
        try:
            status = loop.run(progress)
            loop.evaluate_at_the_end(progress)
        except KeyboardInterrupt:
            status = "interrupted"
        except BractError as failure:
            status, error = "failed", failure
        training_seconds = time.monotonic() - training
        self._save(setting, progress, lambda: loop.checkpoint(progress))
        ended = status not in ("interrupted", "failed")
        if ended:
            directory.forget_noise_key()
        guarantee, keeps_best = setting.guarantee(setting.accounts.rounds), loop.rules.patience > 0
        if ended:
            setting.compare(kept(progress, keeps_best=keeps_best)[0], guarantee)
        result = conclude(
            setting,
            progress,
            status=status,
            error=error,
            guarantee=guarantee,
            keeps_best=keeps_best,
            seconds=time.monotonic() - started,
            training_seconds=training_seconds,
        )
        self.emit(Phase(name="drawing the report"))
        setting.report(directory.path)
        self.emit(RunFinished(result=result.record))
        return result, error

    def _loop(self, setting: Setting, should_stop: Callable[[], bool]) -> RoundLoop:
        clients, server, run = self.experiment.clients, self.experiment.server, self.experiment.experiment

        def log(error: Exception) -> None:
            setting.directory.log("strategy.log", "".join(traceback.format_exception(error)))

        def after_round(progress: Progress, make: Callable[[], Checkpoint]) -> None:
            setting.after_round(progress)
            if time.monotonic() - self._saved_at >= setting.checkpoint_every:
                self._save(setting, progress, make)

        return RoundLoop(
            strategy=self.strategy,
            grid=setting.grid,
            clients=setting.clients,
            sampler=CohortSampler(sampling=clients.sampling, per_round=clients.per_round, key=setting.key),
            budget=setting.accounts,
            rules=Rules(
                rounds=run.rounds,
                quorum=server.quorum,
                evaluate_every=server.evaluate_every,
                patience=server.patience,
            ),
            evaluation=setting.evaluation,
            emit=self.emit,
            private=self.experiment.privacy.unit != "none",
            aggregation=self._aggregation(setting),
            compression=setting.compression,
            strategy_evaluates=setting.strategy_evaluates,
            strategy_seed=run.seed,
            population=setting.population,
            connected=setting.connected,
            client_states=setting.client_states,
            remember_clients=setting.remember_clients,
            virtual_time=setting.virtual_time,
            should_stop=should_stop,
            after_round=after_round,
            on_strategy_error=log,
        )

    def _aggregation(self, setting: Setting) -> PrivateAggregation | None:
        """Return the server's mechanism, None where the clients have their own or there is none."""
        if setting.aggregate is None:
            return None
        secret = self.experiment.privacy.randomness == "secret"

        def noise_key() -> Key:
            return setting.directory.key("noise_key") if secret else setting.key.child("correlated")

        layout, key = Layout.of(setting.initial), setting.key.child("server")
        return PrivateAggregation(setting.aggregate, layout=layout, key=key, noise_key=noise_key)

    def _start(self, setting: Setting, loop: RoundLoop, *, resumed: bool) -> Progress:
        """Return where to start: at the beginning, or after the checkpoint's round."""
        directory = setting.directory
        found = checkpoints.load(directory.checkpoints) if resumed else None
        for name in ("metrics.jsonl", "private/curves.jsonl"):
            told = 0 if found is None else found.round - (found.progress["pending"] is not None)
            directory.forget_after(name, told)
        self._saved_at = time.monotonic()
        if found is None:
            return Progress(round=0, arrays=dict(setting.initial))
        setting.load_client_states(found.clients)
        return loop.restore(found)

    def _save(self, setting: Setting, progress: Progress, make: Callable[[], Checkpoint]) -> None:
        checkpoints.save(setting.directory.checkpoints, make())
        self._saved_at = time.monotonic()
        self.emit(Checkpointed(round=progress.round))
        setting.saved(progress)
