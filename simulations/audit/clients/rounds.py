"""Rounds of the server's own loop over puppets, and what its mechanism released in each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from ....core.errors import RunError
from ....core.keys import Key
from ....core.parameters import Arrays, Layout
from ....core.ring import ExactSum
from ....experiment import Experiment
from ....privacy.client_level import ClientLevelPlan
from ....server.cohort import CohortSampler
from ....server.private_aggregation import PrivateAggregation, ReleasedMean
from ....server.progress import Progress, Rules
from ....server.rounds import RoundLoop
from ....strategies.clipped_sum import ClippedSum, ClippedTotal
from ...grid import VirtualGrid
from .puppets import SILENT, Answers, Cast, Puppets, Vector


@dataclass(frozen=True, kw_only=True)
class Release:
    """One round: the clipping norm that it used and found, the votes, and the noised sum of updates [size].

    `sum` is what the strategy got for a mean, less the model, times the expected cohort.
    """

    round: int
    clipping_norm: float
    next_norm: float
    votes: int
    sum: Vector


class Watched(PrivateAggregation):
    """The server's mechanism, which lets the audit see what it hands to the strategy."""

    def __init__(self, plan: ClientLevelPlan, *, layout: Layout, key: Key) -> None:
        super().__init__(plan, layout=layout, key=key)
        self.releases: list[Release] = []

    def release(self, round: int, fold: ClippedSum, total: ExactSum | None) -> ReleasedMean:
        """Release a round, and note it."""
        found = super().release(round, fold, total)
        self.releases.append(
            Release(
                round=round,
                clipping_norm=fold.clipping_norm,
                next_norm=self.clipping_norm,
                votes=total.votes if isinstance(total, ClippedTotal) else 0,
                sum=(found.mean() - fold.model) * self.plan.cohort,
            )
        )
        return found


class Unlimited:
    """A budget that nothing exhausts: accounts are audited elsewhere."""

    def allows(self, cohort: Sequence[str]) -> bool:
        """Allow it."""
        return True

    def charge(self, cohort: Sequence[str]) -> None:
        """Count nothing."""

    def epsilon(self) -> float | None:
        """Say nothing."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: object) -> None:
        """Take nothing up."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """The server's half of an experiment. Frozen: each run of rounds is one of its own."""

    experiment: Experiment
    plan: ClientLevelPlan | None
    strategy: Any
    names: tuple[str, ...]
    initial: Arrays
    layout: Layout

    def rounds(
        self,
        count: int,
        answers: Answers,
        *,
        key: Key,
        cohorts: Sequence[Sequence[int]],
        noise: bool = True,
        arrays: Arrays | None = None,
        resumed_after: int | None = None,
    ) -> list[Release]:
        """Return what so many rounds released; `cohorts` are places of clients by round, the last for all others.

        Without noise they are the clipped sums. `resumed_after` lets another loop take the run up after so many rounds,
        from the checkpoint there, and repeat what the first one went on to do: its releases come in place of those.
        """
        plan = self.plan if noise or self.plan is None else replace(self.plan, noise_multiplier=0.0)
        watched, loop, _ = self._loop(plan, key, cohorts, answers, count)
        progress = Progress(round=0, arrays=dict(self.initial if arrays is None else arrays))
        if resumed_after is None:
            _go(loop, progress)
            return watched.releases if watched else []
        assert watched is not None
        loop.rules = replace(loop.rules, rounds=resumed_after)
        _go(loop, progress)
        checkpoint, before = copy.deepcopy(loop.checkpoint(progress)), list(watched.releases)
        loop.rules = replace(loop.rules, rounds=min(count, resumed_after + 1))
        _go(loop, progress)
        again, other, _ = self._loop(plan, key, cohorts, answers, count)
        assert again is not None
        _go(other, other.restore(checkpoint))
        # What the first loop had released when it was killed comes first.
        return [*before, *watched.releases[len(before) :], *again.releases]

    def first_message(self) -> Any:
        """Return the message that the strategy sends to a client in the first round."""
        _, loop, puppets = self._loop(None, Key.fresh(), [(0,)], lambda round, name: SILENT, 1)
        _go(loop, Progress(round=0, arrays=dict(self.initial)))
        return puppets.messages[0]

    def _loop(
        self, plan: ClientLevelPlan | None, key: Key, cohorts: Sequence[Sequence[int]], answers: Answers, count: int
    ) -> tuple[Watched | None, RoundLoop, Puppets]:
        puppets = Puppets(self.layout, answers)
        grid = VirtualGrid(puppets, self.names)
        watched = None if plan is None else Watched(plan, layout=self.layout, key=key)
        loop = RoundLoop(
            strategy=copy.deepcopy(self.strategy),
            grid=grid,
            clients=grid.names,
            sampler=cast(CohortSampler, Cast(by_round=tuple(tuple(each) for each in cohorts))),
            budget=Unlimited(),
            rules=Rules(rounds=count, quorum=self.experiment.server.quorum),
            evaluation=None,
            emit=lambda event: None,
            aggregation=watched,
            strategy_seed=self.experiment.experiment.seed,
            client_states=grid.state_dict,
            remember_clients=grid.remember,
        )
        return watched, loop, puppets


def _go(loop: RoundLoop, progress: Progress) -> None:
    """Run the rounds; that nobody replied in any of them is what the audit wanted."""
    try:
        loop.run(progress)
    except RunError as error:
        if error.code != "quorum-missed":
            raise


def norm_of(vector: Vector) -> float:
    """Return the Euclidean norm, NaN and infinity included."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.linalg.norm(vector))
