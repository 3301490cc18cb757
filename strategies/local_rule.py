"""LocalRule: the client half of a strategy. It knows torch tensors and arrays by name, and no messages.

A kernel opens one `LocalSession` for each client and round, lets it correct every step's gradient, and asks it at the
end what the reply holds beside the model. Under record-level privacy the gradient that a session corrects is already
clipped and noised. What it sends must then be a function of that gradient, of what was received and of what it kept
of earlier rounds: post-processing. `LocalRound.loss` and `LocalRound.train`, which touch records, refuse there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..core.parameters import Arrays, Layout

if TYPE_CHECKING:
    # Only a client needs torch: a server reads the declarations alone.
    from torch import Tensor, nn

    from ..experiment import TrainTable

# What a reply and a client's state hold for bract itself.
_TAKEN = ("arrays", "compressed", "config", "error-memory", "folded", "metrics", "num-examples", "personal")
# Running statistics of normalization layers travel and are averaged, but no gradient moves them.
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a reply holds beside the model: arrays of trained tensors by record name, and numbers."""

    arrays: Mapping[str, Arrays] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)


class LocalSession(Protocol):
    """One client's round under a rule."""

    def correct(self) -> None:
        """Change the gradients in place: at each step after clipping and noise, before the optimizer takes them."""

    def finish(self) -> Sent:
        """Return what goes beside the model: once, after the last step, when the model's reply is already copied."""


@dataclass(frozen=True, kw_only=True)
class LocalRound:
    """What a session works on: the model as received, in live tensors by name.

    `shared` is all that travels, `parameters` what of it is trained, `personal` what is trained and stays. `received`
    and `state` hold arrays by record name: what came beside the model, and what this client keeps between rounds (a
    session puts new ones there). `steps` is the public number of local steps that are planned. `loss()` is the mean
    over the client's records at the present tensors, and `train(session)` another pass over them.
    """

    shared: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    personal: Mapping[str, Tensor]
    received: Mapping[str, Arrays]
    state: dict[str, Arrays]
    steps: int
    epochs: int
    learning_rate: float
    momentum: float
    loss: Callable[[], float]
    train: Callable[[LocalSession], None]


class Untouched:
    """The session that corrects and sends nothing: plain local training."""

    def __init__(self, round: LocalRound) -> None:
        pass

    def correct(self) -> None:
        """Leave the gradients as they are."""

    def finish(self) -> Sent:
        """Send nothing beside the model."""
        return Sent()


def _none_personal(module: nn.Module) -> tuple[str, ...]:
    return ()


def _keep_received(tensors: Mapping[str, Tensor], state: Mapping[str, Arrays]) -> None:
    pass


def _no_conflict(train: TrainTable) -> tuple[str, str] | None:
    return None


@dataclass(frozen=True, kw_only=True)
class LocalRule:
    """A strategy's client half: its sessions, and what they receive, keep and send, which the gate holds them to.

    `sends`, `receives` and `keeps` name records of arrays laid out like the model, `reports` names numbers. `personal`
    returns patterns of the module's tensors that stay with the client. `adopt` puts what a client kept into the shared
    tensors before it evaluates. `conflict` returns a key of [train] that does not go with the rule, and why.
    `in_messages` says that the strategy's messages tell any Flower client all of it. Picklable.
    """

    session: Callable[[LocalRound], LocalSession] = Untouched
    sends: tuple[str, ...] = ()
    receives: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    reports: tuple[str, ...] = ()
    personal: Callable[[nn.Module], tuple[str, ...]] = _none_personal
    adopt: Callable[[Mapping[str, Tensor], Mapping[str, Arrays]], None] = _keep_received
    conflict: Callable[[TrainTable], tuple[str, str] | None] = _no_conflict
    in_messages: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether a client trains as without any rule: it corrects, keeps and sends nothing."""
        named = self.sends or self.receives or self.keeps or self.reports
        return self.session is Untouched and self.adopt is _keep_received and not named

    def __post_init__(self) -> None:
        for name in (*self.sends, *self.receives, *self.keeps, *self.reports):
            if name in _TAKEN:
                raise ValueError(f"a local rule must not name a record {name!r}, which is bract's own")


PLAIN = LocalRule(in_messages=True)


def needs_sgd(train: TrainTable) -> tuple[str, str] | None:
    """Return the conflict of a rule that takes the model's change for a sum of gradients."""
    if train.optimizer != "sgd":
        return "optimizer", 'the strategy takes the change of a model for a sum of gradients; use "sgd"'
    return None


def needs_plain_sgd(train: TrainTable) -> tuple[str, str] | None:
    """Return the conflict of a rule that takes the model's change for an unweighted sum of gradients."""
    if train.momentum:
        return "momentum", "the strategy takes the change of a model for a plain sum of gradients; use 0"
    return needs_sgd(train)


def statistics_of(layout: Layout) -> NDArray[np.bool_]:
    """Return which values of the flat vector are running statistics: averaged, never extrapolated or corrected."""
    flags = [name.rpartition(".")[2] in _STATISTICS for name in layout.names]
    return np.repeat(np.array(flags, dtype=bool), layout.sizes)


def population_of(grid: Any, drawn: Sized) -> int:
    """Return the number of all clients, drawn or not; a grid that shows no cohort shows them all."""
    return int(getattr(grid, "population", None) or len(drawn))
