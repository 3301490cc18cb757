"""The stacked kernel: many clients' steps at once, with their models along a leading axis.

For models so small that a step's calls take longer than its arithmetic. `torch.func.vmap` makes one client's step that
of all, which is recorded beneath autograd and repeated, as the traced kernel does. Every client takes the sequential
kernel's steps on the same batches, up to rounding; one with fewer records than others takes part in fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...core.keys import Key
from ...privacy.dpsgd.passes import Loss
from ...tasks.task import Examples
from ..local_model import LocalModel
from ..training import LocalTraining
from . import sequential
from .program import Program
from .recording import NotRecordable, record
from .stack_form import Form

# By how much of a step's length a stack's steps may differ from autograd's for one client, which round otherwise.
_TOLERANCE = 1e-4


@dataclass(kw_only=True)
class Stack:
    """The parameters of so many clients [width, ...], a step for them, and what each example of a batch counts.

    `step(inputs [width, batch, ...], targets [width, batch])` moves each client by the gradient of its weighted sum of
    losses; whoever weighs nothing stays.
    """

    parameters: dict[str, nn.Parameter]
    weights: Tensor
    program: Program

    def load(self, model: LocalModel) -> None:
        """Make every client's parameters those of the model."""
        with torch.no_grad():
            for name, tensor in model.trained.items():
                self.parameters[name].copy_(tensor)

    def rows(self, model: LocalModel) -> NDArray[np.float32]:
        """Return the clients' models [width, size], laid out as they travel."""
        flat = [self.parameters[name].detach().flatten(1) for name in model.layout.names]
        rows: NDArray[np.float32] = torch.cat(flat, dim=1).cpu().numpy()
        return rows


