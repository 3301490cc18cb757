"""privacy/dpsgd/independence.py: a model that mixes the records of a batch is refused before it trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bract.core.errors import InputError
from bract.privacy.dpsgd.independence import refuse_mixing


class Centred(nn.Module):
    """Mixes records by plain arithmetic, which no table of layers knows."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(6, 2), how

    def forward(self, x):
        return self.linear(self.how(x))


@pytest.mark.parametrize(
    "how",
    [
        lambda x: x - x.mean(0),
        lambda x: x / x.norm(),
        lambda x: x.cumsum(0).flip(0),
        lambda x: torch.softmax(x @ x.T, 1) @ x,
    ],
    ids=["mean", "norm", "cumsum", "attention over the batch"],
)
def test_mixing_is_refused(how):
    with pytest.raises(InputError) as caught:
        refuse_mixing(Centred(how), torch.zeros(1, 6))
    assert caught.value.code == "model-not-private"


@pytest.mark.parametrize(
    ("module", "like"),
    [
        (
            nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 1)),
            torch.zeros(1, 6),
        ),
        (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 36, 3)),
            torch.zeros(9, 1, 8, 8),
        ),
        (nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2)), torch.zeros(1, 3, dtype=torch.int64)),
    ],
    ids=["dropout", "convolution", "tokens"],
)
def test_models_that_keep_records_apart_pass_and_stay_as_they_were(module, like):
    module.eval()
    before = torch.random.get_rng_state()
    refuse_mixing(module, like)
    assert not module.training
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batch_normalization_would_be_found_too():
    with pytest.raises(InputError):
        refuse_mixing(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 1)), torch.zeros(1, 6))
