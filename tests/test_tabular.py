"""The tabular task: cells to numbers, bad rows, errors that name what is wrong."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bract.core.errors import InputError
from bract.tasks.features import Feature, parse_features
from bract.tasks.tables import canonical
from bract.tasks.tabular import Tabular
from bract.tasks.task import SiteData, is_test

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_csv"
FEATURES: dict[str, Any] = {
    "age": {"range": [0, 100]},
    "dose": {"range": [-1, 1], "missing": True, "missing_values": [0]},
    "smoker": {"flag": True, "missing": True},
    "ward": {"values": ["surgery", "none"], "missing": True},
}
HEADER = "id,site,age,dose,smoker,ward,out"


def task(**keys: Any) -> Tabular:
    return Tabular(**{"target": "out", "positive": ["yes"], "features": FEATURES, "client_column": "site", **keys})


def write(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def everything(data: SiteData) -> list[list[float]]:
    return sorted([*data.train.inputs.tolist(), *data.test.inputs.tolist()])


def encode(spec: dict[str, Any], cell: str) -> tuple[float, ...]:
    return parse_features({"x": spec})[0].encode(cell)


def message(error: pytest.ExceptionInfo[InputError]) -> str:
    return error.value.sentence


@pytest.mark.parametrize(
    ("cell", "expected"),
    [("0", -1.0), ("100", 1.0), ("25", -0.5), (" 25.0 ", -0.5), ("1e9", 1.0), ("-7", -1.0), ("1e400", 0.0), ("x", 0.0)],
)
def test_a_number_is_clamped_to_its_published_range_and_scaled(cell: str, expected: float) -> None:
    assert encode({"range": [0, 100]}, cell) == (expected,)


@pytest.mark.parametrize("cell", ["", "NA", "nan", "inf", "?", "unknown", "0", "0.0", "-0"])
def test_a_missing_number_is_zero_with_an_indicator(cell: str) -> None:
    assert encode({"range": [-1, 3], "missing": True, "missing_values": [0]}, cell) == (0.0, 1.0)
    assert encode({"range": [-1, 3], "missing": True, "missing_values": [0]}, "1") == (0.0, 0.0)


def test_flags_and_values() -> None:
    assert [encode({"flag": True, "missing": True}, cell) for cell in ("TRUE", "no", "1.0", "perhaps")] == [
        (1.0, 0.0),
        (0.0, 0.0),
        (1.0, 0.0),
        (0.0, 1.0),
    ]
    assert [encode({"flag": ["M", 2]}, cell) for cell in ("M", "F", "2.0", "")] == [(1.0,), (0.0,), (1.0,), (0.0,)]
    values = {"values": ["a", "none", 3], "missing": True}
    assert encode(values, "none") == (0.0, 1.0, 0.0, 0.0)  # published, so not missing
    assert encode(values, "3.00") == (0.0, 0.0, 1.0, 0.0)
    assert encode(values, "zzz") == (0.0, 0.0, 0.0, 0.0)
    assert encode(values, "NA") == (0.0, 0.0, 0.0, 1.0)


@given(cell=st.text(max_size=12) | st.floats().map(str))
def test_any_cell_gives_numbers_within_one_of_zero(cell: str) -> None:
    for feature in parse_features(FEATURES):
        numbers = feature.encode(cell)
        assert len(numbers) == feature.width == len(feature.names)
        assert all(-1.0 <= number <= 1.0 for number in numbers)


@pytest.mark.parametrize(("cell", "text"), [("1.0", "1"), (1, "1"), (True, "true"), ("FALSE", "false"), (None, "")])
def test_numbers_and_booleans_are_written_one_way(cell: object, text: str) -> None:
    assert canonical(cell) == text


def test_bad_rows_are_left_out_and_change_no_other(tmp_path: Path) -> None:
    good = ["1,A,50,0.5,yes,surgery,yes", "2,A,60,-0.5,no,none,no"]
    bad = [
        "3,A,50,0.5,yes,surgery,",  # no target
        "4,A,50,0.5,yes,surgery,NA",
        "5,A,50",  # cells lack
        "6,A,50,0.5,yes,surgery,yes,more",
        '7,A,"50,0.5,yes,surgery,yes',  # an open quote, which would swallow the rows below
        "8,,50,0.5,yes,surgery,yes",  # no client
        "",
    ]
    clean = task().partitions(write(tmp_path / "clean.csv", *good))["A"]
    mixed = task().partitions(write(tmp_path / "mixed.csv", bad[4], good[0], *bad, good[1]))["A"]
    assert len(everything(clean)) == 2
    assert everything(mixed) == everything(clean)


def test_bytes_that_are_no_text_fail_no_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "1,A,50,0.5,yes,surgery,yes")
    path.write_bytes(
        path.read_bytes() + b"2,A,\xff\xfe,0.5,\x00,none,no\n" + b"3,A," + b"9" * 200_000 + b",0,1,none,no\n"
    )
    rows = everything(task().partitions(path)["A"])
    assert len(rows) == 2
    assert min(rows)[0] == 0.0  # the age that is no number: missing


def test_clients_are_sorted_by_name_and_a_site_needs_no_client_column(tmp_path: Path) -> None:
    rows = [f"{i},{site},{i},0.5,yes,none,yes" for i, site in enumerate("CABABC")]
    sites = task(id_column="id").partitions(write(tmp_path / "x.csv", *rows))
    assert list(sites) == ["A", "B", "C"]
    own = [row.replace(",A,", ",") for row in rows if ",A," in row]
    site = task(id_column="id").site(write(tmp_path / "a.csv", *own, header=HEADER.replace(",site", "")))
    assert everything(site) == everything(sites["A"])
    assert site.train.inputs.tolist() == sites["A"].train.inputs.tolist()
    assert list(task(client_column=None).partitions(tmp_path / "x.csv")) == ["all"]


def test_without_an_id_the_split_is_by_content_even_without_the_client_column(tmp_path: Path) -> None:
    rows = [f"{i},A,{i},0.{i},yes,none,no" for i in range(1, 60)]
    together = task().partitions(write(tmp_path / "x.csv", *rows))["A"]
    own = [row.split(",", 2)[2] for row in reversed(rows)]
    alone = task().site(write(tmp_path / "a.csv", *own, header=HEADER.split(",", 2)[2]))
    assert sorted(alone.test.inputs.tolist()) == sorted(together.test.inputs.tolist())
    assert 0 < len(together.test) < len(together.train)


def test_the_split_is_the_published_hash_of_the_id(tmp_path: Path) -> None:
    rows = [f"p{i},A,{i},0.5,yes,none,no" for i in range(100)]
    for fold in range(3):
        test = task(id_column="id", fold=fold, folds=3).partitions(write(tmp_path / "x.csv", *rows))["A"].test
        ages = [round((inputs[0] + 1) * 50) for inputs in test.inputs.tolist()]
        assert ages == [i for i in range(100) if is_test(f"id p{i}", fold=fold, folds=3)]


def test_parquet_gives_the_same_tensors_as_csv(tmp_path: Path) -> None:
    csv_path = write(
        tmp_path / "x.csv", "1,A,50,0.5,true,surgery,yes", "2,B,,-1,false,none,no", "3,A,7,,,other,no", "4,B,8,0,,,yes"
    )
    columns: dict[str, list[Any]] = {
        "id": [1, 2, 3, 4],
        "site": ["A", "B", "A", "B"],
        "age": [50, None, 7, 8],  # pandas would make floats of these, because one is missing
        "dose": [0.5, -1.0, float("nan"), 0.0],
        "smoker": [True, False, None, None],
        "ward": ["surgery", "none", "other", None],
        "out": ["yes", "no", "no", "yes"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    for keys in ({"id_column": "id"}, {}):
        from_csv, from_parquet = (task(**keys).partitions(tmp_path / name) for name in ("x.csv", "x.parquet"))
        assert csv_path.exists() and list(from_csv) == list(from_parquet)
        for name in from_csv:
            assert torch.equal(from_csv[name].train.inputs, from_parquet[name].train.inputs)
            assert torch.equal(from_csv[name].test.inputs, from_parquet[name].test.inputs)


def test_classes_by_list_and_by_table(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", *[f"{i},A,{i},0,no,none,{i % 4}" for i in range(40)])
    by_list = task(positive=None, classes=[0, 1, 2], id_column="id")
    by_table = task(positive=None, classes={"well": 0, "ill": [1, 2, 3]}, id_column="id")
    assert by_list.classes == ("0", "1", "2") and by_list.model()(torch.zeros(2, 8)).shape == (2, 3)
    assert by_table.classes == ("well", "ill") and by_table.model()(torch.zeros(2, 8)).shape == (2, 1)
    counts = []
    for one in (by_list, by_table):
        site = one.partitions(path)["A"]
        counts.append(torch.cat([site.train.targets, site.test.targets]).bincount().tolist())
    assert counts == [[10, 10, 10], [10, 30]]  # a target that no class lists is left out


@pytest.mark.parametrize(
    ("keys", "code", "words"),
    [
        ({"features": {}}, "experiment-value", ["task.features"]),
        ({"features": {"age": {"rang": [0, 1]}}}, "experiment-key", ["task.features.age.rang", '"range"']),
        ({"features": {"age": {"range": [1, 0]}}}, "experiment-value", ["task.features.age.range = [1, 0]"]),
        ({"features": {"age": {"range": [0, float("inf")]}}}, "experiment-value", ["task.features.age.range"]),
        ({"features": {"age": {"range": 5}}}, "experiment-value", ["task.features.age.range = 5"]),
        ({"features": {"age": {"range": [0, 1], "flag": True}}}, "experiment-value", ["exactly one"]),
        ({"features": {"age": {"values": []}}}, "experiment-value", ["task.features.age.values"]),
        ({"features": {"age": {"values": [1, "1.0"]}}}, "experiment-value", ['lists "1" twice']),
        ({"features": {"age": {"flag": True, "missing": 1}}}, "experiment-value", ["task.features.age.missing = 1"]),
        ({"features": {"age": [0, 100]}}, "experiment-value", ["task.features.age = [0, 100]"]),
        ({"features": {"out": {"flag": True}}}, "experiment-conflict", ["task.features.out"]),
        ({"positive": None}, "experiment-conflict", ["task.positive", "task.classes"]),
        ({"classes": ["yes", "no"]}, "experiment-conflict", ["task.positive", "task.classes"]),
        ({"positive": None, "classes": ["yes"]}, "experiment-value", ["task.classes", "two"]),
        ({"positive": None, "classes": {"a": [1], "b": [1]}}, "experiment-value", ["task.classes", '"1" twice']),
        ({"target": 3}, "experiment-value", ["task.target = 3"]),
        ({"separator": "::"}, "experiment-value", ["task.separator"]),
        ({"folds": 1}, "experiment-value", ["task.folds = 1"]),
        ({"fold": 5}, "experiment-value", ["task.fold = 5", "0 to 4"]),
        ({"model": "cnn"}, "experiment-value", ["train.model = 'cnn'", '"logistic" or "mlp"']),
    ],
)
def test_wrong_keys_are_named_before_any_data_is_read(keys: dict[str, Any], code: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        task(**keys)
    assert error.value.code == code
    assert all(word in message(error) for word in words), message(error)


def test_errors_of_a_file_name_key_file_and_the_nearest_column(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "1,A,50,0.5,yes,surgery,yes")
    cases: list[tuple[dict[str, Any], Path | None, str, list[str]]] = [
        ({}, tmp_path / "y.csv", "data-missing", ["task.data", "y.csv", "no such file"]),
        ({}, tmp_path, "data-missing", ["task.data", "folder"]),
        ({}, None, "experiment-value", ["task.data: missing"]),
        ({"target": "ouut"}, path, "data-invalid", ['task.target = "ouut"', "x.csv", 'nearest is "out"']),
        ({"id_column": "ID"}, path, "data-invalid", ['task.id_column = "ID"', '"id"']),
        ({"client_column": "sites"}, path, "data-invalid", ['task.client_column = "sites"', '"site"']),
        ({"features": {"agee": {"range": [0, 1]}}}, path, "data-invalid", ["task.features", '"agee"', '"age"']),
        ({}, write(tmp_path / "twice.csv", header=HEADER + ",age"), "data-invalid", ["twice.csv", '"age" twice']),
        ({}, write(tmp_path / "none.csv", "1,A,5,0,1,none,"), "data-empty", ["none.csv", '"out"']),
        ({"separator": ";"}, path, "data-invalid", ["task.target"]),
    ]
    (tmp_path / "empty.csv").touch()
    (tmp_path / "text.parquet").write_text("no parquet")
    cases.append(({}, tmp_path / "empty.csv", "data-invalid", ["empty.csv", "empty"]))
    cases.append(({}, tmp_path / "text.parquet", "data-invalid", ["text.parquet"]))
    for keys, source, code, words in cases:
        with pytest.raises(InputError) as error:
            task(**keys).partitions(source)
        assert error.value.code == code, message(error)
        assert all(word in message(error) for word in words), message(error)
    with pytest.raises(InputError, match="--data"):
        task().site(tmp_path / "y.csv")


CELL = st.sampled_from(
    ["", "NA", "0", "1", "50", "-3.5", "1e99", "yes", "no", "none", "surgery", '"', "\x00", "ü", "x"]
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(CELL, CELL, CELL, CELL, st.sampled_from(["yes", "no", ""])), min_size=3), data=st.data())
def test_removing_a_row_leaves_the_others_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    removed = data.draw(st.integers(0, len(rows) - 1))

    def read(kept: list[tuple[str, ...]], name: str) -> list[str]:
        # Two rows of known content, so that no file is empty.
        lines = ["i,A,1,1,yes,none,yes", "i,A,2,1,yes,none,no", *(",".join(["i", "A", *row]) for row in kept)]
        site = task().partitions(write(folder / name, *lines))["A"]
        return sorted(
            json.dumps([part, inputs, target])
            for part, examples in (("train", site.train), ("test", site.test))
            for inputs, target in zip(examples.inputs.tolist(), examples.targets.tolist(), strict=True)
        )

    whole = read(rows, "whole.csv")
    rest = read(rows[:removed] + rows[removed + 1 :], "rest.csv")
    alone = read([rows[removed]], "alone.csv")
    base = read([], "base.csv")
    for record in base:
        alone.remove(record)
    assert len(alone) <= 1
    assert sorted(rest + alone) == whole


def test_the_example_needs_no_code() -> None:
    section = tomllib.loads((EXAMPLE / "experiment.toml").read_text(encoding="utf-8"))["task"]
    keys = {key: value for key, value in section.items() if key not in ("name", "data")}
    sites = Tabular(**keys).partitions(EXAMPLE / section["data"])
    with (EXAMPLE / "data.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(sites) == sorted({row["clinic"] for row in rows})
    assert sum(len(site.train) + len(site.test) for site in sites.values()) == len(rows) == 600
    assert Feature(column="age", bounds=(18.0, 100.0)) in Tabular(**keys).features
