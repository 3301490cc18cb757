"""What virtual clients have spent in this run: a count of rounds, for each or for all, and the epsilon that follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..privacy.accounting import CALIBRATING
from ..privacy.mechanism import RecordLevelPlan
from .plan import Plan


class Accounts:
    """The rounds that each client has trained under its plan; disjoint clients compose in parallel.

    `epsilon_budget` is the largest epsilon that any client may reach.
    """

    def __init__(self, plans: Mapping[str, RecordLevelPlan], *, epsilon_budget: float | None = None) -> None:
        self._plans = plans
        self._budget = epsilon_budget
        # Sites that cost the same have one curve: the first of them stands for all.
        first: dict[tuple[float, int, float], RecordLevelPlan] = {}
        self._like = {
            name: first.setdefault((plan.accounted_rate, plan.accounted_steps(1), plan.noise_multiplier), plan)
            for name, plan in plans.items()
        }
        self.rounds = dict.fromkeys(plans, 0)

    def allows(self, cohort: Sequence[str]) -> bool:
        """Return whether one more round keeps each of these clients within the budget."""
        if self._budget is None:
            return all(self.rounds[name] < self._plans[name].rounds for name in cohort if name in self._plans)
        return all(
            _epsilon(self._like[name], self.rounds[name] + 1) <= self._budget for name in cohort if name in self._plans
        )

    def charge(self, cohort: Sequence[str]) -> None:
        """Count one round for these clients."""
        for name in cohort:
            if name in self._plans:
                self.rounds[name] += 1

    def epsilon(self) -> float | None:
        """Return the largest epsilon so far, None without privacy."""
        if not self._plans:
            return None
        most: dict[RecordLevelPlan, int] = {}
        for name, plan in self._like.items():
            most[plan] = max(most.get(plan, 0), self.rounds[name])
        return max(_epsilon(plan, count) for plan, count in most.items())

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"rounds": dict(self.rounds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the counts."""
        self.rounds.update({name: int(count) for name, count in state["rounds"].items()})


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
