"""Fashion-MNIST: IDX files and .npz of any size, the published split, the peers' models, and missing files."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from opacus.validators import ModuleValidator

import bract
from bract.core.errors import InputError
from bract.experiment import Experiment
from bract.privacy.dpsgd.dpsgd import DPSGD
from bract.privacy.mechanism import RecordLevelPlan
from bract.tasks import fashion_mnist
from bract.tasks.fashion_mnist import DEBIAN, INSTALL, TEST, TRAIN, FashionMnist
from bract.tasks.registry import available_tasks, load_task
from bract.tasks.task import initial_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PARAMETERS = {"mlp": 199_210, "small": 26_010, "cnn": 1_663_370}


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def write(folder: Path, *, train: int = 120, test: int = 30, zipped: bool = True, drop: int | None = None) -> Path:
    """Write the four files with images whose class can be learned: a bright row for each class."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for (images_name, labels_name), count in ((TRAIN, train), (TEST, test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), 2 * labels + 3] = 255
        if drop is not None and images_name == TRAIN[0]:
            images, labels = np.delete(images, drop, axis=0), np.delete(labels, drop)
        for name, array in ((images_name, images), (labels_name, labels)):
            content = idx(array)
            path = folder / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(content, 1) if zipped else content)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fashion"))


def test_the_files_own_split_is_kept_and_pixels_stay_bytes(folder: Path, tmp_path: Path) -> None:
    (name, site), *others = FashionMnist().partitions(folder).items()
    assert (name, others) == ("all", [])
    assert (len(site.train), len(site.test)) == (120, 30)
    assert site.train.inputs.dtype == torch.uint8 and site.train.inputs.shape == (120, 1, 28, 28)
    assert site.train.targets.tolist() == [number % 10 for number in range(120)]
    assert int(site.test.inputs[7, 0, 17].min()) == 255
    plain = FashionMnist().site(write(tmp_path / "plain", zipped=False))
    assert torch.equal(plain.train.inputs, site.train.inputs) and torch.equal(plain.test.targets, site.test.targets)


def test_removing_an_image_moves_no_other(folder: Path, tmp_path: Path) -> None:
    whole = FashionMnist().partitions(folder)["all"]
    rest = FashionMnist().partitions(write(tmp_path / "less", drop=41))["all"]
    others = [index for index in range(120) if index != 41]
    assert torch.equal(rest.train.inputs, whole.train.inputs[others])
    assert torch.equal(rest.train.targets, whole.train.targets[others])
    assert torch.equal(rest.test.inputs, whole.test.inputs)


def test_a_sites_npz_is_split_by_content(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images, labels = rng.integers(0, 256, (200, 28, 28), dtype=np.uint8), rng.integers(0, 10, 200)
    np.savez(tmp_path / "site.npz", images=images, labels=labels)
    site = FashionMnist().site(tmp_path / "site.npz")
    assert len(site.train) + len(site.test) == 200 and 20 < len(site.test) < 60
    order = rng.permutation(199)
    labels[199] = 10
    np.savez(tmp_path / "less.npz", images=images[[*order, 199]], labels=labels[[*order, 199]])
    less = FashionMnist().site(tmp_path / "less.npz")
    for part in ("train", "test"):
        before, after = ({row.numpy().tobytes() for row in getattr(each, part).inputs} for each in (site, less))
        assert after == before - {images[199].tobytes()}


@pytest.mark.parametrize("model", FashionMnist.models)
def test_models_are_those_of_the_peers(model: str, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("peers_workload", BENCHMARKS / "peers" / "workload.py")
    assert spec is not None and spec.loader is not None
    workload = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(workload)
    site = FashionMnist().partitions(folder)["all"]
    ours = initial_model(FashionMnist(model=model).model, 4)
    theirs = workload.MODELS[model]()
    tensors = list(ours.state_dict().values())
    assert sum(tensor.numel() for tensor in tensors) == PARAMETERS[model]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), tensors, strict=True)))
    normalised = (site.test.inputs.float() / 255 - 0.2860) / 0.3530
    assert torch.allclose(ours(site.test.inputs), theirs(normalised), atol=1e-5)
    for network, inputs in ((ours, site.test.inputs), (theirs, normalised)):
        FashionMnist().loss(network(inputs), site.test.targets).mean().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None and torch.allclose(one.grad, other.grad, atol=1e-5)


