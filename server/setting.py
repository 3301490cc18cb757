"""What a run's rounds run on: virtual clients or real ones, their accounts, the model, and the run directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..core.keys import Key
from ..privacy.client_level import ClientLevelPlan
from ..privacy.guarantee import Guarantee
from ..privacy.release import EvaluationPlan
from ..strategies.compression import Compression
from .accounts import Accounts, PopulationAccount
from .grid import RoundGrid
from .progress import Progress
from .run_directory import RunDirectory
from .traffic import Traffic

if TYPE_CHECKING:
    from torch import nn

Arrays = dict[str, NDArray[np.generic]]


class GuaranteeOf(Protocol):
    """Returns the guarantee of clients that each trained so many rounds, by default of all that are planned."""

    def __call__(self, rounds: Mapping[str, int] | None = None) -> Guarantee:
        """Return it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A run's parts. `clients` maps node ids to names, and may grow; `module` puts shared arrays into the model.

    `aggregate` is the server's own mechanism, which keeps cohorts secret. `report` writes the report of a run
    directory, `compare` whatever a simulation compares the model with. `saved` is told of each checkpoint.
    """

    directory: RunDirectory
    key: Key
    grid: RoundGrid
    clients: Mapping[int, str]
    accounts: Accounts | PopulationAccount
    guarantee: GuaranteeOf
    initial: Arrays
    module: Callable[[Arrays], nn.Module]
    report: Callable[[Path], object]
    traffic: Traffic
    aggregate: ClientLevelPlan | None = None
    evaluation: EvaluationPlan | None = None
    strategy_evaluates: bool = False
    compression: Compression | None = None
    notes: Sequence[str] = ()
    checkpoint_every: float = 0.0
    population: Callable[[int], Sequence[int]] | None = None
    connected: Callable[[], Mapping[int, str]] | None = None
    client_states: Callable[[], dict[str, Any]] = dict
    load_client_states: Callable[[Mapping[str, Any]], None] = lambda states: None
    remember_clients: Callable[[], Callable[[], None]] = lambda: lambda: None
    virtual_time: Callable[[], float | None] = lambda: None
    after_round: Callable[[Progress], None] = lambda progress: None
    saved: Callable[[Progress], None] = lambda progress: None
    compare: Callable[[Arrays, Guarantee], None] = lambda arrays, guarantee: None
