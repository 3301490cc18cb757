"""What a process needs to be told to put together the run's federation: the main process and each worker alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.keys import Key
from ..experiment import Experiment
from ..server.plan import Plan
from ..tasks.pool import Pool
from ..tasks.registry import find_task
from ..tasks.task import Task
from .federation import Federation, flower_federation, virtual_federation


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Picklable. `key` is the run's secret: a worker is the same owner's process, on the same machine.

    `gpus` is how many GPUs the workers share out among them; 0 where they train on the device that is named.
    """

    tables: dict[str, Any]
    folder: Path | None
    data: Pool | None
    plan: Plan
    key: Key
    gpus: int = 0

    def placed(self, place: int) -> Recipe:
        """Return the recipe of the worker with this number: of several GPUs it trains on one."""
        if self.gpus < 2:
            return self
        train = {**self.tables["train"], "device": f"cuda:{place % self.gpus}"}
        return replace(self, tables={**self.tables, "train": train})

    @property
    def isolate(self) -> bool:
        """Whether a client may change what it is sent: a Flower app may, bract's own does not."""
        return self.data is None

    def build(self, *, task: Task | None = None) -> Federation:
        """Return the federation; a worker finds the task by its name, as the main process did."""
        experiment = Experiment.of(self.tables, folder=self.folder)
        if self.data is None:
            return flower_federation(experiment)
        return virtual_federation(experiment, task or find_task(experiment), self.data, self.plan, key=self.key)
