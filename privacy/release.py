"""The accounted evaluation: a histogram of the test records with exact discrete noise, and the metrics that follow.

Two classes: label by quarter of the score (edges 0.25, 0.5, 0.75), so accuracy at 0.5, AUC and the ROC curve follow.
More classes: label by (correct, wrong). A record is in one cell, so replacing it by nothing changes one count by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core.keys import Stream

if TYPE_CHECKING:
    from torch import Tensor

EDGES = (0.25, 0.5, 0.75)
LEAST_OF_A_CLASS = 5


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """`releases` histograms of one set of test records that cost `epsilon` together; None: exact, without privacy."""

    epsilon: float | None
    releases: int
    classes: int

    def __post_init__(self) -> None:
        _check_epsilon(self.epsilon)
        _check_at_least("releases", self.releases, 1)
        _check_at_least("classes", self.classes, 2)

    @property
    def epsilon_per_release(self) -> float | None:
        """The epsilon of one histogram (they compose by addition)."""
        return None if self.epsilon is None else self.epsilon / self.releases

    @property
    def shape(self) -> tuple[int, int]:
        """[2, 4] for two classes (label, quarter of the score), else [classes, 2] (label, correct or wrong)."""
        return (2, len(EDGES) + 1) if self.classes == 2 else (self.classes, 2)


def histogram(
    probabilities: Tensor | NDArray[np.floating[Any]], targets: Tensor | NDArray[np.integer[Any]], plan: EvaluationPlan
) -> NDArray[np.int64]:
    """Return the counts [plan.shape] of probabilities [n, classes] and targets [n].

    A record counts in at most one cell. A probability that is not a number counts as the lowest score (as wrong with
    more than two classes); a target that is no class counts nowhere.
    """
    found = cells(probabilities, targets, plan)
    return np.bincount(found[found >= 0], minlength=math.prod(plan.shape)).reshape(plan.shape)


def cells(
    probabilities: Tensor | NDArray[np.floating[Any]], targets: Tensor | NDArray[np.integer[Any]], plan: EvaluationPlan
) -> NDArray[np.int64]:
    """Return in which cell of a flat histogram each record counts, [n]; -1 is none."""
    scores: NDArray[np.float64] = _array(probabilities).astype(np.float64)
    labels: NDArray[np.int64] = _array(targets).astype(np.int64)
    if len(labels) == 0:
        return labels
    if plan.classes == 2:
        # A comparison with NaN is false, which makes it the lowest quarter.
        column = (scores[:, 1, None] >= np.array(EDGES)).sum(axis=1)
    else:
        right = np.isfinite(scores).all(axis=1) & (scores.argmax(axis=1) == labels)
        column = np.where(right, 0, 1)
    known = (labels >= 0) & (labels < plan.classes)
    found: NDArray[np.int64] = np.where(known, labels * plan.shape[1] + column, -1)
    return found


def release(counts: NDArray[np.int64], plan: EvaluationPlan, stream: Stream) -> NDArray[np.int64]:
    """Return the counts plus discrete Laplace noise of scale 1 / epsilon_per_release: one of `plan.releases`.

    Formal guarantee: epsilon_per_release-DP under zero-out, exactly (no floating-point number is involved); twice
    that under replace-one. Negative counts are possible, and unbiased.
    """
    if plan.epsilon is None:
        return counts.copy()
    scale = plan.releases / Fraction(plan.epsilon)
    noise = [discrete_laplace(scale, stream) for _ in range(counts.size)]
    return counts + np.array(noise, dtype=np.int64).reshape(counts.shape)


def metrics_from(counts: NDArray[np.int64]) -> dict[str, Any]:
    """Return accuracy, and for two classes auc and roc [(fpr, tpr), …], of a sum of released histograms.

    Negative counts are taken as zero. `accuracy` is None without records, `auc` (and an empty `roc`) where either
    class counts less than 5. Scores of one quarter tie: each such pair counts half (Mann and Whitney's statistic).
    """
    clamped = np.maximum(np.asarray(counts), 0)
    total = int(clamped.sum())
    if clamped.shape != (2, len(EDGES) + 1):
        return {"accuracy": float(clamped[:, 0].sum() / total) if total else None}
    negative, positive = clamped
    half = EDGES.index(0.5) + 1
    right = int(negative[:half].sum() + positive[half:].sum())
    accuracy = right / total if total else None
    negatives, positives = int(negative.sum()), int(positive.sum())
    if min(negatives, positives) < LEAST_OF_A_CLASS:
        return {"accuracy": accuracy, "auc": None, "roc": []}
    # From the strictest threshold to the loosest.
    fpr = np.concatenate([[0.0], np.cumsum(negative[::-1]) / negatives])
    tpr = np.concatenate([[0.0], np.cumsum(positive[::-1]) / positives])
    auc = float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))
    return {"accuracy": accuracy, "auc": auc, "roc": list(zip(fpr.tolist(), tpr.tolist(), strict=True))}


def discrete_laplace(scale: Fraction, stream: Stream) -> int:
    """Return an integer x with probability proportional to exp(-|x| / scale), exactly.

    Canonne, Kamath and Steinke 2020, Algorithm 2, with the scale t / s.
    """
    t, s = scale.numerator, scale.denominator
    while True:
        fraction = stream.below(t)
        if not _bernoulli_exp(fraction, t, stream):
            continue
        whole = 0
        while _bernoulli_exp(1, 1, stream):
            whole += 1
        magnitude = (fraction + t * whole) // s
        negative = stream.below(2) == 1
        if negative and magnitude == 0:
            continue
        return -magnitude if negative else magnitude


def _bernoulli_exp(numerator: int, denominator: int, stream: Stream) -> bool:
    """Draw true with probability exp(-numerator / denominator), a ratio in [0, 1] (Algorithm 1, first case)."""
    k = 1
    while stream.below(denominator * k) < numerator:
        k += 1
    return k % 2 == 1


def _array(values: Tensor | NDArray[Any]) -> NDArray[Any]:
    if isinstance(values, np.ndarray):
        return values
    return values.detach().cpu().numpy()


def _check_epsilon(value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"epsilon = {value}: must be finite and above 0, or None for exact counts")


def _check_at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} = {value}: must be a whole number, at least {least}")
