"""The Flower contexts of virtual clients: made when one is asked for; what a client keeps lies in a slab meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from ..core import flower
from ..core.names import Nodes
from .slab import Kept, Slab

RunConfig = Mapping[str, bool | int | float | str]


class ClientContexts:
    """The contexts by node id; `names` are the clients', in order, by theirs. States lie in a slab in `folder`."""

    def __init__(
        self, names: Sequence[str], run_config: RunConfig | None = None, *, folder: Path | None = None
    ) -> None:
        self.names = Nodes(names)
        self.run_config = dict(run_config or {})
        self._slab = Slab(folder)
        self._kept: dict[int, Kept] = {}
        self._open: dict[int, Context] = {}
        self._before: dict[int, Kept | None] = {}

    def partition(self, node: int) -> int:
        """Return a client's number."""
        return self.names.place(node)

    def of(self, node: int) -> Context:
        """Return a client's context, the same until `settle`."""
        if node not in self._open:
            state = flower.tree_to_state(self.tree(node))
            self._open[node] = context_of(
                self.names[node], node, self.names.place(node), len(self.names), state, self.run_config
            )
        return self._open[node]

    def settle(self, node: int) -> None:
        """Keep the state of a context, after a call of the client, and forget the context."""
        context = self._open.pop(node, None)
        if context is not None:
            self.put(node, flower.state_to_tree(context.state))

    def tree(self, node: int) -> Mapping[str, Any]:
        """Return a client's state as `flower.state_to_tree` gives it; its arrays are valid until the next round."""
        kept = self._kept.get(node)
        return {} if kept is None else kept.tree

    def put(self, node: int, tree: Mapping[str, Any]) -> None:
        """Take a client's new state."""
        self._replace(node, self._slab.put(tree) if tree else None)

    def states(self) -> dict[str, Any]:
        """Return the states of the clients that keep any, by name; as valid as `tree`."""
        return {self.names[node]: kept.tree for node, kept in self._kept.items()}

    def load(self, states: Iterable[tuple[str, Any]]) -> None:
        """Put states back."""
        for name, tree in states:
            self.put(flower.node_id(name), tree)

    def remember(self) -> Mapping[int, Kept | None]:
        """Begin to take note anew of states that change, and return where they will be: for `restore`."""
        for node, kept in self._before.items():
            if kept is not None and kept is not self._kept.get(node):
                self._slab.free(kept)
        self._before = {}
        return self._before

    def restore(self, before: Mapping[int, Kept | None]) -> None:
        """Put the states back that `remember` returned."""
        self._open.clear()
        for node, kept in before.items():
            self._replace(node, kept)

    def _replace(self, node: int, kept: Kept | None) -> None:
        old = self._kept.pop(node, None)
        if old is None and kept is None:
            return
        self._before.setdefault(node, old)
        if kept is not None:
            self._kept[node] = kept
        # What may have to be put back keeps its room.
        if old is not None and old is not kept and old is not self._before.get(node):
            self._slab.free(old)


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
