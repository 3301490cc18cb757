"""Servers behind one interface, so that one property can be asked of each: bract's mechanism, and Flower's as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from numpy.typing import NDArray

from bract.core import flower
from bract.core.errors import RunError
from bract.core.keys import Key
from bract.core.parameters import Layout, record_of
from bract.privacy.client_level import ClientLevelPlan
from bract.server.private_aggregation import PrivateAggregation
from bract.strategies.fold import WeightedSum

COUNT_KEY = "num-examples"
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one client sends: the model it got plus `arrays`, and how many records it says it has."""

    arrays: Arrays
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a server promises: a mean over `cohort` clients, noise z·C on their sum; its randomness is `secret`."""

    clipping_norm: float = 1.0
    noise_multiplier: float = 0.0
    cohort: int = 10
    adaptive: bool = False
    secret: int = 0


class Server(Protocol):
    """A run's server; `clipping_norm` is that of the next round."""

    clipping_norm: float

    def release(self, changes: Sequence[Change]) -> dict[str, NDArray[Any]]:
        """Return by how much a round of these replies moves the model that is released; the model stays as it is."""


Make = Callable[[Arrays, Terms], Server]


class BractServer:
    """The client-level mechanism of a run; a client weighs 1, or its count up to `cap`."""

    def __init__(self, model: Arrays, terms: Terms, *, cap: int | None = None) -> None:
        self.model, self.layout, self.cap, self.round = model, Layout.of(model), cap, 0
        plan = ClientLevelPlan(
            clients=10 * terms.cohort,
            cohort=terms.cohort,
            sampling="poisson",
            rounds=1000,
            clipping_norm=terms.clipping_norm,
            noise_multiplier=terms.noise_multiplier,
            delta=1e-5,
            coordinates=self.layout.size,
            adaptive_clipping=terms.adaptive,
        )
        self.aggregation = PrivateAggregation(plan, layout=self.layout, key=Key.from_seed(terms.secret))

    @property
    def clipping_norm(self) -> float:
        return self.aggregation.clipping_norm

    def release(self, changes: Sequence[Change]) -> dict[str, NDArray[Any]]:
        self.round += 1
        named = {} if self.cap is None else {"weighted_by": COUNT_KEY, "cap": self.cap}
        ring = self.aggregation.plan.ring(1.0)
        fold = self.aggregation.fold(self.model, object(), WeightedSum(layout=self.layout, ring=ring, **named))
        total = fold.start()
        for change in changes:
            try:
                fold.add(total, content_of(self.model, change))
            except RunError:
                # To the round loop this client failed, and a client that failed adds nothing.
                continue
        mean = self.layout.unflatten(self.aggregation.release(self.round, fold, total).mean())
        return moved(mean, self.model)


class FlowerServer:
    """Flower 1.41: its strategies of central DP with server-side clipping, over its FedAvg."""

    def __init__(self, model: Arrays, terms: Terms) -> None:
        flower.identify_process(1)
        self.model, self.round = model, 0
        common = {"noise_multiplier": terms.noise_multiplier, "num_sampled_clients": terms.cohort}
        self.strategy: Any
        if terms.adaptive:
            start = terms.clipping_norm
            self.strategy = DifferentialPrivacyServerSideAdaptiveClipping(
                FedAvg(), initial_clipping_norm=start, **common
            )
        else:
            self.strategy = DifferentialPrivacyServerSideFixedClipping(
                FedAvg(), clipping_norm=terms.clipping_norm, **common
            )

    @property
    def clipping_norm(self) -> float:
        return float(self.strategy.clipping_norm)

    def release(self, changes: Sequence[Change]) -> dict[str, NDArray[Any]]:
        self.round += 1
        asked = Message(RecordDict({}), 7, "train")
        flower.set_message_id(asked, "asked")
        # What `configure_train` does before the replies come.
        self.strategy.current_arrays = ArrayRecord({name: record_of(self.model)[name] for name in self.model})
        replies = [Message(content_of(self.model, change), reply_to=asked) for change in changes]
        with flower.quiet():
            arrays, _ = self.strategy.aggregate_train(self.round, replies)
        return moved({name: array.numpy() for name, array in arrays.items()}, self.model)


def content_of(model: Arrays, change: Change) -> RecordDict:
    """Return a client's reply."""
    with np.errstate(over="ignore"):
        found = {name: np.asarray(model[name] + change.arrays[name], model[name].dtype) for name in model}
    return RecordDict({"arrays": record_of(found), "metrics": MetricRecord({COUNT_KEY: change.count})})


def moved(after: Arrays, before: Arrays) -> dict[str, NDArray[Any]]:
    """Return the difference of two models in float64."""
    return {name: np.asarray(after[name], np.float64) - before[name] for name in before}


def norm(arrays: Arrays) -> float:
    """Return the Euclidean norm of all tensors together."""
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays.values()))


def zeros(**shapes: tuple[int, ...] | int) -> dict[str, NDArray[np.float32]]:
    """Return a model of zeros."""
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
