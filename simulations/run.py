"""`simulate`: an experiment on virtual clients, from its file to its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from ..clients.training import reproducible
from ..core import flower
from ..core.collector import sparing
from ..core.errors import InputError
from ..experiment import Experiment
from ..privacy.guarantee import Guarantee
from ..reports.page import write_report
from ..server.events import Listener
from ..server.interrupt import graceful_interrupt
from ..server.progress import Progress
from ..server.result import Result
from ..server.run import TrainingRun
from ..server.run_directory import RunDirectory
from ..server.setting import Setting
from ..tasks.registry import find_task
from ..tasks.task import Task
from .assembly import Assembly, assemble
from .comparison import MOST_SITES, Curves, compare
from .experiments import DEFAULT_EXPERIMENT
from .profile import Profile


def simulate(
    source: str | Path | Experiment | None = None,
    *,
    task: Task | None = None,
    strategy: Strategy | None = None,
    overrides: Iterable[str] = (),
    out: str | Path | None = None,
    resume: str | Path | None = None,
    listeners: Iterable[Listener] = (),
    profile: bool = False,
) -> Result:
    """Run an experiment on virtual clients in this process.

    `source` is an experiment file or an Experiment, by default four hospitals that learn to recognise heart disease.
    `task` and `strategy` are objects to use instead of what the experiment names. `out` is the run directory; `resume`
    is one to go on with, and takes nothing else but the objects that it was started with. With `profile`,
    private/profile.txt of the run says where the time went, and private/profile.json is a trace for Perfetto. Raises
    BractError: InputError before any data is read, RunError if the run fails.
    """
    existing = None
    if resume is not None:
        existing = RunDirectory.open(Path(resume))
        experiment = existing.experiment()
    elif isinstance(source, Experiment):
        if list(overrides):
            raise InputError("experiment-conflict", "overrides: go with a file; change the Experiment itself")
        experiment = source
    else:
        experiment = Experiment.load(source or DEFAULT_EXPERIMENT, overrides=overrides)
    timed = Profile() if profile else None
    simulation = Simulation(experiment, task=task, strategy=strategy, listeners=listeners, profile=timed)
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
        profile: Profile | None = None,
    ) -> None:
        self._experiment, self._profile = experiment, profile
        known: list[Listener] = [*listeners, *([profile] if profile else [])]
        self._run = TrainingRun(experiment, strategy=strategy, listeners=known)
        self._given = task is not None or strategy is not None
        self._task = task if task or experiment.clients.app else find_task(experiment)

    def run(self, *, existing: RunDirectory | None = None, out: Path | None = None) -> Result:
        """Run to the end or to an interruption; what fails is on disk before it is raised."""
        started = time.monotonic()
        assembly = assemble(
            self._experiment,
            self._task,
            given=self._given,
            existing=existing,
            out=out,
            emit=self._run.emit,
            strategy=self._run.strategy,
            watch=self._profile.called if self._profile else None,
        )
        flower.identify_process(run_id=1)
        with graceful_interrupt() as should_stop, closing(assembly.grid.executor), sparing():
            result, error = self._run.execute(
                self._setting(assembly), resumed=existing is not None, should_stop=should_stop, started=started
            )
        if self._profile is not None:
            self._profile.write(assembly.directory)
        if error is not None:
            raise error
        return result

    def _setting(self, assembly: Assembly) -> Setting:
        federation, grid, plan = assembly.federation, assembly.grid, assembly.plan

        def guarantee(rounds: Any = None) -> Guarantee:
            return plan.guarantee(self._experiment, rounds)

        return Setting(
            directory=assembly.directory,
            key=assembly.key,
            grid=grid,
            clients=grid.names,
            population=lambda round: grid.names.ids,
            accounts=assembly.accounts,
            guarantee=guarantee,
            initial=federation.initial,
            module=federation.module,
            report=write_report,
            aggregate=plan.aggregate,
            evaluation=federation.evaluation,
            strategy_evaluates=federation.evaluation is None and not federation.withholds_metrics,
            compression=federation.compression,
            traffic=federation.traffic,
            notes=federation.notes,
            checkpoint_every=self._experiment.server.checkpoint_every,
            client_states=grid.state_dict,
            load_client_states=grid.load_state_dict,
            remember_clients=grid.remember,
            virtual_time=grid.virtual_time,
            after_round=self._curves(assembly),
            compare=lambda arrays, given: self._compare(assembly, arrays, given),
        )

    def _curves(self, assembly: Assembly) -> Callable[[Progress], None]:
        """Return what writes a round's exact curves down."""
        if assembly.task is None or not self._experiment.simulation.curves:
            return lambda progress: None
        curves = Curves(assembly.federation, assembly.task, assembly.data)

        def draw(progress: Progress) -> None:
            assembly.directory.append("private/curves.jsonl", curves.line(progress.round, progress.arrays))

        return draw

    def _compare(self, assembly: Assembly, arrays: dict[str, NDArray[np.generic]], guarantee: Guarantee) -> None:
        """Write down how the model compares with others, where that is wanted."""
        if assembly.task is None or not _wants_comparison(assembly):
            return
        compared = compare(
            self._experiment,
            assembly.task,
            assembly.data,
            assembly.federation,
            arrays,
            make_strategy=self._run.make_strategy,
            label="federated" if guarantee.epsilon is None else f"federated, epsilon {guarantee.epsilon:.2g}",
            key=assembly.key.child("comparison"),
            emit=self._run.emit,
        )
        assembly.directory.write_json("private/comparison.json", compared)


def _wants_comparison(assembly: Assembly) -> bool:
    if assembly.experiment.privacy.unit == "client":
        return False
    wanted = assembly.experiment.simulation.baselines
    return 1 < len(assembly.data) <= MOST_SITES if wanted == "auto" else wanted
