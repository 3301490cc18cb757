"""DP-SGD (Abadi et al. 2016) on Opacus' per-example gradients, with bract's own sampler, denominator and noise.

Opacus rounds the sampling rate and draws noise from torch's global generator; here batches and noise come from a
`Stream`, and every constant from one `RecordLevelPlan`, which the accountant reads too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Self

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from ...core.errors import RunError
from ...core.keys import Stream
from ..mechanism import RecordLevelPlan
from .layers import needs_autograd
from .passes import Hide, Loss, take_passes, trained_layers
from .stream_optimizer import StreamOptimizer


class DPSGD:
    """One round's DP-SGD on a module, as a context manager; on leaving it the module is as Opacus never was there.

    `optimizer` works on the noised gradient, so momentum and L2 are post-processing; so is `correct`, which is called
    in each step when the noised gradient is there, and must read nothing else of the records. `noise` is this round's
    own stream. The module must be one that `privacy.layers.make_private` returned.

    Whether code raises may follow from one record. With `hide` a step never raises for its examples: each on which
    model or loss raises counts as zero, and `hide` is told.
    """

    any_order = False
    """Whether images may come channels-last: Opacus' per-example gradients of convolutions would be wrong."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        plan: RecordLevelPlan,
        noise: Stream,
        correct: Callable[[], None] = lambda: None,
        hide: Hide | None = None,
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


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Give a convolution its input in torch's own order: Opacus unfolds any other to wrong per-example gradients."""
    return tuple(each.contiguous() for each in inputs)
