"""`bract plan`: who holds how much of what, for two clients and two classes and for a thousand clients and ten."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bract.cli.main import main
from bract.core.errors import InputError
from bract.experiment import Experiment
from bract.reports.plan import DRAWN, FIRST, LISTED, WIDTH, print_plan
from bract.simulations.description import QUANTILES, describe

CLASSES = tuple("0123456789")


def experiment(clients, classes=10, **keys):
    tables = {
        "experiment": {"name": "planned", "rounds": 3},
        "task": {"name": "synthetic", "clients": clients, "records": 25, "features": 4, "classes": classes},
        "train": {"batch_size": 10},
        "simulation": {"curves": False, "baselines": False},
    }
    for path, value in keys.items():
        table, _, key = path.partition(".")
        tables.setdefault(table, {})[key] = value
    return Experiment.of(tables)


def shown(described, width=WIDTH):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_plan(described, console)
    return console.file.getvalue()


def site(labels, **keys):
    return {"train_records": sum(labels) - 1, "test_records": 1, "labels": labels} | keys


def described(sites, classes=CLASSES, **keys):
    """Return a description as `describe` makes it, of given clients."""
    found = describe(experiment(2, len(classes)))
    return found | {"classes": list(classes), "sites": sites, "clients": len(sites)} | keys


def test_a_thousand_clients_are_summed_up_in_100_columns_and_listed_in_json():
    found = describe(experiment(1000))
    text = shown(found)
    assert max(map(len, text.splitlines())) <= 100 and len(text.splitlines()) < 25
    assert "1,000 clients" in text and f"{1000 - FIRST} more clients; --json lists all" in text
    assert len(found["sites"]) == 1000
    sizes = sorted(each["train_records"] for each in found["sites"].values())
    least, low, median, high, most = found["distribution"]["train_records"]
    assert (least, most) == (sizes[0], sizes[-1])
    # The nearest rank, so that each is the value of a client.
    assert [low, median, high] == [sizes[int(np.ceil(1000 * share)) - 1] for share in QUANTILES[1:4]]
    row = next(line for line in text.splitlines() if line.startswith("training records"))
    assert row.split()[2:] == [str(size) for size in (least, low, median, high, most)]
    json.dumps(found, allow_nan=False)


def test_the_distribution_tells_even_clients_from_lopsided_ones():
    pooled = {"clients.partitioner": "iid", "clients.count": 10}
    even = describe(experiment(8, **pooled))["distribution"]
    skewed = describe(experiment(8, **pooled | {"clients.partitioner": "pathological"}))["distribution"]
    assert set(even) == {"train_records", "test_records", "classes_present", "largest_class", "distance"}
    assert max(skewed["classes_present"]) <= 2 < min(even["classes_present"])
    assert min(skewed["largest_class"]) >= 0.5 > max(even["largest_class"])
    assert min(skewed["distance"]) > 0.6 > max(even["distance"])


def test_the_distance_is_the_total_variation_from_all_records():
    # Two clients of two classes: 3 and 1 records of the first, 1 and 3 of the second; all together half and half.
    from bract.simulations.description import _distribution

    found = _distribution([site([3, 1]), site([1, 3])])
    assert found["distance"] == pytest.approx([0.25] * 5) and found["largest_class"] == pytest.approx([0.75] * 5)
    assert _distribution([site([8, 0]), site([0, 8])])["distance"] == pytest.approx([0.5] * 5)
    assert _distribution([site([4, 12]), site([1, 3])])["distance"] == pytest.approx([0.0] * 5)


def test_under_privacy_noise_and_epsilon_are_there_and_fit():
    # A batch of all records has an epsilon in closed form, so this is fast.
    private = {"privacy.unit": "record", "privacy.noise_multiplier": 2.0, "train.batch_size": 100}
    found = describe(experiment(LISTED + 1, **private))
    assert found["distribution"]["noise_multiplier"] == [2.0] * 5
    assert found["distribution"]["epsilon"][-1] == max(each["epsilon"] for each in found["sites"].values())
    text = shown(found)
    assert max(map(len, text.splitlines())) <= 100
    assert "replace-one" in text and "noise multiplier" in text


def test_bars_show_each_class_and_none_that_is_not_there():
    text = shown(described({"a": site([8, 4, 1, 0, 0, 0, 0, 0, 0, 100]), "b": site([0, 30, 0, 0, 10, 0, 0, 0, 0, 0])}))
    rows = {line.split()[0]: line.split()[3:] for line in text.splitlines() if line[:2] in ("a ", "b ")}
    assert rows == {"a": ["▁▁▁······█", "88", "%", "9"], "b": ["·█··▃·····", "75", "%", "1"]}
    assert "labels: 0, 1, 2" in text


def test_few_classes_are_counted_and_very_many_not_drawn():
    counted = shown(described({"a": site([7, 3])}, classes=("no", "yes")))
    assert next(line for line in counted.splitlines() if line.startswith("a ")).split() == ["a", "9", "1", "7", "3"]
    names = tuple(f"word {number}" for number in range(DRAWN + 1))
    many = shown(described({"a": site([0, 6] + [1] * (DRAWN - 1))}, classes=names))
    assert f"{DRAWN} of {DRAWN + 1}" in many and f"{DRAWN + 1} classes" in many and "29 % word 1" in many


def test_odd_names_do_not_break_the_table():
    long = {"[bold]hospital" + "x" * 200: site([1, 9])}
    text = shown(described(long, classes=("[/] odd" * 9, "yes")))
    assert max(map(len, text.splitlines())) <= 100
    assert "[bold]hospital" in text


def test_the_command_prints_it_and_the_json_has_every_client(tmp_path: Path, capsys):
    file = tmp_path / "planned.toml"
    file.write_text(experiment(30).to_toml().replace("model = ", "# model = "), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(file)])
    assert ended.value.code == 0
    assert "over the clients" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", str(file), "--json"])
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 30
    with pytest.raises(InputError, match=r"clients\.count"):
        describe(experiment(3, **{"clients.partitioner": "iid"}))
