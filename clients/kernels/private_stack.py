"""The stacked kernel under record-level privacy: many clients' DP-SGD at once.

Each client draws its own batches and its own noise from its own key, as the sequential kernel does. The pass between
them is one of all clients: each example's gradient by `torch.func.vmap`, written out, clipped and summed, recorded
beneath autograd and repeated. A batch that is larger than a pass takes several: it is never cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...core.keys import Key, single_rows
from ...privacy.dpsgd.bookkeeping import random_inputs
from ...privacy.dpsgd.clipping import clip_factors, layer_norm
from ...privacy.dpsgd.gradients import finite
from ...privacy.dpsgd.noised_sum import NoisedSum
from ...privacy.dpsgd.passes import Loss, trained_layers
from ...privacy.dpsgd.together import batches_together
from ...privacy.mechanism import RecordLevelPlan
from ...tasks.task import Examples
from ..local_model import LocalModel
from ..training import LocalTraining
from .program import recorded_call
from .recording import NotRecordable
from .stack_form import Form

# By how much of its length a stack's sum may differ from the engine's, which rounds otherwise.
_TOLERANCE = 1e-4


@dataclass(kw_only=True)
class PrivateStack:
    """So many clients' parameters, flat [width, size], and the clipped sums of their steps; `held` [width, batch].

    `pass_(inputs [width, batch, ...], targets [width, batch])` adds the clipped gradients of the examples that `held`
    holds as 1 to the sums. The numbers lie in the order in which the noise is drawn, tensor `names[k]` in `slices[k]`.
    """

    flat: Tensor
    sums: Tensor
    held: Tensor
    names: Sequence[str]
    slices: Sequence[slice]
    pass_: Callable[[Tensor, Tensor], Tensor]

    def load(self, model: LocalModel) -> None:
        """Make every client's parameters those of the model."""
        with torch.no_grad():
            self.flat.copy_(torch.cat([model.trained[name].flatten() for name in self.names]))

    def rows(self, model: LocalModel) -> NDArray[np.float32]:
        """Return the clients' models [width, size], laid out as they travel."""
        of = dict(zip(self.names, self.slices, strict=True))
        rows: NDArray[np.float32] = torch.cat([self.flat[:, of[name]] for name in model.layout.names], dim=1).numpy()
        return rows


def train(
    model: LocalModel,
    loss: Loss,
    examples: Examples,
    begins: NDArray[np.int64],
    training: LocalTraining,
    form: Form,
    *,
    keys: Sequence[Key],
    plans: Sequence[RecordLevelPlan],
) -> NDArray[np.float32]:
    """Train the module's parameters on each client's examples, and return the models [clients, size].

    The k-th client's are `plans[k].records` from `begins[k]` on; from `keys[k]` it takes its batches and its noise as
    `sequential.train` does. At most `form.width` clients, which all clip alike; the module stays as it is.

    Formal guarantee: that of each client's plan; no client's examples or draws reach another's sum.
    """
    stack = prepare(model, loss, training, examples, form, plans[0])
    stack.load(model)
    size, clients = stack.flat.shape[1], len(plans)
    batches = batches_together(plans, [key.child("batches").stream() for key in keys])
    noises = [key.child("noise").stream() for key in keys]
    noise = torch.zeros(form.width, size)
    deviations, moves = torch.zeros(form.width, 1), torch.zeros(form.width, 1)
    steps = np.array([plan.steps_per_round for plan in plans])
    with torch.inference_mode():
        for step, (records, counts) in enumerate(batches):
            stack.sums.zero_()
            for first in range(0, int(counts.max(initial=0)), form.batch):
                _take_pass(stack, examples, form, begins, records[:, first : first + form.batch], counts - first)
            going = np.flatnonzero(step < steps).tolist()
            deviations.zero_()
            moves.zero_()
            for place in going:
                deviations[place] = plans[place].noise_deviation
                moves[place] = -training.learning_rate / plans[place].expected_batch
            noisy = [place for place in going if plans[place].noise_deviation]
            if noisy:
                noise[noisy] = torch.from_numpy(single_rows([noises[place] for place in noisy], size))
            stack.flat.addcmul_(stack.sums.addcmul_(noise, deviations), moves)
    return stack.rows(model)[:clients]


