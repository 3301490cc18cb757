"""`simulate`: an experiment on virtual clients, from its file to its result."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from flwr.serverapp.strategy import Strategy

from ..clients.training import reproducible
from ..core import flower
from ..core.errors import BractError, InputError
from ..experiment import Experiment
from ..reports.page import write_report
from ..server import checkpoint as checkpoints
from ..server.checkpoint import Checkpoint
from ..server.cohort import CohortSampler
from ..server.events import Checkpointed, Event, Listener, Notice, Phase, RoundFinished, RunFinished, RunStarted
from ..server.progress import Progress, Rules
from ..server.result import Result
from ..server.rounds import RoundLoop
from ..server.run_directory import RunDirectory
from ..strategies.registry import load_strategy, refuse_unserved, take_whole_cohorts
from ..strategies.state import refuse_unsaveable
from ..tasks.registry import find_task
from ..tasks.task import Task
from .assembly import Assembly, aggregation_of, assemble
from .comparison import Curves
from .experiments import DEFAULT_EXPERIMENT
from .interrupt import graceful_interrupt
from .outcome import conclude
from .plan import refuse_what_is_not_offered


def simulate(
    source: str | Path | Experiment | None = None,
    *,
    task: Task | None = None,
    strategy: Strategy | None = None,
    overrides: Iterable[str] = (),
    out: str | Path | None = None,
    resume: str | Path | None = None,
    listeners: Iterable[Listener] = (),
) -> Result:
    """Run an experiment on virtual clients in this process.

    `source` is an experiment file or an Experiment, by default four hospitals that learn to recognise heart disease.
    `task` and `strategy` are objects to use instead of what the experiment names. `out` is the run directory; `resume`
    is one to go on with, and takes nothing else but the objects that it was started with. Raises BractError:
    InputError before any data is read, RunError if the run fails.
    """
    existing = None
    if resume is not None:
        existing = RunDirectory.open(Path(resume))
        folder = Path(str(existing.read_json("private/origin.json")["folder"]))
        experiment = Experiment.load(existing.path / "experiment.toml", folder=folder)
    elif isinstance(source, Experiment):
        if list(overrides):
            raise InputError("experiment-conflict", "overrides: go with a file; change the Experiment itself")
        experiment = source
    else:
        experiment = Experiment.load(source or DEFAULT_EXPERIMENT, overrides=overrides)
    simulation = Simulation(experiment, task=task, strategy=strategy, listeners=listeners)
    with reproducible(), flower.quiet():
        return simulation.run(existing=existing, out=None if out is None else Path(out))


class Simulation:
    """One run of one experiment."""

    def __init__(
        self,
        experiment: Experiment,
        *,
        task: Task | None = None,
        strategy: Strategy | None = None,
        listeners: Iterable[Listener] = (),
    ) -> None:
        self._experiment = experiment
        self._listeners = list(listeners)
        self._given_strategy = copy.deepcopy(strategy)
        self._strategy = self._make_strategy()
        if not experiment.clients.app:
            refuse_unserved(self._strategy)
        refuse_what_is_not_offered(experiment, self._strategy)
        refuse_unsaveable(self._strategy)
        self._given = task is not None or strategy is not None
        self._task = task if task or experiment.clients.app else find_task(experiment)
        self._directory: RunDirectory | None = None
        self._curves: Curves | None = None
        self._saved_at = 0.0

    def run(self, *, existing: RunDirectory | None = None, out: Path | None = None) -> Result:
        """Run to the end or to an interruption; what fails is on disk before it is raised."""
        started = time.monotonic()
        assembly = assemble(
            self._experiment,
            self._task,
            given=self._given,
            existing=existing,
            out=out,
            emit=self._emit,
            strategy=self._strategy,
        )
        self._directory = assembly.directory
        flower.identify_process(run_id=1)
        if assembly.task and self._experiment.simulation.curves:
            self._curves = Curves(assembly.federation, assembly.task, assembly.data)
        error: BractError | None = None
        with graceful_interrupt() as should_stop, closing(assembly.grid.executor):
            loop = self._loop(assembly, should_stop)
            progress = self._start(assembly, loop, resumed=existing is not None)
            self._emit(
                RunStarted(
                    name=self._experiment.experiment.name,
                    rounds=loop.rules.rounds,
                    clients=len(loop.clients),
                    first_round=progress.round + 1,
                    run_dir=assembly.directory.path,
                    guarantee=assembly.plan.guarantee(self._experiment),
                )
            )
            for note in assembly.federation.notes:
                self._emit(Notice(text=note))
            training = time.monotonic()
            try:
                status = loop.run(progress)
                loop.evaluate_at_the_end(progress)
            except KeyboardInterrupt:
                status = "interrupted"
            except BractError as failure:
                status, error = "failed", failure
            training_seconds = time.monotonic() - training
            self._save(progress, lambda: loop.checkpoint(progress))
            if status not in ("interrupted", "failed"):
                assembly.directory.forget_noise_key()
            result = conclude(
                assembly,
                progress,
                status=status,
                error=error,
                keeps_best=loop.rules.patience > 0,
                started=started,
                training_seconds=training_seconds,
                make_strategy=self._make_strategy,
                emit=self._emit,
            )
            self._emit(Phase(name="drawing the report"))
            write_report(assembly.directory.path)
        self._emit(RunFinished(result=result.record))
        if error is not None:
            raise error
        return result

    def _make_strategy(self) -> Strategy:
        table, experiment = self._experiment.strategy, self._experiment
        place = experiment.place("strategy", "name")
        if self._given_strategy is not None:
            strategy: Strategy = copy.deepcopy(self._given_strategy)
        else:
            strategy = load_strategy(table.name, table.own, folder=experiment.folder, place=place)
        take_whole_cohorts(strategy)
        return strategy

    def _loop(self, assembly: Assembly, should_stop: Callable[[], bool]) -> RoundLoop:
        clients, server, run = self._experiment.clients, self._experiment.server, self._experiment.experiment
        federation = assembly.federation

        def log(error: Exception) -> None:
            assembly.directory.log("strategy.log", "".join(traceback.format_exception(error)))

        return RoundLoop(
            strategy=self._strategy,
            grid=assembly.grid,
            clients=assembly.grid.names,
            sampler=CohortSampler(sampling=clients.sampling, per_round=clients.per_round, key=assembly.key),
            budget=assembly.accounts,
            rules=Rules(
                rounds=run.rounds,
                quorum=server.quorum,
                evaluate_every=server.evaluate_every,
                patience=server.patience,
            ),
            evaluation=federation.evaluation,
            emit=self._emit,
            aggregation=aggregation_of(assembly),
            compression=federation.compression,
            strategy_evaluates=federation.evaluation is None and not federation.withholds_metrics,
            strategy_seed=run.seed,
            client_states=assembly.grid.state_dict,
            remember_clients=assembly.grid.remember,
            virtual_time=assembly.grid.virtual_time,
            should_stop=should_stop,
            after_round=self._after_round,
            on_strategy_error=log,
        )

    def _start(self, assembly: Assembly, loop: RoundLoop, *, resumed: bool) -> Progress:
        """Return where to start: at the beginning, or after the checkpoint's round."""
        directory = assembly.directory
        found = checkpoints.load(directory.checkpoints) if resumed else None
        for name in ("metrics.jsonl", "private/curves.jsonl"):
            directory.forget_after(name, found.round if found else 0)
        self._saved_at = time.monotonic()
        if found is None:
            return Progress(round=0, arrays=dict(assembly.federation.initial))
        assembly.grid.load_state_dict(found.clients)
        return loop.restore(found)

    def _after_round(self, progress: Progress, make: Callable[[], Checkpoint]) -> None:
        if self._curves is not None and self._directory is not None:
            self._directory.append("private/curves.jsonl", self._curves.line(progress.round, progress.arrays))
        if time.monotonic() - self._saved_at >= self._experiment.server.checkpoint_every:
            self._save(progress, make)

    def _save(self, progress: Progress, make: Callable[[], Checkpoint]) -> None:
        if self._directory is not None:
            checkpoints.save(self._directory.checkpoints, make())
            self._saved_at = time.monotonic()
            self._emit(Checkpointed(round=progress.round))

    def _emit(self, event: Event) -> None:
        if isinstance(event, RoundFinished) and self._directory is not None:
            self._directory.append("metrics.jsonl", event.record)
        for listener in self._listeners:
            listener(event)
