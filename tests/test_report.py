"""The report page: whole, honest, harmless, and without the private numbers where it is for others."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bract.core.errors import InputError
from bract.privacy.guarantee import Guarantee
from bract.reports.page import html_of, write_report
from bract.reports.plots import plots_of
from bract.reports.run import read_run

from .sample_run import HISTOGRAMS, SITES, guarantee, without_privacy, write_run

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Keeps ids, references and text, and fails where a tag is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page_of(folder: Path, *, released_only: bool = False) -> tuple[Page, str]:
    run = read_run(folder, released_only=released_only)
    html = html_of(run, plots_of(run), released_only=released_only)
    return Page(html), html


def test_whole_and_self_contained(tmp_path: Path) -> None:
    page, html = page_of(write_run(tmp_path / "run"))
    assert len(page.ids) == len(set(page.ids)) > 50
    assert page.references and all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert {reference for reference in re.findall(r"url\(#([^)]+)\)", html)} <= set(page.ids)
    assert "://" not in html and "@import" not in html
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert html.count('<svg class="plot"') == 8


def test_says_guarantee_and_what_it_leaves_out(tmp_path: Path) -> None:
    page, _ = page_of(write_run(tmp_path / "run"))
    given = guarantee()
    assert given.sentence in page.text
    assert all(item in page.text for item in given.excludes)
    for term in (given.neighbouring, given.sampler, given.trust, "3.832", "1e-5", "from a secret key"):
        assert term in page.text
    assert page.text.index("What was released") < page.text.index("The guarantee")
    assert page.text.index("What it does not cover") < page.text.index("Not private, simulation only")


def test_seeded_randomness_is_said(tmp_path: Path) -> None:
    page, _ = page_of(write_run(tmp_path / "run", given=guarantee(randomness="seed")))
    assert page.text.count("not private towards anyone who knows the seed") == 2


def test_missing_auc_is_a_dash_with_its_reason(tmp_path: Path) -> None:
    page, _ = page_of(write_run(tmp_path / "run"))
    assert re.search(r"Switzerland 25 0\.741 –", page.text)
    assert "fewer than 5 released records of one class" in page.text


def test_hostile_names_are_text(tmp_path: Path) -> None:
    name = "<script>alert('$x^2$')</script>\x1b[31m"
    sites, histograms = (
        {name: (100, 30), "b & c": (90, 30)},
        {name: HISTOGRAMS["Cleveland"], "b & c": HISTOGRAMS["Hungary"]},
    )
    given = guarantee(per_client={name: 1.5, "b & c": 2.0}, excludes=("<b>bold</b>",))
    folder = write_run(tmp_path / "run", sites=sites, histograms=histograms, given=given, classes=("<i>", "</svg>$a$"))
    page, html = page_of(folder)
    assert not page.tags & {"script", "i"}
    assert "<script>alert('$x^2$')</script>" in page.text and "<b>bold</b>" in page.text and "\x1b" not in html
    assert len(page.ids) == len(set(page.ids))


def test_released_only_holds_no_private_number(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    page, html = page_of(folder, released_only=True)
    assert "Not private" not in html and "curve-" not in html and "comparison-" not in html
    comparison = json.loads((folder / "private" / "comparison.json").read_text())
    public = html
    for row in comparison["rows"]:
        assert row["model"] not in public
    whole, _ = page_of(folder)
    private = set(
        re.findall(r"\b0\.\d{3}\b", whole.text.split("Not private, simulation only")[1].split("Configuration")[0])
    )
    left = private & set(re.findall(r"\b0\.\d{3}\b", page.text))
    assert len(private) > 30 and left <= set(re.findall(r"\b0\.\d{3}\b", whole.text.split("Not private")[0]))
    # With the private files damaged the page for others does not even notice.
    (folder / "private" / "comparison.json").write_text("{")
    assert page_of(folder, released_only=True)[1] == html


@pytest.mark.parametrize("status", ["stopped-early", "budget-exhausted", "interrupted", "failed", "refused"])
def test_an_end_before_the_end_is_said(tmp_path: Path, status: str) -> None:
    error = {"code": "quorum-missed", "sentence": "round 4: 1 of 4 clients replied"} if status == "failed" else None
    folder = write_run(tmp_path / "run", result={"status": status, "rounds": 3, "error": error})
    page, _ = page_of(folder)
    assert status.replace("-", " ").capitalize() in page.text and "3 of 20 rounds" in page.text
    assert ("quorum-missed: round 4: 1 of 4 clients replied" in page.text) == (status == "failed")


def test_a_run_without_result_says_so(tmp_path: Path) -> None:
    page, _ = page_of(write_run(tmp_path / "run", finished=False, private=False, rounds=0))
    assert "There is no result yet" in page.text and "Nothing has been released yet" in page.text


def test_no_privacy_is_said_plainly(tmp_path: Path) -> None:
    page, html = page_of(write_run(tmp_path / "run", given=without_privacy()))
    assert "This run gives no privacy guarantee" in page.text and "no guarantee" in page.text
    assert without_privacy().sentence in page.text
    assert (
        "Epsilon by round" not in page.text and "as released" not in page.text.split("The guarantee")[0].split("ROC")[1]
    )
    assert 'id="epsilon-title"' not in html


def test_federation_without_private_files_and_without_metrics(tmp_path: Path) -> None:
    page, _ = page_of(write_run(tmp_path / "run", private=False, result={"metrics": {}, "released": None}))
    assert "No metric was released" in page.text and "Not private" not in page.text


def test_a_thousand_clients(tmp_path: Path) -> None:
    names = [f"client-{index:04d}" for index in range(1000)]
    given = guarantee(per_client={"min": 0.8, "p25": 1.1, "median": 1.3, "p75": 1.6, "max": 2.0})
    folder = write_run(
        tmp_path / "run",
        sites=dict.fromkeys(names, (50, 12)),
        histograms=dict.fromkeys(names, HISTOGRAMS["Hungary"]),
        given=given,
    )
    page, html = page_of(folder)
    assert "Epsilon over 1 000 clients" in page.text and "median 1.300" in page.text
    assert "lowest site" in page.text and "median of 20" in page.text
    assert len(html) < 400_000


def test_many_classes(tmp_path: Path) -> None:
    counts = {name: [[9 - index % 4, index % 3] for index in range(10)] for name in SITES}
    page, _ = page_of(write_run(tmp_path / "run", histograms=counts, classes=tuple("0123456789")))
    assert "right answers by class" in page.text and "ROC curve of the released" not in page.text
    counts = {name: [[3, 1]] * 62 for name in SITES}
    page, _ = page_of(write_run(tmp_path / "run", histograms=counts, classes=tuple(f"letter {k}" for k in range(62))))
    assert "62 classes" in page.text


def test_private_plots_stay_in_private(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert write_report(folder, released_only=True) == folder / "report-released.html"
    assert not (folder / "private" / "plots").exists()
    assert write_report(folder) == folder / "report.html"
    public = {path.name for path in (folder / "plots").iterdir()}
    assert public == {"released-histogram.png", "released-roc.png", "epsilon.png"}
    assert len(list((folder / "private" / "plots").glob("*.png"))) == 5


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert page_of(folder)[1] == page_of(folder)[1]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("manifest.json", None, "run-missing"),
        ("experiment.toml", None, "run-missing"),
        ("manifest.json", "[]", "run-unreadable"),
        ("result.json", '{"guarantee": {"epsilon": 2}}', "run-unreadable"),
        ("result.json", "{", "run-unreadable"),
        ("experiment.toml", "= 1", "run-unreadable"),
        ("metrics.jsonl", '{"round": 1}\nnonsense\n{"round": 3}\n', "run-unreadable"),
        ("private/comparison.json", '{"sites": 3}', "run-unreadable"),
    ],
)
def test_broken_runs_are_named(tmp_path: Path, name: str, content: str | None, code: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(InputError) as caught:
        write_report(folder)
    assert caught.value.code == code and str(folder) in caught.value.sentence


def test_a_line_cut_by_a_kill_is_no_damage(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "clients": 2}\n{"round": 4, "cli')
    rounds = read_run(folder).rounds
    assert [record["round"] for record in rounds] == [1, 2, 3] and rounds[-1]["clients"] == 2


def test_a_guarantee_always_comes_back_as_it_was(tmp_path: Path) -> None:
    found = read_run(write_run(tmp_path / "run")).guarantee
    assert isinstance(found, Guarantee) and found == guarantee()
