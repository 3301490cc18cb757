"""The wheel holds the packages and nothing else, and a clone works whatever its folder is called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import bract

ROOT = Path(bract.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = [name.replace(".", "/") for name in PROJECT["tool"]["setuptools"]["packages"]]


def project_files() -> list[str]:
    """Return what a clone would hold: tracked files, and new ones that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def export(folder: Path) -> Path:
    for name in project_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git clone, to know which files belong to it")
    source, out = export(tmp_path_factory.mktemp("bract-main")), tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, source],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = out.glob("bract-*.whl")
    return zipfile.ZipFile(file)


def shipped(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if not name.endswith("/") and ".dist-info/" not in name}


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {f"bract/{name}" for name in ("__init__.py", "__main__.py", "experiment.py", "py.typed")}
    rooms = {package.removeprefix("bract/") for package in PACKAGES} - {"bract"}
    expected |= {f"bract/{name}" for name in project_files() if name.split("/")[0] in rooms}
    assert shipped(wheel) == expected


def test_nothing_but_packages_stands_in_the_root(wheel: zipfile.ZipFile) -> None:
    assert {name for name in shipped(wheel) if name.count("/") == 1} == {
        "bract/__init__.py",
        "bract/__main__.py",
        "bract/experiment.py",
        "bract/py.typed",
    }
    assert sorted(name for name in project_files() if re.fullmatch(r"[^/]+\.py", name)) == [
        "__init__.py",
        "__main__.py",
        "experiment.py",
    ]


def test_every_package_is_listed_and_every_listed_one_is_there() -> None:
    found = {"bract/" + name.removesuffix("/__init__.py") for name in project_files() if name.endswith("/__init__.py")}
    assert found | {"bract"} == set(PACKAGES)
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_the_wheel_knows_licence_entry_point_and_version(wheel: zipfile.ZipFile) -> None:
    meta = {name.split("/", 1)[1]: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert f"\nVersion: {bract.__version__}\n" in meta["METADATA"]
    assert "\nLicense-Expression: Apache-2.0\n" in meta["METADATA"]
    assert "Apache License" in meta["licenses/LICENSE"]
    assert "bract = bract.cli.main:main" in meta["entry_points.txt"]


def test_the_wheel_runs_without_the_clone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    # -P and an editable install's finder: what is first on the path wins, and it must be the wheel.
    program = "import bract; print(bract.__file__); from bract.cli.main import main; main(['tasks'])"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(str(tmp_path / "site"))
    assert "heart-disease" in ended.stdout


def test_dependencies_have_ranges_and_tested_versions_within() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    tested = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    project = PROJECT["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    for requirement in map(Requirement, project["dependencies"] + extras):
        assert requirement.specifier, f"{requirement} has no range"
        if requirement.name != "setuptools":
            assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), requirement
    assert tested["torch"] == "2.13.0"


@pytest.mark.parametrize("name", ["repo", "bract-main"])
def test_a_clone_of_any_name_collects_its_own_tests_once(name: str, tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git clone, to know which files belong to it")
    clone = export(tmp_path / name)
    # What an editable install of that clone would do: `bract` is its root.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "bract").symlink_to(clone, target_is_directory=True)
    shutil.rmtree(clone / "tests")
    (clone / "tests").mkdir()
    (clone / "tests" / "test_names.py").write_text(
        "import os, sys\n"
        "import bract.core.errors\n"
        "def test_one_copy():\n"
        "    files = {name: getattr(module, '__file__', None) or '' for name, module in sys.modules.items()}\n"
        "    copies = [name for name, file in files.items() if file.endswith('core/errors.py')]\n"
        "    assert copies == ['bract.core.errors']\n"
        "    assert len([name for name, file in files.items() if file.endswith(f'{os.sep}__init__.py') and "
        "os.path.dirname(os.path.realpath(file)) == os.path.realpath(os.getcwd())]) == 1\n"
        "    assert os.path.realpath(bract.__file__) == os.path.realpath('__init__.py')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 passed" in ended.stdout


# Building the model whose first weights a server sends, and writing the trained one, takes torch.
BUILDS_MODELS = ("server.federation", "server.trained_model")
WITHOUT_TORCH = """
import sys
from importlib import import_module

for name in sys.argv[1:]:
    import_module(f"bract.{name}")
from bract.strategies.registry import load_strategy

for name in ("fedavg", "fedadam", "fedmedian", "krum"):
    load_strategy(name, {})
print(*sorted({"torch", "opacus"} & sys.modules.keys()))
"""


def test_the_servers_rounds_and_transport_run_without_torch() -> None:
    names = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in ROOT.glob("server/**/*.py")
    ]
    kept = [name for name in names if not name.startswith(BUILDS_MODELS) and not name.endswith("__init__")]
    assert len(kept) >= 20
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *kept], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == []
