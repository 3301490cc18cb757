"""The released histogram: exact noise, sensitivity one, and the metrics that follow."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from bract.core.keys import Key
from bract.privacy.release import EvaluationPlan, discrete_laplace, histogram, metrics_from, release

BINARY = EvaluationPlan(epsilon=2.0, releases=1, classes=2)
TEN = EvaluationPlan(epsilon=2.0, releases=1, classes=10)
KEY = Key.from_seed(3)


def binary(scores: list[float]) -> torch.Tensor:
    positive = torch.tensor(scores, dtype=torch.float64)
    return torch.stack([1 - positive, positive], dim=1)


def test_binary_cells_are_label_by_quarter_of_the_score() -> None:
    scores = [0.0, 0.2, 0.25, 0.49, 0.5, 0.74, 0.75, 1.0]
    counts = histogram(binary(scores + scores), torch.tensor([0] * 8 + [1] * 8), BINARY)
    assert counts.dtype == np.int64
    assert counts.tolist() == [[2, 2, 2, 2], [2, 2, 2, 2]]
    counts = histogram(binary([0.1, 0.6, 0.9]), torch.tensor([0, 1, 1]), BINARY)
    assert counts.tolist() == [[1, 0, 0, 0], [0, 0, 1, 1]]


def test_multi_class_cells_are_label_by_correct_and_wrong() -> None:
    plan = EvaluationPlan(epsilon=1.0, releases=1, classes=3)
    probabilities = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    counts = histogram(probabilities, np.array([0, 1, 2, 2]), plan)
    assert counts.tolist() == [[1, 0], [1, 0], [1, 1]]
    assert metrics_from(counts) == {"accuracy": 0.75}


def test_what_is_not_a_number_is_no_error() -> None:
    counts = histogram(binary([math.nan, 0.9]), torch.tensor([1, 1]), BINARY)
    assert counts.tolist() == [[0, 0, 0, 0], [1, 0, 0, 1]]
    nothing = torch.full((2, 10), math.nan)
    nothing[1] = torch.eye(10)[4]
    counts = histogram(nothing, torch.tensor([0, 4]), TEN)
    assert counts[0].tolist() == [0, 1]
    assert counts[4].tolist() == [1, 0]
    assert histogram(torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64), BINARY).tolist() == [[0] * 4] * 2
    assert histogram(binary([0.1]), torch.tensor([7]), BINARY).sum() == 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    scores=hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(allow_nan=True, allow_infinity=True)),
    data=st.data(),
)
def test_one_record_moves_one_cell_by_one(scores: np.ndarray, data: st.DataObject) -> None:
    labels = data.draw(hnp.arrays(np.int64, len(scores), elements=st.integers(-1, 2)))
    probabilities = np.stack([1 - scores, scores], axis=1)
    full = histogram(probabilities, labels, BINARY)
    gone = data.draw(st.integers(0, len(scores) - 1))
    rest = histogram(np.delete(probabilities, gone, axis=0), np.delete(labels, gone), BINARY)
    assert np.abs(full - rest).sum() <= 1
    assert full.sum() == np.isin(labels, (0, 1)).sum()


@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(1), Fraction(5, 3), 1 / Fraction(0.3), Fraction(20, 1)])
def test_the_noise_is_the_discrete_laplace_distribution(scale: Fraction) -> None:
    count = 6000
    stream = KEY.child(str(scale)).stream()
    sample = np.array([discrete_laplace(scale, stream) for _ in range(count)])
    base = math.exp(-1 / scale)
    reach = max(1, int(4 * scale))
    inside = np.arange(-reach, reach + 1)
    expected = (1 - base) / (1 + base) * base ** np.abs(inside)
    tail = (1 - expected.sum()) / 2
    probabilities = np.array([tail, *expected, tail])
    observed = np.array([(sample < -reach).sum(), *[(sample == x).sum() for x in inside], (sample > reach).sum()])
    assert stats.chisquare(observed, probabilities * count).pvalue > 1e-3


def test_the_noise_has_the_scale_of_one_release_of_many() -> None:
    plan = EvaluationPlan(epsilon=2.0, releases=8, classes=10)
    assert plan.epsilon_per_release == 0.25
    stream = KEY.stream()
    zeros = np.zeros((10, 2), dtype=np.int64)
    sample = np.concatenate([release(zeros, plan, stream).ravel() for _ in range(300)])
    assert np.abs(sample).mean() == pytest.approx(2 * math.exp(-0.25) / (1 - math.exp(-0.5)), rel=0.06)
    assert abs(sample.mean()) < 4 * math.sqrt(32 / len(sample))


def test_a_release_follows_the_key_and_leaves_the_counts_as_they_are() -> None:
    plan = replace(BINARY, epsilon=0.2)
    counts = np.array([[9, 0, 4, 2], [1, 5, 3, 9]])
    first = release(counts, plan, KEY.stream())
    assert first.dtype == np.int64
    assert first.shape == (2, 4)
    assert (first == release(counts, plan, KEY.stream())).all()
    assert (first != release(counts, plan, Key.from_seed(4).stream())).any()
    assert counts.sum() == 33
    exact = release(counts, replace(plan, epsilon=None), KEY.stream())
    assert (exact == counts).all()
    assert exact is not counts


@pytest.mark.parametrize("epsilon", [1e-6, 1e6])
def test_extreme_budgets_need_no_special_case(epsilon: float) -> None:
    plan = EvaluationPlan(epsilon=epsilon, releases=3, classes=2)
    noise = release(np.zeros((2, 4), dtype=np.int64), plan, KEY.stream())
    assert (np.abs(noise).max() == 0) == (epsilon > 1)


def test_metrics_are_those_of_the_records_behind_the_counts() -> None:
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(2)
    labels = generator.integers(0, 2, 300)
    scores = np.clip(0.5 + 0.25 * (labels - 0.5) + 0.3 * generator.standard_normal(300), 0, 0.999)
    metrics = metrics_from(histogram(np.stack([1 - scores, scores], axis=1), labels, BINARY))
    assert metrics["accuracy"] == pytest.approx(((scores >= 0.5) == labels).mean())
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, np.floor(scores * 4)))
    roc = metrics["roc"]
    assert roc[0] == (0.0, 0.0)
    assert roc[-1] == (1.0, 1.0)
    assert len(roc) == 5
    assert roc == sorted(roc)


@pytest.mark.parametrize(
    ("counts", "accuracy", "auc"),
    [
        ([[5, 0, 0, 0], [0, 0, 0, 5]], 1.0, 1.0),
        ([[0, 0, 0, 5], [5, 0, 0, 0]], 0.0, 0.0),
        ([[0, 5, 0, 0], [0, 5, 0, 0]], 0.5, 0.5),
        ([[4, 0, 0, 0], [0, 0, 0, 50]], 1.0, None),
        ([[50, 0, 0, 0], [0, 0, 0, 4]], 1.0, None),
        ([[9, -3, 0, -2], [-4, 0, 1, 8]], 1.0, 1.0),
        ([[0, 0, 0, 0], [-1, 0, 0, -2]], None, None),
    ],
)
def test_metrics_at_the_edges(counts: list[list[int]], accuracy: float | None, auc: float | None) -> None:
    metrics = metrics_from(np.array(counts))
    assert metrics["accuracy"] == accuracy
    assert metrics["auc"] == auc
    assert bool(metrics["roc"]) == (auc is not None)


def test_negative_counts_are_clamped_after_the_sum() -> None:
    sites = [np.array([[10, 0, 0, -6], [0, 0, 0, 10]]), np.array([[0, 0, 0, 6], [0, 0, 0, 0]])]
    assert metrics_from(np.sum(sites, axis=0))["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("epsilon", 0.0), ("epsilon", math.inf), ("epsilon", math.nan), ("releases", 0), ("classes", 1), ("classes", 2.0)],
)
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} = "):
        EvaluationPlan(**({"epsilon": 1.0, "releases": 1, "classes": 2} | {name: value}))
