"""The records of many clients in four tensors, one client after the other.

A client's own tensors are views that are made when they are asked for: kept for each of many clients, they would take
more memory than small records do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.names import ByName, Places
from .task import Examples, SiteData


@dataclass(frozen=True, kw_only=True, eq=False)
class Pool(Mapping[str, SiteData]):
    """All clients' records by name; those of the k-th are rows `train_ends[k]` to `train_ends[k + 1]` of `train`.

    `train_ends` and `test_ends` are int64 [clients + 1] and begin with 0.
    """

    names: Sequence[str]
    train: Examples
    test: Examples
    train_ends: NDArray[np.int64]
    test_ends: NDArray[np.int64]

    @classmethod
    def of(cls, data: Mapping[str, SiteData]) -> Pool:
        """Copy clients' records together; raises ValueError unless they are all of one shape and type."""
        if isinstance(data, Pool):
            return data
        trains, tests = [site.train for site in data.values()], [site.test for site in data.values()]
        return cls(
            names=tuple(data),
            train=_together(trains),
            test=_together(tests),
            train_ends=ends_of([len(part) for part in trains]),
            test_ends=ends_of([len(part) for part in tests]),
        )

    @classmethod
    def dealt(
        cls, records: Examples, names: Sequence[str], trains: Sequence[Sequence[int]], tests: Sequence[Sequence[int]]
    ) -> Pool:
        """Return the pool whose k-th client trains on the rows `trains[k]` of records, and is tested on `tests[k]`."""
        ends = [ends_of(list(map(len, each))) for each in (trains, tests)]
        pool = cls.room(names, *ends, inputs=records.inputs, targets=records.targets)
        for part, rows in ((pool.train, trains), (pool.test, tests)):
            chosen = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)
            torch.index_select(records.inputs, 0, chosen, out=part.inputs)
            torch.index_select(records.targets, 0, chosen, out=part.targets)
        return pool

    @classmethod
    def room(
        cls,
        names: Sequence[str],
        train_ends: NDArray[np.int64],
        test_ends: NDArray[np.int64],
        *,
        inputs: Tensor,
        targets: Tensor,
    ) -> Pool:
        """Return a pool to be filled with records of the shape and type of these [n, ...], whatever it holds before.

        It lies in shared memory where there is enough of it, so that no copy is made when it is shared.
        """
        train, test = (
            Examples(_room(int(ends[-1]), inputs), _room(int(ends[-1]), targets)) for ends in (train_ends, test_ends)
        )
        return Pool(names=names, train=train, test=test, train_ends=train_ends, test_ends=test_ends)

    def __getitem__(self, name: str) -> SiteData:
        place = self.places[name]
        return SiteData(
            train=_between(self.train, self.train_ends, place), test=_between(self.test, self.test_ends, place)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def places(self) -> Mapping[str, int]:
        """Each client's number, by its name."""
        return Places(self.names)

    def share(self) -> Self:
        """Move the records into shared memory, which other processes map instead of copying; return the pool."""
        for part in (self.train, self.test):
            part.inputs.share_memory_()
            part.targets.share_memory_()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "places"}


def counts_of(data: Mapping[str, SiteData]) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Return each client's numbers of training and of test records."""
    if isinstance(data, Pool):
        trains, tests = np.diff(data.train_ends), np.diff(data.test_ends)
        return ByName.counts(data.names, trains), ByName.counts(data.names, tests)
    return (
        {name: len(site.train) for name, site in data.items()},
        {name: len(site.test) for name, site in data.items()},
    )


def longest_of(data: Mapping[str, SiteData]) -> int:
    """Return the most training records that a client has."""
    if isinstance(data, Pool):
        return int(np.diff(data.train_ends).max(initial=0))
    return max((len(site.train) for site in data.values()), default=0)


def rows_of(
    data: Mapping[str, SiteData], names: Sequence[str], part: Literal["train", "test"]
) -> tuple[Examples, NDArray[np.int64], NDArray[np.int64]]:
    """Return records, and where among them those of each of these clients begin, and how many they are."""
    pool = data if isinstance(data, Pool) else Pool.of({name: data[name] for name in names})
    places = np.array([pool.places[name] for name in names])
    records, ends = (pool.train, pool.train_ends) if part == "train" else (pool.test, pool.test_ends)
    return records, ends[places], ends[places + 1] - ends[places]


def ends_of(sizes: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Return where each client's records begin, and at last where they end."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _together(parts: Sequence[Examples]) -> Examples:
    return Examples(_joined([part.inputs for part in parts]), _joined([part.targets for part in parts]))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    # torch.cat would make one type of several, and leave empty tensors of another shape out.
    if len({(tensor.dtype, tensor.shape[1:]) for tensor in tensors}) != 1:
        raise ValueError("the clients' records are not all of one shape and type")
    return torch.cat(list(tensors), out=_room(sum(map(len, tensors)), tensors[0]))


def _room(count: int, like: Tensor) -> Tensor:
    room = torch.empty((count, *like.shape[1:]), dtype=like.dtype)
    # Containers often have little of it, and who trains in one process needs none.
    with suppress(RuntimeError):
        room.share_memory_()
    return room


def _between(whole: Examples, ends: NDArray[np.int64], place: int) -> Examples:
    part = slice(int(ends[place]), int(ends[place + 1]))
    return Examples(whole.inputs[part], whole.targets[part])
