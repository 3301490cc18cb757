"""Who may take part in a federation, and under which mechanism: what each client said when it joined, for good.

A client that joins says how many records it declares and what its policy releases. From the first round on that is
fixed, as is the noise that follows from it, so that each message of a run asks of a site the same.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ...clients.site.request import RunRequest
from ...core import flower
from ...experiment import Experiment
from ...privacy.guarantee import Guarantee, Randomness
from ...privacy.mechanism import RecordLevelPlan
from ...privacy.release import EvaluationPlan
from ...transport.greeting import Hello
from ..accounts import Accounts, PopulationAccount, accounts_of
from ..events import Listener
from ..plan import Plan, make_plan, planned_releases, record_level_plans, record_table
from .member import Member, counts_clients, suited, unsuited, update_of
from .model import ServerModel

LEDGERS = (
    "earlier and later runs on the same data: the epsilon is that of this run, and the ledger of each site holds all "
    "of them together to its owner's budget"
)
SEEDED = (
    "everything, towards whoever knows the seed: clients were started with --seeded, so their noise and their batches "
    "follow from the published seed, and this run protects nobody"
)


class Membership:
    """The clients of a run. `admit` may be called from any thread, everything else from the round loop's.

    `places` is the public number of clients of a mechanism that counts them; None where any number may join.
    """

    def __init__(self, experiment: Experiment, model: ServerModel, *, run: str, needs_metrics: bool = False) -> None:
        self._experiment, self._model, self._run, self._needs_metrics = experiment, model, run, needs_metrics
        self._update = update_of(experiment)
        self._lock = threading.Lock()
        self._hellos: dict[str, Member] = {}
        self._members: dict[str, Member] = {}
        self._requests: dict[int, RunRequest] = {}
        self._plan: Plan | None = None
        self.places = experiment.clients.count if counts_clients(experiment) else None
        self.names: dict[int, str] = {}
        """The members' names by node id, in the order in which they joined."""
        self.accounts: Accounts | PopulationAccount = Accounts({})

    @property
    def plan(self) -> Plan:
        """The mechanisms of all members, known from the first ones on."""
        if self._plan is None:
            raise RuntimeError("nobody has joined yet")
        return self._plan

    @property
    def members(self) -> list[Member]:
        """All members, in the order in which they joined."""
        return list(self._members.values())

    @property
    def begun(self) -> bool:
        """Whether the mechanisms are fixed."""
        return self._plan is not None

    def admit(self, name: str, hello: Hello) -> None:
        """Take note of a client that joins; Refusal `client-unsuited` if it does not go with the run."""
        said = suited(name, hello, self._experiment, self._model, needs_metrics=self._needs_metrics)
        with self._lock:
            known = self._members.get(name)
            if known is not None and replace(known, noise_multiplier=None) != said:
                raise unsuited(
                    f"{name} joined this run with another data set, number of records or policy, which a run keeps to "
                    "its end; start the client as before, or wait for the next run"
                )
            if known is None and self._full():
                raise unsuited(
                    f"this run was planned for {self.places} clients, and as many have joined; the server's "
                    "clients.count says how many there may be"
                )
            self._hellos[name] = said

    def enrol(self, names: Sequence[str], emit: Listener) -> bool:
        """Make those who are there members, in the order of their names; return whether any is new."""
        with self._lock:
            new = [self._hellos[name] for name in sorted(names) if name not in self._members and name in self._hellos]
            if self.places is not None:
                new = new[: self.places - len(self._members)]
        if not new:
            return False
        if self._plan is None:
            self._begin(new, emit)
        else:
            plans = self._calibrated(new, emit)
            self._plan = replace(self._plan, mechanisms={**self._plan.mechanisms, **plans})
        self._add(new)
        return True

    def request(self, node: int) -> RunRequest:
        """Return what the run asks of a member, in each message the same."""
        if node not in self._requests:
            self._requests[node] = self._request(self._members[self.names[node]])
        return self._requests[node]

    def releases_metrics(self, node: int) -> bool:
        """Return whether a member's policy lets metrics out that this run takes."""
        return self.request(node).metrics != "withheld"

    def guarantee(self, rounds: Mapping[str, int] | None = None) -> Guarantee:
        """Return the guarantee of members that each trained so many rounds, by default all that are planned."""
        found = self.plan.guarantee(self._experiment, rounds, place="federation", randomness=self._randomness())
        members = self._members.values()
        if found.epsilon is not None and all(member.ledger for member in members):
            found = self._under_ledgers(found)
        if any(member.seeded for member in members):
            found = replace(found, excludes=(SEEDED, *found.excludes))
        return found

    def _under_ledgers(self, found: Guarantee) -> Guarantee:
        """Return the guarantee where every site keeps a ledger, of what it enforces: not of what a server claims."""
        if self.plan.aggregate is None:
            bounded = found.under_ledgers()
            return replace(bounded, excludes=(*bounded.excludes, LEDGERS))
        record = found.record
        return found if record is None else replace(found, record=record.under_ledgers())

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run has to ask for again exactly, as JSON knows it."""
        evaluation = self.plan.evaluation
        return {
            "places": self.places,
            "metrics_epsilon": None if evaluation is None else evaluation.epsilon,
            "members": [asdict(member) for member in self._members.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any], emit: Listener) -> None:
        """Take it up."""
        members = [Member(**each) for each in state["members"]]
        self.places = state["places"]
        self._begin(members, emit, metrics_epsilon=state["metrics_epsilon"])
        self._add(members)

    def _full(self) -> bool:
        return self.places is not None and self.begun and len(self._members) >= self.places

    def _begin(self, members: Sequence[Member], emit: Listener, *, metrics_epsilon: float | None = None) -> None:
        """Fix the mechanisms; those that were fixed before are taken as they were."""
        experiment = self._experiment
        if self.places is None and counts_clients(experiment):
            self.places = len(members)
        restored = {member.name: _restored(experiment, member) for member in members if member.noise_multiplier}
        plan = make_plan(
            experiment,
            {member.name: member.records for member in members if member.name not in restored},
            len(self._model.classes) or 2,
            emit,
            coordinates=self._model.size,
            clients=self.places or len(members),
            known=restored,
        )
        if metrics_epsilon is not None and plan.evaluation is not None:
            plan = replace(plan, evaluation=replace(plan.evaluation, epsilon=metrics_epsilon))
        if self._model.classes == ():
            # What a Flower ClientApp measures is no histogram.
            plan = replace(plan, evaluation=None)
        self._plan = plan
        run = experiment.experiment
        self.accounts = accounts_of(
            replace(plan, mechanisms={}), rounds=run.rounds, epsilon_budget=experiment.privacy.epsilon_budget
        )

    def _calibrated(self, members: Sequence[Member], emit: Listener) -> Mapping[str, RecordLevelPlan]:
        if self._update != "dp-sgd":
            return {}
        return record_level_plans(self._experiment, {member.name: member.records for member in members}, emit)

    def _add(self, members: Sequence[Member]) -> None:
        mechanisms = self.plan.mechanisms
        for member in members:
            planned = mechanisms.get(member.name)
            kept = member if planned is None else replace(member, noise_multiplier=planned.noise_multiplier)
            with self._lock:
                self._members[member.name] = kept
            self.names[flower.node_id(member.name)] = member.name
        if isinstance(self.accounts, Accounts):
            names = [member.name for member in members]
            self.accounts.add({name: mechanisms[name] for name in names if name in mechanisms})

    def _request(self, member: Member) -> RunRequest:
        experiment, plan = self._experiment, self.plan
        privacy, train, update = experiment.privacy, experiment.train, self._update
        noise: dict[str, Any] = {}
        if update == "dp-sgd":
            table = record_table(experiment)
            noise = {"clipping_norm": table.clipping_norm, "delta": table.delta}
            noise["noise_multiplier"] = member.noise_multiplier
        elif plan.local is not None:
            noise = {"clipping_norm": privacy.clipping_norm, "delta": privacy.delta}
            noise["noise_multiplier"] = plan.local.noise_multiplier
        elif plan.aggregate is not None:
            noise = {"claimed_epsilon": plan.aggregate.epsilon(relation=member.relation), "delta": privacy.delta}
        return RunRequest(
            run=self._run,
            task=self._model.name,
            strategy=experiment.strategy.name,
            update=update,
            rounds=experiment.experiment.rounds,
            epochs=train.epochs,
            batch_size=train.batch_size,
            **noise,
            **self._metrics(member),
        )

    def _metrics(self, member: Member) -> dict[str, Any]:
        """Return what is asked of a member's metrics: never more than its policy releases."""
        experiment, plan = self._experiment, self.plan
        releases = planned_releases(experiment.experiment.rounds, experiment.server.evaluate_every)
        if experiment.privacy.unit == "none":
            # A strategy may have a Flower ClientApp evaluate in each round.
            releases = releases if self._model.classes else experiment.experiment.rounds
            return {"metrics": "raw", "releases": releases} if member.metrics == "raw" else {}
        evaluation: EvaluationPlan | None = plan.evaluation
        if evaluation is None or member.metrics == "withheld":
            return {}
        return {"metrics": "noised", "metrics_epsilon": evaluation.epsilon, "releases": evaluation.releases}

    def _randomness(self) -> Randomness:
        if any(member.seeded for member in self._members.values()):
            return "seed"
        # Sites draw from their own systems, whatever the experiment says; the server draws as it says.
        return self._experiment.privacy.randomness if self.plan.aggregate is not None else "secret"


def _restored(experiment: Experiment, member: Member) -> RecordLevelPlan:
    """Return a member's mechanism with the noise that it was asked for before."""
    train, table = experiment.train, record_table(experiment)
    return RecordLevelPlan(
        records=member.records,
        batch_size=train.batch_size,
        epochs=train.epochs,
        rounds=experiment.experiment.rounds,
        clipping_norm=table.clipping_norm,
        noise_multiplier=member.noise_multiplier or 0.0,
        delta=table.delta,
        per_layer=table.clipping == "per-layer",
        microbatch_size=train.microbatch_size,
    )
