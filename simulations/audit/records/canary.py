"""Planted records, in the mechanism without sampling, by the engine that the run trains with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ....clients.local_model import LocalModel
from ....clients.training import LocalTraining
from ....core.keys import Key
from ....privacy.canary import canary_test
from ....privacy.dpsgd.passes import Loss
from ....privacy.mechanism import RecordLevelPlan
from ....tasks.task import Examples
from ..coins import guessed
from ..finding import Finding
from .probe import Seeing
from .subject import Subject


def canary(subject: Subject) -> Finding:
    """Planted records are found no more often than the claimed noise allows, at the site with the least noise."""
    site = min(subject.mechanisms, key=lambda name: subject.mechanisms[name].noise_multiplier)
    found = canary_test(
        subject.mechanisms[site],
        subject.key.child("audit", "canary"),
        steps=partial(_kernel_steps, subject),
        device=subject.model.device,
    )
    return guessed(found)


def _kernel_steps(
    subject: Subject,
    layer: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    plan: RecordLevelPlan,
    key: Key,
    see: Callable[[], None],
) -> None:
    """Take the steps by the kernel."""
    model = LocalModel(layer, LocalTraining(buffers=()), device=inputs.device)
    subject.kernel(model, loss, Examples(inputs, targets), plan=plan, key=key, session=Seeing(see))
