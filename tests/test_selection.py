"""The price of tuning: the bounds against exact computations, known figures, and what `bract plan --trials` shows."""

from __future__ import annotations

import io
import json
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats
from scipy.optimize import minimize_scalar

from bract.cli.main import main
from bract.core.errors import InputError
from bract.experiment import Experiment
from bract.privacy import accounting, selection
from bract.privacy.mechanism import RecordLevelPlan
from bract.privacy.release import EvaluationPlan
from bract.privacy.selection import RenyiCurve, Repetitions, choose, gaussian_run, pure_run, selected
from bract.reports.plan import print_plan
from bract.server.plan import Plan
from bract.simulations.description import describe
from bract.simulations.trials import price

DELTA = 1e-5
SHAPES = (0.0, 0.5, 1.0, 4.0, math.inf)
ORDERS = (1.05, 1.3, 2.0, 3.0, 5.0, 10.0, 40.0, 1000.0)


@lru_cache(maxsize=64)
def numbers(mean, shape):
    """Return the probabilities of 0, 1, … runs, all but 1e-12 of them."""
    repetitions, found = Repetitions(mean=mean, shape=shape), []
    while sum(found[-50:]) > 1e-13 or len(found) <= mean:
        found += [repetitions.probability(len(found) + place) for place in range(50)]
    return np.array(found)


def best_of(results, repetitions):
    """Return the exact law of the best of K results, ordered from worst to best; the last entry is that of none."""
    chances = numbers(repetitions.mean, repetitions.shape)
    below = np.concatenate([[0.0], np.cumsum(results)])
    reached = [chances[1:] @ value ** np.arange(1, len(chances)) for value in below]
    return np.append(np.diff(reached), chances[0])


def divergence(ours, theirs, order):
    there = ours > 0
    moments = order * np.log(ours[there]) + (1 - order) * np.log(theirs[there])
    return float(np.logaddexp.reduce(moments)) / (order - 1)


def curve_of(ours, theirs):
    costs = [max(divergence(ours, theirs, order), divergence(theirs, ours, order)) for order in ORDERS]
    return RenyiCurve(orders=ORDERS, costs=tuple(max(0.0, cost) for cost in costs))


@st.composite
def neighbours(draw):
    """Two laws of up to five results, all of which are possible."""
    count = draw(st.integers(2, 5))
    laws = [np.array(draw(st.lists(st.integers(1, 200), min_size=count, max_size=count)), float) for _ in range(2)]
    return laws[0] / laws[0].sum(), laws[1] / laws[1].sum()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(neighbours(), st.sampled_from((1, 2, 5, 20)), st.sampled_from(SHAPES))
def test_the_bound_holds_for_what_can_be_computed_exactly(laws, mean, shape):
    repetitions = Repetitions(mean=mean, shape=shape)
    bound = selected(curve_of(*laws), repetitions)
    ours, theirs = (best_of(law, repetitions) for law in laws)
    for order, cost in zip(bound.orders, bound.costs, strict=True):
        assert divergence(ours, theirs, order) <= cost + 1e-9 * order
        assert divergence(theirs, ours, order) <= cost + 1e-9 * order
    for delta in (1e-6, 0.01, 0.2):
        epsilon = selection.epsilon(bound, delta)
        for first, second in ((ours, theirs), (theirs, ours)):
            assert np.maximum(first - math.exp(epsilon) * second, 0).sum() <= delta + 1e-11


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0])
def test_the_bound_is_not_loose(epsilon, shape):
    # Very many runs; a rare result that the neighbour has less often, below a better one that it has more often.
    repetitions = Repetitions(mean=10**6, shape=shape)
    gamma = repetitions.parameter

    def not_above(mass):
        """Return f(1 - mass), the probability that no result is among the best ones of this mass."""
        bottom = gamma + (1 - gamma) * mass
        return (bottom**-shape - 1) / (gamma**-shape - 1) if shape else math.log(bottom) / math.log(gamma)

    def chance(rare, better):
        return not_above(better) - not_above(better + rare)

    exact = math.log(chance(1e-4, 1e-2) / chance(1e-4 * math.exp(-epsilon), 1e-2 * math.exp(epsilon)))
    bound = selected(pure_run(epsilon=epsilon), repetitions).costs[-1]
    assert exact <= bound <= 1.12 * exact


