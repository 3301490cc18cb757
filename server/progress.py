"""What a run of rounds goes by, and where it stands: rules, budget, progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# What of the progress is counted along the way, besides the model.
COUNTED = (
    "trained",
    "skipped",
    "best",
    "best_round",
    "best_arrays",
    "best_histograms",
    "histograms",
    "evaluated_round",
    "strategy_metrics",
    "bytes_up",
    "bytes_down",
    "pending",
)


class Budget(Protocol):
    """What the rounds spend. A cohort is charged before its data is touched, whether or not it replies."""

    def allows(self, cohort: Sequence[str]) -> bool:
        """Return whether these clients may train once more."""

    def charge(self, cohort: Sequence[str]) -> None:
        """Count one round of training for these clients."""

    def epsilon(self) -> float | None:
        """Return the largest epsilon of all clients so far, None where there is no privacy to account for."""

    def state_dict(self) -> dict[str, Any]:
        """Return what was spent."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what was spent."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How the loop decides: when to evaluate, when to stop early, which share of a cohort must reply."""

    rounds: int
    quorum: float
    evaluate_every: int = 0
    patience: int = 0


@dataclass(kw_only=True)
class Progress:
    """Where the loop stands; all of it is in the checkpoint.

    `pending` is the record of a round that was trained, and neither evaluated nor told of yet.
    """

    round: int
    arrays: dict[str, NDArray[np.generic]]
    trained: int = 0
    skipped: int = 0
    best: float | None = None
    best_round: int = 0
    best_arrays: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    best_histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    histograms: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    evaluated_round: int = 0
    strategy_metrics: dict[str, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    pending: dict[str, Any] | None = None
