"""FedProx: local training is held near the model that the round began with.

Li, Sahu, Zaheer, Sanjabi, Talwalkar & Smith, "Federated optimization in heterogeneous networks", MLSys 2020: each
client minimises h_k(w; w_t) = F_k(w) + mu/2 · ‖w − w_t‖² (equation 2, Algorithm 2). The norm is squared; the term's
gradient mu · (w − w_t) depends on no record, so it is added after clipping and noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from .fedavg import FedAvg
from .local_rule import LocalRound, LocalRule, Sent
from .tensors import add_to_gradient, copies
from .values import number

if TYPE_CHECKING:
    from torch import Tensor

# Flower's own FedProx sends mu under this name, so its clients understand ours.
MU_KEY = "proximal-mu"


class Proximal:
    """Add mu · (w − anchor) to each step's gradient; the anchor is the received model unless one is given."""

    def __init__(self, round: LocalRound, *, mu: float, anchor: Mapping[str, Tensor] | None = None) -> None:
        self._mu = mu
        self._parameters = round.parameters
        self._anchor = copies(round.parameters) if anchor is None else anchor

    def correct(self) -> None:
        """Pull the parameters towards the anchor."""
        for name, parameter in self._parameters.items():
            add_to_gradient(parameter, parameter.detach() - self._anchor[name], self._mu)

    def finish(self) -> Sent:
        """Send nothing beside the model."""
        return Sent()


class FedProx(FedAvg):
    """Average models that were trained with a proximal term of weight `mu`; 0 is FedAvg."""

    allowed_units: ClassVar[frozenset[str]] = frozenset({"none", "record", "client"})

    def __init__(self, *, mu: float = 0.1, weights: Literal["equal", "counted"] = "equal") -> None:
        super().__init__(weights=weights)
        self.mu = number("mu", mu, least=0)
        self.local_rule = LocalRule(session=partial(Proximal, mu=self.mu), in_messages=True)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the model and mu to every client that the grid shows."""
        config[MU_KEY] = self.mu
        return super().configure_train(server_round, arrays, config, grid)
