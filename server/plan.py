"""The plan of a run, fixed before anything is trained: whose data, under which mechanisms, for which guarantee."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from ..core.errors import InputError
from ..core.names import ByName, names_of
from ..experiment import Experiment, PrivacyTable, RecordTable
from ..privacy.client_guarantee import client_level, local_privacy
from ..privacy.client_level import ClientLevelPlan
from ..privacy.guarantee import Guarantee, Place, Randomness, no_privacy, record_level
from ..privacy.local import LocalPlan
from ..privacy.mechanism import RecordLevelPlan
from ..privacy.release import EvaluationPlan
from ..strategies.asynchronous import Asynchronous
from ..strategies.compression import refuse_unproven, refuse_unsuited
from ..strategies.local_rule import PLAIN
from .events import Listener, Phase, PhaseAdvanced

CALIBRATION = "calibrating noise"
MOST_SIZES = 24


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The mechanisms of a run: of each client's steps, of the server's sum, or of each client's whole update.

    Without privacy there are none. `evaluation` is None where no metrics are released; without privacy they are exact.
    """

    mechanisms: Mapping[str, RecordLevelPlan]
    evaluation: EvaluationPlan | None
    aggregate: ClientLevelPlan | None = None
    local: LocalPlan | None = None

    def guarantee(
        self,
        experiment: Experiment,
        rounds: Mapping[str, int] | None = None,
        *,
        place: Place = "simulation",
        randomness: Randomness | None = None,
    ) -> Guarantee:
        """Return the guarantee of clients that each trained so many rounds, by default all that are planned.

        `randomness` is by default what the experiment says.
        """
        known: dict[str, Any] = {"randomness": randomness or experiment.privacy.randomness, "place": place}
        exact = self._exact(experiment) if place == "simulation" else []
        if rounds is None:
            rounds = ByName.alike(names_of(self.mechanisms) or ("all",), experiment.experiment.rounds)
        if self.aggregate is None and self.local is None:
            if not self.mechanisms:
                return no_privacy(**known)
            return record_level(self.mechanisms, rounds, self.evaluation, excludes_extra=exact, **known)
        charged = max(rounds.values(), default=0)
        if self.aggregate is not None:
            found = client_level(self.aggregate, charged, excludes_extra=exact, **known)
        else:
            found = local_privacy(cast(LocalPlan, self.local), charged, excludes_extra=exact, **known)
        if self.mechanisms:
            # Which clients were drawn is secret, so each counts as if it had been in every round.
            everywhere = ByName.alike(names_of(self.mechanisms), charged)
            beneath = record_level(self.mechanisms, everywhere, **known)
            # Names, and the numbers of records that such figures follow, are what is protected here.
            found = replace(found, record=replace(beneath, released="models", per_client={}))
        return found

    def _exact(self, experiment: Experiment) -> list[str]:
        """Return what a simulation shows that no mechanism covers."""
        exact = []
        if experiment.simulation.curves:
            exact.append("the curves by round, which are exact (in private/, and in report.html under their heading)")
        if experiment.simulation.baselines and experiment.privacy.unit == "record":
            exact.append("the comparison with other models, which is exact (likewise)")
        return exact


def make_plan(
    experiment: Experiment,
    records: Mapping[str, int],
    classes: int,
    emit: Listener,
    *,
    coordinates: int = 1,
    clients: int | None = None,
    known: Mapping[str, RecordLevelPlan] | None = None,
) -> Plan:
    """Return the mechanisms for clients with these numbers of training records, the noise calibrated.

    `coordinates` is the number of values that travel, `clients` that of all clients where `records` lacks some, and
    `known` the mechanisms of clients whose noise was calibrated before.
    """
    clients = clients or len(records)
    privacy, run = experiment.privacy, experiment.experiment
    releases = planned_releases(run.rounds, experiment.server.evaluate_every)
    if privacy.unit == "none":
        return Plan(mechanisms={}, evaluation=EvaluationPlan(epsilon=None, releases=releases, classes=classes))
    if privacy.unit == "client":
        mechanisms = record_level_plans(experiment, records, emit, known=known) if privacy.record else {}
        if privacy.trust == "nobody":
            local = _local(experiment, clients, coordinates)
            return Plan(mechanisms=mechanisms, evaluation=None, local=local)
        aggregate = _aggregate(experiment, clients, coordinates)
        return Plan(mechanisms=mechanisms, evaluation=None, aggregate=aggregate)
    mechanisms = record_level_plans(experiment, records, emit, known=known)
    # Test records are other records than those trained on, so they may spend as much.
    target = privacy.epsilon or privacy.epsilon_budget or max(each.epsilon() for each in mechanisms.values())
    return Plan(mechanisms=mechanisms, evaluation=EvaluationPlan(epsilon=target, releases=releases, classes=classes))


