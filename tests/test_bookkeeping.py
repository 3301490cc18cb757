"""Book-keeping: the clipped sums of Opacus from one backward pass, and a fallback wherever it cannot be sure."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bract.clients.kernels import sequential
from bract.clients.local_model import LocalModel
from bract.clients.training import LocalTraining, reproducible
from bract.core.errors import InputError, RunError
from bract.core.keys import Key
from bract.privacy.dpsgd import gradients as gradients_of
from bract.privacy.dpsgd import per_example
from bract.privacy.dpsgd.bookkeeping import BookKeeping, supports
from bract.privacy.dpsgd.dpsgd import DPSGD
from bract.privacy.dpsgd.layers import make_private
from bract.privacy.mechanism import RecordLevelPlan
from bract.tasks.task import Examples

KEY = Key.from_seed(3)
PLAN = RecordLevelPlan(
    records=20, batch_size=5, epochs=2, rounds=1, clipping_norm=0.3, noise_multiplier=0.0, delta=1e-5
)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    # Two threads that wait for each other on a busy machine take a hundred times as long for these small layers.
    with torch.random.fork_rng(), reproducible():
        torch.manual_seed(7)
        yield


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def sums(
    engine: type,
    module: nn.Module,
    inputs: Tensor,
    plan: RecordLevelPlan = PLAN,
    *,
    steps: int = 1,
    targets: Tensor | None = None,
    per_example_loss: Callable[[Tensor, Tensor], Tensor] = loss,
) -> Tensor:
    """Return the noised sum of all parameters at each of so many steps of size 0.1, flat."""
    module = copy.deepcopy(module)
    trained = [p for p in module.parameters() if p.requires_grad]
    targets = torch.arange(len(inputs)) % 3 if targets is None else targets
    found: list[Tensor] = []

    def see() -> None:
        found.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]) * plan.expected_batch)

    optimizer = torch.optim.SGD(trained, lr=0.1)
    with engine(module, optimizer, plan=plan, noise=KEY.stream(), correct=see) as private:
        for _ in range(steps):
            private.step(inputs, targets.to(inputs.device), per_example_loss)
    return torch.cat(found)


class Text(nn.Module):
    """Words, positions, a sequence of linear layers and normalizations."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8, padding_idx=padding)
        self.mix = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.conv = nn.Conv1d(12, 8, 3, padding=1, groups=2)
        self.groups = nn.GroupNorm(2, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        values = self.norm(self.mix(self.words(inputs)))
        values = self.groups(torch.tanh(self.conv(values.transpose(1, 2))))
        return self.out(values.mean(2))


def cnn(**options: object) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, **options),  # type: ignore[arg-type]
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.Conv2d(8, 40, 2, stride=3),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def images(count: int = 7) -> Tensor:
    return torch.randn(count, 4, 9, 9)


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3, bias=False)), lambda: torch.randn(7, 5)),
    "convolution": (cnn, images),
    "stride": (lambda: cnn(stride=2), images),
    "padding": (lambda: cnn(padding=(2, 1)), images),
    "same": (lambda: cnn(padding="same"), images),
    "groups": (lambda: cnn(groups=2, bias=False), images),
    "depthwise": (lambda: cnn(groups=4), images),
    "dilation": (lambda: cnn(dilation=(1, 2), padding=2), images),
    "text": (Text, lambda: torch.randint(0, 11, (7, 6))),
    "short sequence": (
        lambda: sequence(nn.Linear(30, 30), nn.Tanh(), nn.LayerNorm((2, 30))), lambda: torch.randn(7, 2, 30),
    ),
    "long sequence": (lambda: sequence(nn.Linear(3, 3), nn.Tanh()), lambda: torch.randn(7, 20, 3)),
    "two dimensions": (lambda: sequence(nn.Linear(20, 30), nn.Tanh()), lambda: torch.randn(7, 2, 2, 20)),
    "small image": (
        lambda: sequence(nn.Conv2d(30, 40, 3, padding=1, groups=2), nn.Tanh()), lambda: torch.randn(7, 30, 2, 2),
    ),
}  # fmt: skip


def built(name: str) -> tuple[nn.Module, Tensor]:
    make, like = MODELS[name]
    module, inputs = make(), like()
    module(inputs)  # which gives a lazy layer its weights
    return module, inputs


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_clipped_sum_is_that_of_opacus(name: str, per_layer: bool) -> None:
    module, inputs = built(name)
    assert supports(module, inputs)
    for clipping_norm in (0.05, 1.0, 1e3):
        plan = replace(PLAN, clipping_norm=clipping_norm, per_layer=per_layer)
        ours, theirs = sums(BookKeeping, module, inputs, plan), sums(DPSGD, module, inputs, plan)
        # Relative to what the whole sum may be: its length, which clipping bounds.
        assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.norm()))


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("name", ["mlp", "convolution", "text"])
def test_with_noise_both_engines_draw_the_same(name: str, microbatch_size: int | None) -> None:
    module, inputs = built(name)
    plan = replace(PLAN, noise_multiplier=1.3, microbatch_size=microbatch_size)
    ours, theirs = sums(BookKeeping, module, inputs, plan, steps=3), sums(DPSGD, module, inputs, plan, steps=3)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    # And it is noise: an empty batch has nothing else.
    empty = sums(BookKeeping, module, inputs[:0], plan)
    assert float(empty.std()) == pytest.approx(1.3 * 0.3, rel=6 / math.sqrt(2 * len(empty)))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_other_paddings_are_those_of_autograd(mode: str) -> None:
    """Opacus takes every padding for zeros."""
    module = sequence(nn.Conv2d(2, 4, 3, padding=1, padding_mode=mode))
    module(torch.randn(2, 2, 5, 5))
    assert supports(module, torch.randn(2, 2, 5, 5))


