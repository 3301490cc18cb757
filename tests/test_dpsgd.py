"""DP-SGD by either engine: sensitivity, sampling, noise, and what a step does with the worst of batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from bract.core.errors import RunError
from bract.core.keys import Key
from bract.privacy.dpsgd.bookkeeping import BookKeeping, unknown_layer
from bract.privacy.dpsgd.dpsgd import DPSGD
from bract.privacy.dpsgd.layers import make_private
from bract.privacy.dpsgd.passes import poisson_batches
from bract.privacy.dpsgd.stream_optimizer import StreamOptimizer
from bract.privacy.mechanism import RecordLevelPlan

KEY = Key.from_seed(11)
PLAN = RecordLevelPlan(
    records=20, batch_size=5, epochs=1, rounds=3, clipping_norm=0.5, noise_multiplier=0.0, delta=1e-5
)
Engine: Any = DPSGD
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True, params=[DPSGD, BookKeeping])
def _engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Engine", request.param)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        yield


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def one_step(
    module: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    plan: RecordLevelPlan = PLAN,
    *,
    key: Key = KEY,
    steps: int = 1,
    per_example: object = loss,
    **how: Any,
) -> list[Tensor]:
    """Return what a step subtracts from each parameter times the denominator: the noised clipped sum."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    with Engine(module, optimizer, plan=plan, noise=key.child("noise").stream(), **how) as private:
        for _ in range(steps):
            private.step(inputs, targets, per_example)  # type: ignore[arg-type]
    return [(old - new.detach()) * plan.expected_batch for old, new in zip(before, parameters, strict=True)]


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def microbatches(module: nn.Module, inputs: Tensor, targets: Tensor, clipping_norm: float) -> list[Tensor]:
    """Return the sum of clipped gradients, one example at a time: knows nothing of Opacus."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for one, target in zip(inputs, targets, strict=True):
        gradients = list(torch.autograd.grad(loss(module(one[None]), target[None]).sum(), parameters))
        factor = min(1.0, clipping_norm / norm(gradients))
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += factor * gradient
    return total


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def data(count: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 4), torch.randint(0, 3, (count,))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(3, 4)
        self.out = nn.Linear(4, 3, bias=False)
        self.out.weight = self.words.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.words(inputs).mean(1))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))
        self.out = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.scale * inputs)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(4, 5, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.cells(inputs)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.block(inputs).mean(1))


MODELS = {
    "mlp": (mlp, lambda: torch.randn(7, 4)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)),
        lambda: torch.randn(7, 1, 6, 6),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 3)),
        lambda: torch.randint(0, 9, (7, 5)),
    ),
    "tied weights": (Tied, lambda: torch.randint(0, 3, (7, 5))),
    "own parameter": (Scaled, lambda: torch.randn(7, 4)),
    "recurrent": (Recurrent, lambda: torch.randn(7, 5, 4)),
    "attention": (Attention, lambda: torch.randn(7, 5, 4)),
}


@pytest.mark.parametrize(("make", "inputs"), MODELS.values(), ids=MODELS)
def test_the_clipped_sum_is_that_of_microbatches_of_one(make: object, inputs: object) -> None:
    module, _ = make_private(make())  # type: ignore[operator]
    examples, targets = inputs(), torch.randint(0, 3, (7,))  # type: ignore[operator]
    if Engine is BookKeeping and unknown_layer(module):
        with pytest.raises(RunError, match="book"):
            one_step(module, examples, targets)
        return
    for clipping_norm in (0.05, 0.8, 100.0):
        plan = replace(PLAN, clipping_norm=clipping_norm)
        expected = microbatches(module, examples, targets, clipping_norm)
        for ours, theirs in zip(one_step(module, examples, targets, plan), expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=2e-5)


def test_channels_last_images_give_the_gradients_of_any_other_order() -> None:
    """Opacus unfolds such an input as if it were in torch's own order."""
    module, (inputs, targets) = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3)),
        (
            torch.randn(7, 3, 6, 6),
            torch.arange(7) % 3,
        ),
    )
    expected = microbatches(module, inputs, targets, PLAN.clipping_norm)
    found = one_step(module, inputs.to(memory_format=torch.channels_last), targets)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_without_noise_it_agrees_with_opacus_own_optimizer() -> None:
    module, (inputs, targets) = mlp(), data()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    ours = one_step(module, inputs, targets)
    module.load_state_dict(state)
    wrapped = GradSampleModule(module, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=PLAN.clipping_norm,
        expected_batch_size=PLAN.expected_batch,
    )
    loss(wrapped(inputs), targets).sum().backward()
    optimizer.step()
    for mine, old, new in zip(ours, state.values(), module.parameters(), strict=True):
        assert torch.allclose(mine, (old - new) * PLAN.expected_batch, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4, 1e18])
