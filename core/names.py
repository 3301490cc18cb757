"""Many clients' names, and what is known of each, in arrays: an object for each would outweigh small records."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from .flower import node_id

T = TypeVar("T")

_PREFIX = "client-"
# Names that are kept: a round asks several times for those of its cohort.
_RECENT = 2**12


class Numbered(Sequence[str]):
    """The names "client-0001" and so on: padded, so that the order by name is the order by number."""

    def __init__(self, count: int) -> None:
        self._count, self._width = count, max(4, len(str(count)))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        if isinstance(place, slice):
            return tuple(self[each] for each in range(*place.indices(self._count)))
        return f"{_PREFIX}{range(1, self._count + 1)[place]:0{self._width}d}"

    def __iter__(self) -> Iterator[str]:
        return (f"{_PREFIX}{number:0{self._width}d}" for number in range(1, self._count + 1))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._place(name) is not None

    def index(self, name: str, start: int = 0, stop: int | None = None) -> int:
        """Return a name's place; raises ValueError if it is none of them."""
        place = self._place(name)
        if place is None or place not in range(self._count)[start:stop]:
            raise ValueError(f"{name!r} is no client")
        return place

    def _place(self, name: str) -> int | None:
        number = name[len(_PREFIX) :]
        if len(number) != self._width or not name.startswith(_PREFIX) or not (number.isdigit() and number.isascii()):
            return None
        place = int(number) - 1
        return place if 0 <= place < self._count else None


@dataclass(frozen=True, kw_only=True, eq=False)
class ByName(Mapping[str, T]):
    """What is known of each client: of the k-th of `names` it is `values[numbers[k]]`."""

    names: Sequence[str]
    numbers: NDArray[np.integer[Any]]
    known: Sequence[T]

    @classmethod
    def counts(cls, names: Sequence[str], counts: NDArray[np.integer[Any]]) -> ByName[int]:
        """Return whole numbers by name, none of them below 0."""
        return ByName(names=names, numbers=counts, known=range(int(counts.max(initial=0)) + 1))

    @classmethod
    def alike(cls, names: Sequence[str], value: T) -> ByName[T]:
        """Return the same value for each name."""
        return ByName(names=names, numbers=np.zeros(len(names), np.int8), known=(value,))

    def __getitem__(self, name: str) -> T:
        value: T = self.known[int(self.numbers[self._places[name]])]
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _places(self) -> Places:
        return Places(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_places"}


class Places(Mapping[str, int]):
    """Each name's place among others."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._known = None if isinstance(names, Numbered) else {name: place for place, name in enumerate(names)}

    def __getitem__(self, name: str) -> int:
        if self._known is not None:
            return self._known[name]
        try:
            return self.names.index(name)
        except ValueError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Nodes(Mapping[int, str]):
    """The clients' names by their node ids, in the order of the names; `ids` are all node ids in that order."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.ids = array("q", map(node_id, names))
        ids = np.frombuffer(self.ids.tobytes(), np.int64)
        order = np.argsort(ids, kind="stable").astype(np.int32)
        # A search in them takes half a microsecond; a dict would take a hundred bytes a client.
        self._recent: dict[int, str] = {}
        self._places, self._sorted = array("i", order.tobytes()), array("q", ids[order].tobytes())

    def place(self, node: int) -> int:
        """Return the client's number; raises KeyError."""
        found = self._found(node)
        if found is None:
            raise KeyError(node)
        place: int = self._places[found]
        return place

    def _found(self, node: int) -> int | None:
        found = bisect_left(self._sorted, node)
        return found if found < len(self._sorted) and self._sorted[found] == node else None

    def __getitem__(self, node: int) -> str:
        name = self._recent.get(node)
        if name is None:
            name = self._names[self.place(node)]
            if len(self._recent) == _RECENT:
                self._recent.clear()
            self._recent[node] = name
        return name

    def __contains__(self, node: object) -> bool:
        return node in self._recent or (isinstance(node, int | np.integer) and self._found(int(node)) is not None)

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def names_of(mapping: Mapping[str, Any]) -> Sequence[str]:
    """Return a mapping's names, in order; those of many clients as they are kept."""
    names: Sequence[str] = mapping.names if isinstance(mapping, ByName) else tuple(mapping)
    return names
