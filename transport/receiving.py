"""Receiving a message in an asyncio loop: another thread hashes what is there while the rest still arrives."""

from __future__ import annotations

import asyncio

from flwr.app import Error, RecordDict

from .body import Incoming
from .federation_pb2 import Header
from .wire import PIECE


class Receiving:
    """An `Incoming` message; belongs to the loop in which its pieces are added."""

    def __init__(self, header: Header, *, limit: int) -> None:
        """Make room for what a header announces; RunError `message-too-large` or `frame-invalid`."""
        self.header = header
        self._incoming = Incoming(header, limit=limit)
        self._hashing: asyncio.Future[None] | None = None

    @property
    def remaining(self) -> int:
        """Bytes that are still to come."""
        return self._incoming.remaining

    def add(self, data: memoryview) -> None:
        """Take the next piece; RunError `frame-invalid` if it is not as long as it must be."""
        self._incoming.add(data)
        if self._incoming.worth_hashing and (self._hashing is None or self._hashing.done()):
            self._hashing = asyncio.get_running_loop().run_in_executor(None, self._incoming.hash_ahead)

    async def content(self) -> RecordDict | Error:
        """Return what arrived, once whole; RunError `message-damaged` or `frame-invalid`."""
        if self.header.size <= PIECE:
            return self._incoming.content()
        if self._hashing is not None:
            await self._hashing
        return await asyncio.get_running_loop().run_in_executor(None, self._incoming.content)