def train(
    model: LocalModel,
    loss: Loss,
    examples: Examples,
    begins: NDArray[np.int64],
    sizes: NDArray[np.int64],
    training: LocalTraining,
    form: Form,
    *,
    keys: Sequence[Key],
) -> NDArray[np.float32]:
    """Train the module's parameters on each client's examples, and return the models [clients, size].

    The k-th client's are the `sizes[k]` from `begins[k]` on, and `keys[k]` its own, of which it takes its batches as
    `sequential.train` does. At most `form.width` clients; the module stays as it is.
    """
    stack = prepare(model, loss, training, examples, form)
    stack.load(model)
    width, size = form.width, form.batch
    steps = -(-int(sizes.max()) // size)
    # Places past a client's last record hold its first one, and weigh nothing; so do those of no client.
    rows = np.zeros((width, steps * size), np.int64)
    rows[: len(keys)] = begins[:, None]
    held = np.zeros((width, steps * size), bool)
    held[: len(keys)] = np.arange(steps * size) < sizes[:, None]
    counts = held.reshape(width, steps, size).sum(axis=2, keepdims=True)
    weights = torch.from_numpy(
        (held.reshape(width, steps, size) / np.maximum(counts, 1)).astype(np.float32).swapaxes(0, 1).copy()
    ).to(model.device)
    for epoch in range(training.epochs):
        for place, key in enumerate(keys):
            order = sequential.order_of(int(sizes[place]), key, epoch)
            rows[place, : len(order)] = order + begins[place]
        with torch.inference_mode():
            for step, batch in enumerate(torch.from_numpy(rows).split(size, dim=1)):
                chosen = batch.reshape(-1)
                stack.weights.copy_(weights[step])
                stack.program.step(
                    examples.inputs.index_select(0, chosen).to(model.device).unflatten(0, (width, size)),
                    examples.targets.index_select(0, chosen).to(model.device).unflatten(0, (width, size)),
                )
    return stack.rows(model)[: len(keys)]


def prepare(model: LocalModel, loss: Loss, training: LocalTraining, like: Examples, form: Form) -> Stack:
    """Return the stack that the model keeps for examples like these, made and tried out at the first call.

    Raises NotRecordable, also where it was not recordable before.
    """
    kind = (like.inputs.shape[1:], like.inputs.dtype, form, training.learning_rate)
    if kind not in model.stacks:
        model.stacks[kind] = None
        model.stacks[kind] = _prepared(model, loss, training, like, form)
    stack = model.stacks[kind]
    if stack is None:
        raise NotRecordable("it was tried before, and its steps cannot be stacked")
    return stack


def _prepared(model: LocalModel, loss: Loss, training: LocalTraining, like: Examples, form: Form) -> Stack:
    if list(model.module.buffers()) or training.precision != "float32":
        raise NotRecordable("a stack holds float32 parameters, and neither buffers nor other precisions")
    if set(model.trained) != set(model.layout.names) or any(p.dtype != torch.float32 for p in model.trained.values()):
        raise NotRecordable("a stack holds float32 parameters that all travel")
    width, size = form.width, form.batch
    parameters: dict[str, nn.Parameter] = {
        name: nn.Parameter(tensor.detach().expand(width, *tensor.shape).clone())
        for name, tensor in model.trained.items()
    }
    weights = torch.zeros(width, size, device=model.device)

    def one(of: dict[str, Tensor], inputs: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model.module, of, (inputs,))
        return (loss(outputs, targets) * counts).sum()

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        return torch.func.vmap(one)(dict(parameters), inputs, targets, weights).sum()

    records = torch.arange(width * size) % len(like)
    inputs = like.inputs[records].to(model.device).unflatten(0, (width, size))
    targets = like.targets[records].to(model.device).unflatten(0, (width, size))
    was_training = model.module.training
    model.module.train()
    try:
        recording = record(step, model.module, list(parameters.values()), inputs, targets)
        other = record(step, model.module, list(parameters.values()), torch.zeros_like(inputs), targets)
        if not recording.same_steps(other):
            raise NotRecordable("the model does other things for other numbers")
        program = Program(recording, list(parameters.values()), rate=training.learning_rate)
        stack = Stack(parameters=parameters, weights=weights, program=program)
        if program.draws:
            raise NotRecordable("the model draws random numbers, which each client draws by itself")
        _refuse_other_steps(stack, model, loss, training, inputs, targets)
    except NotRecordable:
        raise
    except Exception as error:  # whatever a model or a loss raises, the sequential kernel raises again
        raise NotRecordable(f"a step of a stack fails: {type(error).__name__}") from error
    finally:
        model.module.train(was_training)
    return stack


def _refuse_other_steps(
    stack: Stack, model: LocalModel, loss: Loss, training: LocalTraining, inputs: Tensor, targets: Tensor
) -> None:
    """Raise NotRecordable unless two steps of a stack are autograd's: on whole batches, on short ones, and on none."""
    width, size = stack.weights.shape
    lengths = [size if place == 0 else place % (size + 1) for place in range(width)]
    for place, length in enumerate(lengths):
        stack.weights[place] = 0.0
        stack.weights[place, :length] = 1 / max(1, length)
    stack.load(model)
    start = stack.rows(model)
    with torch.inference_mode():
        for _ in range(2):
            stack.program.step(inputs.clone(), targets.clone())
    found = stack.rows(model) - start
    before = [parameter.detach().clone() for parameter in model.parameters]
    for place in range(min(width, size + 2)):
        length, optimizer = lengths[place], training.make_optimizer(model.parameters)
        for _ in range(2 if length else 0):
            batch, wanted = inputs[place, :length].clone(), targets[place, :length].clone()
            sequential.take_step(model, loss, training, optimizer, batch, wanted)
        flat = [model.trained[name].detach().flatten() for name in model.layout.names]
        expected = torch.cat(flat).cpu().numpy() - start[place]
        optimizer.zero_grad()
        with torch.no_grad():
            for parameter, value in zip(model.parameters, before, strict=True):
                parameter.copy_(value)
        # Numbers that are not finite fail this too.
        if not np.abs(found[place] - expected).max() <= _TOLERANCE * np.abs(expected).max():
            raise NotRecordable("its steps in a stack differ from those of autograd")
