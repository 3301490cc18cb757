"""Models become private, or are refused with the layer's name."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bract.clients.training import LocalTraining
from bract.core.errors import InputError
from bract.core.keys import Key
from bract.privacy.dpsgd.bookkeeping import BookKeeping, supports
from bract.privacy.dpsgd.dpsgd import DPSGD
from bract.privacy.dpsgd.layers import make_private
from bract.privacy.mechanism import RecordLevelPlan


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
        (nn.Embedding(3, 3, max_norm=1.0), "layer 1 (Embedding)"),
        (frozen(nn.Embedding(3, 3, max_norm=1.0)), "layer 1 (Embedding)"),
        (nn.Embedding(3, 3, scale_grad_by_freq=True), "layer 1 (Embedding)"),
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


class Words(nn.Module):
    """A text model of the usual kind: a padding word, a recurrent layer, a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.read, self.out = (
            nn.Embedding(7, 4, padding_idx=3),
            nn.LSTM(4, 5, batch_first=True),
            nn.Linear(5, 2),
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.out(self.read(self.words(inputs))[0][:, -1])


TEXT = torch.tensor([[3, 1, 2], [0, 3, 3], [6, 6, 5], [4, 3, 4]])
PADDED = {
    **{
        f"{kind.__name__} {mode}": (partial(kind, 2, 3, 3, padding=2, padding_mode=mode), torch.ones(4, 2, *[5] * size))
        for size, kind in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d))
        for mode in ("zeros", "circular", "reflect", "replicate")
    },
    "a padding word": (lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=3), nn.Linear(4, 2)), TEXT),
    "a padding word before an LSTM": (Words, TEXT),
}


@pytest.mark.parametrize("engine", ["opacus", "bookkeeping"])
@pytest.mark.parametrize("name", PADDED)
def test_padding_gives_the_clipped_sum_of_autograd_one_record_at_a_time(name: str, engine: str) -> None:
    make, like = PADDED[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = make_private(make())[0]
        inputs = like if like.dtype == torch.int64 else torch.randn_like(like)
    parameters = list(module.parameters())
    singly = []
    for one in inputs.split(1):
        gradients = torch.autograd.grad(squares(module(one), None).sum(), parameters)
        singly.append(torch.cat([each.flatten() for each in gradients]))
    clipping_norm = float(torch.stack([each.norm() for each in singly]).median())
    whole = sum(each * min(1.0, clipping_norm / float(each.norm())) for each in singly)
    plan = RecordLevelPlan(
        records=4, batch_size=4, epochs=1, rounds=1, clipping_norm=clipping_norm, noise_multiplier=0.0, delta=0.5
    )
    before = torch.cat([each.detach().flatten() for each in parameters]).clone()
    kept = set(vars(next(module.modules())))
    if engine == "bookkeeping":
        if not supports(module, inputs):
            assert name.startswith("Conv3d") or name.endswith("LSTM"), "book-keeping knows this layer"
            return
        optimizer = LocalTraining(learning_rate=1.0, momentum=0.0).make_optimizer(module.parameters())
        private = BookKeeping(module, optimizer, plan=plan, noise=Key.from_seed(1).stream())
    else:
        private = DPSGD(module, torch.optim.SGD(parameters, lr=1.0), plan=plan, noise=Key.from_seed(1).stream())
    with private as training:
        training.step(inputs, torch.zeros(4), squares)
    moved = before - torch.cat([each.detach().flatten() for each in parameters])
    assert torch.allclose(moved * 4, whole, atol=2e-5 * float(whole.abs().max()))
    assert set(vars(next(module.modules()))) == kept


def squares(outputs: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
    return (outputs**2).flatten(1).sum(1)
