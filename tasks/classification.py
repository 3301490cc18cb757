"""Loss, probabilities and metrics that classifiers share: inherit from it and write a model and the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    import torchmetrics


class Classification:
    """A classifier: cross-entropy over one logit for each class, or over one logit where there are two classes."""

    classes: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """The number of logits that the model should give: 1 for two classes, else one for each class."""
        return 1 if len(self.classes) == 2 else len(self.classes)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of each example, [n], in nats."""
        if outputs.shape[-1] == 1:
            logits = outputs.squeeze(-1)
            return functional.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
        return functional.cross_entropy(outputs, targets, reduction="none")

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return the probability of each class, [n, classes]."""
        if outputs.shape[-1] == 1:
            return torch.cat([torch.sigmoid(-outputs), torch.sigmoid(outputs)], dim=-1)
        return torch.softmax(outputs, dim=-1)

    def metrics(self) -> dict[str, torchmetrics.Metric]:
        """Return "accuracy", and "auc" where there are two classes."""
        # torchmetrics takes seconds to import, and training needs none of it.
        from .metrics import AUC, Accuracy

        metrics: dict[str, torchmetrics.Metric] = {"accuracy": Accuracy(len(self.classes))}
        if len(self.classes) == 2:
            metrics["auc"] = AUC()
        return metrics
