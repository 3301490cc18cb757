"""Hashing ahead: a message is hashed while the rest of it still arrives, so that little is left at its end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

STRETCH = 4 << 20
"""Bytes that are worth a turn of another thread."""


class Ahead:
    """The SHA-256 of the segments of a buffer that fills from its start; used by one thread at a time.

    `places` says where they begin and how long they are, in order.
    """

    def __init__(self, buffer: NDArray[np.uint8], places: Sequence[tuple[int, int]]) -> None:
        self._view, self._left = buffer.data, list(places)[::-1]
        self._running: Any = hashlib.sha256()
        self._hashed = 0
        self._done: dict[tuple[int, int], bytes] = {}

    def go_on(self, filled: int) -> None:
        """Hash what has arrived, which is everything before `filled`."""
        while self._left:
            start, size = self._left[-1]
            end = min(start + size, filled)
            if end > start + self._hashed:
                self._running.update(self._view[start + self._hashed : end])
                self._hashed = end - start
            if self._hashed < size:
                return
            self._left.pop()
            self._done[start, size] = self._running.digest()
            self._running, self._hashed = hashlib.sha256(), 0

    def digest(self, start: int, size: int) -> bytes:
        """Return a segment's digest; one that was not foreseen is hashed now."""
        found = self._done.get((start, size))
        return hashlib.sha256(self._view[start : start + size]).digest() if found is None else found
