"""All clients' records in four tensors of shared memory, which every worker process maps instead of copying."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
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

    def sites(self) -> dict[str, SiteData]:
        """Return each client's records as views of the shared tensors."""
        trains, tests = _apart(self.train, self.train_sizes), _apart(self.test, self.test_sizes)
        return {
            name: SiteData(train=train, test=test) for name, train, test in zip(self.names, trains, tests, strict=True)
        }


def _together(parts: Sequence[Examples]) -> Examples:
    def shared(tensors: list[Tensor]) -> Tensor:
        together = torch.cat(tensors)
        together.share_memory_()
        return together

    return Examples(shared([part.inputs for part in parts]), shared([part.targets for part in parts]))


def _apart(whole: Examples, sizes: Sequence[int]) -> list[Examples]:
    starts = [0, *accumulate(sizes)]
    return [
        Examples(whole.inputs[start : start + size], whole.targets[start : start + size])
        for start, size in zip(starts, sizes, strict=False)
    ]
