"""The examples in docstrings run, and every module of the house can be imported."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import bract

ROOT = Path(bract.__file__).parent
PACKAGES = sorted(place.parent for place in ROOT.glob("*/__init__.py"))
FILES = [ROOT / "experiment.py", *sorted(file for package in PACKAGES for file in package.rglob("*.py"))]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("bract", *parts)).removesuffix(".__init__")


def test_the_walk_finds_the_house() -> None:
    names = {module_name(file) for file in FILES}
    assert {"bract.core", "bract.core.keys", "bract.experiment", "bract.privacy.accounting", "bract.cli.main"} <= names
    assert not any(name.startswith(("bract.tests", "bract.benchmarks")) for name in names)


@pytest.mark.parametrize("name", [module_name(file) for file in FILES])
def test_a_module_imports_and_its_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, "each module says in a line what it is"
    assert doctest.testmod(module).failed == 0


def test_an_example_that_is_wrong_is_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text('"""\n>>> 1 + 1\n3\n"""\n')
    spec = importlib.util.spec_from_file_location("wrong", wrong)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert doctest.testmod(module, report=False).failed == 1


@pytest.mark.parametrize("name", bract.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(bract, name) is not None
    assert name in dir(bract)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'flower'"):
        _ = bract.flower
