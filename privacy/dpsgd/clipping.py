"""What an example's gradient is multiplied by, so that it is no longer than the clipping norm, whatever it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..mechanism import RecordLevelPlan

_MARGIN = 1e-5
"""Norms are float32: a norm that rounding made too small must not let a gradient be longer than the clipping norm."""


def layer_norm(plan: RecordLevelPlan, layers: int) -> float:
    """Return what each of so many parts of a gradient that are clipped by themselves is clipped to.

    Layers whose norms are at most C / √L each keep a whole gradient's within C.
    """
    return plan.clipping_norm / math.sqrt(layers if plan.per_layer else 1)


def clip_factors(layers: Sequence[Sequence[Tensor]], norm: float) -> list[Tensor | None]:
    """Return what each example [n] of a pass is multiplied by, for each layer that is clipped by itself to `norm`.

    A layer is given as tensors [n, any] that have, row by row, the norms of the examples' gradients; none if the
    loss did not reach it.
    """
    factors = [_factors(list(rows), norm) if rows else None for rows in layers]
    there = [each for each in factors if each is not None]
    if len(there) < 2:
        return factors
    # An example that is bad in one layer counts as zero in all of them.
    sound = torch.stack(there).amin(dim=0) > 0
    return [None if each is None else each * sound for each in factors]


def _factors(samples: list[Tensor], clipping_norm: float) -> Tensor:
    """Return the factor [n] of each example, from its gradients [n, size of a parameter]: 0 if one is not finite."""
    norm = torch.linalg.vector_norm(samples[0], dim=1)
    if len(samples) > 1:
        others = [torch.linalg.vector_norm(sample, dim=1) for sample in samples[1:]]
        norm = torch.linalg.vector_norm(torch.stack([norm, *others], dim=1), dim=1)
    # An infinite norm gives 0 by itself.
    factors: Tensor = clipping_norm / (1 + _MARGIN) / norm
    return factors.clamp_(max=1.0).nan_to_num_(nan=0.0)