def record_level_plans(
    experiment: Experiment,
    records: Mapping[str, int],
    emit: Listener,
    *,
    known: Mapping[str, RecordLevelPlan] | None = None,
) -> Mapping[str, RecordLevelPlan]:
    """Return the mechanisms of clients with so many training records, by their names, after those that are known."""
    if not records:
        return dict(known or {})
    distinct = sorted(set(records.values()))
    emit(Phase(name=CALIBRATION, total=len(distinct)))
    classes_of_size = size_classes(distinct, experiment.train.batch_size)
    plans = []
    for size in distinct:
        plans.append(_of_size(experiment, size, accounted=classes_of_size.get(size)))
        emit(PhaseAdvanced(name=CALIBRATION))
    number = {size: place for place, size in enumerate(distinct)}
    numbers = np.fromiter((number[size] for size in records.values()), np.int32, len(records))
    mechanisms = ByName(names=names_of(records), numbers=numbers, known=plans)
    return {**known, **mechanisms} if known else mechanisms


def _of_size(experiment: Experiment, size: int, *, accounted: tuple[int, int] | None) -> RecordLevelPlan:
    """Return the mechanism of a client with so many records."""
    train, table = experiment.train, record_table(experiment)
    fixed: dict[str, Any] = {
        "records": size,
        "batch_size": train.batch_size,
        "epochs": train.epochs,
        "rounds": experiment.experiment.rounds,
        "clipping_norm": table.clipping_norm,
        "delta": table.delta,
        "accounted_records": accounted,
        "per_layer": table.clipping == "per-layer",
        "microbatch_size": train.microbatch_size,
    }
    if table.epsilon is not None:
        return RecordLevelPlan.calibrate(epsilon=table.epsilon, **fixed)
    return RecordLevelPlan(noise_multiplier=table.noise_multiplier or 0.0, **fixed)


def record_table(experiment: Experiment) -> PrivacyTable | RecordTable:
    """Return what says how records are protected: [privacy], or beneath client-level privacy [privacy.record]."""
    return experiment.privacy.record or experiment.privacy