def test_a_padding_word_has_no_gradient() -> None:
    """Opacus gives it one."""
    module, inputs = Text(padding=0), torch.randint(0, 3, (7, 6))
    assert supports(module, inputs)
    assert float(sums(BookKeeping, module, inputs)[:8].abs().max()) == 0.0


def test_channels_last_images_give_the_same_sum() -> None:
    module, inputs = built("groups")
    plain, last = (sums(BookKeeping, module, inputs.contiguous(memory_format=order)) for order in (
        torch.contiguous_format, torch.channels_last,
    ))  # fmt: skip
    torch.testing.assert_close(plain, last, atol=1e-6, rtol=1e-5)


def test_no_gradient_of_a_wide_layer_is_written_out_by_example(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    real = gradients_of._written_out

    def seen(parameter: nn.Parameter, gradients: Tensor, **options: bool) -> gradients_of.Gradients:
        shapes.append(tuple(gradients.shape))
        return real(parameter, gradients, **options)

    monkeypatch.setattr(gradients_of, "_written_out", seen)
    for name in ("mlp", "short sequence", "small image"):
        module, inputs = built(name)
        before = len(shapes)
        sums(BookKeeping, module, inputs)
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                assert layer.weight.numel() * 7 not in [math.prod(shape) for shape in shapes[before:]], name


class Cancelling(nn.Module):
    """Two positions with gradients of opposite sign."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(40, 40, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        values = self.wide(inputs)
        return (values[:, 0] - values[:, 1]).sum(dim=1, keepdim=True)


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("apart", [0.0, 1e-6, 1e-3])
def test_a_ghost_norm_that_cancels_does_not_let_a_gradient_through(size: float, apart: float) -> None:
    """In float32 the squared norm is lost beneath the squares of its terms."""
    first = size * torch.randn(1, 1, 40)
    inputs = torch.cat([first, first + apart * size * torch.randn(1, 1, 40)], dim=1)
    found = sums(BookKeeping, Cancelling(), inputs, per_example_loss=lambda outputs, _: outputs[:, 0])
    assert float(found.double().norm()) <= PLAN.clipping_norm


def test_a_large_input_beside_a_vanishing_gradient_is_clipped() -> None:
    """1e-23 squared is no float32 number, but times 1e18 it is a gradient of 1e-5."""
    plan, inputs = replace(PLAN, clipping_norm=1e-6), torch.full((1, 4), 1e18)
    module = nn.Linear(4, 3, bias=False)
    found = sums(BookKeeping, module, inputs, plan, per_example_loss=lambda outputs, _: 1e-23 * outputs.sum(dim=1))
    assert float(found.double().norm()) <= plan.clipping_norm


@pytest.mark.parametrize("name", ["convolution", "text", "short sequence", "long sequence", "small image"])
def test_a_bad_example_counts_as_zero_in_every_kind_of_layer(name: str) -> None:
    module, inputs = built(name)

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        scale = torch.ones(len(outputs))
        scale[2] = math.nan
        return loss(outputs, targets) * scale

    rest, targets = [0, 1, 3, 4, 5, 6], torch.arange(7) % 3
    expected = sums(BookKeeping, module, inputs[rest], targets=targets[rest])
    found = sums(BookKeeping, module, inputs, per_example_loss=broken)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    if inputs.is_floating_point():
        inputs[2] = math.inf
        torch.testing.assert_close(sums(BookKeeping, module, inputs), expected, atol=1e-6, rtol=1e-5)


def test_frozen_weights_of_every_kind_stay_and_the_rest_is_trained() -> None:
    for name in MODELS:
        for pattern in ("weight", "bias"):
            module, inputs = built(name)
            frozen = [p for key, p in module.named_parameters() if key.endswith(pattern)]
            for p in frozen:
                p.requires_grad_(False)
            if not any(p.requires_grad for p in module.parameters()):
                continue
            ours, theirs = sums(BookKeeping, module, inputs), sums(DPSGD, module, inputs)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(torch.tanh(self.same(self.same(inputs))))


class Beside(nn.Module):
    """Uses a layer's weight without the layer, where an input says so."""

    def __init__(self, always: bool = True) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 5), nn.Linear(5, 3)
        self.always = always

    def forward(self, inputs: Tensor) -> Tensor:
        values = self.first(inputs)
        if self.always or bool((inputs > 50).any()):
            values = values + inputs @ self.first.weight
        return self.out(values)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.second(self.first(inputs)).sigmoid_())