@pytest.mark.parametrize("model", ["mlp", "small"])
def test_gradients_of_single_examples_are_right(model: str, folder: Path) -> None:
    task = FashionMnist(model=model)
    site = task.partitions(folder)["all"]
    inputs, targets = site.train.inputs[:7], site.train.targets[:7]
    module = initial_model(task.model, 2)
    assert not ModuleValidator.validate(module, strict=False)
    plan = RecordLevelPlan(
        records=7, batch_size=7, epochs=1, rounds=1, clipping_norm=0.5, noise_multiplier=1e-9, delta=1e-5
    )
    expected = [torch.zeros_like(parameter) for parameter in module.parameters()]
    for image, target in zip(inputs, targets, strict=True):
        module.zero_grad()
        task.loss(module(image[None]), target[None]).sum().backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        norm = float(torch.sqrt(sum((gradient**2).sum() for gradient in gradients if gradient is not None)))
        for total, gradient in zip(expected, gradients, strict=True):
            total += gradient * min(1.0, plan.clipping_norm / norm) / plan.expected_batch
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    with DPSGD(module, optimizer, plan=plan, noise=bract.core.keys.Key.from_seed(0).stream()) as private:
        private.step(inputs, targets, task.loss)
        # A Poisson batch may be empty.
        private.step(inputs[:0], targets[:0], task.loss)
    for old, parameter, gradient in zip(before, module.parameters(), expected, strict=True):
        assert torch.allclose(old - parameter.detach(), gradient, atol=1e-5)


def test_missing_files_are_said_with_the_command_that_brings_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for source, words in ((None, "task.data: there is no"), (tmp_path / "gone", "gone"), (tmp_path / "empty", "lacks")):
        with pytest.raises(InputError) as error:
            FashionMnist().partitions(source)
        assert error.value.code == "data-missing"
        assert words in error.value.sentence and INSTALL in error.value.sentence


@pytest.mark.parametrize("what", ["cut", "text", "other", "counts", "npz", "shape"])
def test_damaged_files_are_named(what: str, tmp_path: Path) -> None:
    path = write(tmp_path / "data", train=20, test=10)
    images, labels = (path / f"{name}.gz" for name in TRAIN)
    match what:
        case "cut":
            images.write_bytes(images.read_bytes()[:900])
        case "text":
            images.write_text("text")
        case "other":
            images.write_bytes(gzip.compress(idx(np.zeros((20, 8, 8), np.uint8))))
        case "counts":
            labels.write_bytes(gzip.compress(idx(np.zeros(19, np.uint8))))
        case "npz":
            path = tmp_path / "site.npz"
            path.write_text("text")
        case "shape":
            path = tmp_path / "site.npz"
            np.savez(path, images=np.zeros((4, 28, 28)), labels=np.zeros(4, int))
    with pytest.raises(InputError) as error:
        FashionMnist().site(path)
    assert error.value.code == "data-invalid"
    assert f'--data = "{path}"' in error.value.sentence and "\n" not in error.value.sentence


def test_it_learns_over_dealt_out_clients_and_the_model_takes_raw_images(folder: Path, tmp_path: Path) -> None:
    experiment = Experiment.of(
        {
            "experiment": {"name": "fashion", "rounds": 8, "seed": 1},
            "task": {"name": "fashion-mnist", "data": str(folder)},
            "clients": {"partitioner": "iid", "count": 3},
            "train": {"model": "mlp", "batch_size": 10, "learning_rate": 0.1, "epochs": 2},
            "simulation": {"curves": False, "baselines": False},
        }
    )
    result = bract.simulate(experiment, out=tmp_path / "run")
    assert result.metrics["accuracy"] is not None and result.metrics["accuracy"] > 0.9
    site = FashionMnist().partitions(folder)["all"]
    hits = result.model(site.test.inputs).argmax(1) == site.test.targets
    assert float(hits.float().mean()) == pytest.approx(result.metrics["accuracy"])


def test_it_is_listed_and_its_models_are_checked() -> None:
    info = {info.name: info for info in available_tasks()}["fashion-mnist"]
    assert info.models == FashionMnist.models
    with pytest.raises(InputError, match='"mlp" or "small" or "cnn"'):
        load_task({"name": "fashion-mnist"}, model="logistic", seed=0, folder=None)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_the_published_files() -> None:
    site = FashionMnist().partitions(None)["all"]
    assert (len(site.train), len(site.test)) == (60_000, 10_000)
    assert torch.bincount(site.train.targets).tolist() == [6000] * 10
    assert torch.bincount(site.test.targets).tolist() == [1000] * 10
    pixels = site.train.inputs.float() / 255
    assert (float(pixels.mean()), float(pixels.std())) == pytest.approx((0.2860, 0.3530), abs=1e-4)


@pytest.mark.soak
def test_the_benchmark_prints_the_peers_line(folder: Path, tmp_path: Path) -> None:
    flags = ["--model=mlp", "--clients=12", "--cohort=3", "--rounds=1", "--threads=1"]
    other = tmp_path / "other.py"
    other.write_text('print(\'{"peer": "other", "clients_per_s": 1e-6}\')')
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "simulation.py"), *flags, "--pair", str(other), "--pairs=1"],
        env={"FASHION_MNIST": str(folder), "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs, ratio = map(json.loads, done.stdout.splitlines())
    assert set(ours) == {"peer", "model", "clients_per_s", "accuracy"} and ours["peer"] == "bract"
    assert theirs["peer"] == "other" and ratio["ratio"] == pytest.approx(ours["clients_per_s"] * 1e6, rel=1e-3)
    assert ratio["pairs"] == 1 and not list(tmp_path.glob("runs"))
