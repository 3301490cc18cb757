"""A slab: what virtual clients keep from round to round, in memory that is mapped from a file without a name.

The system writes it out and reads it in again as memory gets short; the file goes with the process, however that ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Smaller states stay where they are.
_LEAST = 2**12
_FIRST, _MOST = 2**20, 2**28
_ALIGNED = 64


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """One client's state as `flower.state_to_tree` gives it, its arrays read-only and in the slab, if anywhere there.

    They are valid until it is freed.
    """

    tree: Mapping[str, Any]
    room: NDArray[np.uint8] | None


class Slab:
    """Rooms for states of one size or of several, in extents of a file that grows; a freed room is taken again."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self._rest: NDArray[np.uint8] = np.empty(0, np.uint8)
        self.nbytes = 0

    def put(self, tree: Mapping[str, Any]) -> Kept:
        """Copy a state in. Raises OSError if the disk is full."""
        arrays = [array for item in tree.values() if item["kind"] == "array" for array in item["value"].values()]
        size = sum(_aligned(array.nbytes) for array in arrays)
        if size < _LEAST:
            return Kept(tree, None)
        room, start = self._room(size), 0
        made: dict[str, Any] = {}
        for name, item in tree.items():
            if item["kind"] != "array":
                made[name] = item
                continue
            values = {}
            for key, array in item["value"].items():
                view = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
                view[...] = array
                view.flags.writeable = False
                values[key] = view
                start += _aligned(array.nbytes)
            made[name] = {"kind": "array", "value": values}
        return Kept(made, room)

    def free(self, kept: Kept) -> None:
        """Give a state's room back."""
        if kept.room is not None:
            self._free.setdefault(len(kept.room), []).append(kept.room)

    def _room(self, size: int) -> NDArray[np.uint8]:
        if free := self._free.get(size):
            return free.pop()
        if len(self._rest) < size:
            self._rest = self._extent(max(size, min(_MOST, max(_FIRST, self.nbytes))))
        room, self._rest = self._rest[:size], self._rest[size:]
        return room

    def _extent(self, size: int) -> NDArray[np.uint8]:
        with tempfile.TemporaryFile(dir=self._folder) as file:
            # A page that the disk has no room for would end the process when it is written to.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            self.nbytes += size
            return np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