def test_the_bound_for_a_poisson_number_is_not_loose():
    laws = np.array([0.48, 0.52]), np.array([0.52, 0.48])
    repetitions = Repetitions(mean=5, shape=math.inf)
    bound = selected(curve_of(*laws), repetitions)
    ours, theirs = (best_of(law, repetitions) for law in laws)
    # At small orders log E(K) / (order - 1) is above any truth, here as in the theorem.
    assert bound.costs[-1] <= 1.6 * divergence(theirs, ours, bound.orders[-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [2, 5, 20, 100])
def test_the_number_of_runs_has_its_mean_and_its_median(mean, shape):
    repetitions = Repetitions(mean=mean, shape=shape)
    chances = numbers(mean, shape)
    assert chances.sum() == pytest.approx(1, abs=1e-9)
    assert chances @ np.arange(len(chances)) == pytest.approx(mean, rel=1e-8)
    assert repetitions.median == np.searchsorted(np.cumsum(chances), 0.5 - 1e-12)
    gamma = repetitions.parameter
    known = {0.0: stats.logser(1 - gamma), 1.0: stats.geom(gamma), math.inf: stats.poisson(mean)}
    if shape in known:
        assert chances[:60] == pytest.approx(known[shape].pmf(np.arange(len(chances)))[:60], rel=1e-9)


@pytest.mark.parametrize(("rate", "sigma", "steps"), [(1.0, 4.0, 20), (0.1, 4.0, 500), (256 / 60000, 1.1, 14100)])
@pytest.mark.parametrize("shape", [0.0, 1.0, 0.5, math.inf])
def test_it_agrees_with_dp_accounting(rate, sigma, steps, shape):
    run = gaussian_run(sampling_rate=rate, noise_multiplier=sigma, steps=steps)
    theirs = RdpAccountant(orders=list(run.orders), neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    base = SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), steps)
    theirs.compose(RepeatAndSelectDpEvent(base, 20, shape))
    ours = selection.epsilon(selected(run, Repetitions(mean=20, shape=shape)), DELTA)
    assert ours == pytest.approx(theirs.get_epsilon(DELTA), rel=1e-6)


@pytest.mark.parametrize("mean", [2, 20, 1000])
@pytest.mark.parametrize("shape", [0.0, 1.0])
def test_a_gaussian_run_costs_what_can_be_worked_out_by_hand(mean, shape):
    # With D = order · rho: (1 - 1/m) m rho + log(1/gamma) / m is least at m = sqrt(log(1/gamma) / rho).
    rho, repetitions = 0.02, Repetitions(mean=mean, shape=shape)
    more = (1 + shape) * (2 * math.sqrt(rho * -math.log(repetitions.parameter)) - rho)

    def at(log_order):
        order = 1 + math.exp(log_order)
        spent = rho * order + more + math.log(mean) / (order - 1)
        return spent + math.log1p(-1 / order) - math.log(DELTA * order) / (order - 1)

    least = minimize_scalar(at, bounds=(-2, 8), method="bounded").fun
    run = gaussian_run(sampling_rate=1.0, noise_multiplier=math.sqrt(1 / (2 * rho)), steps=1)
    found = selection.epsilon(selected(run, repetitions), DELTA)
    assert least - 1e-9 <= found <= 1.002 * least


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_a_pure_run_costs_twice_or_three_times_its_epsilon(epsilon):
    # Papernot and Steinke 2022, corollary 3, and Liu and Talwar 2019, theorem 1.3: whatever the number of runs.
    priced = choose(10**6, [pure_run(epsilon=epsilon)], 1e-30)
    found = {repetitions.distribution: value for repetitions, value in priced.items()}
    assert found["logarithmic"] == pytest.approx(2 * epsilon, rel=1e-3)
    assert found["geometric"] == pytest.approx(3 * epsilon, rel=1e-3)


