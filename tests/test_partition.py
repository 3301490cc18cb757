"""Virtual clients by flwr-datasets' partitioners: each record once, by the public seed, as what it was."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from bract.core.errors import InputError
from bract.tasks.partition import client_names, partition, partitioners
from bract.tasks.task import Examples, SiteData

CLASSES, RECORDS = 4, 240
OPTIONS: dict[str, dict[str, Any]] = {
    "size": {"partition_sizes": [100, 80, 60]},
    "inner-dirichlet": {"partition_sizes": [100, 80, 60]},
    "distribution": {"distribution_array": [[1, 2], [2, 1], [1, 1], [3, 1]], "num_unique_labels_per_partition": 2},
}


def examples(numbers: range) -> Examples:
    inputs = torch.tensor(list(numbers), dtype=torch.float32).reshape(-1, 1)
    return Examples(inputs, torch.tensor([number % CLASSES for number in numbers], dtype=torch.int64))


@pytest.fixture
def sites() -> dict[str, SiteData]:
    """Two clients; the input of a record is its number, and numbers from 200 on are test records."""
    return {
        "A": SiteData(train=examples(range(0, 120)), test=examples(range(200, 220))),
        "B": SiteData(train=examples(range(120, 200)), test=examples(range(220, RECORDS))),
    }


def numbers(part: Examples) -> list[int]:
    return [int(number) for number in part.inputs[:, 0].tolist()]


def layout(clients: dict[str, SiteData]) -> dict[str, tuple[list[int], list[int]]]:
    return {name: (numbers(site.train), numbers(site.test)) for name, site in clients.items()}


def test_natural_changes_nothing(sites: dict[str, SiteData]) -> None:
    assert partition(sites, partitioner="natural", count=9) == sites


@pytest.mark.parametrize("name", partitioners())
def test_each_record_goes_to_one_client_and_keeps_its_part(sites: dict[str, SiteData], name: str) -> None:
    def dealt(seed: int) -> dict[str, SiteData]:
        return partition(sites, partitioner=name, count=4, seed=seed, options=OPTIONS.get(name))

    clients = dealt(1)
    assert Counter(n for site in clients.values() for n in numbers(site.train)) == Counter(range(200))
    assert Counter(n for site in clients.values() for n in numbers(site.test)) == Counter(range(200, RECORDS))
    for site in clients.values():
        for part in (site.train, site.test):
            assert part.targets.tolist() == [number % CLASSES for number in numbers(part)]
    assert layout(clients) == layout(dealt(1))
    if name not in ("natural", "natural-id", "grouped-natural-id"):
        assert layout(clients) != layout(dealt(2))
    if name not in ("natural", "natural-id", "grouped-natural-id", "size", "inner-dirichlet"):
        assert list(clients) == list(client_names(4))


def test_natural_ids_are_the_clients_names(sites: dict[str, SiteData]) -> None:
    assert list(layout(partition(sites, partitioner="natural-id")).values()) == list(layout(sites).values())
    assert len(partition(sites, partitioner="grouped-natural-id", options={"group_size": 2})) == 1


def test_options_reach_the_partitioner(sites: dict[str, SiteData]) -> None:
    for classes in (1, 3):
        clients = partition(
            sites, partitioner="pathological", count=8, options={"num_classes_per_partition": classes}, seed=3
        )
        assert {
            len(set(site.train.targets.tolist()) | set(site.test.targets.tolist())) for site in clients.values()
        } == {classes}
    even, uneven = (
        [len(site.train) for site in partition(sites, partitioner="dirichlet", count=4, options={"alpha": a}).values()]
        for a in (1000.0, 0.3)
    )
    assert max(even) - min(even) < max(uneven) - min(uneven)


def test_many_clients_are_named_in_order() -> None:
    assert list(client_names(2)) == ["client-0001", "client-0002"]
    assert list(client_names(12_345)) == sorted(client_names(12_345))


def test_it_is_quiet(sites: dict[str, SiteData], capfd: pytest.CaptureFixture[str], recwarn: Any) -> None:
    partition(sites, partitioner="inner-dirichlet", options=OPTIONS["inner-dirichlet"])
    partition(sites, partitioner="dirichlet", count=20, options={"alpha": 2.0, "min_partition_size": 4})
    captured = capfd.readouterr()
    assert captured.out == captured.err == "" and not recwarn.list


@pytest.mark.parametrize(
    ("name", "count", "options", "code", "words"),
    [
        ("dirchlet", 3, {}, "experiment-value", ['clients.partitioner = "dirchlet"', 'nearest is "dirichlet"']),
        ("vertical-even", 3, {}, "experiment-value", ["clients.partitioner"]),
        ("iid", None, {}, "experiment-value", ["clients.count: missing"]),
        ("iid", 241, {}, "experiment-value", ["clients.count = 241", "240 records"]),
        ("dirichlet", 3, {"alfa": 1}, "experiment-key", ["clients.partitioner_options.alfa", '"alpha"']),
        ("iid", 3, {"seed": 1}, "experiment-key", ["clients.partitioner_options.seed", "none"]),
        ("natural", 3, {"alpha": 1}, "experiment-key", ["clients.partitioner_options.alpha", "none"]),
        ("dirichlet", 3, {"alpha": "x"}, "experiment-value", ['"dirichlet" with 3 clients']),
        (
            "dirichlet",
            3,
            {"alpha": 1.0, "min_partition_size": 200},
            "experiment-value",
            ["options.min_partition_size = 200"],
        ),
        ("size", None, {}, "experiment-value", ["clients.partitioner_options.partition_sizes: missing"]),
        ("shard", 3, {"num_shards_per_partition": 0}, "experiment-value", ["num_shards_per_partition = 0"]),
        (
            "pathological",
            2,
            {"num_classes_per_partition": 1},
            "experiment-value",
            ["120 of 240 records", "more clients"],
        ),
        (
            "distribution",
            4,
            {**OPTIONS["distribution"], "distribution_array": "x"},
            "experiment-value",
            ["distribution"],
        ),
        ("size", None, {"partition_sizes": [239, 1]}, "data-empty", ['client "client-0002"', "no record to train on"]),
    ],
)
def test_mistakes_are_one_sentence(
    sites: dict[str, SiteData], name: str, count: int | None, options: dict[str, Any], code: str, words: list[str]
) -> None:
    # By this seed the last record in the shuffled order is a test record.
    with pytest.raises(InputError) as error:
        partition(sites, partitioner=name, count=count, options=options, seed=7)
    assert error.value.code == code, error.value.sentence
    assert all(word in error.value.sentence for word in words), error.value.sentence
    assert "\n" not in error.value.sentence


def test_a_natural_client_without_training_records_is_named(sites: dict[str, SiteData]) -> None:
    sites["C"] = SiteData(train=examples(range(0)), test=examples(range(3)))
    with pytest.raises(InputError, match='client "C"') as error:
        partition(sites)
    assert error.value.code == "data-empty"
