"""Virtual clients: the records of a task dealt out anew, by any partitioner of flwr-datasets.

A partitioner sees the classes of all records, so which client holds a record depends on the others; which records
there are, their tensors and their split do not. It stands for how data came to lie where they lie, and is drawn from
the public seed: natural partitions are what a guarantee over real owners is about.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..core.errors import InputError
from ..core.keys import Key
from ..core.names import Numbered
from .pool import Pool, counts_of
from .tables import nearest
from .task import Examples, SiteData

NATURAL = "natural"
# Not here: vertical ones deal out columns, and this one wants a Python function.
LEFT_OUT = ("vertical-even", "vertical-size", "id-to-size-fnc")
# Their options may say that some records go to no client; in others that is a mistake.
MAY_LEAVE = ("size", "shard", "distribution")
BY_CLIENT = ("natural-id", "grouped-natural-id")
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "dirichlet": {"alpha": 0.5},
    "inner-dirichlet": {"alpha": 0.5},
    # Among at least as many clients as classes, each class then has a holder; Flower's "random" may leave some out.
    "pathological": {"num_classes_per_partition": 2, "class_assignment_mode": "first-deterministic"},
    "shard": {"num_shards_per_partition": 2},
    "continuous": {"strictness": 0.5},
    "grouped-natural-id": {"group_size": 2},
    "distribution": {"preassigned_num_samples_per_label": 0},
}


def partition(
    sites: Mapping[str, SiteData],
    *,
    partitioner: str = NATURAL,
    count: int | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Mapping[str, SiteData]:
    """Return the clients that `clients.partitioner` makes of the pooled records; "natural" leaves them as they are.

    A record stays a training or a test record, and goes to exactly one client (to none only where the options say
    so: `size` with sizes below the total). `options` are the partitioner's own parameters. Raises InputError for an
    unknown partitioner or option, a missing count, records without a client, clients without a record to train on.
    """
    options = dict(options or {})
    if _plain(partitioner) == NATURAL:
        if options:
            raise _unknown_option(next(iter(options)), partitioner, [])
        return _checked(sites, "task.data")
    train = [site.train for site in sites.values()]
    test = [site.test for site in sites.values()]
    pool = Examples(
        torch.cat([part.inputs for part in (*train, *test)]), torch.cat([part.targets for part in (*train, *test)])
    )
    holders = [name for parts in (train, test) for name, part in zip(sites, parts, strict=True) for _ in part.targets]
    border = sum(map(len, train))
    groups = _groups(pool.targets.tolist(), holders, partitioner, count, seed, options)
    trains = [[index for index in group if index < border] for group in groups]
    tests = [[index for index in group if index >= border] for group in groups]
    clients = Pool.dealt(pool, client_names(len(groups)), trains, tests)
    return _checked(clients, "clients.partitioner")


def client_names(count: int) -> Sequence[str]:
    """Return "client-0001" and so on: padded, so that the order by name is the order by number."""
    return Numbered(count)


def partitioners() -> tuple[str, ...]:
    """Return the names that `clients.partitioner` takes."""
    return (NATURAL, *_classes())


def _groups(
    labels: Sequence[int],
    holders: Sequence[str],
    partitioner: str,
    count: int | None,
    seed: int,
    options: dict[str, Any],
) -> list[list[int]]:
    """Return the sorted positions of each client's records."""
    # datasets and flwr_datasets take seconds to import, and natural partitions need neither. No part of this touches
    # the network: the data set is made in memory.
    from datasets import Dataset

    key = Key.from_seed(seed).child("partition")
    # Some partitioners cut contiguous pieces and leave the shuffling to their caller.
    order = key.stream().permutation(len(labels)).tolist()
    columns = {
        "index": order,
        "label": [labels[position] for position in order],
        "client": [holders[position] for position in order],
    }
    built = _build(partitioner, count, key.integer(32), options, len(labels))
    built.dataset = Dataset.from_dict(columns)
    try:
        # Dirichlet warns at each new attempt, a paragraph each, and another draws a progress bar; what is wrong in the
        # end is raised.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            groups = [sorted(built.load_partition(number)["index"]) for number in range(built.num_partitions)]
    except (ValueError, TypeError, AssertionError, IndexError) as error:
        least = getattr(built, "_min_partition_size", None)
        if least is not None and "attempts" in str(error):
            raise _too_small(least, partitioner, count) from error
        raise _refused(partitioner, count, str(error)) from error
    dealt = sum(map(len, groups))
    if dealt < len(labels) and _plain(partitioner) not in MAY_LEAVE:
        raise _refused(
            partitioner, count, f"{len(labels) - dealt} of {len(labels)} records go to no client; use more clients"
        )
    return groups


