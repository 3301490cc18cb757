"""Clients of several sizes and small models, as the tests of both stacked kernels train them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bract.clients.local_model import LocalModel
from bract.clients.training import LocalTraining
from bract.privacy.mechanism import RecordLevelPlan
from bract.tasks.task import Examples

PLAN = RecordLevelPlan(
    records=30, batch_size=10, epochs=2, rounds=5, clipping_norm=0.7, noise_multiplier=1.0, delta=1e-5
)
SIZES = np.array([1, 3, 9, 10, 11, 25, 30, 0, 20])
BEGINS = np.concatenate([[0], np.cumsum(SIZES)])[:-1]
TRAINING = LocalTraining(epochs=2, batch_size=10, learning_rate=0.05)


def loss(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def records(shape=(6,), classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    count = int(SIZES.sum())
    return Examples(
        torch.randn(count, *shape, generator=generator), torch.randint(classes, (count,), generator=generator)
    )


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.features.requires_grad_(False)

    def forward(self, inputs):
        return self.head(torch.tanh(self.features(inputs)))


MODELS = {
    "logistic": (lambda: nn.Linear(6, 3), (6,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (6,)),
    "norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)), (6,)),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 3)
        ),
        (1, 8, 8),
    ),
    "frozen": (Frozen, (6,)),
}


def resident(make):
    torch.manual_seed(0)
    return LocalModel(make(), TRAINING)
