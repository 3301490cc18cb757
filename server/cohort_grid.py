"""What a strategy sees of the clients: one round's cohort, and under privacy no more than its round is charged for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from flwr.app import Message

from ..core.errors import RunError
from ..strategies.compression import Compression, Decoding
from ..strategies.fold import Fold
from .grid import Exchange, RoundGrid, size_of


class CohortGrid(RoundGrid):
    """A view of a grid that shows one round's cohort, so that any strategy trains exactly these clients.

    It decodes what they compress. `bytes_down` and `bytes_up` count the arrays that went through it. With `private`,
    which takes the strategy's name, each of the cohort may be sent one train message, since a round is charged once,
    and nobody anything else.
    """

    def __init__(
        self,
        grid: RoundGrid,
        cohort: Sequence[int],
        *,
        compression: Compression | None = None,
        private: str | None = None,
    ) -> None:
        self._grid = grid
        self._cohort = list(cohort)
        self._compression = compression
        self._private = private
        self._to_train = set(self._cohort)
        self._exchanges: list[Exchange] = []
        self.bytes_down = 0

    @property
    def bytes_up(self) -> int:
        """The bytes of the good replies so far."""
        return sum(exchange.bytes_up for exchange in self._exchanges)

    def get_node_ids(self) -> Iterable[int]:
        """Return the cohort's node ids."""
        return list(self._cohort)

    @property
    def population(self) -> int:
        """The number of all clients, drawn or not, which some strategies divide by."""
        return len(list(self._grid.get_node_ids()))

    def exchange(self, messages: Iterable[Message], *, fold: Fold | None = None, until: int | None = None) -> Exchange:
        """Exchange over the grid behind the view; raises RunError before a message leaves that privacy forbids."""
        if self._private is not None:
            messages = list(messages)
            self._refuse_uncharged(messages, self._private)
        compression = self._compression
        if compression is not None and fold is not None:
            fold = Decoding(compression=compression, fold=fold)
        exchange = self._grid.exchange(self._counted(messages), fold=fold, until=until)
        exchange.compression = compression
        self._exchanges.append(exchange)
        return exchange

    def _counted(self, messages: Iterable[Message]) -> Iterator[Message]:
        content, size = None, 0
        for message in messages:
            # Most messages of a round share one.
            if message.content is not content:
                content = message.content
                size = size_of(content)
            self.bytes_down += size
            yield message

    def _refuse_uncharged(self, messages: Sequence[Message], strategy: str) -> None:
        left, cohort = set(self._to_train), set(self._cohort)
        for message in messages:
            kind, node = message.metadata.message_type, message.metadata.dst_node_id
            if kind.partition(".")[0] != "train":
                what = f"sends a {kind} message"
            elif node not in cohort:
                what = "sends a train message to a client that is not in the round's cohort"
            elif node not in left:
                what = "sends a client a second train message in a round"
            else:
                left.remove(node)
                continue
            raise RunError(
                "strategy-failed",
                f"strategy {strategy} {what}, which privacy does not account for; send each client that get_node_ids() "
                "shows one train message",
            )
        self._to_train = left


class SealedGrid(RoundGrid):
    """What a strategy sees of a cohort whose sum the server clips and noises: who is in it, and no way to ask them.

    Whatever came back through it would be raw, so the messages of `configure_train` are all that it may send.
    """

    def __init__(self, view: CohortGrid, strategy: str) -> None:
        self._cohort, self._population, self._strategy = list(view.get_node_ids()), view.population, strategy

    def get_node_ids(self) -> Iterable[int]:
        """Return the cohort's node ids."""
        return list(self._cohort)

    @property
    def population(self) -> int:
        """The number of all clients, drawn or not, which some strategies divide by."""
        return self._population

    def exchange(self, messages: Iterable[Message], *, fold: Fold | None = None, until: int | None = None) -> Exchange:
        """Raise RunError `strategy-failed`, before anything is sent."""
        raise RunError(
            "strategy-failed",
            f"strategy {self._strategy} sends messages of its own, whose replies would reach it before they are "
            'clipped and noised; return them from configure_train, or take privacy.unit = "record" or "none"',
        )
