"""The documents are true: links resolve, files parse, code runs, commands and keys exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from pydantic import BaseModel

import bract
from bract.cli.main import COMMANDS, application
from bract.core import toml
from bract.experiment import Experiment

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def ids(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        if name.startswith("http"):
            continue
        linked = (page.parent / name) if name else page
        assert linked.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_experiments_parse(page, tmp_path):
    for code in blocks(page, "toml"):
        path = tmp_path / "page.toml"
        path.write_text(code)
        Experiment.load(path)


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_commands_exist(page):
    group = application()
    for code in blocks(page, "sh", "console"):
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            words = [Path(word).name if index == 0 else word for index, word in enumerate(words)]
            if not words or words[0] != "bract":
                continue
            assert words[1] in COMMANDS
            command = group.get_command(None, words[1])
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words[2:] if word.startswith("--")} <= options | {"--help"}


def test_make_targets_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        for code in blocks(page, "sh"):
            assert set(re.findall(r"^make (\w+)", code, re.MULTILINE)) <= set(targets)


def test_every_key_is_documented_and_nothing_else():
    documented = set(re.findall(r"^\| `(\w+\.\w+)`", (ROOT / "docs" / "experiment.md").read_text(), re.MULTILINE))
    known = set()
    for name, field in Experiment.model_fields.items():
        table = field.annotation
        assert isinstance(table, type) and issubclass(table, BaseModel)
        known |= {f"{name}.{key}" for key in table.model_fields}
    assert documented == known


def test_documented_defaults_are_the_defaults():
    text = (ROOT / "docs" / "experiment.md").read_text()
    plain = Experiment.of({"task": {"name": "x"}}).model_dump()
    for table, key, default in re.findall(r"^\| `(\w+)\.(\w+)` \| `([^`]*)` \|", text, re.MULTILINE):
        path, value = toml.parse_override(f"{table}.{key}={default}")
        assert path == (table, key)
        actual = plain[table][key]
        assert value == (list(actual) if isinstance(actual, tuple) else actual), f"{table}.{key}"


@pytest.mark.parametrize("number", range(1))
def test_the_readmes_python_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = blocks(ROOT / "README.md", "python")[number]
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "epsilon 4" in capsys.readouterr().out
    assert bract.load is not None and list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_python_compiles(page):
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")


def test_nothing_speaks_of_a_machine():
    for path in [*PAGES, *ROOT.glob("examples/*.py"), *ROOT.glob("examples/*.toml")]:
        assert not re.search(r"/(work|root|tmp|home)/", path.read_text()), path
