"""The guarantee: composed over sites and rounds, whole in words, honest about what it leaves out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bract.privacy.client_guarantee import local_privacy
from bract.privacy.guarantee import Guarantee, no_privacy, record_level, rounded_up
from bract.privacy.local import LocalPlan
from bract.privacy.mechanism import RecordLevelPlan
from bract.privacy.release import EvaluationPlan

PLAN = RecordLevelPlan(
    records=240, batch_size=32, epochs=1, rounds=20, clipping_norm=1.0, noise_multiplier=3.5, delta=1e-5
)
SMALL = replace(PLAN, records=98, noise_multiplier=5.98)
EVALUATION = EvaluationPlan(epsilon=1.5, releases=1, classes=2)


def test_the_largest_epsilon_of_all_sites_and_of_the_evaluation_counts() -> None:
    rounds = {"A": 20, "B": 20}
    trained = record_level({"A": PLAN, "B": SMALL}, rounds)
    assert trained.epsilon == max(PLAN.epsilon(), SMALL.epsilon())
    assert trained.per_client == {"A": PLAN.epsilon(), "B": SMALL.epsilon()}
    evaluated = record_level({"A": PLAN, "B": SMALL}, rounds, replace(EVALUATION, epsilon=9.0))
    assert evaluated.epsilon == 9.0
    assert evaluated.replace_one_epsilon == 18.0
    assert set(evaluated.per_client.values()) == {9.0}
    assert record_level({"A": PLAN, "B": SMALL}, rounds, EVALUATION).epsilon == trained.epsilon


def test_a_shorter_run_spends_less_and_sites_may_have_trained_unequally() -> None:
    early = record_level({"A": PLAN, "B": PLAN}, {"A": 3, "B": 7})
    assert early.epsilon == PLAN.epsilon(7) < PLAN.epsilon()
    assert PLAN.epsilon(3) <= early.per_client["A"] < early.per_client["B"]
    assert "7 rounds with 24 to 56 steps a site" in early.sentence
    assert record_level({"A": PLAN}, {"A": 0}).epsilon == 0


def test_replace_one_stands_beside() -> None:
    guarantee = record_level({"A": PLAN}, {"A": 20})
    assert guarantee.replace_one_epsilon == PLAN.epsilon(relation="replace-one") > guarantee.epsilon  # type: ignore[operator]


def test_the_sentence_says_it_all() -> None:
    guarantee = record_level({"A": PLAN}, {"A": 20}, EVALUATION)
    sentence = guarantee.sentence
    for part in (
        f"epsilon {rounded_up(PLAN.epsilon())}",
        "delta 1e-05",
        "any one record",
        "zero-out",
        f"epsilon {rounded_up(PLAN.epsilon(relation='replace-one'))} if it may be replaced",
        "whole run",
        "20 rounds",
        "160 steps",
        "Poisson sampling",
        "secret key",
    ):
        assert part in sentence
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")


def test_a_seed_is_said_aloud() -> None:
    guarantee = record_level({"A": PLAN}, {"A": 20}, randomness="seed")
    assert "not private towards anyone who knows the seed" in guarantee.sentence


def test_no_privacy_is_said_aloud() -> None:
    guarantee = no_privacy()
    assert guarantee.epsilon is None
    assert guarantee.unit == "none"
    assert "no differential privacy" in guarantee.sentence
    assert guarantee.excludes
    without_noise = record_level({"A": replace(PLAN, noise_multiplier=0.0)}, {"A": 20})
    assert without_noise.epsilon is None
    with pytest.raises(ValueError, match="exact counts"):
        record_level({"A": PLAN}, {"A": 20}, replace(EVALUATION, epsilon=None))


def test_what_is_left_out_is_listed() -> None:
    guarantee = record_level({"A": PLAN}, {"A": 20}, excludes_extra=("the curves in private/",))
    listed = " ".join(guarantee.excludes)
    for word in ("timing", "number of records", "hyper-parameters", "one person", "floating-point", "this run alone"):
        assert word in listed
    assert guarantee.excludes[-1] == "the curves in private/"
    with pytest.raises(ValueError, match="excludes"):
        replace(guarantee, excludes=())


def test_where_ledgers_add_runs_up_other_runs_are_not_left_out() -> None:
    local = LocalPlan(participations=20, noise_multiplier=20.0, clipping_norm=1.0, delta=1e-5, coordinates=10)
    for guarantee in (
        record_level({"A": PLAN}, {"A": 20}, place="federation", excludes_extra=("the curves",)),
        replace(local_privacy(local, 20, place="federation"), record=record_level({"A": PLAN}, {"A": 20})),
    ):
        bounded = guarantee.under_ledgers()
        assert not any("this run alone" in each or "other runs" in each for each in bounded.excludes)
        assert bounded.excludes == tuple(each for each in guarantee.excludes if "this run alone" not in each)
        assert bounded.record is None or not any("this run alone" in each for each in bounded.record.excludes)
        # Nothing else of it changes: the figure is still that of the run.
        assert bounded.sentence == guarantee.sentence and bounded.epsilon == guarantee.epsilon
    assert no_privacy(place="federation").under_ledgers() == no_privacy(place="federation")


def test_a_guarantee_cannot_contradict_itself() -> None:
    guarantee = record_level({"A": PLAN}, {"A": 20})
    for wrong in ({"epsilon": None}, {"unit": "none"}, {"epsilon": math.inf}, {"epsilon": math.nan}, {"epsilon": -1.0}):
        with pytest.raises(ValueError, match="epsilon"):
            replace(guarantee, **wrong)


def test_above_a_hundred_clients_stand_quantiles() -> None:
    names = [f"client {number}" for number in range(101)]
    rounds = {name: 1 + number % 20 for number, name in enumerate(names)}
    guarantee = record_level(dict.fromkeys(names, PLAN), rounds)
    assert list(guarantee.per_client) == ["min", "p25", "median", "p75", "max"]
    values = list(guarantee.per_client.values())
    assert values == sorted(values)
    assert values[-1] == guarantee.epsilon == PLAN.epsilon(20)
    assert len(record_level(dict.fromkeys(names[:100], PLAN), rounds).per_client) == 100


@pytest.mark.parametrize("guarantee", [record_level({"A": PLAN}, {"A": 20}, EVALUATION), no_privacy()])
def test_it_survives_json(guarantee: Guarantee) -> None:
    value = json.loads(json.dumps(guarantee.to_dict(), allow_nan=False))
    assert Guarantee.from_dict(value) == guarantee
    assert value["sentence"] == guarantee.sentence


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.01234567, 1.9998, 2.0, 3.14159, 99.999, 123456.7])
def test_figures_are_rounded_up(value: float) -> None:
    assert value * (1 - 1e-12) <= float(rounded_up(value)) <= value * 1.002
    assert rounded_up(1.99981) == "2"


PLANS = st.builds(
    RecordLevelPlan,
    records=st.sampled_from([98, 240]),
    batch_size=st.sampled_from([32, 64]),
    epochs=st.sampled_from([1, 2]),
    rounds=st.just(20),
    clipping_norm=st.sampled_from([0.5, 1.0]),
    noise_multiplier=st.sampled_from([2.5, 4.0]),
    delta=st.sampled_from([1e-5, 1e-6]),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    plans=st.tuples(PLANS, PLANS),
    rounds=st.tuples(*[st.sampled_from([5, 20])] * 2),
    epsilons=st.tuples(*[st.sampled_from([None, 2.0, 40.0])] * 2),
    randomness=st.tuples(*[st.sampled_from(["secret", "seed"])] * 2),
)
def test_whatever_changes_the_truth_changes_the_sentence(
    plans: tuple[RecordLevelPlan, RecordLevelPlan],
    rounds: tuple[int, int],
    epsilons: tuple[float | None, float | None],
    randomness: tuple[str, str],
) -> None:
    truths, sentences = [], []
    for plan, count, released, source in zip(plans, rounds, epsilons, randomness, strict=True):
        evaluation = None if released is None else replace(EVALUATION, epsilon=released)
        # The clipping norm alone changes nothing: noise is a multiple of it.
        spent = max(plan.epsilon(count), released or 0.0)
        replaced = max(plan.epsilon(count, relation="replace-one"), 2 * (released or 0.0))
        figures = rounded_up(spent), rounded_up(replaced)
        truths.append((*figures, plan.delta, plan.sampling_rate, plan.steps(count), count, source))
        guarantee = record_level({"A": plan}, {"A": count}, evaluation, randomness=source)  # type: ignore[arg-type]
        sentences.append(guarantee.sentence)
    assert (truths[0] == truths[1]) == (sentences[0] == sentences[1])


def test_saying_a_guarantee_loads_no_heavy_module() -> None:
    code = (
        "import sys; import bract.privacy.guarantee, bract.privacy.mechanism, bract.privacy.release;"
        "print([m for m in ('torch', 'opacus', 'dp_accounting', 'scipy', 'flwr') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
