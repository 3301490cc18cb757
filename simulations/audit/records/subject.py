"""The subject of an audit: an experiment put together as `simulate` does it, with the probe inside."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import Message
from flwr.serverapp.strategy import Strategy

from ....clients.kernels import dp_engines, sequential
from ....clients.local_model import LocalModel
from ....clients.parts import local_rule
from ....clients.training import LocalTraining, choose_device
from ....core import flower
from ....core.errors import RunError
from ....core.keys import Key
from ....core.parameters import Arrays
from ....experiment import Experiment
from ....privacy.dpsgd.passes import Loss
from ....privacy.mechanism import RecordLevelPlan
from ....server.accounts import Accounts, PopulationAccount, accounts_of
from ....server.cohort import CohortSampler
from ....server.grid import Arrival
from ....server.plan import Plan, make_plan, refuse_what_is_not_offered
from ....server.progress import Progress, Rules
from ....server.rounds import RoundLoop
from ....strategies.fold import Fold
from ....strategies.local_rule import LocalRule, LocalSession
from ....strategies.registry import load_strategy, refuse_unserved, take_whole_cohorts
from ....tasks.registry import find_task
from ....tasks.task import Examples, SiteData, Task
from ...executors.executor import Call, InlineExecutor
from ...federation import Federation, virtual_federation
from ...grid import VirtualGrid
from ...plan import load_clients
from ...virtual_clock import VirtualClock
from ..replay import addressed
from .probe import Enough, Probe, ProbedTask, Visit

MOST_SITES = 8
_QUICK = 2e8
"""Parameters · records of a batch · steps of one site, above which an audit would not be quick."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a few rounds of the round loop left: its visits in order, and what was charged for them."""

    visits: list[Visit]
    accounts: Accounts | PopulationAccount

    def rounds(self, site: str) -> int:
        """Return the rounds that were charged to a site; under client-level privacy all are charged alike."""
        charged = self.accounts.rounds
        return charged.get(site, charged.get("all", 0))


