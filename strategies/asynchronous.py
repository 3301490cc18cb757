"""What a strategy says that does not wait for a cohort: whom to send a model, and how many replies make a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from flwr.app import Message


@runtime_checkable
class Asynchronous(Protocol):
    """A Strategy whose clients answer in any later round; a round is then one step of the server.

    The round loop asks it for the cohort, those who are sent a message, in place of the experiment's sampler. The
    replies that `aggregate_train` gets are the first `buffer` good ones of all clients in flight, and failures.
    """

    buffer: int

    def draw(self, server_round: int, nodes: Sequence[int]) -> list[int]:
        """Return which of the clients that are there to send the newest model; changes nothing."""

    def skip_train(self, server_round: int, replies: Iterable[Message]) -> None:
        """Take note of who arrived in a round without a quorum, instead of `aggregate_train`."""
