"""Models become private, or are refused with the layer's name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bract.core.errors import InputError
from bract.privacy.dpsgd.layers import make_private


def frozen(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    return layer


class OwnBatchNorm(nn.BatchNorm1d):
    pass


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight


CONV = {
    "trained": lambda: nn.BatchNorm2d(8),
    "frozen": lambda: frozen(nn.BatchNorm2d(8)),
    "no weights": lambda: nn.BatchNorm2d(8, affine=False),
    "no statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "synchronized": lambda: nn.SyncBatchNorm(8),
    "instance statistics": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    "frozen instance statistics": lambda: frozen(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
}


@pytest.mark.parametrize("norm", CONV.values(), ids=CONV)
def test_no_layer_mixes_records_or_keeps_statistics(norm: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), norm(), nn.Flatten(), nn.Linear(8 * 36, 2))
    private, notes = make_private(model)
    assert len(notes) == 1
    assert notes[0].startswith("layer 1 (")
    assert "was replaced by" in notes[0]
    assert not list(private.named_buffers())
    private.train()
    inputs = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    together = private(inputs)
    alone = torch.cat([private(one[None]) for one in inputs])
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.std() > 0


def test_the_note_is_a_plain_sentence() -> None:
    _, notes = make_private(nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
    assert notes == ["layer 1 (BatchNorm1d) was replaced by GroupNorm"]


def test_the_given_model_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8))
    before = copy.deepcopy(model.state_dict())
    make_private(model)
    assert isinstance(model[1], nn.BatchNorm1d)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("features", [2, 8, 16, 32, 48, 100, 101])
def test_vectors_are_not_normalized_to_zero(features: int) -> None:
    private, _ = make_private(nn.Sequential(nn.Linear(3, features), nn.BatchNorm1d(features)))
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    assert private(inputs).abs().max() > 0.1


def test_weights_and_what_is_frozen_are_taken_over() -> None:
    norm = frozen(nn.BatchNorm2d(8))
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    private, _ = make_private(nn.Sequential(norm, nn.Conv2d(8, 1, 3)))
    assert torch.equal(private[0].weight, norm.weight)
    assert not private[0].weight.requires_grad


def test_subclasses_nested_shared_and_whole_models_are_found() -> None:
    shared = OwnBatchNorm(8)
    inner = nn.ModuleDict({"norm": shared, "again": shared})
    private, notes = make_private(nn.ModuleList([inner, nn.Linear(8, 8)]))
    assert [note.split(" (")[0] for note in notes] == ["layer 0.norm", "layer 0.again"]
    assert private[0]["norm"] is private[0]["again"]
    assert isinstance(make_private(nn.BatchNorm1d(8))[0], nn.GroupNorm)


@pytest.mark.parametrize("layer", [nn.LSTM(3, 4), nn.GRU(3, 4, batch_first=True), nn.MultiheadAttention(4, 2)])
def test_what_opacus_can_replace_is_replaced_aloud(layer: nn.Module) -> None:
    private, notes = make_private(nn.Sequential(layer))
    kind = type(layer).__name__
    assert notes == [f"layer 0 ({kind}) was replaced by DP{kind}"]
    assert type(private[0]) is not type(layer)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (Buffered(), "layer 1 (Buffered)"),
        (nn.BatchNorm1d(1), "layer 1 (BatchNorm1d)"),
        (nn.LazyBatchNorm1d(), "layer 1 (LazyBatchNorm1d)"),
        (nn.EmbeddingBag(3, 3), "layer 1 (EmbeddingBag)"),
    ],
)
def test_what_cannot_be_private_is_refused_by_name(layer: nn.Module, named: str) -> None:
    with pytest.raises(InputError) as caught:
        make_private(nn.Sequential(nn.Linear(3, 3), layer))
    assert caught.value.code == "model-not-private"
    assert named in caught.value.sentence


def test_spectral_norm_and_a_model_without_trained_weights_are_refused() -> None:
    with pytest.raises(InputError, match=r"train\.model"):
        make_private(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)))
    with pytest.raises(InputError, match="unfreeze"):
        make_private(frozen(nn.Linear(3, 3)))


def test_a_private_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.Flatten(), nn.Linear(4, 1))
    frozen(model[0])
    private, notes = make_private(model)
    assert notes == []
    assert list(private.state_dict()) == list(model.state_dict())
    assert not private[0].weight.requires_grad
