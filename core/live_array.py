"""A Flower Array that holds its numpy array, and its bytes only once somebody asks for them.

Between processes of one machine nothing needs Flower's bytes: making and reading them for every client took longer
than a small model's training.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray


class LiveArray(Array):
    """Flower's Array over a numpy array that nobody writes to any more; `live` is a read-only view of it."""

    # Flower writes the class's name into what it sends, and knows only its own.
    __qualname__ = "Array"
    live: NDArray[np.generic]

    def __init__(self, array: NDArray[np.generic]) -> None:
        # Flower's own constructor would serialise here.
        live = array.view()
        live.flags.writeable = False
        self.__dict__.update(live=live, dtype=_name(array.dtype), shape=tuple(array.shape), stype="numpy.ndarray")

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in numpy's file format: what Flower sends."""
        if "_bytes" not in self.__dict__:
            buffer = io.BytesIO()
            np.save(buffer, self.live, allow_pickle=False)
            self.__dict__["_bytes"] = buffer.getvalue()
        found: bytes = self.__dict__["_bytes"]
        return found

    def numpy(self) -> NDArray[Any]:
        """Return a copy that is the caller's own, as Flower's does."""
        return np.array(self.live)

    def __reduce__(self) -> tuple[Callable[[NDArray[np.generic]], LiveArray], tuple[NDArray[np.generic]]]:
        return live_array, (self.live,)


@cache
def _name(dtype: np.dtype[np.generic]) -> str:
    """Return a type's name, which numpy puts together in Python each time."""
    return str(dtype)


def live_array(array: NDArray[np.generic]) -> LiveArray:
    """Return the LiveArray of a numpy array: by this name a pickle finds it."""
    return LiveArray(array)
