"""server/accounts.py: what each client has spent, at the cost of a cohort and not of the population."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bract.core.names import ByName, Numbered
from bract.privacy.mechanism import RecordLevelPlan
from bract.server.accounts import Accounts

PLAN = RecordLevelPlan(
    records=20, batch_size=5, epochs=1, rounds=6, clipping_norm=1.0, noise_multiplier=2.0, delta=1e-5
)
PLANS = [PLAN, replace(PLAN, records=40)]
NAMES = Numbered(5)


def accounts(budget=None):
    plans = ByName(names=NAMES, numbers=np.array([0, 1, 0, 1, 1]), known=PLANS)
    return Accounts(plans, epsilon_budget=budget)


def spent(rounds):
    return max(PLANS[number].epsilon(count) for number, count in enumerate(rounds))


def test_each_client_s_rounds_are_counted_and_the_largest_epsilon_is_the_run_s():
    found = accounts()
    assert found.epsilon() == 0
    for cohort in ([0, 1], [0, 3], [2], [0, 4]):
        found.charge([NAMES[place] for place in cohort])
    assert dict(found.rounds) == dict(zip(NAMES, [3, 1, 1, 1, 1], strict=True))
    # On the way it is an upper bound.
    assert spent([3, 1]) <= found.epsilon() <= 1.05 * spent([3, 1])
    assert found.rounds["client-0001"] == 3, "what was read does not move"
    found.charge([NAMES[0]])
    assert found.rounds["client-0001"] == 4


def test_a_round_that_is_taken_back_costs_nothing():
    found = accounts()
    found.charge(NAMES)
    before, epsilon = found.state_dict(), found.epsilon()
    for _ in range(3):
        found.charge([NAMES[1]])
    assert found.epsilon() > epsilon
    found.load_state_dict(before)
    assert found.epsilon() == epsilon and set(found.rounds.values()) == {1}
    again = accounts()
    again.load_state_dict(before)
    assert again.epsilon() == epsilon, "a resumed run has spent what the other had"


def test_nobody_goes_beyond_the_plan_or_the_budget():
    found, tight = accounts(), accounts(budget=PLANS[0].epsilon(2) * 1.02)
    for number in range(6):
        assert found.allows([NAMES[0]]) and tight.allows([NAMES[0]]) == (number < 2)
        found.charge([NAMES[0]])
        tight.charge([NAMES[0]])
    assert not found.allows(NAMES) and found.allows([NAMES[1]])


def test_clients_that_come_later_have_spent_nothing():
    found = Accounts({"ann": PLANS[0]})
    found.charge(["ann"])
    found.add({"bob": PLANS[1], "cid": PLANS[0]})
    found.charge(["bob", "bob", "nobody"])
    assert dict(found.rounds) == {"ann": 1, "bob": 2, "cid": 0}
    assert spent([1, 2]) <= found.epsilon() <= 1.05 * spent([1, 2])
