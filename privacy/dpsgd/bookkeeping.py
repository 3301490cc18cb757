"""DP-SGD by book-keeping (Bu, Wang, Zha & Karypis 2023): one backward pass, and no gradients of wide layers by example.

The backward pass goes to the layers' outputs alone. With each layer's input it gives the norms of the examples'
gradients (`gradients`), and then the clipped sum as one weighted contraction. Clipping factors, noise and
denominator are those of `privacy.dpsgd`: the two engines differ by rounding only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ...core.errors import RunError
from ...core.keys import Key, Stream
from ..mechanism import RecordLevelPlan
from .clipping import clip_factors
from .gradients import Clean, Gradients, finite, unchanged
from .noised_sum import NoisedSum
from .passes import Hide, Loss, take_passes, trained_layers
from .per_example import Kind, kind_of
from .stream_optimizer import StreamOptimizer


class Stepping(Protocol):
    """What takes the step when the noised gradients are there: an optimizer of torch's, or a quicker one."""

    def step(self) -> object:
        """Move every parameter that has a gradient."""


class QuickPass(Protocol):
    """Does to an engine what one whole pass would have done, to the last bit."""

    def __call__(self, engine: BookKeeping, inputs: Tensor, targets: Tensor, loss: Loss) -> bool:
        """Return whether it did; if not, the engine does it by itself."""


@dataclass(kw_only=True)
class _Entry:
    """What one layer did in one pass."""

    layer: nn.Module
    kind: Kind
    inputs: Tensor
    output: Tensor
    version: int


