"""Handwritten digits: 1,797 images of 8x8 pixels that come with scikit-learn (UCI, Alpaydin and Kaynak 1998)."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..core.errors import InputError
from .classification import Classification
from .models import check_model, flattened, logistic, small_cnn
from .task import Examples, SiteData, check_folds

SIDE = 8
BRIGHTEST = 16.0


class Digits(Classification):
    """Which digit is it? Inputs [n, 1, 8, 8] in [-1, 1]; one client "all", for a partitioner to deal out.

    `task.data`, or a site's file, is an .npz with `images` [n, 8, 8], of brightness 0 to 16, and `labels` [n], 0 to
    9. A record's id is its content; a record whose label is no digit or whose image has a NaN is left out.
    """

    models: ClassVar[tuple[str, ...]] = ("cnn", "logistic")
    classes: tuple[str, ...] = tuple("0123456789")

    def __init__(self, *, fold: int = 0, folds: int = 5, model: str = "cnn") -> None:
        check_folds(fold, folds)
        check_model(model, self.models)
        self._fold, self._folds, self._model = fold, folds, model

    def model(self) -> nn.Module:
        """Return the model that `train.model` names."""
        if self._model == "logistic":
            return flattened(logistic(SIDE * SIDE, self.outputs))
        return small_cnn(self.outputs)

    def partitions(self, source: Path | None) -> dict[str, SiteData]:
        """Return one client "all" with scikit-learn's images, or with those of `source`."""
        if source is not None:
            return {"all": self._site(*_load(source, key="task.data"))}
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        return {"all": self._site(digits.images, digits.target)}

    def site(self, path: Path) -> SiteData:
        """Return the records of an .npz file."""
        return self._site(*_load(path, key="--data"))

    def _site(self, images: NDArray[Any], labels: NDArray[Any]) -> SiteData:
        pixels = np.ascontiguousarray(images, dtype="<f4")
        digits = labels.astype(np.float64)
        known = np.isfinite(pixels).all(axis=(1, 2)) & np.isin(digits, range(10))
        pixels, targets = pixels[known], digits[known].astype("<i8")
        ids = [
            hashlib.sha256(image.tobytes() + target.tobytes()).hexdigest()
            for image, target in zip(pixels, targets, strict=True)
        ]
        inputs = torch.from_numpy(np.clip(pixels, 0.0, BRIGHTEST)).unsqueeze(1) * (2.0 / BRIGHTEST) - 1.0
        return SiteData.split(Examples(inputs, torch.from_numpy(targets)), ids, fold=self._fold, folds=self._folds)


def _load(path: Path, *, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    if not path.is_file():
        raise InputError("data-missing", f'{key} = "{path}": no such file; give an .npz with images and labels')
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = (file[name] for name in ("images", "labels"))
    except KeyError as error:
        raise InputError("data-invalid", f'{key} = "{path}": needs the arrays images and labels ({error})') from error
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError("data-invalid", f'{key} = "{path}": is no .npz file that can be read') from error
    numeric = all(np.issubdtype(array.dtype, np.number) for array in (images, labels))
    if not numeric or images.shape != (*labels.shape, SIDE, SIDE):
        raise InputError(
            "data-invalid",
            f'{key} = "{path}": images {images.dtype} {list(images.shape)} and labels {labels.dtype} '
            f"{list(labels.shape)} must be numbers of shape [n, 8, 8] and [n]",
        )
    return images, labels
