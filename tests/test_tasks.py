"""Tasks: records that no other record moves, the published split, names and plug-ins, and what the models give."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.validators import ModuleValidator
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from bract.core.errors import InputError
from bract.experiment import TaskTable
from bract.tasks.classification import Classification
from bract.tasks.digits import Digits
from bract.tasks.heart_disease import PACKAGED, HeartDisease
from bract.tasks.registry import available_tasks, load_task
from bract.tasks.synthetic import Synthetic
from bract.tasks.tabular import Tabular
from bract.tasks.task import Examples, SiteData, Task, initial_model, is_test

ROOT = Path(__file__).parents[1]
TABULAR = {
    "target": "readmitted",
    "positive": "yes",
    "client_column": "clinic",
    "features": {"age": {"range": [18, 100]}, "days": {"range": [0, 30], "missing": True}, "smoker": {"flag": True}},
}
SITES = Callable[[], dict[str, SiteData]]


def records(sites: dict[str, SiteData]) -> dict[str, list[tuple[str, bytes, int]]]:
    """Return each client's records in order: their part of the split, the bytes of their tensor, their class."""
    return {
        client: [
            (part, inputs.numpy().tobytes(), int(target))
            for part, examples in (("train", site.train), ("test", site.test))
            for inputs, target in zip(examples.inputs, examples.targets, strict=True)
        ]
        for client, site in sites.items()
    }


def assert_moves_no_other(whole: dict[str, Any], rest: dict[str, Any], client: str) -> None:
    """Assert that `rest` is `whole` less one record of one client, in the same order."""
    assert list(rest) == list(whole)
    for name in whole:
        if name != client:
            assert rest[name] == whole[name]
    assert len(rest[client]) == len(whole[client]) - 1
    pairs = zip(whole[client], rest[client], strict=False)
    at = next((index for index, (before, after) in enumerate(pairs) if before != after), len(rest[client]))
    assert whole[client][:at] + whole[client][at + 1 :] == rest[client]


@cache
def whole_heart() -> tuple[list[str], dict[str, Any]]:
    return PACKAGED.read_text(encoding="utf-8").splitlines(keepends=True), records(HeartDisease().partitions(None))


@settings(max_examples=25, deadline=None)
@given(row=st.integers(1, 920))
def test_heart_disease_removing_a_patient_moves_no_other(tmp_path_factory: pytest.TempPathFactory, row: int) -> None:
    lines, whole = whole_heart()
    path = tmp_path_factory.mktemp("heart") / "heart.csv"
    path.write_text("".join(lines[:row] + lines[row + 1 :]), encoding="utf-8")
    hospital = lines[row].split(",")[3]
    assert_moves_no_other(whole, records(HeartDisease().partitions(path)), hospital)


@cache
def whole_table() -> tuple[list[str], dict[str, Any]]:
    path = ROOT / "examples" / "own_csv" / "data.csv"
    return path.read_text(encoding="utf-8").splitlines(keepends=True), records(Tabular(**TABULAR).partitions(path))


@settings(max_examples=25, deadline=None)
@given(row=st.integers(1, 600))
def test_tabular_removing_a_record_moves_no_other(tmp_path_factory: pytest.TempPathFactory, row: int) -> None:
    lines, whole = whole_table()
    path = tmp_path_factory.mktemp("table") / "table.csv"
    path.write_text("".join(lines[:row] + lines[row + 1 :]), encoding="utf-8")
    assert_moves_no_other(whole, records(Tabular(**TABULAR).partitions(path)), lines[row].split(",")[1])


@cache
def whole_digits() -> dict[str, Any]:
    return records(Digits().partitions(None))


@settings(max_examples=15, deadline=None)
@given(row=st.integers(0, 1796))
def test_digits_removing_an_image_moves_no_other(tmp_path_factory: pytest.TempPathFactory, row: int) -> None:
    digits: Any = load_digits()
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, images=np.delete(digits.images, row, axis=0), labels=np.delete(digits.target, row))
    assert_moves_no_other(whole_digits(), records(Digits().partitions(path)), "all")
    assert records({"all": Digits().site(path)}) == records(Digits().partitions(path))


@settings(max_examples=25, deadline=None)
@given(
    clients=st.integers(1, 9),
    count=st.integers(1, 40),
    features=st.integers(1, 9),
    classes=st.integers(2, 4),
    seed=st.integers(0, 5),
)
def test_synthetic_records_depend_on_seed_client_and_index_alone(
    clients: int, count: int, features: int, classes: int, seed: int
) -> None:
    shape = {"features": features, "classes": classes, "seed": seed}
    whole = records(Synthetic(clients=9, records=40, **shape).partitions(None))
    part = records(Synthetic(clients=clients, records=count, **shape).partitions(None))
    assert list(part) == list(whole)[:clients]
    for number, name in enumerate(part):
        tests = [is_test(f"{number}/{index}") for index in range(40)]
        trained = [record for record in whole[name] if record[0] == "train"][: tests[:count].count(False)]
        tested = [record for record in whole[name] if record[0] == "test"][: tests[:count].count(True)]
        assert part[name] == trained + tested
    assert records({name: Synthetic(clients=9, records=40, **shape).site(Path(name))}) == {name: whole[name]}


