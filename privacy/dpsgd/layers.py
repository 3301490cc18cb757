"""Models that can be private: a layer's output for a record may depend on that record and the weights alone.

Batch normalization mixes the records of a batch, and its running statistics carry them out in the state dict, even
where it is frozen or has no weights (which Opacus' validator lets pass).
"""

from __future__ import annotations

import copy
from itertools import chain

import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ...core.errors import InputError

_LEAST_CHANNELS = 4
"""A group of a single channel would normalize a vector's only number, to zero."""


def make_private(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return a copy that DP-SGD can train, and a sentence for each layer that was replaced.

    Errors: InputError `model-not-private` that names the first layer without a replacement.
    """
    for path, layer in module.named_modules():
        if LazyModuleMixin in type(layer).mro():  # isinstance would hide from mypy that it is a Module
            raise _refused(path, layer, "give it its number of inputs, a lazy layer has no weights yet")
    module = copy.deepcopy(module)
    notes: list[str] = []
    replaced: dict[nn.Module, nn.Module] = {}
    # A layer that stands in two places stays one layer.
    for path, layer in list(module.named_modules(remove_duplicate=False)):
        replacement = replaced.get(layer) or _replacement(layer, path)
        if replacement is None:
            continue
        if layer not in replaced:
            replacement.train(layer.training)
            replaced[layer] = replacement
        notes.append(f"{_named(path, layer)} was replaced by {_described(layer, replacement)}")
        module = _put(module, path, replacement)
    for path, layer in module.named_modules():
        _refuse_what_mixes(path, layer)
        _refuse_what_opacus_refuses(path, layer)
    _refuse_what_has_no_gradients(module)
    return module, notes


def needs_autograd(module: nn.Module) -> bool:
    """Return whether Opacus' own rules are wrong for a layer, so that it has to differentiate record by record.

    In 1.6 they take any padding of a convolution for zeros, and give the padding word of an embedding a gradient.
    """
    return any(
        (isinstance(layer, _ConvNd) and layer.padding_mode != "zeros")
        or (isinstance(layer, nn.Embedding) and layer.padding_idx is not None)
        for layer in module.modules()
        if _has_trainable_of_its_own(layer)
    )


def _replacement(layer: nn.Module, path: str) -> nn.Module | None:
    if isinstance(layer, _BatchNorm):
        return _group_norm(layer, path)
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        return _without_statistics(layer)
    fixer = ModuleValidator.FIXERS.get(type(layer))
    if fixer is not None and not isinstance(layer, _InstanceNorm) and _trainable(layer):
        try:
            return _where(fixer(layer), layer)
        except Exception as error:  # fixers raise whatever the layer's options lead to
            raise _refused(path, layer, f"Opacus' replacement does not take it ({error})") from error
    return None


def _group_norm(layer: _BatchNorm, path: str) -> nn.Module:
    """Return Wu and He's (2018) group normalization with the layer's weights: at most 32 groups."""
    channels = layer.num_features
    if channels == 1 and isinstance(layer, nn.BatchNorm1d):
        raise _refused(path, layer, "with one feature no normalization of a single record is left; drop it")
    least = min(_LEAST_CHANNELS, channels)
    groups = max(g for g in range(1, 33) if channels % g == 0 and channels // g >= least)
    norm = nn.GroupNorm(groups, channels, eps=layer.eps, affine=layer.affine)
    if layer.affine:
        _take_weights(norm, layer)
    return _where(norm, layer)


def _without_statistics(layer: _InstanceNorm) -> nn.Module:
    norm = type(layer)(layer.num_features, eps=layer.eps, affine=layer.affine, track_running_stats=False)
    if layer.affine:
        _take_weights(norm, layer)
    return _where(norm, layer)


def _take_weights(target: nn.Module, source: nn.Module) -> None:
    for name, parameter in target.named_parameters():
        given = source.get_parameter(name)
        with torch.no_grad():
            parameter.copy_(given)
        parameter.requires_grad_(given.requires_grad)


def _where(replacement: nn.Module, layer: nn.Module) -> nn.Module:
    """Move the replacement to the device and type of the layer."""
    for tensor in chain(layer.parameters(), layer.buffers()):
        if tensor.is_floating_point():
            return replacement.to(device=tensor.device, dtype=tensor.dtype)
    return replacement


def _put(root: nn.Module, path: str, layer: nn.Module) -> nn.Module:
    if not path:
        return layer
    parent, _, name = path.rpartition(".")
    # Not set_submodule: a Sequential's keys are not attributes that a type checker or torch.compile's wrapper knows.
    root.get_submodule(parent)._modules[name] = layer
    return root


def _refuse_what_mixes(path: str, layer: nn.Module) -> None:
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        if layer.max_norm is not None:
            # Frozen or not: looking a word up shortens it, for all other records too, and without noise.
            raise _refused(path, layer, "with max_norm it changes the weights of the words that a batch holds; drop it")
        if layer.scale_grad_by_freq:
            raise _refused(path, layer, "scale_grad_by_freq counts a word over all records of a batch; drop it")


def _refuse_what_opacus_refuses(path: str, layer: nn.Module) -> None:
    validator = ModuleValidator.VALIDATORS.get(type(layer))
    errors = validator(layer) if validator is not None and _trainable(layer) else []
    if errors:
        raise _refused(path, layer, str(errors[0]).splitlines()[0])
    if isinstance(layer, nn.EmbeddingBag) and _trainable(layer):
        raise _refused(path, layer, "Opacus wants offsets beside its input; use Embedding and a mean")
    own_buffers = [name for name, _ in layer.named_buffers(recurse=False)]
    if own_buffers and _has_trainable_of_its_own(layer):
        raise _refused(path, layer, f"it keeps the buffer `{own_buffers[0]}` beside weights that are trained")


def _refuse_what_has_no_gradients(module: nn.Module) -> None:
    """Wrap a copy as DP-SGD will wrap the module; Opacus then raises for what it cannot differentiate by example."""
    if not _trainable(module):
        raise InputError("model-not-private", "train.model: no weight is trained; unfreeze at least one")
    try:
        GradSampleModule(copy.deepcopy(module), loss_reduction="sum", strict=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise InputError("model-not-private", f"train.model: Opacus cannot train it ({reason})") from error


def _trainable(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters())


def _has_trainable_of_its_own(layer: nn.Module) -> bool:
    return any(p.requires_grad for p in layer.parameters(recurse=False))


def _named(path: str, layer: nn.Module) -> str:
    return f"layer {path} ({type(layer).__name__})" if path else f"the model ({type(layer).__name__})"


def _described(layer: nn.Module, replacement: nn.Module) -> str:
    if isinstance(layer, _InstanceNorm):
        return f"{type(replacement).__name__} without running statistics"
    return type(replacement).__name__


def _refused(path: str, layer: nn.Module, why: str) -> InputError:
    return InputError("model-not-private", f"train.model: {_named(path, layer)} cannot be private: {why}")