def _build(partitioner: str, count: int | None, seed: int, options: dict[str, Any], records: int) -> Any:
    name = _plain(partitioner)
    known = _classes()
    if name not in known:
        raise InputError(
            "experiment-value",
            f'clients.partitioner = "{partitioner}": unknown; {nearest(name, (NATURAL, *known))}',
        )
    parameters = inspect.signature(known[name].__init__).parameters
    own = [parameter for parameter in parameters if parameter not in ("self", "num_partitions", "partition_by", "seed")]
    for option in options:
        if option not in own:
            raise _unknown_option(option, partitioner, own)
    arguments = {**DEFAULTS.get(name, {}), **options}
    if "num_partitions" in parameters:
        if count is None:
            raise InputError("experiment-value", f'clients.count: missing; "{partitioner}" needs the number of clients')
        if count > records:
            raise InputError("experiment-value", f"clients.count = {count}: there are {records} records only")
        arguments["num_partitions"] = count
    if "partition_by" in parameters:
        arguments["partition_by"] = "client" if name in BY_CLIENT else "label"
    if "seed" in parameters:
        arguments["seed"] = seed
    if name == "dirichlet":
        # Flower's own default of 10 cannot be met by many clients with few records each.
        arguments.setdefault("min_partition_size", max(1, min(10, records // (5 * (count or 1)))))
    if name == "shard" and "shard_size" not in options:
        # By number of shards flwr-datasets rounds their size down and drops the records left over.
        shards = arguments.pop("num_shards_per_partition")
        if not isinstance(shards, int) or shards < 1:
            raise InputError(
                "experiment-value",
                f"clients.partitioner_options.num_shards_per_partition = {shards!r}: must be a whole number above 0",
            )
        arguments |= {"shard_size": -(-records // (shards * (count or 1))), "keep_incomplete_shard": True}
    for option in own:
        if parameters[option].default is inspect.Parameter.empty and option not in arguments:
            raise InputError(
                "experiment-value", f'clients.partitioner_options.{option}: missing; "{partitioner}" needs it'
            )
    try:
        if "distribution_array" in arguments:
            arguments["distribution_array"] = np.asarray(arguments["distribution_array"], dtype=float)
        return known[name](**arguments)
    except (ValueError, TypeError) as error:
        raise _refused(partitioner, count, str(error)) from error


def _classes() -> dict[str, Any]:
    import flwr_datasets.partitioner as module

    found = {
        re.sub(r"(?<!^)(?=[A-Z])", "-", name.removesuffix("Partitioner")).lower(): getattr(module, name)
        for name in module.__all__
        if name != "Partitioner"
    }
    return {name: found[name] for name in found if name not in LEFT_OUT}


def _plain(partitioner: str) -> str:
    return partitioner.strip().lower().replace("_", "-")


def _checked(clients: Mapping[str, SiteData], key: str) -> Mapping[str, SiteData]:
    for name, records in counts_of(clients)[0].items():
        if not records:
            raise InputError(
                "data-empty",
                f'{key}: client "{name}" has no record to train on; use fewer clients or another partitioner',
            )
    return clients


def _unknown_option(option: str, partitioner: str, own: Sequence[str]) -> InputError:
    known = nearest(option, own) if own else f'"{partitioner}" has none'
    return InputError("experiment-key", f"clients.partitioner_options.{option}: unknown option; {known}")


def _too_small(least: int, partitioner: str, count: int | None) -> InputError:
    return InputError(
        "experiment-value",
        f'clients.partitioner_options.min_partition_size = {least}: "{partitioner}" gave one of {count} clients fewer '
        "records in each of 10 attempts; lower it, raise alpha, or use fewer clients",
    )


def _refused(partitioner: str, count: int | None, reason: str) -> InputError:
    clients = f" with {count} clients" if count is not None else ""
    return InputError("experiment-value", f'clients.partitioner = "{partitioner}"{clients}: {" ".join(reason.split())}')
