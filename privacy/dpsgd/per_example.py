"""Per-example gradients of one layer, not written out: their norms, and any weighted sum of them.

From a layer's input a and the gradient g of its output (Goodfellow 2015; Bu, Wang, Zha & Karypis 2023, section 2).
Where an example's own gradient is smaller than what its norm would take, it is computed after all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv1d_weight, conv2d_weight

from .gradients import (
    Clean,
    Gradients,
    add_product,
    add_rows,
    add_to,
    ghost_norms,
    inner_products,
    norms,
    of_bias,
    of_positions,
    weighted,
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What book-keeping knows of a type of layer.

    `fits` says whether the options of a layer are known; `forward` returns its output and the input to keep, with the
    weights detached; `gradients` takes that input [n, ...] and the gradient of the output [n, ...].
    """

    parameters: tuple[str, ...]
    fits: Callable[[Any], bool]
    forward: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    gradients: Callable[[Any, Tensor, Tensor], list[Gradients]]


def kind_of(layer: nn.Module) -> Kind | None:
    """Return what is known of a layer; None if its type, its options or its parameters are not the known ones.

    A subclass may compute anything, and a layer with a `forward` of its own as well.
    """
    kind = _kinds().get(type(layer))
    own = [name for name, parameter in layer.named_parameters(recurse=False) if parameter is not None]
    if kind is None or "forward" in layer.__dict__ or not set(own) <= set(kind.parameters) or not kind.fits(layer):
        return None
    return kind


def _kinds() -> Mapping[type[nn.Module], Kind]:
    linear = Kind(parameters=("weight", "bias"), fits=_always, forward=_linear, gradients=_of_linear)
    convolution = Kind(parameters=("weight", "bias"), fits=_always, forward=_convolution, gradients=_of_convolution)
    norm = Kind(parameters=("weight", "bias"), fits=_always, forward=_layer_norm, gradients=_of_layer_norm)
    groups = Kind(parameters=("weight", "bias"), fits=_always, forward=_group_norm, gradients=_of_group_norm)
    embedding = Kind(parameters=("weight",), fits=_plain_embedding, forward=_embedding, gradients=_of_embedding)
    return {
        nn.Linear: linear,
        nn.Conv1d: convolution,
        nn.Conv2d: convolution,
        nn.Embedding: embedding,
        nn.GroupNorm: groups,
        nn.LayerNorm: norm,
    }


def _always(layer: nn.Module) -> bool:
    return True


def _linear(layer: nn.Linear, inputs: Tensor) -> tuple[Tensor, Tensor]:
    return functional.linear(inputs, layer.weight.detach(), _detached(layer.bias)), inputs


def _of_linear(layer: nn.Linear, inputs: Tensor, outputs: Tensor) -> list[Gradients]:
    inputs = inputs.to(outputs.dtype)
    if inputs.dim() > 2:
        # A sequence: its positions, whatever their dimensions, are one.
        a, g = (each.flatten(1, -2).unsqueeze(1) for each in (inputs, outputs))
        found = [of_positions(layer.weight, a, g)] if layer.weight.requires_grad else []
        return found + of_bias(layer.bias, lambda: g.sum(dim=(1, 2)))
    size = norms(outputs)
    found = []
    if layer.weight.requires_grad:
        found.append(
            Gradients(
                parameter=layer.weight,
                norms=size * norms(inputs),
                add=lambda total, factors, clean, more: add_product(
                    total, weighted(factors, clean(outputs)), clean(inputs), more
                ),
            )
        )
    bias = layer.bias
    if bias is not None and bias.requires_grad:
        found.append(Gradients(parameter=bias, norms=size, add=partial(add_rows, outputs)))
    return found


def _convolution(layer: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> tuple[Tensor, Tensor]:
    padding: Any = layer.padding
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs, padding = functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode), 0
    convolve = functional.conv1d if isinstance(layer, nn.Conv1d) else functional.conv2d
    weight, bias = layer.weight.detach(), _detached(layer.bias)
    return convolve(inputs, weight, bias, layer.stride, padding, layer.dilation, layer.groups), inputs