def test_one_run_of_a_pure_mechanism_is_randomized_response_and_the_discrete_laplace():
    epsilon = 0.7
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    counts = np.arange(-80, 82)
    weights = np.exp(-epsilon * abs(counts)), np.exp(-epsilon * abs(counts - 1))
    histogram = [each / each.sum() for each in weights]
    run = pure_run(epsilon=epsilon, releases=3)
    for order, cost in list(zip(run.orders, run.costs, strict=True))[::20]:
        if order < 1e3:
            exact = divergence(np.array([right, 1 - right]), np.array([1 - right, right]), order)
            assert cost == pytest.approx(3 * exact, rel=1e-6, abs=1e-9)
            assert cost == pytest.approx(3 * divergence(*histogram, order), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("rate", "sigma", "steps"), [(1.0, 20.0, 5), (0.13, 3.5, 160), (0.01, 1.0, 1000)])
def test_it_never_costs_less_than_one_run_grows_with_the_runs_and_beats_releasing_many(rate, sigma, steps):
    run = gaussian_run(sampling_rate=rate, noise_multiplier=sigma, steps=steps)
    known = {"sampling_rate": rate, "noise_multiplier": sigma, "delta": DELTA}
    last = {"one": accounting.epsilon(**known, steps=steps)}
    for mean in (1, 2, 3, 10, 50, 1000):
        priced = {repetitions.distribution: value for repetitions, value in choose(mean, [run], DELTA).items()}
        for distribution, value in priced.items():
            assert value > last.get(distribution, last["one"])
        assert list(priced.values()) == sorted(priced.values())
        if mean >= 10:
            assert min(priced.values()) < accounting.epsilon(**known, steps=mean * steps)
        last |= priced


def test_noise_that_is_almost_what_is_assumed_costs_nothing_and_other_noise_everything():
    known = {"sampling_rate": 1.0, "noise_multiplier": 4.0, "steps": 3}
    repetitions = Repetitions(mean=20, shape=0.0)
    plain, exact, far = (
        selection.epsilon(selected(gaussian_run(**known, distance=distance), repetitions), DELTA)
        for distance in (0.0, 1e-40, 1e-14)
    )
    assert plain < exact < plain * (1 + 1e-6) and math.isinf(far)


@pytest.mark.parametrize("bad", [{"mean": 0}, {"mean": 2.5}, {"mean": True}, {"shape": -0.5}, {"shape": math.nan}])
def test_impossible_numbers_of_runs_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Repetitions(**{"mean": 2, "shape": 1.0} | bad)


def experiment(unit="record", **keys):
    tables = {
        "experiment": {"name": "tuned", "rounds": 4},
        "task": {"name": "synthetic", "clients": 3, "records": 40, "features": 4, "classes": 2},
        "train": {"batch_size": 100},
        "privacy": {"unit": unit, "noise_multiplier": 10.0},
        "simulation": {"curves": False, "baselines": False},
    }
    for path, value in keys.items():
        *parents, key = path.split(".")
        table = tables
        for parent in parents:
            table = table.setdefault(parent, {})
        table[key] = value
    return Experiment.of(tables)


def closed_form(steps, sigma=10.0):
    return accounting.epsilon(sampling_rate=1.0, noise_multiplier=sigma, steps=steps, delta=DELTA)


