"""What a server announces, taken as a stranger's word: the experiment that a site may build, or a refusal.

Code is never taken from it, only names: of tasks, strategies and apps that the owner's policy lists. What is the
owner's (paths, device) and what is the server's own is left out before it is looked at. A text, which might name a file
or a module, reaches code of the owner's only under a key that the policy lists.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...core.complaints import shown as in_toml
from ...core.errors import InputError, Refusal, RunError
from ...experiment import Experiment
from ...privacy.policy import Policy, shown_list
from ...strategies.registry import BUILT_IN as STRATEGIES
from ...tasks.registry import BUILT_IN as TASKS
from ...transport.wire import shown

# Time and memory of Python's parser grow with the square of a key's parts: a line of 400,000 takes all there is.
_MOST_DOTS = 200
_DEEPEST = 32
_WIDEST = 2**63

# Tables and keys of an experiment file that say nothing to a site.
_NOT_ITS_OWN = ("simulation", "server")
_NOT_ITS_OWN_KEYS = {
    "task": ("data",),
    "train": ("device",),
    "clients": ("partitioner", "partitioner_options", "minimum"),
}


def proposed(text: str, *, folder: Path, device: str = "auto") -> Experiment:
    """Return the experiment that a server announced, without what is not the site's, for the owner's device.

    Code is looked for in `folder`. Raises RunError `announcement-invalid`.
    """
    try:
        _refuse_costly(text)
        tables = tomllib.loads(text)
        _refuse_odd(tables)
        return Experiment.of(_own(tables, device), folder=folder)
    except InputError as error:
        why = error.sentence
    except (ValueError, RecursionError) as error:
        # Python's parser raises each of them.
        why = f"cannot be read ({error})"
    raise RunError("announcement-invalid", f"the server's experiment: {shown(why, 500)}")


def pinned(path: Path, *, folder: Path, device: str = "auto") -> Experiment:
    """Return the experiment of the owner's own file, likewise without what is not the site's. Raises InputError."""
    # Once as a whole, so that a complaint names the line.
    Experiment.load(path, folder=folder)
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    return Experiment.of(_own(tables, device), source=path, folder=folder)


def refuse_another(announced: Experiment, expected: Experiment) -> None:
    """Raise Refusal unless two experiments are the same to a site; it names the first key that differs."""
    here, there = dict(_flat(expected.model_dump())), dict(_flat(announced.model_dump()))
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            source = expected.source
            raise Refusal(
                "experiment-unexpected",
                f"{shown(key)} = {shown(in_toml(there.get(key, '(missing)')))}: is announced by the server, and "
                f"{in_toml(here.get(key, '(missing)'))} is what {source.name if source else 'the owner'} says; "
                "agree with who runs it, or drop --experiment",
            )


def refuse_unlisted(experiment: Experiment, policy: Policy) -> None:
    """Raise Refusal where an experiment names code, or hands texts to it, that the policy does not list.

    Built-in tasks and strategies take no text that names a file or a module; others are the owner's own code.
    """
    clients, task, strategy = experiment.clients, experiment.task, experiment.strategy
    if clients.app is not None:
        policy.refuse_unlisted("apps", clients.app)
        # Called without arguments, so that any function of any module could be run by naming it here.
        policy.refuse_unlisted("apps", str(task.model))
        _refuse_texts(policy, "clients.run_config", clients.run_config)
    else:
        policy.refuse_unlisted("tasks", task.name)
        if task.name not in TASKS:
            _refuse_texts(policy, "task", task.own)
            _refuse_texts(policy, "train", {"model": experiment.train.model})
    policy.refuse_unlisted("strategies", strategy.name)
    if strategy.name not in STRATEGIES:
        _refuse_texts(policy, "strategy", strategy.own)


def refuse_foreign_options(experiment: Experiment, policy: Policy, data: str) -> None:
    """Raise Refusal unless the task's options are the owner's, which stand in the policy's [data.NAME.task].

    They choose columns, classes and the split, and whether a site opens under them depends on its records: a server
    that chose them could ask about any record, and pay nothing.
    An app reads its data by itself.
    """
    if experiment.clients.app is not None:
        return
    here, there = policy.data[data].task, experiment.task.own
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) == there.get(key):
            continue
        asked = "leaves it out" if key not in there else f"says {shown(in_toml(there[key]), 200)}"
        raise policy.refusal(
            "data",
            data,
            "task",
            why=f"how the data are read is the owner's to say, and for task.{shown(key, 60)} the server {asked}",
            write=f"[data.{data}.task] with the options that were agreed, or give --experiment FILE",
        )


def _refuse_texts(policy: Policy, table: str, options: Mapping[str, Any]) -> None:
    for key, value in options.items():
        if key in policy.allow.options or _is_plain(value):
            continue
        allowed = shown_list((*policy.allow.options, shown(key)))
        raise policy.refusal(
            "allow",
            "options",
            why=f"{table}.{shown(key)} = {shown(repr(value), 80)} would be handed to code of this site, and may name a "
            "file",
            write=f"options = {allowed}",
        )


def _is_plain(value: Any) -> bool:
    """Return whether a value can name nothing: numbers, and lists of them."""
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float)


def _own(tables: Mapping[str, Any], device: str) -> dict[str, Any]:
    found = {name: table for name, table in tables.items() if name not in _NOT_ITS_OWN}
    for name, keys in _NOT_ITS_OWN_KEYS.items():
        table = found.get(name)
        if isinstance(table, Mapping):
            found[name] = {key: value for key, value in table.items() if key not in keys}
    train = found.setdefault("train", {})
    if isinstance(train, dict):
        train["device"] = device
    return found


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif value is not None and value != {}:
        yield path, list(value) if isinstance(value, tuple) else value


def _refuse_costly(text: str) -> None:
    """Raise ValueError for a text on which the parser would take minutes."""
    if any(line.count(".") > _MOST_DOTS for line in text.split("\n")):
        raise ValueError(f"a line has more than {_MOST_DOTS} dots")


def _refuse_odd(value: Any, depth: int = 0) -> None:
    """Raise ValueError for what no experiment holds, and not all that comes after could take."""
    if depth > _DEEPEST:
        raise ValueError(f"tables lie deeper than {_DEEPEST}")
    if isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            _refuse_odd(item, depth + 1)
    elif isinstance(value, int | float):
        # In this order: a whole number of many digits is no float.
        if (isinstance(value, int) and abs(value) > _WIDEST) or not math.isfinite(value):
            raise ValueError("a number is not finite, or beyond 64 bits")
    elif not isinstance(value, str):
        raise ValueError("a date or a time stands in it")
