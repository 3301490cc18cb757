"""What a site runs, built from an experiment and held against the policy before any record is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from ...core.parameters import Layout, digest
from ...experiment import Experiment
from ...privacy.dpsgd.independence import refuse_mixing
from ...privacy.policy import Policy, Update
from ...strategies.compression import Compression
from ...strategies.local_rule import LocalRule
from ...strategies.tensors import arrays_like
from ...tasks.prepared import site_data
from ...tasks.registry import find_task
from ...tasks.task import SiteData, Task
from ..kernels.kernel import choose_kernel
from ..local_model import build_module
from ..parts import app_module, flower_app, local_model, local_rule, strategy_of, withholds_counts
from ..training import choose_device
from .admission import refuse_what_may_not_run
from .padding import Padded, padded
from .work import AppWork, TaskWork, Work


@dataclass(frozen=True, kw_only=True)
class Built:
    """A site's work, and what of it is public.

    `updates` are the kinds that the experiment goes with, `options` fields of its RecordLevelPlan. `data_digest` goes
    into the ledger alone, `remark` to the owner alone.
    """

    work: Work
    task_name: str
    strategy_name: str
    is_app: bool
    classes: int
    updates: tuple[Update, ...]
    options: Mapping[str, Any]
    data_digest: str
    remark: str
    node_config: Mapping[str, bool | int | float | str]
    run_config: Mapping[str, bool | int | float | str]


def build(
    experiment: Experiment,
    policy: Policy,
    data: str,
    *,
    server: str | None,
    log: Callable[[str], None],
    task: Task | None = None,
    strategy: object | None = None,
) -> Built:
    """Return a site's work on the data set of this name. Raises Refusal or InputError."""
    is_app = experiment.clients.app is not None
    task_name = experiment.clients.app or experiment.task.name
    refuse_what_may_not_run(policy, task_name, experiment.strategy.name, is_app=is_app)
    updates = _updates(experiment)
    if not set(updates) & set(policy.allow.updates):
        policy.refuse_unlisted("updates", updates[0])
    strategy = strategy or strategy_of(experiment)
    _refuse_needs(policy, strategy, server)
    rule = local_rule(experiment, strategy)
    work: Work
    if is_app:
        work, digested, remark, classes = *_app(experiment, policy, data, log), 2
    else:
        found = task or find_task(experiment)
        work, digested, remark = _task(experiment, policy, data, found, rule, log)
        classes = len(found.classes)
    node_config: dict[str, bool | int | float | str] = {"name": data, "partition-id": 0, "num-partitions": 1}
    if is_app:
        node_config |= {"data": str(policy.path_of(data)), **policy.data[data].node_config}
    return Built(
        work=work,
        task_name=task_name,
        strategy_name=experiment.strategy.name,
        is_app=is_app,
        classes=classes,
        updates=updates,
        options={
            "per_layer": (experiment.privacy.record or experiment.privacy).clipping == "per-layer",
            "microbatch_size": experiment.train.microbatch_size,
        },
        data_digest=digested,
        remark=remark,
        node_config=node_config,
        run_config=experiment.clients.run_config,
    )


def _updates(experiment: Experiment) -> tuple[Update, ...]:
    """Return the kinds of updates that go with an experiment; a ClientApp's may be noised where they are raw."""
    privacy = experiment.privacy
    if privacy.unit == "record" or privacy.record is not None:
        return ("dp-sgd",)
    if privacy.trust == "nobody":
        return ("noised",)
    return ("noised", "raw") if experiment.clients.app else ("raw",)


def _refuse_needs(policy: Policy, strategy: object, server: str | None) -> None:
    """Raise Refusal where a strategy needs what the policy withholds; counts are declared, so they are public."""
    if getattr(strategy, "needs_metrics", False):
        name = type(strategy).__name__
        if policy.allow.metrics != "raw":
            raise policy.refusal(
                "allow", "metrics", why=f"{name} needs the clients' own metrics in each reply", write='metrics = "raw"'
            )
        policy.refuse_untrusted(server, f"what {name} needs, metrics without noise,")


def _task(
    experiment: Experiment, policy: Policy, data: str, task: Task, rule: LocalRule, log: Callable[[str], None]
) -> tuple[TaskWork, str, str]:
    updates = _updates(experiment)
    if "noised" in updates and (rule.sends or rule.reports):
        why = "has clients send more than the model, which no mechanism covers"
        raise experiment.conflict("strategy", "name", why=why)
    private = experiment.privacy.unit != "none"
    device = choose_device(experiment.train.device)
    module, _ = build_module(task, seed=experiment.experiment.seed, private=private)
    # On the processor, and before the module moves: a bad index would end a GPU's context.
    ready = padded(
        task,
        module,
        site_data(task, policy.path_of(data)),
        records=policy.data[data].records,
        place=policy.place("data", data, "records"),
    )
    if private:
        refuse_mixing(module, ready.data.train.inputs)
    model, training = local_model(experiment, module, rule, device=device)
    # As a simulation chooses, so that both give the same model.
    kernel = choose_kernel(
        experiment.simulation.kernel,
        model,
        Padded(task=task).loss,
        ready.data.train,
        training,
        rule,
        private="dp-sgd" in updates,
        place=experiment.place("simulation", "kernel"),
    )
    training = replace(training, kernel=kernel)
    tables = experiment.model_dump(mode="json", include={"task", "strategy", "compression"})
    work = TaskWork(
        name=data,
        task=Padded(task=task),
        data=ready.data,
        model=model,
        training=training,
        rule=rule,
        compression=Compression.of(experiment.compression),
        withhold_counts=withholds_counts(experiment),
        settings={**tables, "training": asdict(training), "layout": _form(model.layout)},
        log=log,
    )
    remark = (
        f"{ready.unusable} records cannot be used and {ready.missing} are fewer than declared; "
        "both count as records without contribution"
    )
    return work, _digest(ready.data), remark


def _app(experiment: Experiment, policy: Policy, data: str, log: Callable[[str], None]) -> tuple[AppWork, str, str]:
    path = policy.path_of(data)
    if not path.exists():
        where = policy.place("data", data, "path")
        raise InputError("data-missing", f'data.{data}.path = "{path}": there is no such file{where}')
    layout = Layout.of(arrays_like(app_module(experiment).state_dict()))
    tables = experiment.model_dump(mode="json", include={"task", "strategy", "clients"})
    work = AppWork(
        app=flower_app(experiment),
        layout=layout,
        records=policy.data[data].records,
        settings={**tables, "layout": _form(layout)},
        log=log,
    )
    return work, _file_digest(path), "the ClientApp reads the data itself"


def _form(layout: Layout) -> list[list[Any]]:
    rows = zip(layout.names, layout.shapes, layout.dtypes, strict=True)
    return [[name, list(shape), dtype] for name, shape, dtype in rows]


def _file_digest(path: Path) -> str:
    if not path.is_file():
        return "a folder"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(data: SiteData) -> str:
    """Return the digest of the records as they are trained on, for the ledger alone: it never leaves."""
    return digest(
        {
            f"{part}/{kind}": getattr(getattr(data, part), kind).numpy()
            for part in ("train", "test")
            for kind in ("inputs", "targets")
        }
    )
