"""The closing lines of a run."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

from bract.reports import words
from bract.reports.summary import print_summary

from .sample_run import HISTOGRAMS, guarantee, without_privacy, write_run


def summary(folder: Path, *, terminal: bool = False, width: int = 80) -> str:
    output = io.StringIO()
    print_summary(folder, Console(file=output, force_terminal=terminal, no_color=True, width=width))
    # Bold and dim take no room.
    return re.sub(r"\x1b\[[\d;]*m", "", output.getvalue())


def test_says_metrics_guarantee_report_and_the_table(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "report.html").touch()
    text = summary(folder)
    assert "accuracy 0.778, AUC 0.847" in text
    assert guarantee().sentence in text
    assert str(folder / "report.html") in text
    public, private = text.split("not private, simulation only")
    assert "alone" not in public and "0.72" in private
    for name in ("federated, epsilon 2", "without privacy", "Cleveland alone", "Hungary", "Switzerland", "all sites"):
        assert name in private
    assert "\x1b" not in text and "─" not in text


def test_table_fits_80_columns_without_a_cut_word(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for terminal in (False, True):
        table = summary(folder, terminal=terminal).split("simulation only")[1]
        assert max(len(line.rstrip()) for line in table.splitlines()) <= 80
        assert all(
            name in table for name in ("Cleveland", "Hungary", "VA Long", "Beach", "Switzerland", "VA Long Beach alone")
        )
        assert "…" not in table


def test_a_terminal_wraps_all_but_the_path(tmp_path: Path) -> None:
    folder = write_run(tmp_path / ("deep-" * 20) / "run")
    (folder / "report.html").touch()
    lines = summary(folder, terminal=True).splitlines()
    assert any(str(folder / "report.html") in line for line in lines)
    assert all(len(line) <= 120 for line in lines if "report.html" not in line)


def test_many_sites_become_their_spread(tmp_path: Path) -> None:
    names = [f"hospital number {index}" for index in range(40)]
    histograms = dict.fromkeys(names, HISTOGRAMS["Hungary"])
    folder = write_run(tmp_path / "run", sites=dict.fromkeys(names, (50, 12)), histograms=histograms)
    text = summary(folder)
    assert "lowest" in text and "median" in text and "median of 20" in text and "hospital number" not in text
    assert max(len(line.rstrip()) for line in text.split("simulation only")[1].splitlines()) <= 80


def test_names_too_wide_for_columns_become_their_spread(tmp_path: Path) -> None:
    names = [f"Universitätsklinikum-{index}-Außenstelle" for index in range(7)]
    folder = write_run(
        tmp_path / "run", sites=dict.fromkeys(names, (50, 12)), histograms=dict.fromkeys(names, HISTOGRAMS["Hungary"])
    )
    table = summary(folder).split("simulation only")[1]
    assert "lowest" in table and max(len(line.rstrip()) for line in table.splitlines()) <= 80


def test_without_privacy_and_without_comparison(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "run", given=without_privacy(), private=False, result={"status": "stopped-early", "rounds": 9}
    )
    text = summary(folder)
    assert "There is no differential privacy" in text and "stopped early, 9 of 20 rounds" in text
    assert "not private, simulation only" not in text and "report.html" not in text


def test_hostile_names_reach_no_terminal(tmp_path: Path) -> None:
    sites = {"\x1b]0;x\x07[bold]a": (50, 12), "b": (50, 12)}
    histograms = dict.fromkeys(sites, HISTOGRAMS["Hungary"])
    text = summary(write_run(tmp_path / "run", sites=sites, histograms=histograms))
    assert "\x1b" not in text and "[bold]a" in text


def test_numbers_are_never_rounded_to_someone_s_favour() -> None:
    assert words.epsilon(1.2341) == "1.235" and words.epsilon(2.0000000001) == "2.000" and words.epsilon(None) == "–"
    assert [words.delta(value) for value in (1e-5, 2.5e-6, 0, None)] == ["1e-5", "2.5e-6", "0", "–"]
    assert [words.duration(value) for value in (0.21, 59.96, 125, 12000)] == [
        "0.2 s",
        "1 min 00 s",
        "2 min 05 s",
        "3 h 20 min",
    ]
    assert words.number(-0.25) == "−0.250" and words.number(float("nan")) == "–"
    assert words.printable("a\tb\x9b2J\u202e") == "a b�2J�"
