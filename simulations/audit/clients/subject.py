"""The subject of an audit at the client level: the experiment's server, or its sites where nobody is trusted."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ....core import flower
from ....core.keys import Key
from ....core.names import ByName
from ....core.parameters import Layout
from ....experiment import Experiment
from ....privacy.client_level import ClientLevelPlan
from ....privacy.local import LocalPlan
from ....server.cohort import CohortSampler
from ....server.plan import Plan, make_plan, refuse_what_is_not_offered
from ....server.run import TrainingRun
from ....tasks.partition import client_names
from ....tasks.registry import find_task
from ....tasks.task import Task
from ...federation import Federation, flower_federation, travelling_size, virtual_federation
from ...plan import load_clients
from .noise import Series, of_bands, of_rounds
from .puppets import SILENT, Vector
from .rounds import Release, Server, norm_of
from .sites import Dictation, Sites
from .whole_run import Whole, whole_run

_VALUES = 2e7
"""Values of noise, above which an audit would not be quick."""
_MOST_RUNS = 40


@dataclass(kw_only=True)
class ClientSubject:
    """An experiment's real parts, but for clients that send what the audit wants; under a fresh key.

    `sites` are there where each client noises its own update, and then `plan.aggregate` is not. `given` is a task to
    use instead of what the experiment names.
    """

    experiment: Experiment
    given: Task | None
    plan: Plan
    key: Key
    federation: Federation
    strategy: Any
    sites: Sites | None = None

    @cached_property
    def layout(self) -> Layout:
        """The layout of the model that travels."""
        return Layout.of(self.federation.initial)

    @property
    def aggregate(self) -> ClientLevelPlan:
        """The server's plan."""
        assert self.plan.aggregate is not None
        return self.plan.aggregate

    @property
    def local(self) -> LocalPlan:
        """Each client's own plan."""
        assert self.plan.local is not None
        return self.plan.local

    @property
    def mechanism(self) -> ClientLevelPlan | LocalPlan:
        """What releases: the server's plan or each client's."""
        return self.plan.aggregate or self.local

    @cached_property
    def server(self) -> Server:
        """The server's half of the experiment."""
        return Server(
            experiment=self.experiment,
            plan=self.plan.aggregate,
            strategy=self.strategy,
            names=tuple(self.federation.names),
            initial=self.federation.initial,
            layout=self.layout,
        )

    @property
    def sampler(self) -> CohortSampler:
        """What draws the cohorts of a run, here under the audit's key."""
        return replace(self.whole.sampler, key=self.key)

    @cached_property
    def whole(self) -> Whole:
        """A few rounds of a run as a simulation makes it, with its files; run once, in a folder that is deleted."""
        with tempfile.TemporaryDirectory(prefix="bract-audit-") as folder:
            return whole_run(self.experiment, self.given, folder=Path(folder))

    @property
    def planned(self) -> int:
        """The rounds of the experiment."""
        return self.experiment.experiment.rounds

    @cached_property
    def wanted(self) -> int:
        """How many vectors of noise a check of chance looks at."""
        return int(min(150, max(6, _VALUES / (10 * self.layout.size))))

    @cached_property
    def silent(self) -> list[list[Release]]:
        """Runs of the server's rounds in which no client changes anything; every second one is killed and resumed.

        What they release is noise alone.
        """
        rounds = min(self.planned, self.wanted)
        lengths = [rounds] * min(_MOST_RUNS, max(2, math.ceil(self.wanted / rounds)))
        if self.aggregate.adaptive_clipping:
            # Each clipping norm has a table of its own for its noise, which takes a while: many first rounds have one.
            lengths = [min(rounds, 6)] * 2 + [1] * self.wanted
        cohort = tuple(range(min(2, len(self.federation.names))))
        return [
            self.server.rounds(
                rounds,
                lambda round, name: SILENT,
                key=self.key.child("silent", number),
                cohorts=[cohort],
                resumed_after=rounds // 2 if number % 2 and rounds > 1 else None,
            )
            for number, rounds in enumerate(lengths)
        ]

    @cached_property
    def series(self) -> list[Series]:
        """The noise over its planned deviation, standard normal if all is well, of the server's runs or of sites."""
        if self.sites is not None:
            return self.sites.series(self.wanted)
        of = of_bands if self.aggregate.bands else of_rounds
        return [
            of(self.aggregate, releases, f"run {number}" + (", which was resumed," if number % 2 else ""))
            for number, releases in enumerate(self.silent)
        ]

    def direction(self, *path: str | int) -> Vector:
        """Return a unit vector [size] over the tensors that are no whole numbers."""
        drawn = self.key.child("direction", *path).stream().normals(self.layout.size)
        drawn[self.layout.whole] = 0.0
        return drawn / max(norm_of(drawn), 1e-300)


def client_subject_of(experiment: Experiment, *, task: Task | None = None) -> ClientSubject:
    """Return the subject that an experiment gives; nothing is trained and nothing is written. Raises InputError."""
    flower.identify_process(run_id=1)
    strategy = TrainingRun(experiment).strategy
    refuse_what_is_not_offered(experiment, strategy)
    given = task
    if task is None and not experiment.clients.app:
        task = find_task(experiment)
    data = load_clients(experiment, task) if task else {}
    counts = {name: len(site.train) for name, site in data.items()}
    plan = make_plan(
        experiment,
        counts or ByName.alike(client_names(experiment.clients.count or 1), 0),
        len(task.classes) if task else 2,
        lambda event: None,
        coordinates=travelling_size(experiment, task, strategy),
    )
    key, dictation = Key.fresh(), Dictation()
    if task is None:
        federation = flower_federation(experiment, strategy)
    else:
        half: object = strategy if plan.local is None else dictation.half_of(experiment, strategy)
        federation = virtual_federation(experiment, task, data, plan, key=key, strategy=half)
    subject = ClientSubject(
        experiment=experiment, given=given, plan=plan, key=key, federation=federation, strategy=strategy
    )
    if task is not None and plan.local is not None:
        template = subject.server.first_message()
        subject.sites = Sites.of(
            experiment, task, data, plan, federation, key=key, dictation=dictation, template=template
        )
    return subject
