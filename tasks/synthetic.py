"""Synthetic classification, of any size: each record is a function of (seed, client, index) alone.

After the Synthetic(alpha, beta) data of Li et al. 2020 (FedProx, appendix C.1), with one knob h for both: client k
has inputs x = (z + h·b_k) / √(1+h²) and classes drawn from softmax(4·x·(W + h·V_k) / √((1+h²)·features)), with z,
b, W and V standard normal: at h = 0 all clients are alike, and as h grows they share less and less. Numbers come
from SplitMix64 (Steele, Lea and Flood 2014) at counters, so no record's draw moves another's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..core.errors import InputError
from ..core.keys import Key
from .classification import Classification
from .models import check_model, logistic, mlp
from .partition import client_names
from .pool import Pool, ends_of
from .task import SiteData, check_folds, is_test

BLOCK = 1 << 19  # numbers drawn at once, to bound memory
BOUND = 3.0
SHARPNESS = 4.0
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Synthetic(Classification):
    """A classifier over `clients` clients of `records` records each; inputs [n, features] in [-1, 1]."""

    models: ClassVar[tuple[str, ...]] = ("logistic", "mlp")

    def __init__(
        self,
        *,
        clients: int = 10,
        records: int = 100,
        features: int = 20,
        classes: int = 2,
        heterogeneity: float = 0.5,
        seed: int = 0,
        fold: int = 0,
        folds: int = 5,
        model: str = "logistic",
    ) -> None:
        for key, value, least in (
            ("clients", clients, 1),
            ("records", records, 1),
            ("features", features, 1),
            ("classes", classes, 2),
        ):
            if type(value) is not int or not least <= value < 2**31:
                raise InputError(
                    "experiment-value", f"task.{key} = {value!r}: must be a whole number of at least {least}"
                )
        if type(heterogeneity) not in (int, float) or not 0 <= heterogeneity < math.inf:
            raise InputError(
                "experiment-value", f"task.heterogeneity = {heterogeneity!r}: must be a number of at least 0"
            )
        check_folds(fold, folds)
        check_model(model, self.models)
        self.classes = tuple(f"class {number}" for number in range(classes))
        self._names = client_names(clients)
        self._records, self._features, self._heterogeneity = records, features, float(heterogeneity)
        self._fold, self._folds, self._model = fold, folds, model
        self._root = Key.from_seed(seed).child("synthetic")

    def model(self) -> nn.Module:
        """Return the model that `train.model` names."""
        return (logistic if self._model == "logistic" else mlp)(self._features, self.outputs)

    def partitions(self, source: Path | None) -> Mapping[str, SiteData]:
        """Return the clients "client-0001" and so on; `source` must be None, since nothing is read."""
        if source is not None:
            raise InputError(
                "experiment-value", f'task.data = "{source}": a synthetic task reads no file; drop this key'
            )
        return self._pool(range(len(self._names)))

    def site(self, path: Path) -> SiteData:
        """Return the records of the client that the last part of `path` names; no file is read."""
        if path.name not in self._names:
            raise InputError(
                "data-missing",
                f'--data = "{path}": a synthetic task reads no file; '
                f"name a client, {self._names[0]} to {self._names[-1]}",
            )
        return self._pool(range(number := self._names.index(path.name), number + 1))[path.name]

    def _pool(self, clients: range) -> Pool:
        # The number and not the name: a name's padding depends on how many clients there are.
        records = range(self._records)
        held = (
            is_test(f"{number}/{index}", fold=self._fold, folds=self._folds) for number in clients for index in records
        )
        test = np.fromiter(held, np.bool_, len(clients) * len(records)).reshape(len(clients), len(records))
        pool = Pool.room(
            self._names if len(clients) == len(self._names) else self._names[clients.start : clients.stop],
            ends_of(np.count_nonzero(~test, axis=1)),
            ends_of(np.count_nonzero(test, axis=1)),
            inputs=torch.empty(0, self._features),
            targets=torch.empty(0, dtype=torch.int64),
        )
        parts = [(pool.train, ~test, pool.train_ends), (pool.test, test, pool.test_ends)]
        each = self._records * self._features + self._features * len(self.classes)
        size = max(1, BLOCK // each)
        for start in range(0, len(clients), size):
            stop = min(start + size, len(clients))
            drawn, labels = self._draw(clients[start:stop])
            for part, mask, ends in parts:
                part.inputs.numpy()[ends[start] : ends[stop]] = drawn[mask[start:stop]]
                part.targets.numpy()[ends[start] : ends[stop]] = labels[mask[start:stop]]
        return pool

    def _draw(self, clients: range) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        numbers = np.arange(clients.start, clients.stop, dtype=np.uint64)[:, None]
        indices = np.arange(self._records, dtype=np.uint64)[None, :]
        features, classes, mix = self._features, len(self.classes), self._heterogeneity
        unit = math.sqrt(1.0 + mix * mix)  # keeps the variance of inputs and logits
        shift = _normals(self._counters("shift", numbers[:, 0]), features)
        noise = _normals(self._counters("inputs", numbers, indices), features)
        inputs = (noise + mix * shift[:, None, :]) / unit
        common = _normals(self._counters("weights", np.zeros(1, dtype=np.uint64)), features * classes)
        local = _normals(self._counters("local weights", numbers[:, 0]), features * classes)
        weights = (common + mix * local).reshape(-1, features, classes) * (SHARPNESS / (unit * math.sqrt(features)))
        logits = -np.log(-np.log(_uniforms(self._counters("class", numbers, indices), classes)))  # Gumbel noise
        # Feature by feature, not as a matrix product: BLAS rounds by the shape of the whole block.
        for feature in range(features):
            logits += inputs[:, :, feature, None] * weights[:, None, feature, :]
        scaled = (np.clip(inputs, -BOUND, BOUND) / BOUND).astype(np.float32)
        return scaled, logits.argmax(axis=-1).astype(np.int64)

    def _counters(self, purpose: str, *parts: NDArray[np.uint64]) -> NDArray[np.uint64]:
        state: NDArray[np.uint64] = np.array([self._root.child(purpose).integer()], dtype=np.uint64)
        for part in parts:
            state = _mix(state + (part + np.uint64(1)) * _GOLDEN)
        return state


def _mix(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _uniforms(counters: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    words = _mix(counters[..., None] + steps)
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _normals(counters: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Return `count` standard normals for each counter, [..., count], by Box and Muller from its own words."""
    half = (count + 1) // 2
    uniforms = _uniforms(counters, 2 * half)
    radius = np.sqrt(-2.0 * np.log(uniforms[..., :half]))
    angle = (2.0 * np.pi) * uniforms[..., half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)[..., :count]
