"""The gradients of a batch's examples for one parameter, not written out: norms, and any weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Clean = Callable[[Tensor], Tensor]
Add = Callable[[Tensor, Tensor, Clean, bool], None]

_VANISHED = 1e-18
"""More than a float32 number whose square vanishes: a norm is made longer by it."""
_ROUNDING = 2.0**-23
"""A ghost norm is of the exact gradient; its float32 sum may be longer by this share of Σ |a_t| |g_t|."""


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """The gradients of n examples for one parameter: `norms` [n], and `add` for Σ factor · gradient.

    A norm is too small by rounding in float32 at most, and not finite if the gradient is not. `add` takes the total in
    the parameter's shape, the factors [n], `finite` or `unchanged` for the tensors that it multiplies (if an example is
    bad, only the first makes 0 · gradient zero), and whether to add to the total or to overwrite it.
    """

    parameter: Tensor
    norms: Tensor
    add: Add


def of_positions(parameter: Tensor, a: Tensor, g: Tensor, add: Add | None = None) -> Gradients:
    """Return the gradients Σ_t g_t a_tᵀ of inputs a [n, groups, T, p] and output gradients g [n, groups, T, q]."""
    positions, numbers = a.shape[2], a.shape[3] * g.shape[3]
    # Twice, since the ghost norm takes float64.
    if 2 * positions * (a.shape[3] + g.shape[3]) > numbers:
        return _written_out(parameter, g.mT @ a, channels_last=parameter.dim() > 2)
    products = inner_products(a) * inner_products(g)
    return Gradients(
        parameter=parameter,
        norms=ghost_norms(products, norms(a) * norms(g)),
        add=add
        or (
            lambda total, factors, clean, more: add_product(
                total, weighted(factors, clean(g)).flatten(0, 2), clean(a).flatten(0, 2), more
            )
        ),
    )


def inner_products(vectors: Tensor) -> Tensor:
    """Return the inner products [n, t, t] of an example's vectors [n, t, d], in float64."""
    wide = vectors.double()
    return wide @ wide.mT


def ghost_norms(products: Tensor, most: Tensor) -> Tensor:
    """Return the roots [n] of the sums of products [n, ...], and what rounding the gradient itself may add.

    `most` [n] is at least Σ |a_t| |g_t|, of which the products may have cancelled all but little.
    """
    squares = products.flatten(1).sum(dim=1)
    # clamp would make a norm of what is not a number.
    root = torch.where(squares < 0, torch.zeros_like(squares), squares).sqrt()
    return root.to(most.dtype) + _ROUNDING * most


def of_bias(parameter: Tensor | None, gradients: Callable[[], Tensor]) -> list[Gradients]:
    """Return the gradients of a parameter that may be missing or frozen."""
    if parameter is None or not parameter.requires_grad:
        return []
    return [_written_out(parameter, gradients())]


def _written_out(parameter: Tensor, gradients: Tensor, *, channels_last: bool = False) -> Gradients:
    """Return gradients [n, ...] that are small enough to be there, those of a convolution with channels last."""
    rows, shape = gradients.flatten(1), parameter.shape

    def reordered(total: Tensor, factors: Tensor, clean: Clean, more: bool) -> None:
        add_to(total, (factors @ clean(rows)).view(shape[0], *shape[2:], shape[1]).movedim(-1, 1), more)

    return Gradients(
        parameter=parameter,
        norms=torch.linalg.vector_norm(rows, dim=1),
        add=reordered if channels_last else partial(add_rows, rows),
    )


def add_rows(rows: Tensor, total: Tensor, factors: Tensor, clean: Clean, more: bool) -> None:
    """Add Σ factor · row of rows [n, numbers]."""
    total.view(-1).addmv_(clean(rows).mT, factors, beta=float(more))


def add_product(total: Tensor, g: Tensor, a: Tensor, more: bool) -> None:
    """Add gᵀa of g [n, q] and a [n, p] to a total [q, p], without a copy of it in between."""
    # With beta = 0 what was in the total does not count, be it infinite.
    total.addmm_(g.mT, a, beta=float(more))


def add_to(total: Tensor, part: Tensor, more: bool) -> None:
    """Add a part to a total, or put it in its place."""
    if more:
        total.add_(part)
    else:
        total.copy_(part)


def finite(tensor: Tensor) -> Tensor:
    """Return a tensor with 0 for what is not finite."""
    return tensor.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def unchanged(tensor: Tensor) -> Tensor:
    """Return a tensor as it is."""
    return tensor


def norms(tensor: Tensor) -> Tensor:
    """Return norms [n] that are not too small, even where the squares of all numbers vanish."""
    rows = tensor.flatten(1) if tensor.dim() > 2 else tensor
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.add_(_VANISHED * math.sqrt(rows.shape[1]))


def weighted(factors: Tensor, tensor: Tensor) -> Tensor:
    """Return each example's part of a tensor [n, ...] times its factor [n]."""
    return tensor * (factors.unsqueeze(1) if tensor.dim() == 2 else factors.view(-1, *[1] * (tensor.dim() - 1)))