def _take_pass(
    stack: PrivateStack,
    examples: Examples,
    form: Form,
    begins: NDArray[np.int64],
    records: NDArray[np.int64],
    left: NDArray[np.int64],
) -> None:
    clients, places = records.shape
    rows = np.zeros((form.width, form.batch), np.int64)
    rows[:clients, :places] = records
    rows[:clients] += begins[:, None]
    held = np.zeros((form.width, form.batch), np.float32)
    held[:clients] = np.arange(form.batch) < left[:, None]
    stack.held.copy_(torch.from_numpy(held))
    chosen = torch.from_numpy(rows.reshape(-1))
    shape = (form.width, form.batch)
    stack.pass_(
        examples.inputs.index_select(0, chosen).unflatten(0, shape),
        examples.targets.index_select(0, chosen).unflatten(0, shape),
    )


def prepare(
    model: LocalModel, loss: Loss, training: LocalTraining, like: Examples, form: Form, plan: RecordLevelPlan
) -> PrivateStack:
    """Return the stack that the model keeps for examples like these, made at the first call.

    It is tried out on random examples. `plan` says how gradients are clipped. Raises NotRecordable, also where it was
    not recordable before.
    """
    kind = (like.inputs.shape[1:], like.inputs.dtype, form, plan.clipping_norm, plan.per_layer)
    if kind not in model.private_stacks:
        model.private_stacks[kind] = None
        model.private_stacks[kind] = _prepared(model, loss, training, like, form, plan)
    stack = model.private_stacks[kind]
    if stack is None:
        raise NotRecordable("it was tried before, and its passes cannot be stacked")
    return stack


