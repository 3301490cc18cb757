"""All clients' records in four tensors of shared memory, which every worker process maps instead of copying.

A client's own tensors are views that are made when they are asked for: kept for each of many clients, they would take
more memory than small records do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..tasks.task import Examples, SiteData


@dataclass(frozen=True, kw_only=True)
class SharedData:
    """The training and the test records of all clients, one after the other, and how many each client has."""

    train: Examples
    test: Examples
    names: tuple[str, ...]
    train_sizes: tuple[int, ...]
    test_sizes: tuple[int, ...]

    @classmethod
    def of(cls, data: Mapping[str, SiteData]) -> SharedData:
        """Copy clients' records into shared memory."""
        return cls(
            train=_together([site.train for site in data.values()]),
            test=_together([site.test for site in data.values()]),
            names=tuple(data),
            train_sizes=tuple(len(site.train) for site in data.values()),
            test_sizes=tuple(len(site.test) for site in data.values()),
        )

    def sites(self) -> Mapping[str, SiteData]:
        """Return each client's records as views of the shared tensors."""
        return _Views(self)


class Population(Mapping[str, SiteData]):
    """The records of all virtual clients, by name: as their task made them, until they are shared."""

    def __init__(self, data: Mapping[str, SiteData]) -> None:
        self._data = data

    def __getitem__(self, name: str) -> SiteData:
        return self._data[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def share(self) -> SharedData:
        """Copy the records into shared memory, and let go of what the task made."""
        shared = SharedData.of(self._data)
        self._data = shared.sites()
        return shared


class _Views(Mapping[str, SiteData]):
    def __init__(self, whole: SharedData) -> None:
        self._whole = whole
        self._places = {name: place for place, name in enumerate(whole.names)}
        self._trains, self._tests = _ends(whole.train_sizes), _ends(whole.test_sizes)

    def __getitem__(self, name: str) -> SiteData:
        place = self._places[name]
        return SiteData(
            train=_between(self._whole.train, self._trains, place), test=_between(self._whole.test, self._tests, place)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _together(parts: Sequence[Examples]) -> Examples:
    def shared(tensors: list[Tensor]) -> Tensor:
        together = torch.cat(tensors)
        together.share_memory_()
        return together

    return Examples(shared([part.inputs for part in parts]), shared([part.targets for part in parts]))


def _ends(sizes: Sequence[int]) -> NDArray[np.int64]:
    """Return where each client's records begin, and at last where they end."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _between(whole: Examples, ends: NDArray[np.int64], place: int) -> Examples:
    part = slice(int(ends[place]), int(ends[place + 1]))
    return Examples(whole.inputs[part], whole.targets[part])
