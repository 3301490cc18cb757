"""The discrete Gaussian has its law, decides exactly, and costs what is stated."""

from __future__ import annotations

import importlib.util
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_discrete_gaussian_mechanism
from scipy import stats

from bract.core.keys import Key
from bract.core.ring import Ring
from bract.privacy import accounting, discrete_gaussian
from bract.privacy.discrete_gaussian import LARGEST_SIGMA, LEAST_SIGMA, TOTAL_VARIATION, epsilon, largest, sample

KEY = Key.from_seed(5)
SIGMAS = (64.0, 100.3, 127.99, 1024.0, 2.0**30 + 0.25, 1.3 * 2.0**50, LARGEST_SIGMA)
# A test of chance fails for one key in a million at most.
RARE = 1e-6


def law(sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the integers [n] and their probabilities [n], to float64's accuracy."""
    values = np.arange(-math.ceil(12 * sigma), math.ceil(12 * sigma) + 1)
    weights = np.exp(-(values**2) / (2 * sigma**2))
    return values, weights / weights.sum()


@pytest.mark.parametrize("sigma", [64.0, 64.37, 127.0])
def test_every_integer_has_its_probability(sigma: float) -> None:
    count = 2_000_000
    draws = sample(KEY.stream(), sigma, count)
    values, probabilities = law(sigma)
    likely = count * probabilities > 50
    inside = np.abs(values) <= values[likely].max()
    observed = np.bincount(draws - values[0], minlength=len(values))
    cells = [*observed[inside], observed[~inside & (values < 0)].sum(), observed[~inside & (values > 0)].sum()]
    expected = [
        *probabilities[inside],
        probabilities[~inside & (values < 0)].sum(),
        probabilities[~inside & (values > 0)].sum(),
    ]
    assert stats.chisquare(cells, np.array(expected) * count).pvalue > RARE


@pytest.mark.parametrize("sigma", SIGMAS)
def test_moments_and_tails(sigma: float) -> None:
    count = 4_000_000
    draws = sample(KEY.stream(), sigma, count) / sigma
    limit = stats.norm.isf(RARE / 2)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((draws**power).mean() - mean) < limit * math.sqrt(variance / count)
    for reach in (3, 4, 4.5):
        # The lattice has no mass between its points: half a step off at most.
        low, high = (2 * count * stats.norm.sf(reach + shift / sigma) for shift in (0.5, -0.5))
        found = (np.abs(draws) > reach).sum()
        assert stats.poisson.ppf(RARE, low) <= found <= stats.poisson.isf(RARE, high)
    assert abs(draws).max() < largest(sigma) / sigma


@pytest.mark.parametrize("sigma", [64.0, 1024.0, 1.3 * 2.0**50])
def test_the_shape_inside_of_a_strip(sigma: float) -> None:
    """A sampler that accepts all proposals has flat strips of a 64th to a 128th of sigma."""
    draws = sample(KEY.stream(), sigma, 4_000_000)
    edges = np.unique(np.rint(np.linspace(-4, 4, 1000) * sigma)).astype(np.int64)
    cells = np.bincount(np.searchsorted(edges, draws, side="right"), minlength=len(edges) + 1)
    shares = np.diff(stats.norm.cdf(np.array([-np.inf, *(edges - 0.5), np.inf]) / sigma))
    # Rounded to integers the Gaussian differs from the discrete one by 0.02 / sigma²: nothing, here.
    assert stats.chisquare(cells, shares * len(draws)).pvalue > RARE


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_tables_hold_the_proposal_exactly(sigma: float) -> None:
    strips = discrete_gaussian._strips(sigma)
    width = 2**strips.width_bits
    assert 64 <= Fraction(sigma) / width < 128
    # The alias columns give strip j its weight, to the last unit.
    found = [0] * 2048
    for column, (threshold, other) in enumerate(zip(strips.thresholds, strips.others, strict=True)):
        found[column] += int(threshold)
        found[int(other)] += 2**52 - int(threshold)
    assert tuple(found) == strips.weights
    assert sum(found) == 2**63
    assert found[strips.count :] == [0] * (2048 - strips.count)
    # The weights cover the target, wastefully only where they are near one unit; the table stays below the least p.
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(80):
        for j in range(strips.count):
            start, end = (
                strips.scale * mpmath.exp(-(mpmath.mpf(x * width) ** 2) / (2 * mpmath.mpf(sigma) ** 2))
                for x in (j, j + 1)
            )
            assert start <= found[j] < start * (1 + mpmath.mpf(2) ** -40) + 2
            least = end / found[j] * 2 ** (64 - strips.width_bits)
            assert least - 2 < int(strips.surely[j]) <= least
            assert abs(strips.shares[j] - start / found[j]) < 2.0**-53
    assert largest(sigma) == strips.count * width >= 15 * Fraction(sigma)
    assert 2 * math.exp(-(15**2) / 2) <= TOTAL_VARIATION


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_fast_decision_is_the_exact_one(sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = sample(KEY.stream(), sigma, 50_000)
    monkeypatch.setattr(discrete_gaussian, "_MARGIN", 1.0)
    assert (sample(KEY.stream(), sigma, 50_000) == fast).all()


@pytest.mark.parametrize("sigma", SIGMAS)
def test_float64_errs_by_no_more_than_was_proved(sigma: float) -> None:
    strips = discrete_gaussian._strips(sigma)
    width, unit = 2**strips.width_bits, 10**90
    for strip in range(0, strips.count, 7):
        for beyond in (0, 1, width // 3, width - 1, width):
            found = discrete_gaussian._nearly(strips, np.array([strip]), np.array([float(beyond)]))
            low, _ = discrete_gaussian._bounds(strip * width + beyond, strips.sigma, 90)
            exact = Fraction(strips.scale * low, strips.weights[strip] * unit)
            assert abs(Fraction(float(found[0])) - exact) < Fraction(1, 2**47)
            assert exact <= 1
    # What float64 decides, it decides at least this far from the border.
    assert discrete_gaussian._MARGIN > 2 * 2.0**-47


def test_where_64_digits_do_not_tell_more_of_them_do() -> None:
    strips = discrete_gaussian._strips(1024.0)
    strip, draw, bits = 3, 3 * 16 + 7, 128 - strips.width_bits
    low, _ = discrete_gaussian._bounds(draw, strips.sigma, 100)
    scaled = Fraction(low, 10**100) * strips.scale / strips.weights[strip] * 2**bits
    known = math.floor(scaled)
    count = 2000
    found = [discrete_gaussian._exactly(strips, strip, draw, known, KEY.child(i).stream()) for i in range(count)]
    assert stats.binomtest(sum(found), count, float(scaled - known)).pvalue > RARE
    assert discrete_gaussian._exactly(strips, strip, draw, known - 1, KEY.stream())
    assert not discrete_gaussian._exactly(strips, strip, draw, known + 1, KEY.stream())


def test_draws_are_a_function_of_the_stream_sigma_and_count() -> None:
    one, two = KEY.stream(), KEY.stream()
    assert (sample(one, 1e6, 40_000) == sample(two, 1e6, 40_000)).all()
    # The streams stand at the same place, and go on.
    again = sample(one, 1e6, 10)
    assert (again == sample(two, 1e6, 10)).all()
    assert (again != sample(KEY.stream(), 1e6, 10)).any()
    assert sample(KEY.stream(), 1e6, 0).size == 0
    # A run resumes with the same noise only if these stay.
    assert sample(KEY.stream(), 2.0**50, 3).tolist() == [88087042768342, 120006028007877, -529412507084939]


def test_a_sigma_out_of_range_is_refused() -> None:
    for sigma in (0.0, LEAST_SIGMA * 0.999, LARGEST_SIGMA * 1.001, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma"):
            sample(KEY.stream(), sigma, 1)
    assert largest(LARGEST_SIGMA) < 2**62


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize("noise", [0.8, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_the_bound_holds_for_the_discrete_law_itself(shift: int, noise: float, rate: float) -> None:
    """One coordinate, a sigma of a few units: the exact privacy losses of dp-accounting."""
    truth = from_discrete_gaussian_mechanism(
        noise * shift, shift, value_discretization_interval=1e-3, sampling_prob=rate, pessimistic_estimate=True
    )
    for steps in (1, 5, 30):
        bound = epsilon(
            sampling_rate=rate,
            noise_multiplier=noise,
            steps=steps,
            delta=1e-5,
            sigma_units=noise * shift,
            coordinates=1,
        )
        true = truth.self_compose(steps).get_epsilon_for_delta(1e-5)
        # The library's figure may be above the truth by its rounding, a part of 1e-3 a step.
        assert true <= bound + 1e-3 * math.sqrt(steps)
        assert bound < 1.5 * true + 0.2


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_with_a_fine_lattice_it_costs_what_the_gaussian_costs(rate: float) -> None:
    common = {"sampling_rate": rate, "noise_multiplier": 4.0, "steps": 100, "delta": 1e-6, "relation": "add-remove"}
    gaussian = accounting.epsilon(**common)
    figures = [epsilon(**common, sigma_units=2.0**bits, coordinates=10**6) for bits in (2, 10, 16, 20, 30, 50)]
    assert figures == sorted(figures, reverse=True)
    assert figures[0] == figures[1] > 1.04 * gaussian
    assert gaussian <= figures[-1] <= gaussian * (1 + 1e-8)
    assert epsilon(**(common | {"steps": 0}), sigma_units=1.0, coordinates=1) == 0
    assert epsilon(**(common | {"noise_multiplier": 0.0}), sigma_units=1.0, coordinates=1) == math.inf


def test_the_samplers_distance_counts() -> None:
    common = {"sampling_rate": 1.0, "noise_multiplier": 4.0, "steps": 100, "sigma_units": 2.0**50}
    # A delta that the distance of 10^11 draws exceeds cannot be promised at all.
    assert epsilon(**common, delta=1e-12, coordinates=10**2) < math.inf
    assert epsilon(**common, delta=1e-30, coordinates=10**9) == math.inf


def test_replace_one_costs_a_shift_of_twice_the_length() -> None:
    common = {"steps": 5, "delta": 1e-5, "sigma_units": 16.0, "coordinates": 10**6}
    double = epsilon(sampling_rate=1.0, noise_multiplier=4.0, relation="replace-one", **common)
    assert double == pytest.approx(epsilon(sampling_rate=1.0, noise_multiplier=2.0, **common))
    # No sampled figure is known for the lattice: sampling must not lower it.
    assert epsilon(sampling_rate=0.01, noise_multiplier=4.0, relation="replace-one", **common) == double


@pytest.mark.parametrize("sigma", [4.0, 5.3, 16.0, 64.0])
def test_the_distance_of_the_rounded_gaussian_is_bounded(sigma: float) -> None:
    values, discrete = law(sigma)
    far, near = (np.abs(values) + half for half in (0.5, -0.5))
    rounded = stats.norm.sf(near / sigma) - stats.norm.sf(far / sigma)
    distance = np.abs(rounded - discrete).sum() / 2
    bound = discrete_gaussian.rounding_distance(sigma_units=sigma, draws=1)
    assert 0.25 * bound < distance < bound
    information = (rounded * np.log(rounded / discrete)).sum()
    for draws in (1, 100, 10**4):
        found = math.sqrt(draws * information / 2)
        assert discrete_gaussian.rounding_distance(sigma_units=sigma, draws=draws) == pytest.approx(
            min(1, math.sqrt(draws) * bound)
        )
        assert found < math.sqrt(draws) * bound < 3 * found
    assert discrete_gaussian.rounding_distance(sigma_units=3.9, draws=1) == 1


def test_truncation_toward_zero_keeps_the_norm() -> None:
    """On a coarse ring each client moves the integer sum by at most C / step; to the nearest it would be more."""
    ring = Ring(bound=0.5, capacity=2**53)
    units, exceeded = int(0.5 / ring.step), 0
    for i in range(50):
        vector = KEY.child("clipped", i).stream().normals(400)
        vector *= 0.5 * (1 - 1e-12) / np.linalg.norm(vector)
        assert sum(int(x) ** 2 for x in ring.encode(vector)) <= units**2
        exceeded += sum(int(x) ** 2 for x in np.rint(vector / ring.step)) > units**2
    assert exceeded > 10


def test_the_benchmark_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "noise.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_noise", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--count", "20000", "--repeats", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["count"] == 20000
    assert all(found[f"{name}_m_per_s"] > 0.1 for name in ("discrete_gaussian", "stream_normals", "numpy_normal"))