def _prepared(
    model: LocalModel, loss: Loss, training: LocalTraining, like: Examples, form: Form, plan: RecordLevelPlan
) -> PrivateStack:
    if list(model.module.buffers()) or set(model.trained) != set(model.layout.names):
        raise NotRecordable("a stack holds parameters that all travel, and no buffers")
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.trained.values()):
        raise NotRecordable("a private stack holds float32 parameters on a processor")
    stack, views, layers = _rooms(model, form)
    width, batch = form.width, form.batch
    norm = layer_norm(plan, len(layers))

    def one(of: dict[str, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
        losses = loss(torch.func.functional_call(model.module, of, (inputs[None],)), target[None])
        if losses.shape != (1,):
            raise NotRecordable("the loss does not give one number for one example")
        return losses[0]

    def call(inputs: Tensor, targets: Tensor) -> list[Tensor]:
        # Each example has its own copy of its client's parameters, whose gradient is the example's.
        own = {
            name: view[:, None].expand(width, batch, *view.shape[1:]).detach().requires_grad_()
            for name, view in views.items()
        }
        with torch.enable_grad():
            losses = torch.func.vmap(torch.func.vmap(one))(own, inputs, targets)
        found = torch.autograd.grad(losses, list(own.values()), torch.ones_like(losses))
        rows = {name: each.reshape(width * batch, -1) for name, each in zip(own, found, strict=True)}
        by_layer = [[rows[name] for name in names] for names in layers]
        if not plan.per_layer:
            by_layer = [[each for of_layer in by_layer for each in of_layer]]
        factors = clip_factors(by_layer, norm)
        parts: dict[str, Tensor] = {}
        for names, factor in zip(layers if plan.per_layer else [list(rows)], factors, strict=True):
            assert factor is not None
            weights = (factor.view(width, batch) * stack.held)[:, None]
            # A bad example has the factor 0, but 0 · NaN is NaN.
            parts |= {name: (weights @ finite(rows[name]).view(width, batch, -1))[:, 0] for name in names}
        stack.sums.add_(torch.cat([parts[name] for name in stack.names], dim=1))
        return [torch.stack([factor.amin() for factor in factors if factor is not None]).amin()]

    # Random ones: what a run takes must not follow from anybody's records.
    inputs = random_inputs(width * batch, like.inputs, torch.Generator().manual_seed(0)).unflatten(0, (width, batch))
    targets = torch.zeros(width, batch, dtype=like.targets.dtype)
    was_training = model.module.training
    model.module.train()
    try:
        with torch.random.fork_rng(devices=[]):
            stack = replace(stack, pass_=recorded_call(call, model.module, inputs, targets).call)
        _refuse_other_sums(stack, model, loss, training, inputs, targets, plan)
    except NotRecordable:
        raise
    except Exception as error:  # whatever a model or a loss raises, the sequential kernel raises again
        raise NotRecordable(f"a pass of a stack fails: {type(error).__name__}") from error
    finally:
        model.module.train(was_training)
    return stack


def _rooms(model: LocalModel, form: Form) -> tuple[PrivateStack, dict[str, Tensor], list[list[str]]]:
    """Return a stack without its pass, the clients' parameters by name [width, ...], and the names of each layer's."""
    by_layer = [own for _, own in trained_layers(model.module)]
    names = {parameter: name for name, parameter in model.trained.items()}
    parameters: list[nn.Parameter] = [parameter for own in by_layer for parameter in own]
    if any(parameter not in names for parameter in parameters):
        raise NotRecordable("a weight is trained that does not travel")
    # Of one type and on one device, so the noise is drawn in the order of the parameters.
    assert list(NoisedSum(parameters).parts) == parameters
    ends = np.cumsum([parameter.numel() for parameter in parameters]).tolist()
    slices = [slice(end - p.numel(), end) for p, end in zip(parameters, ends, strict=True)]
    flat = torch.zeros(form.width, ends[-1])
    views = {names[p]: flat[:, part].view(form.width, *p.shape) for p, part in zip(parameters, slices, strict=True)}
    stack = PrivateStack(
        flat=flat,
        sums=torch.zeros_like(flat),
        held=torch.zeros(form.width, form.batch),
        names=list(views),
        slices=slices,
        pass_=lambda inputs, targets: inputs,
    )
    return stack, views, [[names[parameter] for parameter in own] for own in by_layer]


def _refuse_other_sums(
    stack: PrivateStack,
    model: LocalModel,
    loss: Loss,
    training: LocalTraining,
    inputs: Tensor,
    targets: Tensor,
    plan: RecordLevelPlan,
) -> None:
    """Raise NotRecordable unless a stack's clipped sums are the engine's: of whole batches, of short ones, of none."""
    from .dp_engines import private_steps

    width, batch = stack.held.shape
    lengths = [batch if place == 0 else place % (batch + 1) for place in range(width)]
    for place, length in enumerate(lengths):
        stack.held[place] = (torch.arange(batch) < length).float()
    stack.load(model)
    stack.sums.zero_()
    with torch.inference_mode():
        stack.pass_(inputs.clone(), targets.clone())
    alone = RecordLevelPlan(
        records=1,
        batch_size=1,
        epochs=1,
        rounds=1,
        clipping_norm=plan.clipping_norm,
        noise_multiplier=0.0,
        delta=0.5,
        per_layer=plan.per_layer,
    )
    sums: list[Tensor] = []

    def see() -> None:
        sums.append(torch.cat([gradient_of(model.trained[name]).flatten() for name in stack.names]))

    still = replace(training, learning_rate=0.0, kernel="sequential")
    noise = Key.from_seed(0).stream()
    with private_steps(model, inputs[0], still, alone, noise, see, None) as private:
        for place in range(min(width, batch + 2)):
            private.step(inputs[place, : lengths[place]], targets[place, : lengths[place]], loss)
    for place, expected in enumerate(sums):
        # Numbers that are not finite fail this too.
        if not float((stack.sums[place] - expected).abs().max()) <= _TOLERANCE * float(expected.abs().max()):
            raise NotRecordable("its sums in a stack differ from those of one client")


def gradient_of(parameter: Tensor) -> Tensor:
    """Return a copy of a parameter's gradient, zeros if it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
