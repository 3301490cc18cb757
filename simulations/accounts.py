"""What each virtual client has spent in this run: a count of rounds for each, and the epsilon that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..privacy.accounting import epsilons
from ..privacy.mechanism import RecordLevelPlan


class Accounts:
    """The rounds that each client has trained under its plan; disjoint clients compose in parallel.

    `epsilon_budget` is the largest epsilon that any client may reach.
    """

    def __init__(self, plans: Mapping[str, RecordLevelPlan], *, epsilon_budget: float | None = None) -> None:
        self._plans = plans
        self._budget = epsilon_budget
        self._curves: dict[RecordLevelPlan, Sequence[float]] = {}
        self.rounds = dict.fromkeys(plans, 0)

    def allows(self, cohort: Sequence[str]) -> bool:
        """Return whether one more round keeps each of these clients within the budget."""
        if self._budget is None:
            return all(self.rounds[name] < self._plans[name].rounds for name in cohort if name in self._plans)
        return all(self._at(name, self.rounds[name] + 1) <= self._budget for name in cohort if name in self._plans)

    def charge(self, cohort: Sequence[str]) -> None:
        """Count one round for these clients."""
        for name in cohort:
            if name in self._plans:
                self.rounds[name] += 1

    def epsilon(self) -> float | None:
        """Return the largest epsilon so far, None without privacy."""
        if not self._plans:
            return None
        return max(self._at(*pair) for pair in {(name, count) for name, count in self.rounds.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"rounds": dict(self.rounds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the counts."""
        self.rounds.update({name: int(count) for name, count in state["rounds"].items()})

    def _at(self, name: str, count: int) -> float:
        if count == 0:
            return 0.0
        plan = self._plans[name]
        if plan not in self._curves:
            self._curves[plan] = epsilons(plan, range(1, plan.rounds + 1))
        return self._curves[plan][count - 1]
