"""The sum of a step's clipped gradients in one piece of memory, and the noise that is added to it as it is drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...core.keys import Stream


class NoisedSum:
    """Σ of the clipped gradients of parameters, flat; `parts[p]` is that of parameter p, in p's shape, to be written.

    It is float32 and, for float64 parameters, float64, however narrow a parameter is, and lies where the parameter
    lies. The memory is used again in each step: what reads `grad` later must copy it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for p in parameters:
            groups.setdefault((_wide(p.dtype), p.device), []).append(p)
        self.parts: dict[Tensor, Tensor] = {}
        self._flat = []
        for (dtype, device), group in groups.items():
            flat = torch.empty(sum(p.numel() for p in group), dtype=dtype, device=device)
            pieces = flat.split([p.numel() for p in group])
            self.parts |= {p: piece.view(p.shape) for p, piece in zip(group, pieces, strict=True)}
            self._flat.append(flat)

    def finish(self, noise: Stream, *, deviation: float, denominator: float) -> None:
        """Make the sum (sum + noise) / denominator, the noise independent N(0, deviation²) in every coordinate.

        The stream is used up in the order of the parameters, those of one type and device together, in float32 normals
        (`Stream.single_blocks`) for a float32 sum and float64 ones for a float64 one. It is drawn on the processor
        whatever the device, so that the key decides it alone.
        """
        for flat in self._flat:
            if not deviation:
                flat.div_(denominator)
            elif flat.dtype == torch.float64:
                flat.add_(torch.from_numpy(noise.normals(len(flat))).to(flat.device), alpha=deviation)
                flat.div_(denominator)
            elif flat.device.type == "cpu":
                first = 0
                # While a block is in the processor's cache: a large model's sum is read and written once.
                for block in noise.single_blocks(len(flat)):
                    part = flat[first : first + len(block)]
                    part.add_(torch.from_numpy(block), alpha=deviation).div_(denominator)
                    first += len(block)
            else:
                flat.add_(_drawn(noise, flat), alpha=deviation).div_(denominator)


def _drawn(noise: Stream, like: Tensor) -> Tensor:
    """Return float32 normals on a tensor's device, by way of memory that it can read by itself."""
    host = torch.empty(len(like), pin_memory=like.device.type == "cuda")
    first = 0
    for block in noise.single_blocks(len(like)):
        host[first : first + len(block)] = torch.from_numpy(block)
        first += len(block)
    return host.to(like.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
