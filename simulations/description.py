"""What `bract plan` prints: what an experiment will do and cost, before anything is trained."""

from __future__ import annotations

from typing import Any

import torch

from ..clients.local_model import LocalModel, build_module
from ..clients.training import LocalTraining
from ..experiment import Experiment
from ..privacy.mechanism import RecordLevelPlan
from ..tasks.registry import find_task
from ..tasks.task import SiteData
from .plan import load_clients, make_plan


def describe(experiment: Experiment) -> dict[str, Any]:
    """Return what `bract plan` prints: data, model, bytes, mechanisms and guarantee; nothing is trained."""
    task = find_task(experiment)
    data = load_clients(experiment, task)
    private = experiment.privacy.unit != "none"
    module, notes = build_module(task, seed=experiment.experiment.seed, private=private)
    model = LocalModel(module, LocalTraining.of(experiment.train, private=private))
    counts = {name: len(site.train) for name, site in data.items()}
    planned = make_plan(experiment, counts, len(task.classes), lambda event: None)
    rounds = experiment.experiment.rounds
    size = sum(tensor.element_size() * tensor.numel() for tensor in model.shared.values())
    cohort = experiment.clients.per_round if experiment.clients.sampling != "all" else len(data)
    return {
        "experiment": experiment.experiment.name,
        "task": experiment.task.name,
        "rounds": rounds,
        "clients": len(data),
        "cohort": cohort,
        "classes": list(task.classes),
        "parameters": {"shared": model.layout.size, "personal": sum(t.numel() for t in model.personal.values())},
        "notes": notes,
        "bytes": {"client_round": 2 * size, "run": 2 * size * rounds * (cohort or 0)},
        "sites": {
            name: _describe_site(site, len(task.classes), planned.mechanisms.get(name)) for name, site in data.items()
        },
        "evaluation": {"releases": planned.evaluation.releases, "epsilon": planned.evaluation.epsilon},
        "guarantee": planned.guarantee(experiment).to_dict(),
    }


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