def _of_convolution(layer: nn.Conv1d | nn.Conv2d, inputs: Tensor, outputs: Tensor) -> list[Gradients]:
    inputs = inputs.to(outputs.dtype)
    count, groups = len(outputs), layer.groups
    found = []
    if layer.weight.requires_grad:
        padded = layer.padding_mode != "zeros" or isinstance(layer.padding, str)
        padding: Any = (0,) * len(layer.kernel_size) if padded else layer.padding

        def add(total: Tensor, factors: Tensor, clean: Clean, more: bool) -> None:
            gradient = conv1d_weight if isinstance(layer, nn.Conv1d) else conv2d_weight
            weighed, shape = weighted(factors, clean(outputs)), layer.weight.shape
            options = (layer.stride, padding, layer.dilation, groups)
            add_to(total, gradient(clean(inputs), shape, weighed, *options), more)  # type: ignore[no-untyped-call]

        patches = _patches(layer, inputs, padding)
        g = outputs.reshape(count, groups, -1, patches.shape[2]).mT
        found.append(of_positions(layer.weight, patches, g, add))
    return found + of_bias(layer.bias, lambda: outputs.flatten(2).sum(dim=2))


def _patches(layer: nn.Conv1d | nn.Conv2d, inputs: Tensor, padding: Sequence[int]) -> Tensor:
    """Return what each position of the output sees, [n, groups, positions, kernel · channels of a group].

    Channels last: then a kernel's row is one piece of memory, several times as quick to copy as torch's unfold.
    """
    if isinstance(layer, nn.Conv1d):
        inputs, padding = inputs.unsqueeze(2), (0, *padding)
    ones = (1,) * (2 - len(layer.kernel_size))
    (high, wide), (down, right), (below, beside) = (
        (*ones, *each) for each in (layer.kernel_size, layer.stride, layer.dilation)
    )
    images = inputs.permute(0, 2, 3, 1)
    images = functional.pad(images, (0, 0, padding[1], padding[1], padding[0], padding[0])).contiguous()
    count, height, width, channels = images.shape
    rows = (height - below * (high - 1) - 1) // down + 1
    columns = (width - beside * (wide - 1) - 1) // right + 1
    own = channels // layer.groups
    step = width * channels
    seen = images.as_strided(
        (count, layer.groups, rows, columns, high, wide, own),
        (height * step, own, down * step, right * channels, below * step, beside * channels, 1),
    )
    return seen.reshape(count, layer.groups, rows * columns, high * wide * own)


def _plain_embedding(layer: nn.Embedding) -> bool:
    return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse


def _embedding(layer: nn.Embedding, inputs: Tensor) -> tuple[Tensor, Tensor]:
    return functional.embedding(inputs, layer.weight.detach(), layer.padding_idx), inputs


def _of_embedding(layer: nn.Embedding, inputs: Tensor, outputs: Tensor) -> list[Gradients]:
    if not layer.weight.requires_grad:
        return []
    words, g = inputs.reshape(len(inputs), -1), outputs.reshape(len(outputs), -1, layer.embedding_dim)
    if layer.padding_idx is not None:
        g = g.masked_fill((words == layer.padding_idx).unsqueeze(2), 0.0)
    same = words.unsqueeze(2) == words.unsqueeze(1)
    # A product, since `where` would hide a NaN.
    found = ghost_norms(inner_products(g) * same, norms(g) * math.sqrt(words.shape[1]))

    def add(total: Tensor, factors: Tensor, clean: Clean, more: bool) -> None:
        if not more:
            total.zero_()
        total.index_add_(0, words.flatten(), weighted(factors, clean(g)).flatten(0, 1))

    return [Gradients(parameter=layer.weight, norms=found, add=add)]


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = _detached(layer.weight), _detached(layer.bias)
    return functional.layer_norm(inputs, layer.normalized_shape, weight, bias, layer.eps), inputs


def _of_layer_norm(layer: nn.LayerNorm, inputs: Tensor, outputs: Tensor) -> list[Gradients]:
    def total(tensor: Tensor) -> Tensor:
        return tensor.reshape(len(tensor), -1, *layer.normalized_shape).sum(dim=1)

    normal = functional.layer_norm(inputs.to(outputs.dtype), layer.normalized_shape, eps=layer.eps)
    scale, shift = layer.weight, layer.bias
    return of_bias(scale, lambda: total(normal * outputs)) + of_bias(shift, lambda: total(outputs))


def _group_norm(layer: nn.GroupNorm, inputs: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = _detached(layer.weight), _detached(layer.bias)
    return functional.group_norm(inputs, layer.num_groups, weight, bias, layer.eps), inputs


def _of_group_norm(layer: nn.GroupNorm, inputs: Tensor, outputs: Tensor) -> list[Gradients]:
    def total(tensor: Tensor) -> Tensor:
        return tensor.reshape(len(tensor), layer.num_channels, -1).sum(dim=2)

    normal = functional.group_norm(inputs.to(outputs.dtype), layer.num_groups, eps=layer.eps)
    scale, shift = layer.weight, layer.bias
    return of_bias(scale, lambda: total(normal * outputs)) + of_bias(shift, lambda: total(outputs))


def _detached(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach()
