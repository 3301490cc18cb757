"""A canary test of DP-SGD: planted records, and whether they are found more often than the claimed noise allows.

The mechanism under test is the plan's own, unsampled: real steps with the plan's noise multiplier z and clipping norm C
on a probe layer. A record that is in all of T such steps has the trade-off curve of a Gaussian shift of
mu = √T / z (Dong, Roth and Su 2022, section 2.2 and corollary 3.3). For such a curve a fair coin that says whether a
record is in is guessed right with a chance of at most Φ(mu / 2), whatever the guess goes by (their section 2.1: the sum
of both errors is at least 2 Φ(-mu / 2)).

m canaries are m such coins, thrown independently. They have gradients on disjoint blocks of coordinates, so that under
noise which is independent on each coordinate, as it is claimed to be, the guesses are independent too and the number of
right ones is Bin(m, p) with p at most Φ(mu / 2): exactly, not in the limit. The claim is rejected above the quantile of
1 - 1e-6 of Bin(m, Φ(mu / 2)). A guess compares the sum of a canary's inner products with the released sums to half of
what the canary adds: a threshold that is fixed before anything is drawn.

Clients are canaries in the same way: a client whose update moves the sum by C is what a record is in DP-SGD, and m
clients that each noise their own update are m mechanisms, each with a coin of its own.

A test of the unsampled mechanism says nothing of the sampler, and amplification does not carry such a claim over: the
audit counts what the sampler draws instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self

import torch
from scipy import stats
from torch import Tensor, nn

from ..core.keys import Key
from .dpsgd.bookkeeping import BookKeeping
from .dpsgd.dpsgd import DPSGD
from .dpsgd.passes import Loss
from .mechanism import RecordLevelPlan

SIGNIFICANCE = 1e-6
CANARIES = 1_000
BLOCK = 5
"""Coordinates of the probe layer for each canary: d = 5 · m."""

_LARGEST_SHIFT = 1.5
"""Beyond it both curves are so steep that a thousand coins do not tell them apart."""
_MOST_STEPS = 400


class Steps(Protocol):
    """What takes one round of the plan's steps, each over all records, and calls `see` at each noised gradient."""

    def __call__(
        self,
        layer: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        loss: Loss,
        *,
        plan: RecordLevelPlan,
        key: Key,
        see: Callable[[], None],
    ) -> None:
        """Train `layer` in place."""


def steps_by(engine: Literal["bookkeeping", "opacus"]) -> Steps:
    """Return what takes the steps of a round by an engine alone."""

    def steps(
        layer: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        loss: Loss,
        *,
        plan: RecordLevelPlan,
        key: Key,
        see: Callable[[], None],
    ) -> None:
        optimizer, noise = torch.optim.SGD(layer.parameters(), lr=0.0), key.stream()
        private: BookKeeping | DPSGD
        if engine == "bookkeeping":
            private = BookKeeping(layer, optimizer, plan=plan, noise=noise, correct=see)
        else:
            private = DPSGD(layer, optimizer, plan=plan, noise=noise, correct=see)
        with private:
            for _ in range(plan.steps_per_round):
                private.step(inputs, targets, loss)

    return steps


