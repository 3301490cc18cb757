"""Find a task by its name: built in, by dotted path, or declared by an installed package (group `bract.tasks`)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from ..core.plugins import construct, declared, resolve
from .tables import nearest

if TYPE_CHECKING:
    from ..experiment import Experiment
    from .task import Task

GROUP = "bract.tasks"
METHODS = ("model", "partitions", "site", "loss", "probabilities", "metrics")
# Read by others than the task's class: `name` here, `data` by the caller, who hands it to `partitions`.
NOT_THE_CLASSES = ("name", "data", "model")


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """A task that can be named: its models, and where it comes from ("bract" or the package that declares it)."""

    name: str
    summary: str
    models: tuple[str, ...] = ()
    origin: str = "bract"


@dataclass(frozen=True, kw_only=True)
class _BuiltIn:
    target: str
    info: TaskInfo


def _built_in(name: str, target: str, models: tuple[str, ...], summary: str) -> _BuiltIn:
    return _BuiltIn(target=target, info=TaskInfo(name=name, summary=summary, models=models))


BUILT_IN: Mapping[str, _BuiltIn] = {
    task.info.name: task
    for task in (
        _built_in(
            "heart-disease",
            "heart_disease:HeartDisease",
            ("logistic", "mlp"),
            "heart disease in four hospitals: 920 patients, 17 features (UCI)",
        ),
        _built_in(
            "tabular",
            "tabular:Tabular",
            ("logistic", "mlp"),
            "a CSV or Parquet file of your own, by configuration alone",
        ),
        _built_in(
            "digits", "digits:Digits", ("cnn", "logistic"), "1,797 handwritten digits of 8x8 pixels (scikit-learn)"
        ),
        _built_in(
            "synthetic", "synthetic:Synthetic", ("logistic", "mlp"), "any number of clients and records, from a seed"
        ),
        _built_in(
            "fashion-mnist",
            "fashion_mnist:FashionMnist",
            ("mlp", "small", "cnn"),
            "70,000 images of clothes of 28x28 pixels (Debian's dataset-fashion-mnist)",
        ),
    )
}


def available_tasks() -> list[TaskInfo]:
    """Return the built-in tasks and those that installed packages declare, without importing any."""
    plugins = [
        TaskInfo(name=name, summary=point.value, origin=point.dist.name if point.dist else "an installed package")
        for name, point in declared(GROUP).items()
        if name not in BUILT_IN
    ]
    return [task.info for task in BUILT_IN.values()] + plugins


def load_task(
    section: Mapping[str, Any] | Any,
    *,
    model: str | None = None,
    seed: int,
    folder: Path | None,
    file: str | None = None,
) -> Task:
    """Return the task of `[task]`: `section` is that table, as a mapping or as the experiment's model of it.

    The keys beside `name` and `data` go to the task's class, with `train.model` as `model` where it is set, and
    `experiment.seed` as `seed` where the class takes one. Raises InputError, which names key and `file`.
    """
    keys = dict(section)
    place = f" ({file})" if file else ""
    name = keys.get("name") or ""
    own = {key: value for key, value in keys.items() if key not in NOT_THE_CLASSES}
    if keys.get("model") is not None:
        raise InputError("experiment-key", f"task.model: write train.model to choose among a task's models{place}")
    try:
        found = _find(name, folder)
        task = found if not callable(found) else _construct(found, own, name=name, model=model, seed=seed, place=place)
    except InputError as error:
        if place and place not in error.sentence:
            raise InputError(error.code, error.sentence + place) from error
        raise
    return _checked(task, f'task.name = "{name}"', place)


def find_task(experiment: Experiment) -> Task:
    """Return the task that an experiment names; raises InputError."""
    source = experiment.source
    return load_task(
        {"name": experiment.task.name, **experiment.task.own},
        model=experiment.train.model,
        seed=experiment.experiment.seed,
        folder=experiment.folder or Path(),
        file=source.name if source else None,
    )


def _find(name: str, folder: Path | None) -> Any:
    if not name:
        raise InputError("experiment-value", f"task.name: missing; {nearest(name, BUILT_IN)}")
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].target.partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), attribute)
    if ":" in name:
        return resolve(name, folder=folder, key="task.name")
    plugins = declared(GROUP)
    if name not in plugins:
        raise InputError(
            "plugin-missing",
            f'task.name = "{name}": unknown; {nearest(name, [*BUILT_IN, *plugins])}; '
            'an own task is written "module:Class"',
        )
    return resolve(plugins[name].value, folder=None, key="task.name")


def _construct(
    factory: Callable[..., Any], own: Mapping[str, Any], *, name: str, model: str | None, seed: int, place: str
) -> Any:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise InputError("plugin-invalid", f'task.name = "{name}": is no class of a task') from error
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    given: dict[str, Any] = {}
    if model is not None:
        if "model" not in signature.parameters and not takes_any:
            raise InputError(
                "experiment-value", f'train.model = "{model}": the task "{name}" has one model only; drop this key'
            )
        given["model"] = model
    if "seed" in signature.parameters and "seed" not in own:
        given["seed"] = seed

    def build(**keywords: Any) -> Any:
        return factory(**keywords, **given)

    # What complaints list as known: the task's own keys, without those that stand in other tables.
    build.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            parameter
            for parameter in signature.parameters.values()
            if parameter.name not in given and parameter.name != "model"
        ]
    )
    return construct(build, own, table="task", place=place)


def _checked(task: Any, key: str, place: str) -> Task:
    lacking = [method for method in METHODS if not callable(getattr(task, method, None))]
    if lacking:
        raise InputError(
            "plugin-invalid",
            f"{key}: lacks {', '.join(f'{method}()' for method in lacking)}; "
            f"bract.tasks.classification.Classification gives the last three methods of a task{place}",
        )
    classes = getattr(task, "classes", ())
    if not isinstance(classes, tuple) or len(classes) < 2 or not all(isinstance(item, str) for item in classes):
        raise InputError(
            "plugin-invalid",
            f"{key}: classes = {classes!r} must be a tuple with the names of at least two classes{place}",
        )
    found: Task = task
    return found
