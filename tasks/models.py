"""Small models of the built-in tasks; each has layers that Opacus can take per-example gradients of."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ..core.errors import InputError

HIDDEN = 32


def check_model(model: str, models: tuple[str, ...]) -> None:
    """Raise InputError unless `model`, the key `train.model`, is one of the task's models."""
    if model not in models:
        names = " or ".join(f'"{name}"' for name in models)
        raise InputError("experiment-value", f"train.model = {model!r}: this task has {names}")


def logistic(features: int, outputs: int) -> nn.Module:
    """Return multinomial (one output: binary) logistic regression over inputs [n, features]."""
    return nn.Linear(features, outputs)


def mlp(features: int, outputs: int) -> nn.Module:
    """Return a perceptron with one hidden layer of tanh units (bounded activations suit clipping: Papernot 2021)."""
    return nn.Sequential(
        OrderedDict(hidden=nn.Linear(features, HIDDEN), tanh=nn.Tanh(), linear=nn.Linear(HIDDEN, outputs))
    )


def flattened(model: nn.Module) -> nn.Module:
    """Return `model` for inputs of any shape [n, ...]."""
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), model=model))


def small_cnn(outputs: int) -> nn.Module:
    """Return a network of two convolutions with GroupNorm for images [n, 1, 8, 8]."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, kernel_size=3, padding=1),
            norm1=nn.GroupNorm(4, 16),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 32, kernel_size=3, padding=1),
            norm2=nn.GroupNorm(4, 32),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            linear=nn.Linear(32 * 2 * 2, outputs),
        )
    )