class Positions(nn.Module):
    """A layer whose first dimension is not the examples'."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.inner(inputs.transpose(0, 1)).mean(0))


class Own(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) ** 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(5, 5), nn.Linear(5, 5)
        self.out.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.first(inputs))


FALLBACKS = {
    "called twice": (Twice, torch.randn(2, 5)),
    "beside its layer": (Beside, torch.randn(2, 5)),
    "in place": (InPlace, torch.randn(2, 5)),
    "positions first": (Positions, torch.randn(2, 4, 5)),
    "a subclass": (lambda: nn.Sequential(Own(5, 3)), torch.randn(2, 5)),
    "tied": (Tied, torch.randn(2, 5)),
    "recurrent": (lambda: make_private(nn.Sequential(nn.LSTM(5, 3)))[0], torch.randn(2, 4, 5)),
    "bilinear": (lambda: nn.Bilinear(5, 5, 3), torch.randn(2, 5)),
    "a renormed embedding": (lambda: nn.Embedding(5, 3, max_norm=1.0), torch.zeros(2, 4, dtype=torch.int64)),
    "weight normalization": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), torch.randn(2, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "like"), FALLBACKS.values(), ids=FALLBACKS)
def test_what_it_cannot_be_sure_of_is_left_to_opacus(make: object, like: Tensor) -> None:
    module = make()  # type: ignore[operator]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert not supports(module, like)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_weight_used_beside_its_layer_in_one_batch_alone_is_never_silent() -> None:
    """No trial can see what an input triggers; the pass itself does."""
    module = Beside(always=False)
    assert supports(module, torch.randn(2, 5))
    sums(BookKeeping, module, torch.randn(7, 5))
    with pytest.raises(RunError) as caught:
        sums(BookKeeping, module, torch.full((7, 5), 51.0))
    assert caught.value.code == "model-not-private" and "outside of its layer" in caught.value.sentence


@pytest.mark.parametrize("module", [Twice(), InPlace()])
def test_a_step_refuses_what_the_trial_would(module: nn.Module) -> None:
    with pytest.raises(RunError) as caught:
        sums(BookKeeping, module, torch.randn(7, 5))
    assert caught.value.code == "model-not-private"


def test_the_trial_sees_a_wrong_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
    assert supports(module, torch.randn(2, 5))
    real = per_example.norms
    monkeypatch.setattr(per_example, "norms", lambda tensor: real(tensor) * 0.9)
    assert not supports(module, torch.randn(2, 5))


def test_the_trial_follows_neither_weights_nor_inputs_nor_dropout() -> None:
    module = nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.5), nn.Linear(9, 3))
    with torch.no_grad():
        module[0].weight.fill_(math.nan)
    module.eval()
    state = torch.get_rng_state()
    assert supports(module, torch.full((2, 5), math.nan))
    assert supports(module, torch.zeros(0, 5))
    assert torch.equal(state, torch.get_rng_state()) and not module.training


def federated(model: nn.Module, engine: str, **options: object) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    training = LocalTraining(learning_rate=0.1, dp_engine=engine, **options)  # type: ignore[arg-type]
    local = LocalModel(copy.deepcopy(model), training)
    data = Examples(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3)
    plan = replace(PLAN, noise_multiplier=0.5)
    sequential.train(local, loss, data, training, plan=plan, key=KEY)
    assert local.bookkeeping is (None if engine == "opacus" else not isinstance(model, Tied | Twice))
    return dict(local.shared_arrays())


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"l2": 0.1}, {"optimizer": "adam"}, {"frozen": ("0.*",)}])
def test_the_kernel_trains_the_same_model_with_either_engine(options: dict[str, object]) -> None:
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
    found = [federated(model, engine, **options) for engine in ("auto", "bookkeeping", "opacus")]
    for name, array in found[0].items():
        np.testing.assert_array_equal(array, found[1][name])
        np.testing.assert_allclose(array, found[2][name], atol=2e-5)
        assert not np.array_equal(array, model.get_parameter(name).detach().numpy())


def test_the_kernel_falls_back_to_opacus_and_says_so_where_book_keeping_is_asked_for() -> None:
    for name, array in federated(Twice(), "auto").items():
        assert np.isfinite(array).all(), name
    with pytest.raises(InputError) as caught:
        federated(Twice(), "bookkeeping")
    assert caught.value.code == "model-not-private"
    assert caught.value.sentence.startswith('train.dp_engine = "bookkeeping": ')


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_on_cuda_it_agrees_with_the_processor(name: str) -> None:
    module, inputs = built(name)
    with torch.backends.cudnn.flags(allow_tf32=False):
        there = sums(BookKeeping, module.cuda(), inputs.cuda())
    torch.testing.assert_close(there.cpu(), sums(BookKeeping, module.cpu(), inputs), atol=1e-4, rtol=1e-3)