def test_records_that_were_trained_on_and_tested_with_count_by_the_larger():
    found = describe(experiment(), trials=20)
    trials = found["trials"]
    one = closed_form(4)
    assert trials["one"]["epsilon"] == found["guarantee"]["epsilon"] == pytest.approx(one)
    # One histogram of epsilon `one` a run, exactly: the loss is 20 - 2 k of them where the noise went k times astray.
    wrong = stats.binom(20, 1 / (1 + math.exp(one)))
    losses = (20 - 2 * np.arange(21)) * one

    def delta(epsilon):
        return wrong.pmf(np.arange(21)) @ np.maximum(-np.expm1(epsilon - losses), 0)

    assert delta(trials["all"]["epsilon"]) <= DELTA < delta(0.8 * trials["all"]["epsilon"])
    assert closed_form(80) < trials["all"]["epsilon"] <= 20 * one
    trained = gaussian_run(sampling_rate=1.0, noise_multiplier=10.0, steps=4)
    tested = pure_run(epsilon=one)
    best = next(iter(choose(20, [trained, tested], DELTA).items()))
    assert (trials["best"]["epsilon"], trials["best"]["distribution"]) == (best[1], best[0].distribution)
    alone = [next(iter(choose(20, [each], DELTA).values())) for each in (trained, tested)]
    assert best[1] == max(alone) and one < best[1] < trials["all"]["epsilon"]


def test_many_small_releases_of_metrics_compose_below_their_sum():
    often = describe(experiment(**{"experiment.rounds": 50, "server.evaluate_every": 1}), trials=20)["trials"]
    assert closed_form(1000) <= often["all"]["epsilon"] < 20 * often["one"]["epsilon"]


@pytest.mark.parametrize("metrics", [0.01, 5.0])
def test_the_site_that_spends_most_counts_or_the_metrics(metrics):
    known = {"records": 30, "batch_size": 100, "epochs": 1, "rounds": 4, "clipping_norm": 1.0, "delta": DELTA}
    sites = {f"site {sigma}": RecordLevelPlan(**known, noise_multiplier=sigma) for sigma in (8.0, 2.0, 5.0)}
    planned = Plan(mechanisms=sites, evaluation=EvaluationPlan(epsilon=metrics, releases=1, classes=2))
    trials = price(experiment(), planned, planned.guarantee(experiment()), 20)
    assert trials["one"]["epsilon"] == pytest.approx(max(closed_form(4, 2.0), metrics))
    assert trials["all"]["epsilon"] == pytest.approx(max(closed_form(80, 2.0), 20 * metrics))
    run = gaussian_run(sampling_rate=1.0, noise_multiplier=2.0, steps=4)
    if metrics > 1:
        run = pure_run(epsilon=metrics)
    assert trials["best"]["epsilon"] == next(iter(choose(20, [run], DELTA).values()))


@pytest.mark.parametrize(
    ("keys", "steps", "together"),
    [
        ({}, 4, 80),
        ({"clients.sampling": "cyclic", "clients.per_round": 1}, 2, 40),
        ({"clients.sampling": "cyclic", "clients.per_round": 1, "privacy.bands": 2}, 1, 20),
        ({"privacy.adaptive_clipping": True, "privacy.noise_multiplier": 4.0, "task.clients": 60}, 4, 80),
        ({"clients.sampling": "fixed", "clients.per_round": 2}, 4, 80),
    ],
)
def test_clients_pay_for_the_rounds_that_they_are_in(keys, steps, together):
    trials = describe(experiment("client", **keys), trials=20)["trials"]
    sigma = keys.get("privacy.noise_multiplier", 10.0)
    assert trials["one"]["epsilon"] == pytest.approx(closed_form(steps, sigma), rel=1e-6)
    assert trials["all"]["epsilon"] == pytest.approx(closed_form(together, sigma), rel=1e-6)
    run = gaussian_run(sampling_rate=1.0, noise_multiplier=sigma, steps=steps)
    assert trials["best"]["epsilon"] == pytest.approx(next(iter(choose(20, [run], DELTA).values())), rel=1e-6)
    assert "public data" in trials["best"]["released"]