def _local(experiment: Experiment, clients: int, coordinates: int) -> LocalPlan:
    privacy, table = experiment.privacy, experiment.clients
    period = -(-clients // (table.per_round or clients)) if table.sampling == "cyclic" else 1
    known: dict[str, Any] = {
        "participations": -(-experiment.experiment.rounds // period),
        "clipping_norm": privacy.clipping_norm,
        "delta": privacy.delta,
        "coordinates": coordinates,
    }
    if privacy.epsilon is not None:
        return LocalPlan.calibrate(epsilon=privacy.epsilon, **known)
    return LocalPlan(noise_multiplier=privacy.noise_multiplier or 0.0, **known)


def _aggregate(experiment: Experiment, clients: int, coordinates: int) -> ClientLevelPlan:
    privacy, table = experiment.privacy, experiment.clients
    known: dict[str, Any] = {
        "clients": clients,
        "cohort": clients if table.sampling == "all" else table.per_round,
        "sampling": table.sampling,
        "rounds": experiment.experiment.rounds,
        "clipping_norm": privacy.clipping_norm,
        "delta": privacy.delta,
        "coordinates": coordinates,
        "adaptive_clipping": privacy.adaptive_clipping,
        "clipping_quantile": privacy.clipping_quantile,
        "bands": privacy.bands,
    }
    if privacy.epsilon is not None:
        return ClientLevelPlan.calibrate(epsilon=privacy.epsilon, **known)
    return ClientLevelPlan(noise_multiplier=privacy.noise_multiplier or 0.0, **known)


def size_classes(sizes: Iterable[int], batch_size: int) -> dict[int, tuple[int, int]]:
    """Return, for each size, the (fewest, most) records that it is accounted with; empty while each has its own.

    An accountant's figure takes a fraction of a second for each size. Above `MOST_SIZES` of them, sizes within a
    constant ratio share one: the bound is that of the fewest records' sampling rate and the most records' steps.
    """
    distinct = sorted(set(sizes))
    if len(distinct) <= MOST_SIZES:
        return {}
    # Up to one batch every record is in every step: nothing is lost by counting these as one.
    small = [size for size in distinct if size <= batch_size]
    large = [size for size in distinct if size > batch_size]
    groups: dict[int, list[int]] = {-1: small} if small else {}
    for size in large:
        scale = math.log(large[-1] / large[0]) or 1.0
        place = min(MOST_SIZES - 2, int((MOST_SIZES - 1) * math.log(size / large[0]) / scale))
        groups.setdefault(place, []).append(size)
    return {size: (group[0], group[-1]) for group in groups.values() for size in group}


def planned_releases(rounds: int, evaluate_every: int) -> int:
    """Return how often metrics are released at most: every so many rounds, and at the end."""
    return -(-rounds // evaluate_every) if evaluate_every else 1


def refuse_too_few_clients(experiment: Experiment, strategy: object, clients: int) -> None:
    """Raise InputError for an asynchronous strategy whose buffer these clients can never fill."""
    if isinstance(strategy, Asynchronous) and strategy.buffer > clients:
        place = experiment.place("strategy", "buffer")
        raise InputError(
            "experiment-conflict",
            f"strategy.buffer = {strategy.buffer}: must be at most the number of clients, {clients}{place}",
        )


def refuse_what_is_not_offered(experiment: Experiment, strategy: object) -> None:
    """Raise InputError for a combination that only the strategy's class decides.

    A strategy may say `allowed_units`, and that it `needs_counts` or `needs_metrics` in the clear.
    """
    unit, name = experiment.privacy.unit, type(strategy).__name__
    refuse_unproven(experiment)
    refuse_unsuited(experiment, strategy)
    if isinstance(strategy, Asynchronous) and experiment.clients.sampling != "all":
        raise experiment.conflict("clients", "sampling", why=f"{name} draws whom it sends a model; drop the key")
    for need, what in (("needs_counts", "counts of records"), ("needs_metrics", "metrics")):
        if unit != "none" and getattr(strategy, need, False):
            raise experiment.conflict("privacy", "unit", why=f"{name} needs clients' {what}, which are withheld")
    allowed = getattr(strategy, "allowed_units", None)
    if allowed is not None and unit not in allowed:
        raise experiment.conflict(
            "privacy", "unit", why=f"{name} goes with {' or '.join(sorted(allowed))} only; docs/strategies.md says why"
        )
    if unit != "client":
        return
    if isinstance(strategy, Asynchronous):
        raise experiment.conflict("privacy", "unit", why=f"{name} is asynchronous, and noise goes on one cohort's sum")
    if not hasattr(strategy, "fold"):
        raise experiment.conflict(
            "privacy", "unit", why=f"noise on a sum needs a linear strategy, which {type(strategy).__name__} is not"
        )
    weights, cap = getattr(strategy, "weights", "equal"), getattr(strategy, "weight_cap", None)
    if weights != "equal" and (cap is None or experiment.privacy.trust == "nobody"):
        why = 'goes with strategy.weights = "equal", or with a trusted server "counted" and a strategy.weight_cap'
        raise experiment.conflict("privacy", "unit", why=why)
    rule = getattr(strategy, "local_rule", PLAIN)
    if rule.sends or rule.reports:
        why = f"{name} has clients send more than the model, which no mechanism covers"
        raise experiment.conflict("privacy", "unit", why=why)
