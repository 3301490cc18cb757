"""What one check of an audit found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scipy import stats

SIGNIFICANCE = 1e-6
"""A sound program fails a check of chance with at most this probability."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check: its name, whether it passed (None: not checked), a sentence, and the figures that it rests on."""

    name: str
    passed: bool | None
    sentence: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Return passed, FAILED or not checked."""
        return {True: "passed", False: "FAILED", None: "not checked"}[self.passed]

    def to_dict(self) -> dict[str, Any]:
        """Return what --json prints of it."""
        return {"name": self.name, "passed": self.passed, "sentence": self.sentence, "figures": dict(self.figures)}


def failed(name: str, sentence: str, figures: Mapping[str, Any]) -> Finding:
    """Return the finding of a check that failed."""
    return Finding(name=name, passed=False, sentence=sentence, figures=figures)


def not_tried(name: str, why: str) -> Finding:
    """Return the finding of a check that there was nothing to try on."""
    return Finding(name=name, passed=None, sentence=f"could not be tried: {why}")


def variance_bounds(count: int, *, tests: int = 1) -> tuple[float, float]:
    """Return between what the mean square of `count` standard normals lies, but for a chance of 1e-6 in all tests."""
    tail = SIGNIFICANCE / (2 * tests)
    return float(stats.chi2.ppf(tail, count)) / count, float(stats.chi2.isf(tail, count)) / count


def figure(value: float) -> float | str:
    """Return a number as JSON takes it."""
    return value if math.isfinite(value) else str(value)
