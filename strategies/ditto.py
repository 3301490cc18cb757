"""Ditto: beside the global model each client trains one of its own, held near the global one.

Li, Hu, Beirami & Smith, "Ditto: fair and robust federated learning through personalization", ICML 2021, Algorithm 1:
v_k ← v_k − η · (∇F_k(v_k) + λ · (v_k − w_t)). The global model is FedAvg's; the personal one never leaves the client,
and is the one that it evaluates.

The personal model takes as many steps again over the same records. Under record-level privacy nothing accounts for
them, and metrics of that model would be a release of them, so it is refused there: by the run at the start, and by
each client, whose `LocalRound.train` does not do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core.parameters import Arrays
from .fedavg import FedAvg
from .fedprox import Proximal
from .local_rule import LocalRound, LocalRule, Sent
from .tensors import arrays_like, copies, put, tensors_like
from .values import number

if TYPE_CHECKING:
    from torch import Tensor

    from ..experiment import TrainTable

OWN_MODEL = "own-model"


class TwoModels:
    """A client's round: plain training of the global model, then of its own near the received one."""

    def __init__(self, round: LocalRound, *, regularization: float) -> None:
        self._round = round
        self._regularization = regularization
        self._received = copies(round.shared)

    def correct(self) -> None:
        """Leave the global model's gradients as they are."""

    def finish(self) -> Sent:
        """Train v_k from where it stands, by default from the received model, and keep it; send nothing of it."""
        put(self._round.shared, self._received)
        adopt_own_model(self._round.shared, self._round.state)
        self._round.train(Proximal(self._round, mu=self._regularization, anchor=self._received))
        self._round.state[OWN_MODEL] = arrays_like(self._round.shared)
        return Sent()


class Ditto(FedAvg):
    """FedAvg, and personal models with a proximal term of weight `regularization`, the paper's lambda.

    A small weight gives nearly lone models, a large one nearly the global model.
    """

    # Noise on the clients' updates covers a whole client, whatever it keeps for itself; it does not cover a record
    # that its own model was trained on.
    allowed_units: ClassVar[frozenset[str]] = frozenset({"none", "client"})

    def __init__(self, *, regularization: float = 0.1, weights: Literal["equal", "counted"] = "equal") -> None:
        super().__init__(weights=weights)
        self.regularization = number("regularization", regularization, least=0)
        self.local_rule = LocalRule(
            session=partial(TwoModels, regularization=self.regularization),
            keeps=(OWN_MODEL,),
            adopt=adopt_own_model,
            conflict=_no_personal_layers,
        )


def adopt_own_model(tensors: Mapping[str, Tensor], state: Mapping[str, Arrays]) -> None:
    """Put the client's own model into the tensors, if it has one yet."""
    if OWN_MODEL in state:
        put(tensors, tensors_like(state[OWN_MODEL], tensors))


def _no_personal_layers(train: TrainTable) -> tuple[str, str] | None:
    if train.personal:
        return "personal", "Ditto keeps a whole model with each client; drop the key, or use fedper"
    return None