class BookKeeping:
    """One round's DP-SGD on a module, as a context manager; on leaving it the module is as before.

    The same as `privacy.dpsgd.DPSGD`, of which see the arguments, for modules that `supports` finds fit: else a step
    raises RunError `model-not-private`.

    Formal guarantee: that of `StreamOptimizer`, which clips, sums and adds the noise here too.
    """

    any_order = True
    """Whether images may come channels-last."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: Stepping,
        *,
        plan: RecordLevelPlan,
        noise: Stream,
        correct: Callable[[], None] = lambda: None,
        hide: Hide | None = None,
        summed: NoisedSum | None = None,
        quick: QuickPass | None = None,
    ) -> None:
        self._summed = summed
        self._quick = quick
        self._module = module
        self._optimizer = optimizer
        self._plan = plan
        self._noise = noise
        self._correct = correct
        self._hide = hide

    def __enter__(self) -> Self:
        layers = trained_layers(self._module)
        self._layers = [layer for layer, _ in layers]
        self._parameters = [p for _, own in layers for p in own]
        known = {layer: kind for layer in self._layers if (kind := kind_of(layer)) is not None}
        if reason := unknown_layer(self._module):
            raise _unfit(reason)
        self._was_training = self._module.training
        self._module.train()
        # It holds clipping, noise and denominator; the optimizer in it takes no step.
        self._private = StreamOptimizer(
            torch.optim.SGD(self._parameters, lr=0.0),
            plan=self._plan,
            noise=self._noise,
            correct=self._correct,
            layers=[own for _, own in layers],
            summed=self._summed,
        )
        self._entries: dict[nn.Module, _Entry] = {}
        for layer, kind in known.items():
            layer.forward = partial(self._forward, layer, kind)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._layers:
            layer.__dict__.pop("forward", None)
        for p in self._module.parameters():
            p.grad = None
            p.__dict__.pop("summed_grad", None)
        self._entries.clear()
        self._module.train(self._was_training)

    def step(self, inputs: Tensor, targets: Tensor, loss: Loss) -> None:
        """Take one step on a Poisson batch, inputs [n, ...] and targets [n], with loss(outputs, targets) -> [n].

        A batch larger than the plan's microbatches takes several passes: it is never cut.
        """
        size = self._plan.microbatch_size
        whole = 0 < len(inputs) <= (size or len(inputs))
        if not (whole and self._quick is not None and self._quick(self, inputs, targets, loss)):
            take_passes(self._pass, self.forget, inputs, targets, loss, size=size, hide=self._hide)
        self._private.pre_step()
        self._optimizer.step()

    def forget(self) -> None:
        """Begin the sum of a step anew."""
        for p in self._parameters:
            p.grad = p.summed_grad = None  # type: ignore[attr-defined]

    def _pass(self, inputs: Tensor, targets: Tensor, loss: Loss) -> None:
        self.add_clipped(inputs, targets, loss, cleaning=cleaning_of)

    @torch.no_grad()
    def add_clipped(
        self, inputs: Tensor, targets: Tensor, loss: Loss, *, cleaning: Callable[[Sequence[Tensor]], Clean]
    ) -> list[Tensor]:
        """Add the clipped gradients of some examples to those of the step.

        Return the factors [n], one of each layer that is clipped by itself and that the losses reach; `cleaning` says
        by them what makes the tensors of the pass finite.
        """
        self._entries.clear()
        with torch.enable_grad():
            losses = loss(self._module(inputs), targets)
        if losses.shape != (len(inputs),):
            raise RunError(
                "plugin-invalid",
                f"task.loss returned the shape {list(losses.shape)} for {len(inputs)} examples; give one loss each",
            )
        by_layer = self._gradients(losses, len(inputs))
        found = by_layer if self._plan.per_layer else [[each for own in by_layer for each in own]]
        factors = clip_factors([[_columns(own)] if own else [] for own in found], self._private.layer_norm)
        there = [factor for factor in factors if factor is not None]
        clean, parts = cleaning(there), self._private.parts
        for own, factor in zip(found, factors, strict=True):
            for each in own:
                if factor is not None:
                    p, part = each.parameter, parts[each.parameter]
                    each.add(part, factor.to(each.norms.dtype), clean, p.summed_grad is part)  # type: ignore[attr-defined]
                    p.summed_grad = part  # type: ignore[attr-defined]
        return there

    @property
    def parts(self) -> dict[Tensor, Tensor]:
        """The sum of the step so far, of each parameter that it holds."""
        return {p: part for p, part in self._private.parts.items() if p.summed_grad is part}  # type: ignore[attr-defined]

    def put(self, parameters: Iterable[Tensor]) -> None:
        """Say that the parts of these parameters hold the sum of the step, and no others do."""
        self.forget()
        for p in parameters:
            p.summed_grad = self._private.parts[p]  # type: ignore[attr-defined]

    def _gradients(self, losses: Tensor, examples: int) -> list[list[Gradients]]:
        """Return the gradients of each layer's parameters; none for a layer that the losses do not reach."""
        entries = list(self._entries.values())
        for entry in entries:
            if entry.output._version != entry.version:
                raise _unfit(f"the output of a {type(entry.layer).__name__} is changed in place")
        if not entries or not losses.requires_grad:
            return [[] for _ in self._layers]
        # The layers use their weights detached, so a gradient of a weight is one that no layer accounts for.
        wanted = [*(entry.output for entry in entries), *self._parameters]
        gradients = torch.autograd.grad(losses, wanted, torch.ones_like(losses), allow_unused=True)
        if any(gradient is not None for gradient in gradients[len(entries) :]):
            raise _unfit("a weight is used outside of its layer")
        found = {}
        for entry, gradient in zip(entries, gradients, strict=False):
            if gradient is None:
                continue
            if gradient.dim() < 2 or len(gradient) != examples:
                raise RunError(
                    "model-not-private",
                    f"train.model: a layer sees {len(gradient)} rows for {examples} examples, so a record's gradient "
                    "cannot be told from the others'; keep the examples in the first dimension of every layer's input",
                )
            found[entry.layer] = entry.kind.gradients(entry.layer, entry.inputs, _wide(gradient))
        self._entries.clear()
        return [found.get(layer, []) for layer in self._layers]

    def _forward(self, layer: nn.Module, kind: Kind, inputs: Tensor) -> Tensor:
        """Stand in for a layer's own forward: the same output, and what it takes to tell the examples apart."""
        if layer in self._entries:
            raise _unfit(f"a {type(layer).__name__} is called twice")
        output, kept = kind.forward(layer, inputs)
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            output.requires_grad_()
        self._entries[layer] = _Entry(
            layer=layer, kind=kind, inputs=kept.detach(), output=output, version=output._version
        )
        return output


