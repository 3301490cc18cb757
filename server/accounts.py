"""What clients have spent in this run: a count of rounds, for each or for all, and the epsilon that follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.names import ByName, Places, names_of
from ..privacy.accounting import CALIBRATING
from ..privacy.mechanism import RecordLevelPlan
from .plan import Plan


class Accounts:
    """The rounds that each client has trained under its plan; disjoint clients compose in parallel.

    Two arrays for all clients: the class of events of each, which clients that cost the same share, and its count.
    `epsilon_budget` is the largest epsilon that any client may reach. The figures count this run alone.
    """

    def __init__(self, plans: Mapping[str, RecordLevelPlan], *, epsilon_budget: float | None = None) -> None:
        self._budget = epsilon_budget
        self._place = Places(())
        # The first client of a class stands for all.
        self._classes: list[RecordLevelPlan] = []
        self._numbers: dict[tuple[float, int, float, int], int] = {}
        self._class = np.zeros(0, np.int32)
        self._counts = np.zeros(0, np.int32)
        self.add(plans)

    def add(self, plans: Mapping[str, RecordLevelPlan]) -> None:
        """Take on clients that have trained nothing yet."""
        classes = np.fromiter(map(self._class_of, plans.values()), np.int32, len(plans))
        # Only of a simulation there may be very many.
        self._place = Places((*self._place, *names_of(plans)) if self._place else names_of(plans))
        self._class = np.append(self._class, classes)
        self._counts = np.append(self._counts, np.zeros(len(classes), np.int32))
        self._largest = self._most(np.arange(len(self._counts)))

    def _class_of(self, plan: RecordLevelPlan) -> int:
        event = (plan.accounted_rate, plan.accounted_steps(1), plan.noise_multiplier, plan.rounds)
        if event not in self._numbers:
            self._numbers[event] = len(self._classes)
            self._classes.append(plan)
        return self._numbers[event]

    @property
    def rounds(self) -> Mapping[str, int]:
        """The rounds that each client has trained."""
        return ByName.counts(self._place.names, self._counts.copy())

    def allows(self, cohort: Sequence[str]) -> bool:
        """Return whether one more round keeps each of these clients within the budget."""
        places = self._places(cohort)
        for number, count in self._most(places).items():
            plan = self._classes[number]
            if self._budget is None and count >= plan.rounds:
                return False
            if self._budget is not None and _epsilon(plan, count + 1) > self._budget:
                return False
        return True

    def charge(self, cohort: Sequence[str]) -> None:
        """Count one round for these clients."""
        places = self._places(cohort)
        np.add.at(self._counts, places, 1)
        # Only these can have become the largest, so a round costs by its cohort.
        for number, count in self._most(places).items():
            self._largest[number] = max(self._largest[number], count)

    def epsilon(self) -> float | None:
        """Return the largest epsilon so far, None without privacy."""
        if not self._classes:
            return None
        return max(_epsilon(self._classes[number], count) for number, count in self._largest.items())

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, in the order of the clients."""
        return {"rounds": self._counts.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the counts; clients that were added since have none."""
        counts = np.array(state["rounds"], np.int32)
        self._counts = np.append(counts, np.zeros(len(self._place) - len(counts), np.int32))
        self._largest = self._most(np.arange(len(self._counts)))

    def _places(self, cohort: Sequence[str]) -> NDArray[np.int64]:
        return np.array([self._place[name] for name in cohort if name in self._place], np.int64)

    def _most(self, places: NDArray[np.int64]) -> dict[int, int]:
        """Return the largest count in each class of these clients."""
        counts = np.full(len(self._classes), -1, np.int64)
        np.maximum.at(counts, self._class[places], self._counts[places])
        return {number: int(count) for number, count in enumerate(counts) if count >= 0}


class PopulationAccount:
    """The rounds of a mechanism for whole clients: each counts for every client, drawn or not.

    `epsilon_after` returns the epsilon of so many of the planned `rounds`.
    """

    def __init__(
        self, *, rounds: int, epsilon_after: Callable[[int], float], epsilon_budget: float | None = None
    ) -> None:
        self._planned, self._epsilon_after, self._budget = rounds, epsilon_after, epsilon_budget
        self._count = 0

    @property
    def rounds(self) -> dict[str, int]:
        """The rounds that everybody has spent."""
        return {"all": self._count}

    def allows(self, cohort: Sequence[str]) -> bool:
        """Return whether one more round keeps everybody within the plan and the budget."""
        if self._count >= self._planned:
            return False
        return self._budget is None or self._epsilon_after(self._count + 1) <= self._budget

    def charge(self, cohort: Sequence[str]) -> None:
        """Count one round, also where nobody was drawn."""
        self._count += 1

    def epsilon(self) -> float | None:
        """Return the epsilon so far."""
        return self._epsilon_after(self._count)

    def state_dict(self) -> dict[str, Any]:
        """Return the count."""
        return {"rounds": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the count."""
        self._count = int(state["rounds"])


def accounts_of(plan: Plan, *, rounds: int, epsilon_budget: float | None) -> Accounts | PopulationAccount:
    """Return what counts a run's spending."""
    aggregate, local = plan.aggregate, plan.local
    if aggregate is not None:
        return PopulationAccount(rounds=rounds, epsilon_after=aggregate.epsilon, epsilon_budget=epsilon_budget)
    if local is not None:

        def after(count: int) -> float:
            return local.epsilon(min(count, local.participations))

        return PopulationAccount(rounds=rounds, epsilon_after=after, epsilon_budget=epsilon_budget)
    return Accounts(plan.mechanisms, epsilon_budget=epsilon_budget)


def _epsilon(plan: RecordLevelPlan, count: int) -> float:
    """Return an upper bound after `count` rounds that never falls: coarse on the way, exact at the end."""
    exact = plan.epsilon()
    if count >= plan.rounds:
        return exact
    return min(plan.epsilon(count, interval=CALIBRATING), exact)
