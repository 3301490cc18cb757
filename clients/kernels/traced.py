"""The traced kernel: a step of plain SGD is recorded once for each size of batch, and repeated without autograd.

It takes the sequential kernel's steps on the same batches, up to rounding, and takes a step for which there is no
program as that does. Under record-level privacy, and where a strategy corrects gradients, the sequential one trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...core.keys import Key
from ...privacy.dpsgd.passes import Hide, Loss
from ...privacy.mechanism import RecordLevelPlan
from ...strategies.local_rule import LocalSession, Untouched
from ...tasks.task import Examples
from ..local_model import LocalModel
from ..training import LocalTraining
from . import sequential
from .program import Program
from .recording import NotRecordable, record

# Batches that are gathered at once.
_GATHERED = 32
# By how much of a step's length a program's steps may differ from autograd's, which round otherwise.
_TOLERANCE = 1e-4


def train(
    model: LocalModel,
    loss: Loss,
    examples: Examples,
    training: LocalTraining,
    *,
    plan: RecordLevelPlan | None,
    key: Key,
    session: LocalSession | None = None,
    hide: Hide | None = None,
) -> None:
    """Train the module in place for one round, as `sequential.train` does."""
    if plan is not None or not isinstance(session, Untouched | None):
        sequential.train(model, loss, examples, training, plan=plan, key=key, session=session, hide=hide)
        return
    model.module.train()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        sequential.seed_generators(model.device, key.child("dropout").integer())
        order = sequential.memory_format(model, examples)
        for records in _stretches(len(examples), training, key.child("batches")):
            inputs, targets = sequential.on_device(examples, records, model.device)
            _train_on(model, loss, training, Examples(inputs.contiguous(memory_format=order), targets))


def _stretches(records: int, training: LocalTraining, key: Key) -> Iterator[Tensor]:
    """Yield the records of whole batches, some at a time, and of the last, shorter batch of an epoch by itself."""
    size = training.batch_size
    for order in sequential.shuffled(records, training, key):
        whole = records - records % size
        if whole:
            yield from order[:whole].split(_GATHERED * size)
        if records > whole:
            yield order[whole:]


def _train_on(model: LocalModel, loss: Loss, training: LocalTraining, examples: Examples) -> None:
    """Take the steps on examples in their order, all batches of one size."""
    size = min(training.batch_size, len(examples))
    batches = list(zip(examples.inputs.split(size), examples.targets.split(size), strict=True))
    program = _program(model, loss, training, Examples(*batches[0]))
    if program is None:
        optimizer = training.make_optimizer(model.parameters)
        for inputs, targets in batches:
            sequential.take_step(model, loss, training, optimizer, inputs, targets)
        return
    with torch.inference_mode():
        program.begin()
        for inputs, targets in batches:
            program.step(inputs, targets)
        program.settle()


def _program(model: LocalModel, loss: Loss, training: LocalTraining, batch: Examples) -> Program | None:
    """Return the program for batches like this one; None where there cannot be one."""
    form = (len(batch), training.learning_rate)
    if form not in model.programs:
        try:
            prepare(model, loss, training, batch)
        except NotRecordable:
            model.programs[form] = None
    return model.programs[form]


def prepare(model: LocalModel, loss: Loss, training: LocalTraining, batch: Examples) -> None:
    """Have the model keep a program for batches like this one, once it was seen to take autograd's steps.

    Raises NotRecordable.
    """
    inputs, targets = batch.inputs.to(model.device), batch.targets.to(model.device)
    inputs = inputs.contiguous(memory_format=sequential.memory_format(model, batch))
    parameters, devices = model.parameters, [model.device] if model.device.type == "cuda" else []

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        return loss(sequential.outputs_of(model, inputs, training), targets).mean()

    def twice_by_autograd() -> None:
        optimizer = training.make_optimizer(parameters)
        for _ in range(2):
            sequential.take_step(model, loss, training, optimizer, inputs, targets)
        optimizer.zero_grad()

    def twice_by_program() -> None:
        with torch.inference_mode():
            program.begin()
            for _ in range(2):
                program.step(inputs, targets)
            program.settle()

    was_training = model.module.training
    model.module.train()
    try:
        with torch.random.fork_rng(devices=devices):
            recording = record(step, model.module, parameters, inputs, targets)
            # What a step does must not follow from a batch's numbers.
            if not recording.same_steps(record(step, model.module, parameters, torch.zeros_like(inputs), targets)):
                raise NotRecordable("the model does other things for other numbers")
            program = Program(recording, parameters, rate=training.learning_rate)
            expected, found = _moved(model, twice_by_autograd), _moved(model, twice_by_program)
    except NotRecordable:
        raise
    except Exception as error:  # whatever a model or a loss raises, the sequential kernel raises again
        raise NotRecordable(f"a step of it fails: {type(error).__name__}") from error
    finally:
        model.module.train(was_training)
    if not torch.allclose(found, expected, rtol=0, atol=_TOLERANCE * float(expected.abs().max()), equal_nan=True):
        raise NotRecordable("its steps differ from those of autograd")
    model.programs[len(batch), training.learning_rate] = program


def _moved(model: LocalModel, steps: Callable[[], None]) -> Tensor:
    """Return by how much steps move parameters and buffers, which are put back; always with the same draws."""
    tensors = [*model.module.parameters(), *model.module.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    sequential.seed_generators(model.device, 0)
    try:
        steps()
        after = torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])
        return after - torch.cat([tensor.double().reshape(-1) for tensor in before])
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