def unknown_layer(module: nn.Module) -> str | None:
    """Return why the trained parameters of a module are not all those of known layers; None if they are."""
    seen: set[nn.Parameter] = set()
    for path, layer in module.named_modules():
        own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        if own and kind_of(layer) is None:
            return f"layer {path or type(layer).__name__} ({type(layer).__name__}) is not one of those it knows"
        if any(p in seen for p in own):
            return f"layer {path} shares a weight with another"
        seen.update(own)
    return None


def supports(module: nn.Module, like: Tensor) -> bool:
    """Return whether book-keeping gives a module's clipped sums, as autograd gives them one example at a time.

    It is tried out on a copy with random weights, on the processor, with random inputs of the shape and type of `like`
    [n, ...] (whose values are not used) and without dropout: a fixed rule, the same in every process.
    """
    if unknown_layer(module) is not None:
        return False
    try:
        with torch.random.fork_rng(devices=[]):
            return _agrees(copy.deepcopy(module).cpu(), like)
    except Exception:  # a model may raise whatever it likes at inputs that are none
        return False


def _agrees(module: nn.Module, like: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    inputs = _probe(module, like, generator)
    module.train()
    for layer in module.modules():
        if isinstance(layer, _DropoutNd):
            layer.p = 0.0
    parameters = [p for p in module.parameters() if p.requires_grad]
    singly = [
        torch.autograd.grad(_probe_loss(module(one[None])).sum(), parameters, allow_unused=True) for one in inputs
    ]
    rows = torch.stack([_flat(gradients, parameters) for gradients in singly])
    norms = torch.linalg.vector_norm(rows, dim=1)
    # So that some are clipped, and some are not.
    clipping_norm = max(float(norms.median()), 1e-6)
    plan = RecordLevelPlan(
        records=1, batch_size=1, epochs=1, rounds=1, clipping_norm=clipping_norm, noise_multiplier=0.0, delta=0.5
    )
    found: list[Tensor] = []

    def see() -> None:
        found.append(_flat([p.grad for p in parameters], parameters))

    engine = BookKeeping(module, _NoStep(), plan=plan, noise=Key.from_seed(0).stream(), correct=see)
    with engine:
        engine.step(inputs, torch.zeros(len(inputs)), lambda outputs, _: _probe_loss(outputs))
    expected = (clipping_norm / norms).clamp(max=1.0) @ rows
    return bool(torch.allclose(found[0], expected, rtol=1e-4, atol=1e-4 * clipping_norm))


def _probe(module: nn.Module, like: Tensor, generator: torch.Generator) -> Tensor:
    """Put random weights into a module, and return random inputs [n, ...], n unlike any other dimension of `like`."""
    for p in module.parameters():
        fan_in = math.prod(p.shape[1:])
        p.data.uniform_(-1.0, 1.0, generator=generator).mul_(1 / math.sqrt(fan_in))
    return random_inputs(next(n for n in range(3, 3 + like.dim() + 1) if n not in like.shape[1:]), like, generator)


def random_inputs(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Return so many random inputs of the shape and type of `like` [n, ...], whose values are not used."""
    shape = (count, *like.shape[1:])
    if like.is_floating_point():
        return torch.randn(shape, generator=generator).to(like.dtype)
    # Bytes are pixels; other whole numbers may be words, of which there are at least two.
    return torch.randint(0, 256 if like.dtype == torch.uint8 else 2, shape, generator=generator).to(like.dtype)


def _probe_loss(outputs: Tensor) -> Tensor:
    """Return a loss [n] that reaches every output differently."""
    values = outputs.flatten(1)
    return (values.square() + values * torch.arange(1, values.shape[1] + 1).cos()).sum(dim=1)


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).detach().double().flatten() for g, p in pairs])


class _NoStep:
    def step(self) -> None:
        """Leave the weights as they are."""


def cleaning_of(factors: Sequence[Tensor]) -> Clean:
    """Return what makes the tensors of a pass finite: nothing, if a look at the factors costs no wait for a device."""
    if not factors or (factors[0].device.type == "cpu" and bool((factors[0] > 0).all())):
        return unchanged
    return finite


def _columns(gradients: list[Gradients]) -> Tensor:
    """Return norms [n, parameters], of what is clipped together."""
    return torch.stack([each.norms for each in gradients], dim=1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _unfit(reason: str) -> RunError:
    return RunError("model-not-private", f'train.dp_engine = "bookkeeping": {reason}; use "auto" or "opacus"')
