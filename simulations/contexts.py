"""The Flower contexts of virtual clients: made when one is asked for, and kept only where a client keeps something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, RecordDict

from ..core import flower

RunConfig = Mapping[str, bool | int | float | str]


class ClientContexts:
    """The contexts by node id; `names` are the clients', in order, by theirs."""

    def __init__(self, names: Sequence[str], run_config: RunConfig | None = None) -> None:
        self.names = {flower.node_id(name): name for name in names}
        self.run_config = dict(run_config or {})
        self._partitions = {node: index for index, node in enumerate(self.names)}
        self._contexts: dict[int, Context] = {}
        self._before: dict[int, RecordDict] = {}

    def partition(self, node: int) -> int:
        """Return a client's number."""
        return self._partitions[node]

    def of(self, node: int) -> Context:
        """Return a client's context, the same until `settle`."""
        if node not in self._contexts:
            self._contexts[node] = context_of(
                self.names[node], node, self._partitions[node], len(self.names), RecordDict(), self.run_config
            )
        return self._contexts[node]

    def tree(self, node: int) -> dict[str, Any]:
        """Return a client's state as `flower.state_to_tree` gives it, without making a context."""
        context = self._contexts.get(node)
        return {} if context is None else flower.state_to_tree(context.state)

    def put(self, node: int, tree: Mapping[str, Any]) -> None:
        """Take a client's new state."""
        if tree or node in self._contexts:
            self.of(node).state = flower.tree_to_state(tree)

    def begin(self, node: int) -> None:
        """Take note of a client's state before a call of it, for `restore`."""
        if node not in self._before:
            context = self._contexts.get(node)
            self._before[node] = RecordDict() if context is None else flower.copy_records(context.state)

    def settle(self, node: int) -> None:
        """Forget a context that holds nothing, after a call of the client."""
        if node in self._contexts and not self._contexts[node].state:
            del self._contexts[node]

    def states(self) -> dict[str, Any]:
        """Return the states of the clients that keep any, by name."""
        return {
            self.names[node]: flower.state_to_tree(context.state)
            for node, context in self._contexts.items()
            if context.state
        }

    def load(self, states: Iterable[tuple[str, Any]]) -> None:
        """Put states back."""
        for name, tree in states:
            self.put(flower.node_id(name), tree)

    def remember(self) -> dict[int, RecordDict]:
        """Begin to take note of states anew, and return where they will be: for `restore`."""
        self._before = {}
        return self._before

    def restore(self, before: Mapping[int, RecordDict]) -> None:
        """Put the states back that `remember` returned."""
        for node, state in before.items():
            if state or node in self._contexts:
                self.of(node).state = state


def context_of(
    name: str, node: int, partition: int, partitions: int, state: RecordDict, run_config: RunConfig
) -> Context:
    """Return a client's context, as Flower's own simulation would make it, and with its name."""
    return Context(
        run_id=1,
        node_id=node,
        node_config={"name": name, "partition-id": partition, "num-partitions": partitions},
        state=state,
        run_config=dict(run_config),
    )
