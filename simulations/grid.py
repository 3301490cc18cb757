"""The virtual grid: every client is a call of a ClientApp, made when its message is due."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Context, Message, RecordDict

from ..core import flower
from ..server.grid import Exchange, RoundGrid
from ..strategies.fold import Fold
from .executors import Call, Executor


class VirtualGrid(RoundGrid):
    """Virtual clients by name; their state lives in their Flower contexts, and an executor runs them."""

    def __init__(
        self,
        executor: Executor,
        names: Sequence[str],
        *,
        run_config: Mapping[str, bool | int | float | str] | None = None,
    ) -> None:
        self.names = {flower.node_id(name): name for name in names}
        self.executor = executor
        self._partitions = {node: index for index, node in enumerate(self.names)}
        self._contexts: dict[int, Context] = {}
        self._run_config = dict(run_config or {})
        self._sent = 0
        self._before: dict[int, RecordDict] = {}

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of all virtual clients."""
        return list(self.names)

    def exchange(self, messages: Iterable[Message], *, fold: Fold | None = None, until: int | None = None) -> Exchange:
        """Have the executor call the app for each message, as the replies are asked for."""
        # Past `until` nothing may be in the total, so there the exchange folds reply by reply.
        arrivals = self.executor.run(self._calls(messages), fold=fold if until is None else None)
        return Exchange(arrivals, fold=fold, until=until)

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

    def remember(self) -> Callable[[], None]:
        """Return what puts the clients' states back to what they are now: for a round that will be repeated."""
        before = self._before = {}

        def put_back() -> None:
            for node, state in before.items():
                self._contexts[node].state = state

        return put_back

    def _calls(self, messages: Iterable[Message]) -> Iterator[Call]:
        for message in messages:
            node = message.metadata.dst_node_id
            self._sent += 1
            flower.set_message_id(message, str(self._sent))
            context = self._context(node)
            if node not in self._before:
                self._before[node] = flower.copy_records(context.state)
            yield Call(client=self.names[node], message=message, context=context)

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
