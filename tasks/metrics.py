"""Exact metrics of a classifier, updated with probabilities [n, classes] and targets [n]. They are not private."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy


class Accuracy(MulticlassAccuracy):
    """The share of records whose most probable class is the right one."""

    def __init__(self, classes: int) -> None:
        super().__init__(num_classes=classes, average="micro", validate_args=False)


class AUC(BinaryAUROC):
    """The area under the ROC curve of the second of two classes; NaN where a class has no record."""

    def __init__(self) -> None:
        super().__init__(thresholds=None, validate_args=False)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add records: probabilities [n, 2] and targets [n]."""
        super().update(preds[:, 1], target)

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the area, or NaN where it is undefined (torchmetrics would say 0)."""
        chunks = self.target if isinstance(self.target, list) else [self.target]
        present = torch.cat([chunk.reshape(-1) for chunk in chunks]) if chunks else torch.zeros(0, dtype=torch.int64)
        if len(torch.unique(present)) < 2:
            return torch.tensor(torch.nan)
        area: Tensor = super().compute()
        return area
