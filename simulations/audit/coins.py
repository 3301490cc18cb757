"""The finding of a canary test, of records or of clients."""

from __future__ import annotations

from ...privacy.canary import CanaryResult
from .finding import Finding


def guessed(found: CanaryResult) -> Finding:
    """Return whether planted canaries were found no more often than the claimed noise allows."""
    verdict = "as the noise allows" if found.passed else "more than the noise allows"
    weak = "" if found.power >= 0.99 else f"; so much noise hides a mistake: half of it is found in {found.power:.0%}"
    return Finding(
        name="canary",
        passed=found.passed,
        sentence=f"{found.right} of {found.canaries} coins are guessed, {verdict} (at most {found.most}){weak}",
        figures={
            "right": found.right,
            "most": found.most,
            "canaries": found.canaries,
            "steps": found.steps,
            "mu": found.mu,
            "power": found.power,
        },
    )
