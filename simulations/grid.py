"""The virtual grid: every client is a call of the ClientApp in this process, made when its message is due."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from ..clients.gate import release_error
from ..core import flower
from ..server.grid import Exchange, RoundGrid
from ..strategies.fold import Fold


class VirtualGrid(RoundGrid):
    """Virtual clients by name; their state lives in their Flower contexts.

    `isolate` gives each client its own copy of a message's records, for an app that may change what it is sent.
    """

    def __init__(
        self,
        app: ClientApp,
        names: Sequence[str],
        *,
        log: Callable[[str], None],
        isolate: bool = False,
        run_config: Mapping[str, bool | int | float | str] | None = None,
    ) -> None:
        self.names = {flower.node_id(name): name for name in names}
        self._partitions = {node: index for index, node in enumerate(self.names)}
        self._contexts: dict[int, Context] = {}
        self._app = app
        self._log = log
        self._isolate = isolate
        self._run_config = dict(run_config or {})
        self._sent = 0

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of all virtual clients."""
        return list(self.names)

    def exchange(self, messages: Iterable[Message], *, fold: Fold | None = None, until: int | None = None) -> Exchange:
        """Call the app for each message, one after the other, as the replies are asked for."""
        return Exchange(self._calls(messages), fold=fold, until=until)

    def client_states(self) -> dict[str, Any]:
        """Return the contexts' states of the clients that keep any, by name."""
        return {
            self.names[node]: flower.state_to_tree(context.state)
            for node, context in self._contexts.items()
            if context.state
        }

    def load_client_states(self, states: Mapping[str, Any]) -> None:
        """Put the contexts' states back."""
        for name, tree in states.items():
            self._context(flower.node_id(name)).state = flower.tree_to_state(tree)

    def _calls(self, messages: Iterable[Message]) -> Iterator[tuple[Message, Message]]:
        for message in messages:
            node = message.metadata.dst_node_id
            # The same RecordDict may be in every message; a message of its own lets a reply refer to it.
            self._sent += 1
            flower.set_message_id(message, str(self._sent))
            if self._isolate:
                message.content = _copy(message.content)
            try:
                reply = self._app(message, self._context(node))
            except Exception as error:  # whatever a client raises is that client's failure
                self._log(f"{self.names[node]}: {''.join(traceback.format_exception(error))}")
                reply = release_error(message, error)
            yield message, reply

    def _context(self, node: int) -> Context:
        if node not in self._contexts:
            config: dict[str, bool | int | float | str] = {
                "name": self.names[node],
                "partition-id": self._partitions[node],
                "num-partitions": len(self._partitions),
            }
            self._contexts[node] = Context(
                run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config=dict(self._run_config)
            )
        return self._contexts[node]


def _copy(content: RecordDict) -> RecordDict:
    """Return records of its own over the same arrays, whose bytes nobody changes in place."""
    copies: dict[str, Any] = {name: type(record)(dict(record)) for name, record in content.items()}  # type: ignore[arg-type]
    return RecordDict(copies)
