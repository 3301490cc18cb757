"""Personal layers: part of the model stays with each client, the rest is averaged.

- FedPer: Arivazhagan, Aggarwal, Singh & Choudhary, "Federated learning with personalization layers", 2019,
  Algorithms 1 and 2: base layers travel, the last ones are each client's own, both are trained together.
- FedRep: Collins, Hassani, Mokhtari & Shakkottai, "Exploiting shared representations for personalized federated
  learning", ICML 2021, Algorithm 1: first the head with the body fixed, then the body with the head fixed.
- FedBN: Li, Jiang, Zhang, Kamp & Dou, "FedBN: federated learning on non-IID features via local batch normalization",
  ICLR 2021, Algorithm 1: normalization layers, with their running statistics, are each client's own.

Under record-level privacy personal tensors are trained by the same DP-SGD as shared ones, so that metrics of them are
post-processing of what the plan accounts for; running statistics, which no mechanism covers, stay as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from ..core.errors import InputError
from .fedavg import FedAvg
from .local_rule import LocalRound, LocalRule, Sent
from .values import patterns, whole_number

if TYPE_CHECKING:
    from torch import nn

    from ..experiment import TrainTable

_ALL_UNITS = frozenset({"none", "record", "client"})


class FedPer(FedAvg):
    """Average all but the tensors that match `personal`; by default the last layer that has parameters."""

    allowed_units: ClassVar[frozenset[str]] = _ALL_UNITS

    def __init__(self, *, personal: Sequence[str] = (), weights: Literal["equal", "counted"] = "equal") -> None:
        super().__init__(weights=weights)
        self.local_rule = LocalRule(personal=partial(head_of, chosen=patterns("personal", personal)))


class FedRep(FedAvg):
    """As FedPer, but of each round's train.epochs the first `head_epochs` train the head, the others the body."""

    allowed_units: ClassVar[frozenset[str]] = _ALL_UNITS

    def __init__(
        self,
        *,
        personal: Sequence[str] = (),
        head_epochs: int = 1,
        weights: Literal["equal", "counted"] = "equal",
    ) -> None:
        super().__init__(weights=weights)
        self.head_epochs = whole_number("head_epochs", head_epochs, least=1)
        self.local_rule = LocalRule(
            session=partial(HeadThenBody, head_epochs=self.head_epochs),
            personal=partial(head_of, chosen=patterns("personal", personal)),
            conflict=partial(_leaves_no_epoch, head_epochs=self.head_epochs),
        )


class FedBN(FedAvg):
    """Average all but the normalization layers."""

    allowed_units: ClassVar[frozenset[str]] = _ALL_UNITS

    def __init__(self, *, weights: Literal["equal", "counted"] = "equal") -> None:
        super().__init__(weights=weights)
        self.local_rule = LocalRule(personal=normalization_of)


class HeadThenBody:
    """Take the gradient from the body while the head is trained, and the other way round.

    Under privacy the noised sum is of clipped gradients of both, as the plan has it; the half that is not trained is
    dropped.
    """

    def __init__(self, round: LocalRound, *, head_epochs: int) -> None:
        self._head, self._body = list(round.personal.values()), list(round.parameters.values())
        self._head_steps = round.steps * head_epochs // round.epochs
        self._step = 0

    def correct(self) -> None:
        """Drop the gradient of the half that is fixed: an optimizer leaves what has none."""
        for parameter in self._body if self._step < self._head_steps else self._head:
            parameter.grad = None
        self._step += 1

    def finish(self) -> Sent:
        """Send nothing beside the model."""
        return Sent()


def head_of(module: nn.Module, *, chosen: tuple[str, ...]) -> tuple[str, ...]:
    """Return the patterns chosen, or the tensors of the last layer; raises InputError if one matches nothing."""
    names = [name for name, _ in module.named_parameters()]
    for pattern in chosen:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                "experiment-value",
                f'strategy.personal = "{pattern}": matches no tensor; the model has {", ".join(names[:8])}',
            )
    if chosen:
        return chosen
    layers = [path for path, layer in module.named_modules() if any(True for _ in layer.parameters(recurse=False))]
    if len(layers) < 2:
        raise InputError(
            "experiment-conflict",
            "strategy.name: a personal layer leaves nothing to share in a model of one layer; use a deeper train.model",
        )
    return _tensors_of(module, layers[-1:])


def normalization_of(module: nn.Module) -> tuple[str, ...]:
    """Return the parameters and buffers of all normalization layers; raises InputError if there are none."""
    from torch import nn
    from torch.nn.modules.batchnorm import _NormBase

    normalizations = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    layers = [path for path, layer in module.named_modules() if isinstance(layer, normalizations)]
    if not any(any(True for _ in module.get_submodule(path).parameters()) for path in layers):
        raise InputError(
            "experiment-conflict",
            "strategy.name: FedBN keeps normalization layers local, and this model has none with weights",
        )
    return _tensors_of(module, layers)


def _tensors_of(module: nn.Module, layers: Sequence[str]) -> tuple[str, ...]:
    found: list[str] = []
    for path in layers:
        layer = module.get_submodule(path)
        found += [f"{path}.{name}" for name, _ in [*layer.named_parameters(), *layer.named_buffers()]]
    return tuple(found)


def _leaves_no_epoch(train: TrainTable, *, head_epochs: int) -> tuple[str, str] | None:
    if train.epochs <= head_epochs:
        return "epochs", f"FedRep trains the head for {head_epochs} of them, and the body for the rest; give more"
    return None
