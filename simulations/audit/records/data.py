"""The data of one record: whether removing it leaves every other record's tensors as they were."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ....core.errors import InputError
from ....tasks.heart_disease import PACKAGED, HeartDisease
from ....tasks.tables import PARQUET
from ....tasks.task import Examples, Task
from ..finding import Finding
from .subject import Subject

_SHARES = (0.1, 0.37, 0.63, 0.9)
_LARGE = 50e6

Fingerprints = Counter[tuple[str, str, bytes]]


def data(subject: Subject) -> Finding:
    """Without one row of its file, the task gives every other record the same client, split and tensors, byte for byte.

    Scaling by the records' own mean, filling in from other records, or a vocabulary of what occurs would show.
    """
    source = subject.source or (PACKAGED if isinstance(subject.task, HeartDisease) else None)
    if source is None:
        return _unchecked("the task reads no file of task.data, so no row of it could be left out")
    if not source.is_file():
        return _unchecked(f"task.data is {source.name}, which is not one file, so no row of it could be left out")
    remove = _remover(source)
    if remove is None:
        return _unchecked(f"{source.suffix or 'such'} files are not known, so no row of it could be left out")
    whole = _fingerprints(subject.task, source)
    removed = 0
    shares = _SHARES if source.stat().st_size < _LARGE else _SHARES[:1]
    # A copy of the owner's data, in a folder that nobody else may read, for as long as the check takes.
    with tempfile.TemporaryDirectory(prefix="bract-audit-") as folder:
        for share in shares:
            path = Path(folder) / source.name
            remove(path, share)
            try:
                rest = _fingerprints(subject.task, path)
            except InputError as error:
                return Finding(
                    name="data",
                    passed=False,
                    sentence=f"without one row the task refuses the file, which tells of that row: {error.sentence}",
                )
            changed, gone = (rest - whole).total(), (whole - rest).total()
            if changed or gone > 1:
                return Finding(
                    name="data",
                    passed=False,
                    sentence=f"without one row of {source.name} the tensors of {changed or gone - 1:,} other records "
                    "change; let a record's tensors depend on that record alone",
                    figures={"changed": changed, "gone": gone, "records": whole.total()},
                )
            removed += gone
    if not removed:
        return _unchecked("the rows that were left out are no records")
    return Finding(
        name="data",
        passed=True,
        sentence=f"without one row of {source.name} all other records' tensors stay, byte for byte "
        f"({removed} rows tried of {whole.total():,} records)",
        figures={"rows": removed, "records": whole.total()},
    )


def _fingerprints(task: Task, path: Path) -> Fingerprints:
    """Return how often each (client, part, record) is there."""
    found: Fingerprints = Counter()
    for name, site in task.partitions(path).items():
        for part, examples in (("train", site.train), ("test", site.test)):
            found.update((name, part, each) for each in _hashes(examples))
    return found


def _hashes(examples: Examples) -> list[bytes]:
    inputs, targets = examples.inputs.cpu().contiguous().numpy(), examples.targets.cpu().numpy()
    return [
        hashlib.sha256(one.tobytes() + target.tobytes()).digest() for one, target in zip(inputs, targets, strict=True)
    ]


def _remover(source: Path) -> Callable[[Path, float], None] | None:
    """Return what writes the file to a path without the row at a share of its rows; None for an unknown form."""
    suffix = source.suffix.lower()
    if suffix in PARQUET:
        return lambda path, share: _without_parquet_row(source, path, share)
    if suffix == ".npz":
        return lambda path, share: _without_item(source, path, share)
    if suffix in (".csv", ".tsv", ".txt", ".data"):
        return lambda path, share: _without_line(source, path, share)
    return None


def _without_line(source: Path, path: Path, share: float) -> None:
    """Leave out a line, but never the first: the header."""
    with source.open("rb") as lines:
        count = sum(1 for line in lines if line.strip())
    chosen = 1 + int(share * max(0, count - 1))
    with source.open("rb") as lines, path.open("wb") as kept:
        number = 0
        for line in lines:
            if not line.strip() or number != chosen:
                kept.write(line)
            number += bool(line.strip())
    shutil.copymode(source, path)


def _without_parquet_row(source: Path, path: Path, share: float) -> None:
    import pyarrow
    from pyarrow import parquet

    table = parquet.read_table(source)
    chosen = int(share * table.num_rows)
    parquet.write_table(pyarrow.concat_tables([table.slice(0, chosen), table.slice(chosen + 1)]), path)


def _without_item(source: Path, path: Path, share: float) -> None:
    """Leave out an item of every array that is as long as the longest."""
    with np.load(source, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    count = max((len(array) for array in arrays.values() if array.ndim), default=0)
    chosen = int(share * count)
    rest = {
        name: np.delete(array, chosen, axis=0) if array.ndim and len(array) == count else array
        for name, array in arrays.items()
    }
    np.savez(path, **rest)


def _unchecked(why: str) -> Finding:
    return Finding(name="data", passed=None, sentence=f"could not be checked: {why}")
