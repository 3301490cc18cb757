"""The traced kernel: a step of plain SGD is recorded once for each size of batch, and repeated without autograd.

It takes the sequential kernel's steps on the same batches, up to rounding, and takes a step for which there is no
program as that does. Where a strategy corrects gradients the sequential one trains; so it does under record-level
privacy, with passes that are repeated (`recorded_passes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

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
from .memory_format import in_order, memory_format
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
    if plan is not None or type(session) not in (Untouched, type(None)):
        sequential.train(model, loss, examples, training, plan=plan, key=key, session=session, hide=hide)
        return
    programs = _programs(model, loss, training, examples)
    with _draws(model, key.child("dropout"), programs):
        order = memory_format(model, examples.inputs)
        for records in _stretches(len(examples), training, key):
            inputs, targets = sequential.on_device(examples, records, model.device)
            inputs, size = in_order(inputs, order), min(training.batch_size, len(inputs))
            _train_on(model, loss, training, inputs.split(size), targets.split(size), programs[size])


def _programs(model: LocalModel, loss: Loss, training: LocalTraining, examples: Examples) -> dict[int, Program | None]:
    """Return the programs for the sizes of batches that training takes; None where there cannot be one."""
    whole, rest = divmod(len(examples), training.batch_size)
    sizes = (training.batch_size if whole else 0, rest)
    found: dict[int, Program | None] = {}
    for size in filter(None, sizes):
        batch = Examples(examples.inputs[:size], examples.targets[:size])
        form = _form(batch, training)
        if form not in model.programs:
            try:
                prepare(model, loss, training, batch)
            except NotRecordable:
                model.programs[form] = None
        found[size] = model.programs[form]
    return found


@contextmanager
def _draws(model: LocalModel, key: Key, programs: Mapping[int, Program | None]) -> Iterator[None]:
    """Seed torch's generators from the key, and put them back; where no step draws, there is no need."""
    if all(program is not None and not program.draws for program in programs.values()):
        yield
        return
    model.module.train()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        sequential.seed_generators(model.device, key.integer())
        yield


def _stretches(records: int, training: LocalTraining, key: Key) -> Iterator[Tensor]:
    """Yield the records of whole batches, some at a time, and of the last, shorter batch of an epoch by itself."""
    size = training.batch_size
    for order in sequential.shuffled(records, training, key):
        whole = records - records % size
        if whole:
            yield from order[:whole].split(_GATHERED * size)
        if records > whole:
            yield order[whole:]


def _train_on(
    model: LocalModel,
    loss: Loss,
    training: LocalTraining,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    program: Program | None,
) -> None:
    """Take the steps on batches of one size, in their order."""
    if program is None:
        optimizer = training.make_optimizer(model.parameters)
        for batch, wanted in zip(inputs, targets, strict=True):
            sequential.take_step(model, loss, training, optimizer, batch, wanted)
        return
    with torch.inference_mode():
        program.begin()
        for batch, wanted in zip(inputs, targets, strict=True):
            program.step(batch, wanted)
        program.settle()


def _form(batch: Examples, training: LocalTraining) -> tuple[object, ...]:
    return (batch.inputs.shape, batch.inputs.dtype, batch.targets.shape, batch.targets.dtype, training.learning_rate)


def prepare(model: LocalModel, loss: Loss, training: LocalTraining, batch: Examples) -> None:
    """Have the model keep a program for batches like this one, once it was seen to take autograd's steps.

    Raises NotRecordable.
    """
    inputs, targets = batch.inputs.to(model.device), batch.targets.to(model.device)
    inputs = in_order(inputs, memory_format(model, inputs))
    parameters, devices = model.parameters, [model.device] if model.device.type == "cuda" else []

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        return loss(sequential.outputs_of(model, inputs, training), targets).mean()

    def twice_by_autograd() -> None:
        optimizer = training.make_optimizer(parameters)
        for _ in range(2):
            sequential.take_step(model, loss, training, optimizer, inputs.clone(), targets.clone())
        optimizer.zero_grad()

    def twice_by_program() -> None:
        with torch.inference_mode():
            program.begin()
            for _ in range(2):
                program.step(inputs.clone(), targets.clone())
            program.settle()

    was_training = model.module.training
    model.module.train()
    try:
        with torch.random.fork_rng(devices=devices):
            # A model may work in place on what it is given.
            recording = record(step, model.module, parameters, inputs.clone(), targets.clone())
            # What a step does must not follow from a batch's numbers.
            other = record(step, model.module, parameters, torch.zeros_like(inputs), targets.clone())
            if not recording.same_steps(other):
                raise NotRecordable("the model does other things for other numbers")
            program = Program(recording, parameters, rate=training.learning_rate)
            expected, found = _moved(model, twice_by_autograd), _moved(model, twice_by_program)
    except NotRecordable:
        raise
    except Exception as error:  # whatever a model or a loss raises, the sequential kernel raises again
        raise NotRecordable(f"a step of it fails: {type(error).__name__}") from error
    finally:
        model.module.train(was_training)
    # Numbers that are not finite fail this too.
    if not (found - expected).abs().max() <= _TOLERANCE * expected.abs().max():
        raise NotRecordable("its steps differ from those of autograd")
    model.programs[_form(batch, training)] = program


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
