"""Opacus' optimizer with noise from a stream: what both engines clip with, and where they add the noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from ...core.errors import RunError
from ...core.keys import Stream
from ..mechanism import RecordLevelPlan
from .clipping import clip_factors, layer_norm
from .noised_sum import NoisedSum


class StreamOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' DPOptimizer with noise from a stream, a fixed denominator, and bad examples counted as zero.

    Formal guarantee: one example changes the clipped sum by at most the clipping norm, whatever its gradient is
    (NaN, infinite, huge); N(0, noise_deviation²) is added to every coordinate of the sum.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        plan: RecordLevelPlan,
        noise: Stream,
        correct: Callable[[], None] = lambda: None,
        layers: Sequence[Sequence[nn.Parameter]] = (),
        summed: NoisedSum | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.clipping_norm,
            expected_batch_size=plan.expected_batch,
        )
        self._noise = noise
        self._deviation = plan.noise_deviation
        self._parameters = list(self.params)
        self._layers = [list(layer) for layer in layers] if plan.per_layer else [self._parameters]
        self.layer_norm = layer_norm(plan, len(self._layers))
        self._correct = correct
        self._sum = NoisedSum(self._parameters) if summed is None else summed
        self.examples = 0

    @property
    def parts(self) -> Mapping[Tensor, Tensor]:
        """Where a parameter's clipped sum may be written, to be set as its `summed_grad`: then it is copied no more."""
        return self._sum.parts

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Set every gradient to (Σ clip(g_i) + noise) / expected batch, and let it be corrected."""
        self.add_noise()
        self._correct()
        return True

    def clip_and_accumulate(self) -> None:
        """Add the clipped per-example gradients of one pass to `summed_grad`, and forget them.

        Raises RunError if some gradient has another number of rows than the pass has examples.
        """
        rows = [[self._rows(p) for p in layer] for layer in self._layers]
        there = [[sample for sample in samples if sample is not None] for samples in rows]
        factors = clip_factors(there, self.layer_norm)
        for layer, samples, factor in zip(self._layers, rows, factors, strict=True):
            for p, sample in zip(layer, samples, strict=True):
                if sample is not None and factor is not None:
                    # A bad example has the factor 0, but 0 · NaN is NaN.
                    finite = sample.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                    part = (factor @ finite).view_as(p)
                    p.summed_grad = part if p.summed_grad is None else p.summed_grad + part
        for p in self._parameters:
            p.grad_sample = p.grad = None

    def _rows(self, p: nn.Parameter) -> Tensor | None:
        if self.examples == 0 or p.grad_sample is None:  # type: ignore[attr-defined]
            return None
        sample: Tensor = self._get_flat_grad_sample(p)
        if len(sample) != self.examples:
            raise RunError(
                "model-not-private",
                f"train.model: a layer sees {len(sample)} rows for {self.examples} examples, so a record's gradient "
                "cannot be told from the others'; keep the examples in the first dimension of every layer's input",
            )
        return sample.reshape(len(sample), -1).float()

    @torch.no_grad()
    def add_noise(self) -> None:
        """Set `grad` to the clipped sum plus noise, over the expected batch and never the number of examples drawn."""
        for p in self._parameters:
            part, clipped = self._sum.parts[p], p.summed_grad
            if clipped is None:
                part.zero_()
            elif clipped is not part:
                part.copy_(clipped)
        self._sum.finish(self._noise, deviation=self._deviation, denominator=float(self.expected_batch_size))
        for p in self._parameters:
            p.grad = self._sum.parts[p].to(p.dtype)

    def scale_grad(self) -> None:
        """Do nothing: `add_noise` has divided already."""