@pytest.mark.parametrize("clipping_norm", [0.1, 1.0])
def test_one_record_moves_the_sum_by_at_most_the_clipping_norm(size: float, clipping_norm: float, device: str) -> None:
    module, (inputs, targets) = mlp().to(device).double(), data(64)
    inputs, targets = inputs.to(device).double(), targets.to(device)
    outlier = torch.cat([inputs, size * torch.randn(1, 4, device=device, dtype=torch.float64)])
    plan = replace(PLAN, clipping_norm=clipping_norm)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    without = one_step(module, inputs, targets, plan)
    module.load_state_dict(state)
    with_it = one_step(module, outlier, torch.cat([targets, targets[:1]]), plan)
    moved = norm([a - b for a, b in zip(with_it, without, strict=True)])
    # The sums themselves are float32: 64 clipped gradients, rounded.
    assert moved <= clipping_norm * (1 + 1e-5)
    assert moved > 0
    if size >= 1e4:
        alone = one_step(module, outlier[-1:], targets[:1], plan)
        assert norm(alone) <= clipping_norm


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
def test_a_bad_example_counts_as_zero_alone(value: float) -> None:
    module, (inputs, targets) = mlp(), data()
    module[1] = nn.Identity()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    bad = inputs.clone()
    bad[3] = value
    got = one_step(module, bad, targets)
    module.load_state_dict(state)
    rest = [0, 1, 2, 4, 5, 6]
    expected = one_step(module, inputs[rest], targets[rest])
    assert all(torch.isfinite(tensor).all() for tensor in got)
    moved = norm([a - b for a, b in zip(got, expected, strict=True)])
    assert moved <= PLAN.clipping_norm if value == 1e38 else moved < 1e-6


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_microbatches_change_the_memory_and_nothing_else(size: int, per_layer: bool) -> None:
    module, (inputs, targets) = mlp(), data()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    noisy = replace(PLAN, noise_multiplier=1.0, per_layer=per_layer)
    whole = one_step(module, inputs, targets, noisy)
    module.load_state_dict(state)
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    pieces = one_step(module, inputs, targets, replace(noisy, microbatch_size=size))
    assert sum(seen) == 7 and max(seen) <= size
    for one, other in zip(whole, pieces, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_per_layer_clipping_clips_every_layer_and_bounds_the_whole() -> None:
    module, (inputs, targets) = mlp(), data()
    plan = replace(PLAN, per_layer=True, clipping_norm=0.05)
    first, second = one_step(module, inputs[:1], targets[:1], plan), 0.05 / math.sqrt(2)
    for layer in (first[:2], first[2:]):
        assert norm(layer) == pytest.approx(second, rel=1e-3)
    assert norm(first) <= 0.05 * (1 + 1e-5)
    wide = replace(PLAN, per_layer=True, clipping_norm=1e3)
    expected = microbatches(module, inputs, targets, 1e3)
    for one, other in zip(one_step(module, inputs, targets, wide), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


class Branches(nn.Module):
    """Each layer sees two of the four columns."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.left(inputs[:, :2]) + self.right(inputs[:, 2:])


def test_an_example_that_is_bad_in_one_layer_counts_as_zero_in_all() -> None:
    """Else its sound layers would be more than a record without contribution."""
    module, (inputs, targets) = Branches(), data()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    bad = inputs.clone()
    bad[3, :2] = 3e38
    plan = replace(PLAN, per_layer=True)
    wrong = targets.clone()
    # The loss of any class but the likeliest has a gradient, whose norm overflows in the left layer alone.
    wrong[3] = (module(bad)[3].argmax() + 1) % 3
    got = one_step(module, bad, wrong, plan)
    module.load_state_dict(state)
    rest = [0, 1, 2, 4, 5, 6]
    for one, other in zip(got, one_step(module, inputs[rest], targets[rest], plan), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_loss_that_is_not_a_number_counts_as_zero_alone() -> None:
    module, (inputs, targets) = mlp(), data()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def broken(outputs: Tensor, wanted: Tensor) -> Tensor:
        scale = torch.ones(len(outputs))
        scale[2] = math.nan
        return loss(outputs, wanted) * scale

    got = one_step(module, inputs, targets, per_example=broken)
    module.load_state_dict(state)
    rest = [0, 1, 3, 4, 5, 6]
    for a, b in zip(got, one_step(module, inputs[rest], targets[rest]), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("raises_in", ["model", "loss", "backward"])
@pytest.mark.parametrize("size", [None, 3])
def test_an_example_on_which_the_code_raises_counts_as_zero_alone(raises_in: str, size: int | None) -> None:
    module, (inputs, targets) = mlp(), data()
    inputs[[2, 5], 0] = 70.0
    told: list[Exception] = []

    def watch(where: str, values: Tensor) -> None:
        if where == raises_in and len(values) and bool((values[:, 0] == 70.0).any()):
            raise IndexError("70 is out of range")

    def broken(outputs: Tensor, wanted: Tensor) -> Tensor:
        # A batch is known by its targets: those of the two examples are nowhere else.
        if raises_in == "loss" and bool((wanted == 3).any()):
            raise IndexError("3 is no class")
        return loss(outputs, wanted.clamp(max=2))

    class Watching(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, values: Tensor, first: Tensor) -> Tensor:
            context.save_for_backward(first)
            return values.clone()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
            watch("backward", context.saved_tensors[0])
            return gradient, None

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, values: Tensor) -> Tensor:
            watch("model", values)
            return Watching.apply(self.inner(values), values)  # type: ignore[no-untyped-call, no-any-return]

    targets[[2, 5]] = 3
    plan = replace(PLAN, microbatch_size=size)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    looking = Looking()
    with pytest.raises(IndexError):
        one_step(looking, inputs, targets, plan, per_example=broken)
    module.load_state_dict(state)
    got = one_step(looking, inputs, targets, plan, per_example=broken, hide=told.append)
    assert [type(each) for each in told] == [IndexError] * 2
    module.load_state_dict(state)
    rest = [0, 1, 3, 4, 6]
    for one, other in zip(got, one_step(module, inputs[rest], targets[rest], plan), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_an_empty_batch_is_noise_alone() -> None:
    plan = replace(PLAN, noise_multiplier=2.0)
    module, (inputs, targets) = mlp(), data()
    quiet = one_step(module, inputs[:0], targets[:0])
    assert norm(quiet) == 0
    noise = torch.cat([t.flatten() for t in one_step(module, inputs[:0], targets[:0], plan)]).double()
    drawn = torch.from_numpy(KEY.child("noise").stream().single_normals(len(noise))).double() * plan.noise_deviation
    assert torch.allclose(noise, drawn, atol=1e-5)


def test_an_unused_parameter_gets_noise_and_no_error() -> None:
    module = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(2, 2)})
    module.forward = lambda inputs: module["used"](inputs)  # type: ignore[method-assign]
    inputs, targets = data()
    changes = one_step(module, inputs, targets, replace(PLAN, noise_multiplier=1.0))
    assert all(norm([change]) > 0 for change in changes)


def test_the_denominator_is_the_expected_batch_whatever_was_drawn() -> None:
    module, (inputs, targets) = mlp(), data(1)
    plan = replace(PLAN, clipping_norm=1e-3, records=400)
    for copies in (1, 3, 8):
        change = one_step(module, inputs.repeat(copies, 1), targets.repeat(copies), plan)
        assert norm(change) == pytest.approx(copies * 1e-3, rel=1e-2)


def test_l2_and_momentum_act_after_clipping_and_noise() -> None:
    plan = replace(PLAN, noise_multiplier=1.0)
    module = nn.Linear(4, 3)
    with torch.no_grad():
        module.weight.fill_(50.0)  # its L2 term is far longer than the clipping norm
        module.bias.zero_()
    inputs, targets = data()
    weight = module.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.2)
    with Engine(module, optimizer, plan=plan, noise=KEY.stream()) as private:
        private.step(inputs[:0], targets[:0], loss)
        first = torch.from_numpy(KEY.stream().single_normals(15)[:12]).float().view(3, 4)
        gradient = first * plan.noise_deviation / plan.expected_batch + 0.2 * weight
        assert torch.allclose(module.weight, weight - 0.1 * gradient, atol=1e-5)
        private.step(inputs[:0], targets[:0], loss)
    buffer = optimizer.state[module.weight]["momentum_buffer"]
    second = Key.from_seed(11).stream()
    second.single_normals(15)
    noise = torch.from_numpy(second.single_normals(15)[:12]).float().view(3, 4)
    now = weight - 0.1 * gradient
    expected = 0.9 * gradient + noise * plan.noise_deviation / plan.expected_batch + 0.2 * now
    assert torch.allclose(buffer, expected, atol=1e-4)


def noise_of(key: Key, *, steps: int, plan: RecordLevelPlan = PLAN, size: int = 400) -> list[Tensor]:
    """Return what each step adds to a model of two equal layers, in units of the deviation: [2, size] each."""
    plan = replace(plan, noise_multiplier=1.7)
    layers = nn.ModuleList([nn.Linear(size, 1, bias=False), nn.Linear(size, 1, bias=False)])
    optimizer = torch.optim.SGD(layers.parameters(), lr=1.0)
    drawn = []
    with Engine(layers, optimizer, plan=plan, noise=key.stream()) as private:
        for _ in range(steps):
            before = [p.detach().double().clone() for p in layers.parameters()]
            private.step(torch.zeros(0, size), torch.zeros(0), loss)
            after = [p.detach().double() for p in layers.parameters()]
            drawn.append(torch.cat([a - b for a, b in zip(before, after, strict=True)]))
    return [each * plan.expected_batch / plan.noise_deviation for each in drawn]


def test_the_noise_is_gaussian_with_the_planned_deviation() -> None:
    sample = torch.cat(noise_of(KEY, steps=50)).flatten().numpy()
    count = len(sample)
    assert abs(sample.mean()) < 4 / math.sqrt(count)
    assert abs(sample.std() - 1) < 4 / math.sqrt(2 * count)
    assert stats.kstest(sample, "norm").pvalue > 1e-3


def test_the_noise_is_independent_over_steps_parameters_rounds_and_clients() -> None:
    first = noise_of(KEY.child("round", 1, "Cleveland"), steps=3)
    others = [
        *first[1:],
        first[0].flip(0),  # the other parameter of the same step
        noise_of(KEY.child("round", 2, "Cleveland"), steps=1)[0],
        noise_of(KEY.child("round", 1, "Hungary"), steps=1)[0],
        noise_of(Key.from_seed(12).child("round", 1, "Cleveland"), steps=1)[0],
    ]
    for other in others:
        correlation = np.corrcoef(first[0].flatten().numpy(), other.flatten().numpy())[0, 1]
        assert abs(correlation) < 4.5 / math.sqrt(800)


def test_the_noise_is_keyed_and_never_torchs_own() -> None:
    torch.manual_seed(3)
    one = noise_of(KEY, steps=2)
    torch.manual_seed(4)
    same = noise_of(KEY, steps=2)
    torch.manual_seed(3)
    other = noise_of(Key.from_seed(12), steps=2)
    for a, b, c in zip(one, same, other, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
        assert not torch.allclose(a, c, atol=0.1)
    state = torch.get_rng_state()
    inputs, targets = torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)
    module = nn.Linear(4, 3)
    state = torch.get_rng_state()
    one_step(module, inputs, targets, replace(PLAN, noise_multiplier=1.0))
    assert torch.equal(state, torch.get_rng_state())


def test_every_record_is_drawn_with_the_rate_independently() -> None:
    plan = replace(PLAN, records=30, batch_size=9, epochs=1500)
    batches = list(poisson_batches(plan, KEY.child("batches").stream()))
    assert len(batches) == plan.steps_per_round == 6000
    drawn = np.zeros((len(batches), plan.records), dtype=bool)
    for row, batch in zip(drawn, batches, strict=True):
        assert batch.dtype == torch.int64
        row[batch.numpy()] = True
        assert row.sum() == len(batch)  # no record twice
    q, count = plan.sampling_rate, len(batches)
    deviation = math.sqrt(q * (1 - q) / count)
    assert np.abs(drawn.mean(axis=0) - q).max() < 4.5 * deviation
    together = np.corrcoef(drawn.T) - np.eye(plan.records)
    assert np.abs(together).max() < 5 / math.sqrt(count)
    after_itself = np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]
    assert abs(after_itself) < 4.5 / math.sqrt(count)
    sizes = drawn.sum(axis=1)
    assert sizes.var() == pytest.approx(plan.records * q * (1 - q), rel=0.1)  # a fixed-size batch has none


def test_batches_follow_the_key_and_may_be_empty_or_whole() -> None:
    def drawn(plan: RecordLevelPlan, key: Key) -> list[list[int]]:
        return [batch.tolist() for batch in poisson_batches(plan, key.stream())]

    assert drawn(PLAN, KEY) == drawn(PLAN, KEY) != drawn(PLAN, Key.from_seed(12))
    assert [] in drawn(replace(PLAN, records=20, batch_size=1), KEY)
    assert drawn(replace(PLAN, batch_size=20), KEY) == [list(range(20))]


def test_the_module_is_as_before_when_the_round_is_over() -> None:
    module, (inputs, targets) = mlp(), data()
    names = list(module.state_dict())
    module.eval()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):  # a second round on the same module
        with Engine(module, optimizer, plan=PLAN, noise=KEY.stream()) as private:
            private.step(inputs, targets, loss)
            assert list(module.state_dict()) == names
    assert not module.training
    for p in module.parameters():
        assert p.grad is None
        assert not p.__dict__
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in module.modules())
    loss(module(inputs), targets).mean().backward()
    assert not any(hasattr(p, "grad_sample") for p in module.parameters())
    assert not any("forward" in layer.__dict__ for layer in module.modules())


def test_an_error_in_a_step_leaves_nothing_behind() -> None:
    module, (inputs, targets) = mlp(), data()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(IndexError), Engine(module, optimizer, plan=PLAN, noise=KEY.stream()) as private:
        private.step(inputs, targets + 5, loss)
    one_step(module, inputs, targets)
    assert not any(p.__dict__ for p in module.parameters())
    assert not any(layer.__dict__.keys() & {"activations", "forward"} for layer in module.modules())


def test_a_layer_that_sees_rows_instead_of_examples_is_refused() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(2, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.out(inputs.reshape(-1, 2)).reshape(len(inputs), -1, 3).mean(1)

    inputs, targets = data()
    with pytest.raises(RunError) as caught:
        one_step(Rows(), inputs, targets)
    assert caught.value.code == "model-not-private"


def test_a_loss_that_is_not_per_example_is_refused() -> None:
    inputs, targets = data()
    with pytest.raises(RunError) as caught:
        one_step(mlp(), inputs, targets, per_example=lambda outputs, wanted: functional.cross_entropy(outputs, wanted))
    assert caught.value.code == "plugin-invalid"


def test_frozen_parameters_get_neither_gradient_nor_noise() -> None:
    module, (inputs, targets) = mlp(), data()
    module[0].requires_grad_(False)
    frozen = module[0].weight.clone()
    one_step(module, inputs, targets, replace(PLAN, noise_multiplier=1.0))
    assert torch.equal(module[0].weight, frozen)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.Adagrad])
def test_other_optimizers_read_the_noised_gradient(optimizer: type[torch.optim.Optimizer]) -> None:
    plan = replace(PLAN, noise_multiplier=1.0)
    module, (inputs, targets) = nn.Linear(4, 3), data()
    twin = nn.Linear(4, 3)
    twin.load_state_dict(module.state_dict())
    plain = optimizer(twin.parameters(), lr=0.1)  # type: ignore[call-arg]
    with Engine(module, optimizer(module.parameters(), lr=0.1), plan=plan, noise=KEY.stream()) as private:  # type: ignore[call-arg]
        private.step(inputs[:0], targets[:0], loss)
    noise = torch.from_numpy(KEY.stream().single_normals(15)).float() * plan.noise_deviation / plan.expected_batch
    twin.weight.grad, twin.bias.grad = noise[:12].view(3, 4), noise[12:]
    plain.step()
    assert torch.allclose(module.weight, twin.weight, atol=1e-6)
    assert torch.allclose(module.bias, twin.bias, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parameters_of_other_types_get_noise_of_their_own(dtype: torch.dtype) -> None:
    """Float64 is drawn in float64; narrower types are summed in float32, and rounded once at the end."""
    plan = replace(PLAN, noise_multiplier=1.0)
    module = nn.Linear(4, 3).to(dtype)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    seen: list[Tensor] = []
    see = lambda: seen.extend(p.grad.clone() for p in module.parameters() if p.grad is not None)  # noqa: E731
    with Engine(module, optimizer, plan=plan, noise=KEY.stream(), correct=see) as private:
        private.step(torch.zeros(0, 4, dtype=dtype), torch.zeros(0), loss)
    stream = KEY.stream()
    drawn = stream.normals(15) if dtype == torch.float64 else stream.single_normals(15)
    expected = torch.from_numpy(drawn) * plan.noise_deviation / plan.expected_batch
    found = torch.cat([each.flatten() for each in seen])
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


def test_parameters_of_two_types_get_independent_noise() -> None:
    plan = replace(PLAN, noise_multiplier=1.0)
    parameters = [nn.Parameter(torch.zeros(5000, dtype=dtype)) for dtype in (torch.float32, torch.float64) * 2]
    optimizer = StreamOptimizer(torch.optim.SGD(parameters, lr=1.0), plan=plan, noise=KEY.stream())
    optimizer.pre_step()
    grads = np.stack([p.grad.double().numpy() for p in parameters if p.grad is not None])
    assert len(grads) == 4 and np.abs(grads).min() > 0
    assert np.abs(np.corrcoef(grads) - np.eye(4)).max() < 4.5 / math.sqrt(5000)
    scale = plan.noise_deviation / plan.expected_batch
    assert np.abs(grads.std(axis=1) / scale - 1).max() < 4.5 / math.sqrt(10_000)


def test_a_large_model_s_noise_is_the_stream_s_from_end_to_end() -> None:
    plan = replace(PLAN, noise_multiplier=1.0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((300, 300), (7,), (40_000,))]
    optimizer = StreamOptimizer(torch.optim.SGD(parameters, lr=1.0), plan=plan, noise=KEY.stream())
    for p in parameters:
        p.summed_grad = torch.ones_like(p)  # type: ignore[attr-defined]
    optimizer.pre_step()
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    drawn = torch.from_numpy(KEY.stream().single_normals(130_007))
    torch.testing.assert_close(found, (1 + drawn * plan.noise_deviation) / plan.expected_batch)


def test_a_step_s_noise_does_not_stay_in_the_next_step_s() -> None:
    """The sum's memory is used again: what the loss does not reach must be zero before the noise."""
    module = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(2, 2)})
    module.forward = lambda inputs: module["used"](inputs)  # type: ignore[method-assign]
    plan = replace(PLAN, noise_multiplier=1.0)
    optimizer = StreamOptimizer(torch.optim.SGD(module.parameters(), lr=1.0), plan=plan, noise=KEY.stream())
    found = []
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        optimizer.pre_step()
        found.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).clone())
    stream = KEY.stream()
    for each in found:
        expected = torch.from_numpy(stream.single_normals(21)) * plan.noise_deviation / plan.expected_batch
        torch.testing.assert_close(each, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_noise_on_cuda_is_that_on_the_cpu() -> None:
    plan = replace(PLAN, noise_multiplier=1.0)
    module, (inputs, targets) = mlp(), data()
    other = mlp().cuda()
    other.load_state_dict(module.state_dict())
    here = one_step(module, inputs, targets, plan)
    there = one_step(other, inputs.cuda(), targets.cuda(), plan)
    for a, b in zip(here, there, strict=True):
        assert torch.allclose(a, b.cpu(), atol=1e-4)