@dataclass(frozen=True, kw_only=True)
class CanaryResult:
    """`right` of `canaries` coins were guessed; more than `most` rejects the claim, a shift of `mu` over `steps`.

    `power` is the chance with which half of the claimed noise is rejected.
    """

    canaries: int
    steps: int
    mu: float
    threshold: float
    right: int
    most: int
    power: float

    @property
    def passed(self) -> bool:
        """Whether the claim stands."""
        return self.right <= self.most


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """The coins of a test: `there` [m] says which canaries take part.

    `directions` are unit vectors [m, BLOCK · m], each on its own block: exactly orthogonal, and every coordinate is
    used. A canary moves what is released by `length` · C in each of `steps` steps, whose noise is z · C.
    """

    there: Tensor
    directions: Tensor
    noise_multiplier: float
    steps: int
    length: float

    @classmethod
    def toss(cls, key: Key, *, noise_multiplier: float, canaries: int = CANARIES, steps: int = _MOST_STEPS) -> Self:
        """Return the canaries of a mechanism, for at most so many steps; raises ValueError for one without noise.

        With z below 2/3 a canary moves less than C, so that the claimed shift stays at 1.5.
        """
        if noise_multiplier <= 0:
            raise ValueError("noise_multiplier = 0: a plan without noise claims nothing")
        return cls(
            there=torch.from_numpy(key.child("coins").stream().bernoulli(canaries, 0.5)),
            directions=_directions(key.child("directions"), canaries),
            noise_multiplier=noise_multiplier,
            steps=min(steps, max(1, math.ceil(noise_multiplier**2))),
            length=min(1.0, _LARGEST_SHIFT * noise_multiplier),
        )

    @property
    def threshold(self) -> float:
        """Half of what a canary adds to its inner product with the released sums, in units of C."""
        return self.steps * self.length / 2

    def products(self, released: Tensor) -> Tensor:
        """Return the inner products [m] of the released sums [BLOCK · m], float64, with the canaries."""
        canaries = len(self.there)
        return (released.view(canaries, BLOCK) * _blocks(self.directions)).sum(dim=1)

    def guess(self, products: Tensor) -> CanaryResult:
        """Return how many coins are guessed from the inner products [m], in units of C."""
        canaries, noise = len(self.there), self.noise_multiplier
        mu = math.sqrt(self.steps) * self.length / noise
        most = int(stats.binom.isf(SIGNIFICANCE, canaries, float(stats.norm.cdf(mu / 2))))
        return CanaryResult(
            canaries=canaries,
            steps=self.steps,
            mu=mu,
            threshold=self.threshold,
            right=int(((products > self.threshold) == self.there).sum()),
            most=most,
            power=float(stats.binom.sf(most, canaries, stats.norm.cdf(mu))),
        )


def canary_test(
    plan: RecordLevelPlan,
    key: Key,
    *,
    canaries: int = CANARIES,
    steps: Steps | None = None,
    device: torch.device | None = None,
) -> CanaryResult:
    """Return what an attacker finds of canaries under the plan's noise and clipping.

    `key` decides the coins, the canaries and, by its child "noise", what `steps` draws, by default book-keeping. Above
    z = 20 the test takes 400 steps, and its power falls. Raises ValueError for a plan without noise.
    """
    coins = Canaries.toss(key, noise_multiplier=plan.noise_multiplier, canaries=canaries)
    # Only those that are there take part. Ten times too long where it shall be clipped, a canary moves the sum by C.
    length = plan.clipping_norm * (coins.length if coins.length < 1 else 10.0)
    inputs = coins.directions[coins.there].mul_(length)
    unsampled = replace(plan, records=len(inputs), batch_size=len(inputs), epochs=coins.steps, accounted_records=None)
    steps, device = steps or steps_by("bookkeeping"), device or torch.device("cpu")
    released = _released(unsampled, inputs, key.child("noise"), steps, device)
    return coins.guess(coins.products(released) / plan.clipping_norm)


def _directions(key: Key, canaries: int) -> Tensor:
    """Return unit vectors [m, m · BLOCK], each on its own block: exactly orthogonal, and every coordinate is used."""
    blocks = torch.from_numpy(key.stream().normals(canaries * BLOCK)).view(canaries, BLOCK)
    blocks = blocks / torch.linalg.vector_norm(blocks, dim=1, keepdim=True)
    place = torch.arange(canaries)
    directions = torch.zeros(canaries, canaries, BLOCK)
    directions[place, place] = blocks.float()
    return directions.view(canaries, canaries * BLOCK)


def _blocks(directions: Tensor) -> Tensor:
    canaries, place = len(directions), torch.arange(len(directions))
    return directions.view(canaries, canaries, BLOCK)[place, place].double()


def _released(plan: RecordLevelPlan, inputs: Tensor, key: Key, steps: Steps, device: torch.device) -> Tensor:
    """Return the sum over steps of the noised sums [d], float64."""
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(inputs.shape[1], 1, bias=False).to(device)
    total = torch.zeros(inputs.shape[1], dtype=torch.float64)

    def see() -> None:
        gradient = layer.weight.grad
        if gradient is not None:
            # The sum and not the mean: a fixed denominator is part of the plan.
            total.add_(gradient.detach().cpu().double().view(-1), alpha=plan.records)

    targets = torch.zeros(len(inputs), dtype=torch.int64, device=device)
    steps(layer, inputs.to(device), targets, _own_output, plan=plan, key=key, see=see)
    return total


def _own_output(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the output as the loss: a canary's gradient is then its input."""
    return outputs[:, 0]
