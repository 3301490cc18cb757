"""DP-SGD (Abadi et al. 2016) on Opacus' per-example gradients, with bract's own sampler, denominator and noise.

Opacus rounds the sampling rate and draws noise from torch's global generator; here batches and noise come from a
`Stream`, and every constant from one `RecordLevelPlan`, which the accountant reads too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from ...core.errors import RunError
from ...core.keys import Stream
from ..mechanism import RecordLevelPlan
from .layers import needs_autograd
from .noised_sum import NoisedSum

Loss = Callable[[Tensor, Tensor], Tensor]

_MARGIN = 1e-5
"""Norms are float32: a norm that rounding made too small must not let a gradient be longer than the clipping norm."""


def poisson_batches(plan: RecordLevelPlan, stream: Stream) -> Iterator[Tensor]:
    """Yield one round's batches, int64 indices: each record in each batch independently with plan.sampling_rate.

    A batch may be empty; it is a step like any other.
    """
    for _ in range(plan.steps_per_round):
        yield torch.from_numpy(stream.bernoulli(plan.records, plan.sampling_rate).nonzero()[0])


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
        # Layers whose norms are at most C / √L each keep a whole gradient's within C.
        self._layers = [list(layer) for layer in layers] if plan.per_layer else [self._parameters]
        self._layer_norm = plan.clipping_norm / math.sqrt(len(self._layers))
        self._correct = correct
        self._sum = NoisedSum(self._parameters)
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
        factors = self.factors([[sample for sample in samples if sample is not None] for samples in rows])
        for layer, samples, factor in zip(self._layers, rows, factors, strict=True):
            for p, sample in zip(layer, samples, strict=True):
                if sample is not None and factor is not None:
                    # A bad example has the factor 0, but 0 · NaN is NaN.
                    finite = sample.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                    part = (factor @ finite).view_as(p)
                    p.summed_grad = part if p.summed_grad is None else p.summed_grad + part
        for p in self._parameters:
            p.grad_sample = p.grad = None

    def factors(self, layers: Sequence[Sequence[Tensor]]) -> list[Tensor | None]:
        """Return what each example [n] of a pass is multiplied by, for each layer that is clipped on its own.

        A layer is given as tensors [n, any] that have, row by row, the norms of the examples' gradients; none if the
        loss did not reach it.
        """
        factors = [_clip_factors(list(rows), self._layer_norm) if rows else None for rows in layers]
        there = [each for each in factors if each is not None]
        if len(there) < 2:
            return factors
        # An example that is bad in one layer counts as zero in all of them.
        sound = torch.stack(there).amin(dim=0) > 0
        return [None if each is None else each * sound for each in factors]

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


class DPSGD:
    """One round's DP-SGD on a module, as a context manager; on leaving it the module is as Opacus never was there.

    `optimizer` works on the noised gradient, so momentum and L2 are post-processing; so is `correct`, which is called
    in each step when the noised gradient is there, and must read nothing else of the records. `noise` is this round's
    own stream. The module must be one that `privacy.layers.make_private` returned.

    Whether code raises may follow from one record. With `hide` a step never raises for its examples: each on which
    model or loss raises counts as zero, and `hide` is told.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        plan: RecordLevelPlan,
        noise: Stream,
        correct: Callable[[], None] = lambda: None,
        hide: Callable[[Exception], None] | None = None,
    ) -> None:
        self._correct = correct
        self._hide = hide
        self._module = module
        self._optimizer = optimizer
        self._plan = plan
        self._noise = noise

    def __enter__(self) -> Self:
        self._was_training = self._module.training
        self._module.train()
        try:
            self._wrapped = GradSampleModule(
                self._module, loss_reduction="sum", strict=True, force_functorch=needs_autograd(self._module)
            )
        except NotImplementedError as error:
            raise RunError("model-not-private", f"train.model: {str(error).splitlines()[0]}") from error
        self._private = StreamOptimizer(
            self._optimizer,
            plan=self._plan,
            noise=self._noise,
            correct=self._correct,
            layers=[own for _, own in trained_layers(self._module)],
        )
        self._hooks = [
            module.register_forward_pre_hook(_contiguous)
            for module in self._module.modules()
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._private.zero_grad(set_to_none=True)
        self._wrapped.to_standard_module()
        _forget_passes(self._module)
        for p in self._module.parameters():
            # Opacus leaves this one behind: a clipped sum without noise.
            p.__dict__.pop("summed_grad", None)
        for module in self._module.modules():
            module.__dict__.pop("ft_compute_sample_grad", None)
        self._module.train(self._was_training)

    def step(self, inputs: Tensor, targets: Tensor, loss: Loss) -> None:
        """Take one step on a Poisson batch, inputs [n, ...] and targets [n], with loss(outputs, targets) -> [n].

        A batch larger than the plan's microbatches takes several passes: it is never cut.
        """
        take_passes(self._pass, self._forget, inputs, targets, loss, size=self._plan.microbatch_size, hide=self._hide)
        self._private.step()

    def _forget(self) -> None:
        """Begin the sum of a step anew."""
        self._private.zero_grad(set_to_none=True)

    def _pass(self, inputs: Tensor, targets: Tensor, loss: Loss) -> None:
        """Add the clipped gradients of some examples to those of the step."""
        try:
            self._differentiate(inputs, targets, loss)
            self._private.examples = len(inputs)
            self._private.clip_and_accumulate()
        except Exception:
            # What Opacus' hooks kept of these examples would be taken for that of the next ones.
            _forget_passes(self._module)
            raise

    def _differentiate(self, inputs: Tensor, targets: Tensor, loss: Loss) -> None:
        losses = loss(self._wrapped(inputs), targets)
        if losses.shape != (len(inputs),):
            raise RunError(
                "plugin-invalid",
                f"task.loss returned the shape {list(losses.shape)} for {len(inputs)} examples; give one loss each",
            )
        with warnings.catch_warnings():
            # The inputs are data: that they have no gradient is as it should be.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            warnings.filterwarnings("ignore", message="In CPU autocast")
            losses.sum().backward()


def _forget_passes(module: nn.Module) -> None:
    """Remove what Opacus' hooks keep of examples between forward, backward and clipping."""
    for p in module.parameters():
        p.grad = None
        if "grad_sample" in p.__dict__:
            p.grad_sample = None  # type: ignore[attr-defined]
        if "_forward_counter" in p.__dict__:
            p._forward_counter = 0  # type: ignore[attr-defined]
        p.__dict__.pop("_current_grad_sample", None)
    for part in module.modules():
        part.__dict__.pop("activations", None)
        part.__dict__.pop("max_batch_len", None)


def take_passes(
    take: Callable[[Tensor, Tensor, Loss], None],
    begin: Callable[[], None],
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    size: int | None,
    hide: Callable[[Exception], None] | None,
) -> None:
    """Begin a sum, and add the examples to it by passes of at most `size` (None: all at once).

    With `hide`, where a pass raises the sum is begun anew with one example at a time, and one that raises is left out:
    each adds what it adds alone, or nothing, whatever the others do. Without, what a pass raises is raised.
    """
    begin()
    size = size or max(1, len(inputs))
    try:
        for first in range(0, len(inputs), size):
            take(inputs[first : first + size], targets[first : first + size], loss)
    except Exception:
        if hide is None:
            raise
    else:
        return
    begin()
    for one in range(len(inputs)):
        try:
            take(inputs[one : one + 1], targets[one : one + 1], loss)
        except Exception as error:  # what a model or a loss raises may follow from this record
            hide(error)


def trained_layers(module: nn.Module) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Return the modules that own trained parameters, with these; one that two share goes with the first."""
    seen: set[nn.Parameter] = set()
    layers = []
    for part in module.modules():
        own = [p for p in part.parameters(recurse=False) if p.requires_grad and p not in seen]
        seen.update(own)
        if own:
            layers.append((part, own))
    return layers


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give a convolution its input in torch's own order: Opacus unfolds any other to wrong per-example gradients."""
    return tuple(each.contiguous() for each in inputs)


def _clip_factors(samples: list[Tensor], clipping_norm: float) -> Tensor:
    """Return the factor [n] of each example, from its gradients [n, size of a parameter]: 0 if one is not finite."""
    norm = torch.linalg.vector_norm(samples[0], dim=1)
    if len(samples) > 1:
        others = [torch.linalg.vector_norm(sample, dim=1) for sample in samples[1:]]
        norm = torch.linalg.vector_norm(torch.stack([norm, *others], dim=1), dim=1)
    # An infinite norm gives 0 by itself.
    factors: Tensor = clipping_norm / (1 + _MARGIN) / norm
    return factors.clamp_(max=1.0).nan_to_num_(nan=0.0)
