"""What a run returns: status, metrics, guarantee, and the way to its model and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..privacy.guarantee import Guarantee

if TYPE_CHECKING:
    from torch import nn

EXIT_STATUS = {"completed": 0, "stopped-early": 0, "failed": 1, "refused": 3, "budget-exhausted": 3, "interrupted": 130}


@dataclass(frozen=True, kw_only=True)
class Result:
    """The end of a run. `record` is the object of result.json."""

    run_dir: Path
    record: Mapping[str, Any]
    guarantee: Guarantee
    module: nn.Module

    @property
    def status(self) -> str:
        """One of "completed", "stopped-early", "budget-exhausted", "interrupted" and "failed"."""
        return str(self.record["status"])

    @property
    def metrics(self) -> dict[str, float | None]:
        """The released metrics of the final model, by name; None where the counts do not support one."""
        return dict(self.record["metrics"])

    @property
    def model(self) -> nn.Module:
        """The trained module, on the CPU, in evaluation mode."""
        return self.module

    @property
    def model_sha256(self) -> str:
        """SHA-256 of the file model.safetensors."""
        return str(self.record["model_sha256"])

    @property
    def report(self) -> Path:
        """The path of the report page."""
        return self.run_dir / "report.html"

    @property
    def exit_status(self) -> int:
        """What the command line exits with."""
        return EXIT_STATUS[self.status]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in self.metrics.items() if value is not None)
        return f"<Result {self.status}: {shown or 'no metrics'}; {self.guarantee.sentence} Report: {self.report}>"
