"""A grid on which every message says what its run asks of its client, whatever the strategy wrote into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from ...clients.site.request import CONFIG, PREFIX, VERSION_KEY, RunRequest
from ...core.parameters import arrays_of, digest
from ...strategies.fold import Fold
from ..grid import Exchange, RoundGrid


class RequestGrid(RoundGrid):
    """Puts a client's `RunRequest` into the config of each of its messages.

    `request` is the same for a client over the whole run: its ledger holds it to that. A message that asks for metrics
    does not go to clients whose policy withholds them.
    """

    def __init__(self, grid: RoundGrid, request: Callable[[int], RunRequest]) -> None:
        self._grid, self._request = grid, request

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of the grid beneath."""
        return self._grid.get_node_ids()

    def exchange(self, messages: Iterable[Message], *, fold: Fold | None = None, until: int | None = None) -> Exchange:
        """Exchange over the grid beneath."""
        return self._grid.exchange(list(self._asking(messages)), fold=fold, until=until)

    def _asking(self, messages: Iterable[Message]) -> Iterator[Message]:
        versions: dict[int, str] = {}
        for message in messages:
            kind, request = message.metadata.message_type, self._request(message.metadata.dst_node_id)
            if kind == "evaluate" and request.metrics == "withheld":
                continue
            given = message.content.get(CONFIG)
            said = dict(given) if isinstance(given, ConfigRecord) else {}
            config = {key: value for key, value in said.items() if not key.startswith(PREFIX)}
            if VERSION_KEY not in config:
                config[VERSION_KEY] = _version(message.content, versions)
            records = dict(message.content.items()) | {CONFIG: ConfigRecord(config | request.to_config())}
            message.content = RecordDict(records)
            yield message


def _version(content: RecordDict, known: dict[int, str]) -> str:
    """Return the digest of the arrays that a message holds; of those that many share it is computed once."""
    arrays = next((record for record in content.values() if isinstance(record, ArrayRecord)), None)
    if arrays is None:
        return digest({})
    if id(arrays) not in known:
        known[id(arrays)] = digest(arrays_of(arrays))
    return known[id(arrays)]
