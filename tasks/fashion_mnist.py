"""Fashion-MNIST: 70,000 images of clothes, 28x28 pixels, 10 classes (Xiao, Rasul & Vollgraf 2017)."""

from __future__ import annotations

import gzip
import hashlib
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..core.errors import InputError
from .classification import Classification
from .models import check_model
from .task import Examples, SiteData

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
INSTALL = "apt-get install dataset-fashion-mnist"
SIDE = 28
# The published mean and standard deviation of the training pixels, as shares of 255: constants, whatever the data.
MEAN, DEVIATION = 0.2860, 0.3530
TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class FashionMnist(Classification):
    """Which piece of clothing is it? Inputs are bytes [n, 1, 28, 28]; one client "all", for a partitioner to deal out.

    `task.data`, or a site's data, is a folder with the four published IDX files (gzipped or not), whose own split into
    training and test records is kept; or an .npz with `images` [n, 28, 28] of 0 to 255 and `labels` [n], split by each
    record's content. A record whose label is no class is left out.
    """

    models: ClassVar[tuple[str, ...]] = ("mlp", "small", "cnn")
    classes: tuple[str, ...] = (
        "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip

    def __init__(self, *, model: str = "small") -> None:
        check_model(model, self.models)
        self._model = model

    def model(self) -> nn.Module:
        """Return the model that `train.model` names."""
        match self._model:
            case "mlp":
                return two_hidden_layers()
            case "small":
                return small_cnn()
            case _:
                return large_cnn()

    def partitions(self, source: Path | None) -> dict[str, SiteData]:
        """Return one client "all" with the images of `source`, by default of Debian's package."""
        if source is None and not DEBIAN.is_dir():
            raise InputError(
                "data-missing",
                f"task.data: there is no {DEBIAN}; install it ({INSTALL}), or give the folder of the four IDX files",
            )
        return {"all": _load(source or DEBIAN, key="task.data")}

    def site(self, path: Path) -> SiteData:
        """Return the records of a folder of IDX files, or of an .npz file."""
        return _load(path, key="--data")


class Pixels(nn.Module):
    """Bytes as normalised float32: images take a quarter of the memory, and the trained model takes raw ones."""

    def forward(self, images: Tensor) -> Tensor:
        """Return (images / 255 - mean) / deviation."""
        return images.sub(255 * MEAN).mul(1 / (255 * DEVIATION))


def two_hidden_layers() -> nn.Module:
    """Return the 2NN of McMahan et al. 2017: 199,210 parameters."""
    return nn.Sequential(
        OrderedDict(
            pixels=Pixels(),
            flatten=nn.Flatten(),
            hidden1=nn.Linear(SIDE * SIDE, 200),
            relu1=nn.ReLU(),
            hidden2=nn.Linear(200, 200),
            relu2=nn.ReLU(),
            out=nn.Linear(200, 10),
        )
    )


def small_cnn() -> nn.Module:
    """Return the CNN of Opacus' MNIST example (Papernot et al. 2021, with ReLU): 26,010 parameters."""
    return nn.Sequential(
        OrderedDict(
            pixels=Pixels(),
            conv1=nn.Conv2d(1, 16, 8, stride=2, padding=3),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2, stride=1),
            conv2=nn.Conv2d(16, 32, 4, stride=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2, stride=1),
            flatten=nn.Flatten(),
            hidden=nn.Linear(512, 32),
            relu3=nn.ReLU(),
            out=nn.Linear(32, 10),
        )
    )


def large_cnn() -> nn.Module:
    """Return the CNN of McMahan et al. 2017: 1,663,370 parameters."""
    return nn.Sequential(
        OrderedDict(
            pixels=Pixels(),
            conv1=nn.Conv2d(1, 32, 5, padding=2),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            hidden=nn.Linear(3136, 512),
            relu3=nn.ReLU(),
            out=nn.Linear(512, 10),
        )
    )


def _load(path: Path, *, key: str) -> SiteData:
    where = f'{key} = "{path}"'
    if path.is_dir():
        train, test = (
            _examples(*(_read_idx(path, name, key=key) for name in part), where=where) for part in (TRAIN, TEST)
        )
        return SiteData(train=train, test=test)
    if not path.is_file():
        raise InputError("data-missing", f"{where}: is not there; give the folder of the four IDX files ({INSTALL})")
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = (file[name] for name in ("images", "labels"))
    except KeyError as error:
        raise InputError("data-invalid", f"{where}: needs the arrays images and labels ({error})") from error
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError("data-invalid", f"{where}: is no .npz file that can be read") from error
    if images.dtype != np.uint8 or labels.dtype.kind not in "iu" or images.shape != (*labels.shape, SIDE, SIDE):
        raise InputError(
            "data-invalid",
            f"{where}: images {images.dtype} {list(images.shape)} and labels {labels.dtype} "
            f"{list(labels.shape)} must be uint8 [n, 28, 28] and whole numbers [n]",
        )
    examples = _examples(images, labels, where=where)
    return SiteData.split(examples, [_content(*record) for record in zip(*_arrays(examples), strict=True)])


def _read_idx(folder: Path, name: str, *, key: str) -> NDArray[np.uint8]:
    """Return the array of an IDX file of bytes (LeCun's format: two zeros, type 8, the number of dimensions, each)."""
    zipped, plain = folder / f"{name}.gz", folder / name
    path = zipped if zipped.is_file() else plain
    if not path.is_file():
        raise InputError("data-missing", f'{key} = "{folder}": lacks {name}.gz; {INSTALL} has all four IDX files')
    dimensions = 3 if "images" in name else 1
    try:
        raw = gzip.decompress(path.read_bytes()) if path is zipped else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError("data-invalid", f'{key} = "{folder}": {path.name} cannot be read') from error
    shape = tuple(int.from_bytes(raw[4 + 4 * place : 8 + 4 * place], "big") for place in range(dimensions))
    start = 4 + 4 * dimensions
    whole = len(raw) == start + int(np.prod(shape, dtype=np.int64))
    if raw[:4] != bytes([0, 0, 8, dimensions]) or not whole or shape[1:] not in ((), (SIDE, SIDE)):
        what = "images of 28x28 bytes" if dimensions == 3 else "labels"
        raise InputError("data-invalid", f'{key} = "{folder}": {path.name} is no whole IDX file of {what}')
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _examples(images: NDArray[Any], labels: NDArray[Any], *, where: str) -> Examples:
    if len(images) != len(labels):
        raise InputError("data-invalid", f"{where}: {len(images)} images for {len(labels)} labels")
    known = (labels >= 0) & (labels < 10)
    # A copy: the file's bytes are read-only, which torch warns of.
    inputs = torch.from_numpy(images[known]).unsqueeze(1)
    return Examples(inputs, torch.from_numpy(labels[known].astype(np.int64)))


def _arrays(examples: Examples) -> tuple[NDArray[Any], NDArray[Any]]:
    return examples.inputs.numpy(), examples.targets.numpy()


def _content(image: NDArray[np.uint8], label: np.int64) -> str:
    return hashlib.sha256(image.tobytes() + bytes([int(label)])).hexdigest()