def test_synthetic_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = records(Synthetic(clients=7, records=5).partitions(None))
    monkeypatch.setattr("bract.tasks.synthetic.BLOCK", 300)
    assert records(Synthetic(clients=7, records=5).partitions(None)) == whole


def test_synthetic_can_be_learned_and_clients_differ_by_heterogeneity() -> None:
    def score(heterogeneity: float) -> float:
        sites = Synthetic(clients=2, records=1500, heterogeneity=heterogeneity, seed=3).partitions(None)
        own, other = sites.values()
        model = LogisticRegression().fit(own.train.inputs, own.train.targets)
        return float(model.score(other.test.inputs, other.test.targets))

    assert score(0.0) > 0.85 > 0.8 > score(1.0)


BUILT_IN: dict[str, SITES] = {
    "heart-disease": lambda: HeartDisease().partitions(None),
    "tabular": lambda: Tabular(**TABULAR).partitions(ROOT / "examples" / "own_csv" / "data.csv"),
    "digits": lambda: Digits().partitions(None),
    "synthetic": lambda: Synthetic(clients=3).partitions(None),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_records_are_finite_in_range_and_mostly_for_training(name: str) -> None:
    for site in BUILT_IN[name]().values():
        both = torch.cat([site.train.inputs, site.test.inputs])
        assert both.dtype == torch.float32 and both.isfinite().all() and both.abs().max() <= 1.0
        assert 0.1 < len(site.test) / len(both) < 0.4


def test_folds_are_disjoint_and_cover_each_record() -> None:
    ids = [f"record {number}" for number in range(2000)]
    for folds in (2, 5):
        assert all(sum(is_test(record, fold=fold, folds=folds) for fold in range(folds)) == 1 for record in ids)
    assert 340 < sum(map(is_test, ids)) < 460
    # Published: a change here would move records between training and test in every run.
    assert [is_test(str(number)) for number in range(1, 13)] == [number in (4, 10) for number in range(1, 13)]
    for task in (HeartDisease, Digits, Synthetic):
        parts = [task(fold=fold).partitions(None) for fold in range(5)]
        name, first = next(iter(parts[0].items()))
        assert sum(len(part[name].test) for part in parts) == len(first.train) + len(first.test)


def test_heart_disease_is_what_its_page_says() -> None:
    task = HeartDisease()
    sites = task.partitions(None)
    assert list(sites) == ["Cleveland", "Hungary", "Switzerland", "VA Long Beach"]
    assert [len(site.train) + len(site.test) for site in sites.values()] == [304, 293, 123, 200]
    assert task.classes == ("no disease", "disease")
    assert len(task.feature_names) == 17
    assert sum(parameter.numel() for parameter in task.model().parameters()) == 18
    with pytest.raises(InputError, match=r"train.model"):
        HeartDisease(model="cnn")


def test_pooled_logistic_regression_on_heart_disease() -> None:
    accuracies, areas = [], []
    for fold in range(5):
        sites = HeartDisease(fold=fold).partitions(None).values()
        train, test = (
            [
                torch.cat([getattr(getattr(site, part), field) for site in sites]).numpy()
                for field in ("inputs", "targets")
            ]
            for part in ("train", "test")
        )
        model = LogisticRegression(max_iter=1000).fit(*train)
        accuracies.append(model.score(*test))
        areas.append(roc_auc_score(test[1], model.predict_proba(test[0])[:, 1]))
    assert np.mean(accuracies) > 0.80
    assert np.mean(areas) > 0.88


@pytest.mark.parametrize("info", available_tasks()[:4], ids=lambda info: info.name)
def test_models_of_built_in_tasks_can_be_private_and_learn(info: Any) -> None:
    keys = TABULAR if info.name == "tabular" else {}
    sites = BUILT_IN[info.name]()
    train = next(iter(sites.values())).train
    for name in info.models:
        task = load_task({"name": info.name, **keys}, model=name, seed=1, folder=None)
        assert isinstance(task, Task)
        model = initial_model(task.model, 1)
        assert not ModuleValidator.validate(model, strict=False)
        before = task.loss(model(train.inputs), train.targets)
        assert before.shape == (len(train),) and before.isfinite().all()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            task.loss(model(train.inputs), train.targets).mean().backward()
            optimizer.step()
        assert task.loss(model(train.inputs), train.targets).mean() < before.mean()
        probabilities = task.probabilities(model(train.inputs))
        assert probabilities.shape == (len(train), len(task.classes))
        assert torch.allclose(probabilities.sum(dim=1), torch.ones(len(train)))
        for metric in task.metrics().values():
            metric.update(probabilities, train.targets)
            assert 0.0 <= float(metric.compute()) <= 1.0


def test_loss_and_probabilities_agree_for_one_logit_and_two() -> None:
    class Two(Classification):
        classes = ("a", "b")

    logits = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(50) % 2
    pair = torch.cat([torch.zeros_like(logits), logits], dim=1)
    assert torch.allclose(Two().probabilities(logits), Two().probabilities(pair), atol=1e-6)
    assert torch.allclose(Two().loss(logits, targets), Two().loss(pair, targets), atol=1e-6)
    assert torch.allclose(
        Two().loss(logits, targets), -Two().probabilities(logits)[range(50), targets].log(), atol=1e-6
    )


def test_metrics_are_those_of_scikit_learn() -> None:
    probabilities = torch.rand(200, 1, generator=torch.Generator().manual_seed(1))
    targets = (torch.arange(200) % 3 == 0).long()
    both = torch.cat([1 - probabilities, probabilities], dim=1)
    metrics = HeartDisease().metrics()
    assert set(metrics) == {"accuracy", "auc"} and set(Digits().metrics()) == {"accuracy"}
    for start in range(0, 200, 60):
        for metric in metrics.values():
            metric.update(both[start : start + 60], targets[start : start + 60])
    expected = ((probabilities[:, 0] > 0.5).long() == targets).float().mean()
    assert float(metrics["accuracy"].compute()) == pytest.approx(float(expected))
    assert float(metrics["auc"].compute()) == pytest.approx(roc_auc_score(targets, probabilities[:, 0]), abs=1e-6)
    lone = HeartDisease().metrics()["auc"]
    lone.update(both[:3], torch.ones(3, dtype=torch.int64))
    assert math.isnan(float(lone.compute()))


def test_initial_weights_are_the_seeds_and_leave_torchs_generator_alone() -> None:
    task = Digits()
    state = torch.random.get_rng_state()
    one, same, other = (initial_model(task.model, seed).state_dict() for seed in (7, 7, 8))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_examples_are_checked() -> None:
    with pytest.raises(ValueError, match="int64"):
        Examples(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="2 inputs for 3"):
        Examples(torch.zeros(2, 1), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="1 ids for 2"):
        SiteData.split(Examples(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)), ["a"])
    assert len(Examples(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)).select([])) == 0


