"""Private steps behind one interface: bract's two engines, Opacus as it is, and one that noises final weights once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.utils.adaptive_clipping.adaptive_clipping_utils import PrivacyEngineAdaptiveClipping
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from bract.core.keys import Key
from bract.privacy import accounting
from bract.privacy.dpsgd.bookkeeping import BookKeeping
from bract.privacy.dpsgd.dpsgd import DPSGD
from bract.privacy.mechanism import RecordLevelPlan

Loss = Callable[[Tensor, Tensor], Tensor]
DELTA = 1e-5


def per_example(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each example, [n]."""
    return functional.cross_entropy(outputs, targets, reduction="none")


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a step promises: clipping to C, noise z·C on the sum; `secret` (under 2^256) gives the noise."""

    clipping_norm: float = 1.0
    noise_multiplier: float = 0.0
    secret: int = 0


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """The noised sum of clipped gradients, as one vector, and the clipping norm that bounded them."""

    total: Tensor
    clipping_norm: float


Step = Callable[[nn.Module, Tensor, Tensor, Loss, Terms], Stepped]


def bract_step(engine: type[DPSGD | BookKeeping]) -> Step:
    """Return a step by one of bract's engines."""

    def step(module: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, terms: Terms) -> Stepped:
        plan = RecordLevelPlan(
            records=len(inputs),
            batch_size=len(inputs),
            epochs=1,
            rounds=1,
            clipping_norm=terms.clipping_norm,
            noise_multiplier=terms.noise_multiplier,
            delta=DELTA,
        )
        noise = Key(terms.secret.to_bytes(32, "big")).stream()
        before = flat(module)
        with engine(module, torch.optim.SGD(module.parameters(), lr=1.0), plan=plan, noise=noise) as private:
            private.step(inputs, targets, loss)
        return Stepped(total=(before - flat(module)) * len(inputs), clipping_norm=terms.clipping_norm)

    step.__name__ = engine.__name__
    return step


def opacus_step(module: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, terms: Terms) -> Stepped:
    """Take a step of Opacus 1.6's DPOptimizer as it comes: its noise is the global generator's."""
    return _opacus(module, inputs, targets, loss, terms, generator=None)


def opacus_generator_step(module: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, terms: Terms) -> Stepped:
    """Take the same step with a `noise_generator` of its own, whose seed is the secret."""
    return _opacus(module, inputs, targets, loss, terms, generator=torch.Generator().manual_seed(terms.secret))


def _opacus(
    module: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, terms: Terms, *, generator: torch.Generator | None
) -> Stepped:
    wrapped = GradSampleModule(module, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(module.parameters(), lr=1.0),
        noise_multiplier=terms.noise_multiplier,
        max_grad_norm=terms.clipping_norm,
        expected_batch_size=len(inputs),
        generator=generator,
    )
    before = flat(module)
    loss(wrapped(inputs), targets).sum().backward()
    optimizer.step()
    wrapped.to_standard_module()
    return Stepped(total=(before - flat(module)) * len(inputs), clipping_norm=terms.clipping_norm)


def opacus_adaptive_step(module: nn.Module, inputs: Tensor, targets: Tensor, loss: Loss, terms: Terms) -> Stepped:
    """Take a step of Opacus 1.6's ghost clipping with an adaptive norm, which is at least 1."""
    before = flat(module)
    wrapped, optimizer, criterion, _ = PrivacyEngineAdaptiveClipping(accountant="rdp").make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(inputs, targets), batch_size=len(inputs)),
        criterion=loss,
        noise_multiplier=terms.noise_multiplier,
        max_grad_norm=terms.clipping_norm,
        poisson_sampling=False,
        grad_sample_mode="ghost",
    )
    criterion(wrapped(inputs), targets).backward()
    optimizer.step()
    return Stepped(total=(before - flat(module)) * len(inputs), clipping_norm=float(optimizer.max_grad_norm))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One round from weights of zero: the final weights, and the epsilon that is claimed for releasing them."""

    weights: Tensor
    epsilon: float


Train = Callable[[Tensor, int, float], Trained]


def bract_round(engine: type[DPSGD | BookKeeping]) -> Train:
    """Return training over all records [n, p] in each of some steps, loss w · x, with noise in each step."""

    def train(records: Tensor, steps: int, noise_multiplier: float) -> Trained:
        module = linear(records.shape[1])
        count = len(records)
        plan = RecordLevelPlan(
            records=count,
            batch_size=count,
            epochs=steps,
            rounds=1,
            clipping_norm=1.0,
            noise_multiplier=noise_multiplier,
            delta=DELTA,
        )
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        with engine(module, optimizer, plan=plan, noise=Key.from_seed(1).stream()) as private:
            for _ in range(plan.steps()):
                private.step(records, torch.zeros(count), lambda outputs, _: outputs[:, 0])
        return Trained(weights=flat(module), epsilon=plan.epsilon())

    train.__name__ = engine.__name__
    return train


def noised_once(records: Tensor, steps: int, noise_multiplier: float) -> Trained:
    """Train as above with clipped gradients and no noise, and noise the final weights once by sigma · C.

    As Fed-BioMed's "central" type of differential privacy does, whose sigma is that of one Gaussian mechanism a round.
    """
    weights = torch.zeros(records.shape[1])
    gradients = records / records.norm(dim=1, keepdim=True).clamp(min=1.0)
    for _ in range(steps):
        weights = weights - gradients.mean(dim=0)
    noise = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
    epsilon = (
        accounting.epsilon(sampling_rate=1.0, noise_multiplier=noise_multiplier, steps=1, delta=DELTA)
        if noise_multiplier
        else math.inf
    )
    return Trained(weights=weights + noise_multiplier * noise, epsilon=epsilon)


def linear(size: int) -> nn.Module:
    """Return w · x with w = 0."""
    module = nn.Linear(size, 1, bias=False)
    nn.init.zeros_(module.weight)
    return module


def flat(module: nn.Module) -> Tensor:
    """Return all trained parameters as one vector."""
    return torch.cat([p.detach().flatten().clone() for p in module.parameters() if p.requires_grad])
