"""tasks/pool.py: many clients' records in four tensors are each client's own, in this process and in another."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import bract
from bract.core.errors import InputError
from bract.tasks.pool import Pool, counts_of, longest_of, rows_of
from bract.tasks.synthetic import Synthetic
from bract.tasks.task import Examples, SiteData

SIZES = {"north": (3, 1), "south": (0, 2), "east": (5, 0), "west": (1, 1)}


def part(count, start, width=2):
    rows = torch.arange(start, start + count)
    return Examples(rows[:, None].float().expand(count, width).contiguous(), rows % 3)


@pytest.fixture
def clients():
    sites, start = {}, 0
    for name, (train, test) in SIZES.items():
        sites[name] = SiteData(train=part(train, start), test=part(test, start + train))
        start += train + test
    return sites


def same(one, other):
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


@pytest.mark.parametrize("made", [Pool.of, lambda of: Pool.of(Pool.of(of)), lambda of: Pool.of(of).share()])
def test_each_client_has_its_own_records(clients, made):
    pool = made(clients)
    assert list(pool) == list(clients) and len(pool) == 4
    for name, site in clients.items():
        assert same(pool[name].train, site.train) and same(pool[name].test, site.test)
    assert counts_of(pool) == counts_of(clients) == (dict(north=3, south=0, east=5, west=1),
                                                     dict(north=1, south=2, east=0, west=1))  # fmt: skip
    assert longest_of(pool) == longest_of(clients) == 5
    with pytest.raises(KeyError):
        pool["nobody"]


def test_records_are_views_and_sharing_copies_none_a_second_time(clients):
    pool = Pool.of(clients).share()
    assert pool["east"].train.inputs.data_ptr() == pool.train.inputs[3:].data_ptr()
    assert pool.train.inputs.is_shared() and pool.test.targets.is_shared()


@pytest.mark.parametrize("name", ["train", "test"])
def test_rows_are_those_of_the_clients_that_were_asked_for(clients, name):
    for data in (clients, Pool.of(clients)):
        records, begins, sizes = rows_of(data, ["west", "south", "north"], name)
        for client, begin, size in zip(("west", "south", "north"), begins, sizes, strict=True):
            mine = slice(int(begin), int(begin + size))
            assert same(Examples(records.inputs[mine], records.targets[mine]), getattr(clients[client], name))


def test_a_pool_survives_a_pickle(clients):
    pool = Pool.of(clients)
    assert pool.places["west"] == 3
    again = pickle.loads(pickle.dumps(pool))
    assert list(again) == list(pool) and same(again["west"].train, pool["west"].train)


@pytest.mark.parametrize(
    "other",
    [part(2, 0, width=3), Examples(part(2, 0).inputs.double(), part(2, 0).targets), part(0, 0, width=3)],
    ids=["shape", "type", "empty"],
)
def test_records_of_several_shapes_or_types_are_not_pooled(clients, other):
    clients["south"] = SiteData(train=other, test=clients["south"].test)
    with pytest.raises(ValueError, match="one shape"):
        Pool.of(clients)


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 2)

    def forward(self, inputs):
        return self.linear(inputs.mean(1, keepdim=True))


class Odd(Synthetic):
    """Each client's records are of its own length, which no pool holds."""

    def model(self):
        return Mean()

    def partitions(self, source):
        sites = dict(super().partitions(source))
        for place, (name, site) in enumerate(sites.items()):
            parts = [Examples(each.inputs[:, place:], each.targets) for each in (site.train, site.test)]
            sites[name] = SiteData(train=parts[0], test=parts[1])
        return sites


def test_clients_that_cannot_be_pooled_are_served_in_this_process(tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    keys = {"task.name": "test_pool:Odd", "experiment.rounds": 1}
    result = bract.simulate(tiny(**keys, **{"simulation.workers": 2}), out=tmp_path / "run")
    assert result.status == "completed"
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["kernel"]
    with pytest.raises(InputError, match="not all of one shape and type"):
        bract.simulate(tiny(**keys, **{"simulation.executor": "processes"}), out=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_sizes_may_be_as_they_come():
    ends = Pool.of({"a": SiteData(train=part(0, 0), test=part(0, 0))}).train_ends
    np.testing.assert_array_equal(ends, [0, 0])


def test_a_room_lies_in_shared_memory_and_takes_any_record(monkeypatch):
    like = part(1, 0)
    pool = Pool.room(("a", "b"), np.array([0, 2, 3]), np.array([0, 0, 1]), inputs=like.inputs, targets=like.targets)
    assert pool.train.inputs.is_shared() and pool.train.inputs.shape == (3, 2) and pool.test.targets.shape == (1,)
    before = pool.train.inputs.data_ptr()
    assert pool.share().train.inputs.data_ptr() == before, "it is shared without a copy"
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda _: (_ for _ in ()).throw(RuntimeError("no space")))
    alone = Pool.room(("a",), np.array([0, 2]), np.array([0, 1]), inputs=like.inputs, targets=like.targets)
    assert alone.train.inputs.shape == (2, 2) and not alone.train.inputs.is_shared()


def test_records_are_dealt_out_by_their_rows():
    records = part(6, 0)
    pool = Pool.dealt(records, ("a", "b"), [[4, 0], [5]], [[], [1, 3]])
    assert same(pool["a"].train, records.select([4, 0])) and same(pool["b"].train, records.select([5]))
    assert len(pool["a"].test) == 0 and same(pool["b"].test, records.select([1, 3]))