def test_digits_file_errors(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    np.savez(tmp_path / "shape.npz", images=np.zeros((3, 28, 28)), labels=np.zeros(3))
    np.savez(tmp_path / "words.npz", images=np.full((3, 8, 8), "x"), labels=np.zeros(3))
    for name, code in [("none", "data-missing"), *((n, "data-invalid") for n in ("text", "other", "shape", "words"))]:
        with pytest.raises(InputError, match=f"{name}.npz") as error:
            Digits().partitions(tmp_path / f"{name}.npz")
        assert error.value.code == code
    images = np.full((4, 8, 8), 99.0)
    images[1, 0, 0] = np.nan
    np.savez(tmp_path / "odd.npz", images=images, labels=np.array([1.0, 2.0, 3.5, 7.0]))
    site = Digits().site(tmp_path / "odd.npz")
    assert sorted([*site.train.targets.tolist(), *site.test.targets.tolist()]) == [1, 7]
    assert torch.cat([site.train.inputs, site.test.inputs]).unique().tolist() == [1.0]  # clamped to the brightest


@pytest.mark.parametrize(
    ("section", "model", "code", "words"),
    [
        ({}, None, "experiment-value", ["task.name: missing", "heart-disease"]),
        ({"name": "heart-diseas"}, None, "plugin-missing", ['"heart-diseas"', 'nearest is "heart-disease"']),
        ({"name": "digits", "fould": 1}, None, "experiment-key", ["task.fould", "fold"]),
        ({"name": "digits", "modle": 1}, None, "experiment-key", ["task.modle", "it takes"]),
        ({"name": "digits", "model": "cnn"}, None, "experiment-key", ["task.model", "train.model"]),
        ({"name": "digits", "fold": 9}, None, "experiment-value", ["task.fold = 9"]),
        ({"name": "digits"}, "mlp", "experiment-value", ["train.model = 'mlp'", '"cnn" or "logistic"']),
        ({"name": "tabular", "features": {}}, None, "experiment-key", ["task.target"]),
        ({"name": "synthetic", "clients": 0}, None, "experiment-value", ["task.clients = 0"]),
        ({"name": "synthetic", "clients": True}, None, "experiment-value", ["task.clients = True"]),
        ({"name": "synthetic", "heterogeneity": float("nan")}, None, "experiment-value", ["task.heterogeneity"]),
        ({"name": "synthetic", "heterogeneity": "much"}, None, "experiment-value", ["task.heterogeneity"]),
        ({"name": "own:Nothing"}, None, "plugin-missing", ["task.name"]),
        ({"name": "own:Half"}, None, "plugin-invalid", ["own:Half", "site()", "loss()"]),
        ({"name": "own:Lonely"}, None, "plugin-invalid", ["own:Lonely", "classes"]),
        ({"name": "own:Own"}, "mlp", "experiment-value", ['train.model = "mlp"', "one model only"]),
        ({"name": "own:Own", "depth": 1}, None, "experiment-key", ["task.depth"]),
        ({"name": "own:Own", "width": -1}, None, "experiment-value", ["task", "width must be positive"]),
    ],
)
def test_mistakes_name_key_and_file(
    own: Path, section: dict[str, Any], model: str | None, code: str, words: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        load_task(section, model=model, seed=0, folder=own, file="my.toml")
    assert error.value.code == code, error.value.sentence
    assert all(word in error.value.sentence for word in [*words, "(my.toml)"]), error.value.sentence


OWN = """
    import torch
    from torch import nn

    from bract.tasks.classification import Classification
    from bract.tasks.task import Examples, SiteData

    class Half:
        classes = ("a", "b")
        def model(self): return nn.Linear(1, 1)
        def partitions(self, source): return {}

    class Own(Classification):
        classes = ("a", "b")
        def __init__(self, *, width=1, seed=None):
            if width < 1:
                raise ValueError("width must be positive")
            self.width, self.seed = width, seed
        def model(self): return nn.Linear(self.width, self.outputs)
        def site(self, path): return self.partitions(path)["all"]
        def partitions(self, source):
            examples = Examples(torch.zeros(9, self.width), torch.zeros(9, dtype=torch.int64))
            return {"all": SiteData.split(examples, [str(i) for i in range(9)])}

    class Lonely(Own):
        classes = ("a",)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN), encoding="utf-8")
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


def test_an_own_task_by_dotted_path_from_the_experiments_folder(own: Path) -> None:
    task: Any = load_task({"name": "own:Own", "width": 3, "data": "x.csv"}, seed=5, folder=own)
    assert (task.width, task.seed) == (3, 5)
    assert len(task.partitions(None)["all"].train) > 0
    again: Any = load_task(TaskTable(name="own:Own", width=2), seed=6, folder=own)  # type: ignore[call-arg]
    assert (again.width, again.seed) == (2, 6)


def test_an_own_task_of_an_installed_package(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = own / "own_tasks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-tasks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bract.tasks]\nmine = own:Own\ndigits = own:Half\n")
    monkeypatch.syspath_prepend(str(own))
    task: Any = load_task({"name": "mine", "width": 4}, seed=1, folder=None)
    assert task.width == 4
    assert isinstance(load_task({"name": "digits"}, seed=1, folder=None), Digits)  # built-in names are not taken over
    listed = {info.name: info for info in available_tasks()}
    assert (listed["mine"].origin, listed["mine"].summary) == ("own-tasks", "own:Own")
    assert listed["digits"].origin == "bract"
    with pytest.raises(InputError, match='"mine"'):
        load_task({"name": "mime"}, seed=1, folder=None)


def test_listing_tasks_imports_nothing_heavy() -> None:
    script = (
        "import sys; from bract.tasks.registry import available_tasks; available_tasks();"
        "print([m for m in ('torch', 'flwr', 'opacus', 'sklearn', 'torchmetrics', 'pandas', 'pyarrow', 'datasets')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_example_task_runs(tmp_path: Path) -> None:
    task = load_task({"name": "own_task:Tumours"}, seed=0, folder=ROOT / "examples")
    site = task.partitions(None)["all"]
    measurements, labels = load_breast_cancer(return_X_y=True)
    np.savez(tmp_path / "site.npz", measurements=measurements, labels=labels)
    assert torch.equal(task.site(tmp_path / "site.npz").test.inputs, site.test.inputs)
    model = LogisticRegression().fit(site.train.inputs, site.train.targets)
    assert model.score(site.test.inputs, site.test.targets) > 0.85
    assert site.train.inputs.abs().max() <= 1.0
    assert task.loss(task.model()(site.test.inputs), site.test.targets).shape == (len(site.test),)