def test_secret_cohorts_amplify_each_run():
    keys = {"clients.sampling": "poisson", "clients.per_round": 1, "privacy.noise_multiplier": 2.0}
    drawn = describe(experiment("client", **keys), trials=20)["trials"]
    known = {"sampling_rate": 1 / 3, "noise_multiplier": 2.0}
    assert drawn["all"]["epsilon"] == pytest.approx(accounting.epsilon(**known, steps=80, delta=DELTA), rel=1e-3)
    run = gaussian_run(**known, steps=4)
    assert drawn["best"]["epsilon"] == pytest.approx(next(iter(choose(20, [run], DELTA).values())), rel=1e-6)
    assert (
        drawn["best"]["epsilon"]
        < choose(20, [gaussian_run(**known | {"sampling_rate": 1.0}, steps=4)], DELTA)[Repetitions(mean=20, shape=0.0)]
    )


def test_a_server_that_nobody_trusts_sees_every_run():
    keys = {"privacy.trust": "nobody", "privacy.record.noise_multiplier": 5.0}
    found = describe(experiment("client", **keys), trials=20)
    trials = found["trials"]
    assert trials["best"] is None and trials["record"]["best"] is None
    assert trials["all"]["epsilon"] == pytest.approx(closed_form(80), rel=1e-6)
    assert trials["record"]["all"]["epsilon"] == pytest.approx(closed_form(80, 5.0), rel=1e-9)
    assert "no choice hides a run" in shown(found)


def test_records_beneath_clients_have_a_price_of_their_own():
    trials = describe(experiment("client", **{"privacy.record.noise_multiplier": 5.0}), trials=20)["trials"]
    run = gaussian_run(sampling_rate=1.0, noise_multiplier=5.0, steps=4)
    assert trials["record"]["unit"] == "record"
    assert trials["record"]["best"]["epsilon"] == next(iter(choose(20, [run], DELTA).values()))
    assert trials["record"]["one"]["epsilon"] == pytest.approx(closed_form(4, 5.0))


def shown(described):
    console = Console(file=io.StringIO(), width=100, highlight=False)
    print_plan(described, console)
    return console.file.getvalue()


def test_the_table_has_a_row_each_and_fits():
    found = describe(experiment(), trials=20)
    text = shown(found)
    assert max(map(len, text.splitlines())) <= 100
    rows = {line[:24].strip(): line.split() for line in text.splitlines()}
    for heading, key in (("one run", "one"), ("20 runs, all released", "all"), ("best of about 20", "best")):
        figure = float(next(word for word in rows[heading] if "." in word))
        assert 0 <= figure - found["trials"][key]["epsilon"] <= 1e-3
    assert found["trials"]["best"]["distribution"] in text and "the model and metrics of every run" in text
    # Without the option nothing is said of it.
    assert "tuning" not in shown(describe(experiment()))


def test_the_command_shows_it_and_refuses_what_is_no_number_of_trials(tmp_path: Path, capsys):
    file = tmp_path / "tuned.toml"
    file.write_text(experiment().to_toml().replace("model = ", "# model = "), encoding="utf-8")

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(file), *arguments])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    code, out, _ = run("--trials", "20")
    assert code == 0 and "best of about 20" in out
    code, out, _ = run("--trials", "20", "--json")
    trials = json.loads(out)["trials"]
    assert code == 0 and trials["runs"] == 20 and trials["delta"] == DELTA
    assert trials["one"]["epsilon"] < trials["best"]["epsilon"] < trials["all"]["epsilon"]
    assert json.loads(run("--json")[1])["trials"] is None
    for bad in ("1", "0", "-3", "2.5", "many"):
        code, out, err = run("--trials", bad)
        assert code == 2 and not out and "--trials" in err and err.count("\n") == 1


def test_without_privacy_there_is_nothing_to_count():
    plain = Experiment.of({"experiment": {"name": "plain"}, "task": {"name": "synthetic", "clients": 2}})
    with pytest.raises(InputError, match=r'privacy\.unit = "none": there is nothing for --trials to count'):
        describe(plain, trials=3)