@dataclass(kw_only=True)
class Subject:
    """An experiment's real parts over the audited sites; `plan` has a mechanism for each.

    `steps` is how many steps of a site an audit of chance looks at.
    """

    experiment: Experiment
    task: Task
    plan: Plan
    key: Key
    probe: Probe
    federation: Federation
    model: LocalModel
    training: LocalTraining
    strategy: Strategy
    steps: int
    sites_in_all: int
    _templates: list[Message] = field(default_factory=list)
    _trained: Trained | None = None
    _silent: dict[str, list[Visit]] | None = None

    @property
    def data(self) -> Mapping[str, SiteData]:
        """The audited sites; the targets of training records are their numbers."""
        return self.probe.data

    @property
    def mechanisms(self) -> Mapping[str, RecordLevelPlan]:
        """The plan of each audited site."""
        return self.plan.mechanisms

    @property
    def source(self) -> Path | None:
        """The file of `task.data`, None where the task brings its own data."""
        data = self.experiment.task.own.get("data")
        return None if data is None else (self.experiment.folder or Path()) / str(data)

    def denominator(self, site: str) -> float:
        """Return what a step's noised sum is divided by: the expected batch."""
        return float(min(self.mechanisms[site].batch_size, len(self.data[site].train)))

    def trained(self) -> Trained:
        """Return a few rounds of the experiment's own loop with every record silent; run once."""
        if self._trained is None:
            self._trained = self._train()
        return self._trained

    def silent(self) -> dict[str, list[Visit]]:
        """Return rounds 1, 2, … of each site from the initial model, with every record silent; run once.

        What their steps release is noise alone.
        """
        if self._silent is None:
            found: dict[str, list[Visit]] = {}
            for site, plan in self.mechanisms.items():
                rounds = min(32, max(3, -(-self.steps // plan.steps_per_round)))
                each = max(1, -(-self.steps // rounds))
                with self.probe.silence(site):
                    found[site] = [self.replay(site, round=number, limit=each) for number in range(1, rounds + 1)]
            self._silent = found
        return self._silent

    def replay(
        self, site: str, *, round: int = 1, arrays: Arrays | None = None, limit: int | None = None, whole: bool = False
    ) -> Visit:
        """Return what a site's app does with the train message of a round, by default with the initial model.

        The app, its gate and its kernel are those that a simulation runs; the site's state is that before its first
        round. `limit` ends the visit after so many steps, without a reply.
        """
        visit = Visit(site=site, round=round)
        arrays = self.federation.initial if arrays is None else arrays
        message, context = addressed(
            self._template(), site, round=round, arrays=arrays, initial=self.federation.initial
        )
        visit.message = message
        self.probe.begin(visit, limit=limit, whole=whole)
        # What it is raised through are the kernel's own context managers, which clean up.
        with suppress(Enough):
            visit.reply = self.federation.app(message, context)
        return visit

    def kernel(
        self,
        model: LocalModel,
        loss: Loss,
        examples: Examples,
        *,
        plan: RecordLevelPlan,
        key: Key,
        session: LocalSession,
    ) -> None:
        """Train one round by the kernel, with the engine and the optimizer that the experiment's clients use."""
        inputs = next(iter(self.data.values())).train.inputs
        # That of the run's own model: another model might go with another engine.
        engine = dp_engines.dp_engine(self.model, inputs[:2], self.training)
        training = replace(self.training, personal=(), frozen=(), dp_engine=engine)
        sequential.train(model, loss, examples, training, plan=plan, key=key, session=session)

    def _template(self) -> Message:
        """Return the first message that the experiment's strategy sent: to every site it would send the same."""
        self.trained()
        if not self._templates:
            raise RunError(
                "strategy-failed", f"strategy {type(self.strategy).__name__} sent no message in three rounds"
            )
        return self._templates[0]

    def _train(self) -> Trained:
        run, budget = self.experiment.experiment, self.experiment.privacy.epsilon_budget
        accounts = accounts_of(self.plan, rounds=run.rounds, epsilon_budget=budget)
        executor = _WatchedExecutor(self.federation, self.probe, self._templates)
        grid = VirtualGrid(executor, self.federation.names, clock=VirtualClock.of(self.experiment))
        loop = RoundLoop(
            strategy=copy.deepcopy(self.strategy),
            grid=grid,
            clients=grid.names,
            sampler=CohortSampler(sampling="all", per_round=None, key=self.key),
            budget=accounts,
            rules=Rules(rounds=min(run.rounds, 3 if self.steps > 20 else 1), quorum=1.0),
            evaluation=None,
            compression=self.federation.compression,
            emit=lambda event: None,
            strategy_seed=run.seed,
            client_states=grid.state_dict,
            remember_clients=grid.remember,
        )
        with self.probe.silence():
            loop.run(Progress(round=0, arrays=dict(self.federation.initial)))
        return Trained(visits=executor.visits, accounts=accounts)


class _WatchedExecutor(InlineExecutor):
    """The inline executor, which tells the probe whose message comes next."""

    def __init__(self, federation: Federation, probe: Probe, templates: list[Message]) -> None:
        super().__init__(federation.app, log=lambda trace: None)
        self._probe, self._templates = probe, templates
        self.visits: list[Visit] = []

    def run(self, calls: Iterable[Call], *, fold: Fold | None) -> Iterator[Arrival]:
        for call in calls:
            config = call.message.content.config_records["config"]
            visit = Visit(site=call.client, round=int(config["server-round"]))  # type: ignore[arg-type]
            self._probe.begin(visit)
            self._templates.append(call.message)
            self.visits.append(visit)
            for arrival in super().run([call], fold=fold):
                visit.reply = arrival.reply
                yield arrival


@dataclass(frozen=True)
class _ClientHalf:
    """What `virtual_federation` asks of a strategy."""

    local_rule: LocalRule


def subject_of(experiment: Experiment, *, task: Task | None = None) -> Subject:
    """Return the subject that an experiment gives, under a fresh key; nothing is trained and nothing is written.

    With more than eight clients, eight are audited: the ones with the fewest and the most records, and others between.
    Raises InputError.
    """
    table = experiment.strategy
    place = experiment.place("strategy", "name")
    strategy: Strategy = load_strategy(table.name, table.own, folder=experiment.folder, place=place)
    take_whole_cohorts(strategy)
    refuse_unserved(strategy)
    refuse_what_is_not_offered(experiment, strategy)
    task = task or find_task(experiment)
    data = load_clients(experiment, task)
    counts = {name: len(site.train) for name, site in data.items()}
    plan = make_plan(experiment, counts, len(task.classes), lambda event: None)
    key = Key.fresh()
    device = choose_device(experiment.train.device)
    rule = local_rule(experiment, strategy)
    names = _audited(counts, MOST_SITES)
    probe = Probe(task, {name: data[name] for name in names}, device)
    plan = replace(plan, mechanisms={name: plan.mechanisms[name] for name in names})
    federation = virtual_federation(
        experiment, ProbedTask(probe), probe.data, plan, key=key, strategy=_ClientHalf(probe.watched(rule))
    )
    model = federation.local
    assert model is not None
    batch = min(experiment.train.batch_size, max(counts.values()))
    work = batch * sum(parameter.numel() for parameter in model.parameters)
    flower.identify_process(run_id=1)
    return Subject(
        experiment=experiment,
        task=task,
        plan=plan,
        key=key,
        probe=probe,
        federation=federation,
        model=model,
        training=LocalTraining.of(experiment.train, private=True),
        strategy=strategy,
        steps=int(min(150, max(6, _QUICK / work))),
        sites_in_all=len(data),
    )


def _audited(counts: Mapping[str, int], most: int) -> list[str]:
    """Return at most so many clients, evenly by their number of records."""
    by_size = sorted(counts, key=lambda name: counts[name])
    if len(by_size) <= most:
        return list(counts)
    return [by_size[round(place * (len(by_size) - 1) / (most - 1))] for place in range(most)]
