"""What `bract plan` prints: what an experiment will do and cost, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..clients.local_model import build_module
from ..clients.parts import local_model, local_rule, strategy_of
from ..experiment import Experiment
from ..privacy.mechanism import RecordLevelPlan
from ..server.plan import Plan, make_plan, refuse_what_is_not_offered
from ..server.traffic import Traffic, traffic_of
from ..strategies.compression import Compression
from ..tasks.registry import find_task
from ..tasks.task import SiteData
from .federation import flower_federation, remarks_on
from .plan import load_clients
from .trials import price, refuse_nothing_to_count

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


def describe(experiment: Experiment, *, trials: int | None = None) -> dict[str, Any]:
    """Return what `bract plan` prints: data, model, bytes, mechanisms and guarantee; nothing is trained.

    With `trials` also what it costs to run the experiment that often. Raises InputError.
    """
    if trials is not None:
        refuse_nothing_to_count(experiment)
    strategy = strategy_of(experiment)
    refuse_what_is_not_offered(experiment, strategy)
    if experiment.clients.app:
        return _describe_app(experiment, strategy, trials)
    task = find_task(experiment)
    data = load_clients(experiment, task)
    private = experiment.privacy.unit != "none"
    module, notes = build_module(task, seed=experiment.experiment.seed, private=private)
    rule = local_rule(experiment, strategy)
    model, _ = local_model(experiment, module, rule)
    counts = {name: len(site.train) for name, site in data.items()}
    planned = make_plan(experiment, counts, len(task.classes), lambda event: None, coordinates=model.layout.size)
    cohort = _cohort(experiment, len(data))
    sites = {name: _describe_site(site, len(task.classes), planned.mechanisms.get(name)) for name, site in data.items()}
    guarantee = planned.guarantee(experiment)
    return {
        "experiment": experiment.experiment.name,
        "task": experiment.task.name,
        "rounds": experiment.experiment.rounds,
        "clients": len(data),
        "cohort": cohort,
        "classes": list(task.classes),
        "parameters": {"shared": model.layout.size, "personal": sum(t.numel() for t in model.personal.values())},
        "notes": [*notes, *remarks_on(experiment, strategy)],
        "bytes": _bytes(experiment, traffic_of(model.layout, rule, Compression.of(experiment.compression)), cohort),
        "distribution": _distribution(list(sites.values())),
        "sites": sites,
        "evaluation": _describe_evaluation(planned),
        "aggregate": _describe_aggregate(planned),
        "local": _describe_local(planned),
        "guarantee": guarantee.to_dict(),
        "trials": None if trials is None else price(experiment, planned, guarantee, trials),
    }


def _describe_app(experiment: Experiment, strategy: object, trials: int | None) -> dict[str, Any]:
    """Return the same of a Flower ClientApp, which brings its own data: nothing is known of its clients' records."""
    federation = flower_federation(experiment, strategy)
    names, size = federation.names, federation.size
    planned = make_plan(experiment, dict.fromkeys(names, 0), 2, lambda event: None, coordinates=size)
    guarantee, cohort = planned.guarantee(experiment), _cohort(experiment, len(names))
    return {
        "experiment": experiment.experiment.name,
        "task": experiment.clients.app,
        "rounds": experiment.experiment.rounds,
        "clients": len(names),
        "cohort": cohort,
        "classes": [],
        "parameters": {"shared": size, "personal": 0},
        "notes": ["a Flower ClientApp: it brings its own data, metrics, and what it keeps"],
        "bytes": _bytes(experiment, federation.traffic, cohort),
        "distribution": {},
        "sites": {},
        "evaluation": _describe_evaluation(planned),
        "aggregate": _describe_aggregate(planned),
        "local": _describe_local(planned),
        "guarantee": guarantee.to_dict(),
        "trials": None if trials is None else price(experiment, planned, guarantee, trials),
    }


def _cohort(experiment: Experiment, clients: int) -> int:
    sampled = experiment.clients.per_round if experiment.clients.sampling != "all" else None
    return sampled or clients


def _bytes(experiment: Experiment, traffic: Traffic, cohort: int) -> dict[str, int]:
    """Return the bytes of a client's round and of the run; `saved` of what a client sends in a round."""
    both = traffic.down + traffic.up
    run = both * experiment.experiment.rounds * cohort
    return {"client_round": both, "run": run, "down": traffic.down, "up": traffic.up, "saved": traffic.saved}


def _describe_evaluation(planned: Plan) -> dict[str, Any] | None:
    evaluation = planned.evaluation
    return None if evaluation is None else {"releases": evaluation.releases, "epsilon": evaluation.epsilon}


def _describe_aggregate(planned: Plan) -> dict[str, Any] | None:
    """Return the client-level mechanism, None where there is none."""
    plan = planned.aggregate
    if plan is None:
        return None
    return {
        "sampling": plan.sampling,
        "sampling_rate": plan.sampling_rate,
        "cohort": plan.cohort,
        "clipping_norm": plan.clipping_norm,
        "adaptive_clipping": plan.adaptive_clipping,
        "noise_multiplier": plan.noise_multiplier,
        "update_noise_multiplier": plan.update_noise_multiplier,
        "epsilon": plan.epsilon(),
    }


def _describe_local(planned: Plan) -> dict[str, Any] | None:
    """Return what each client does to its updates, None where that is nothing."""
    plan = planned.local
    if plan is None:
        return None
    return {
        "participations": plan.participations,
        "clipping_norm": plan.clipping_norm,
        "noise_multiplier": plan.noise_multiplier,
        "epsilon": plan.epsilon(),
    }


def _distribution(sites: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the least, 5 %, median, 95 % and largest of what the clients hold.

    `distance` is half the sum of the absolute differences between a client's shares of the classes and those of all
    records (total variation): 0 where a client is a small image of the whole, near 1 where it holds a rare class only.
    """
    labels = np.array([site["labels"] for site in sites], dtype=np.float64)
    shares = labels / labels.sum(axis=1, keepdims=True)
    columns: dict[str, Any] = {
        "train_records": [site["train_records"] for site in sites],
        "test_records": [site["test_records"] for site in sites],
        "classes_present": (labels > 0).sum(axis=1),
        "largest_class": shares.max(axis=1),
        "distance": np.abs(shares - labels.sum(axis=0) / labels.sum()).sum(axis=1) / 2,
    }
    for name in ("noise_multiplier", "epsilon"):
        if all(name in site for site in sites):
            columns[name] = [site[name] for site in sites]
    # By the nearest rank, so that each is some client's own value: no client holds half a record.
    ranks = [max(0, math.ceil(share * len(sites)) - 1) for share in QUANTILES]
    return {name: np.sort(np.asarray(column))[ranks].tolist() for name, column in columns.items()}


def _describe_site(site: SiteData, classes: int, mechanism: RecordLevelPlan | None) -> dict[str, Any]:
    labels = torch.bincount(torch.cat([site.train.targets, site.test.targets]), minlength=classes)
    record: dict[str, Any] = {
        "train_records": len(site.train),
        "test_records": len(site.test),
        "labels": labels.tolist(),
    }
    if mechanism is not None:
        record |= {
            "sampling_rate": mechanism.sampling_rate,
            "steps": mechanism.steps(),
            "noise_multiplier": mechanism.noise_multiplier,
            "epsilon": mechanism.epsilon(),
            "epsilon_replace_one": mechanism.epsilon(relation="replace-one"),
        }
    return record
