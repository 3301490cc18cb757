"""core/names.py: many clients' names, and what is known of each, without an object for each."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest

from bract.core import flower, names
from bract.core.names import ByName, Nodes, Numbered, Places, names_of


@pytest.mark.parametrize("count", [0, 1, 9_999, 12_345])
def test_names_are_numbered_with_one_width(count):
    found, width = Numbered(count), max(4, len(str(count)))
    expected = [f"client-{number:0{width}d}" for number in range(1, count + 1)]
    assert list(found) == expected and len(found) == count
    assert [found[place] for place in range(count)] == expected
    assert found[3:9] == tuple(expected[3:9])
    assert all(found.index(name) == place for place, name in enumerate(expected))


@pytest.mark.parametrize(
    "name",
    [
        "client-0000",
        "client-0021",
        "client-21",
        "client-00001",
        "client-+001",
        "client-\u0660\u0660\u0660\u0661",
        "Client-0001",
        "c",
        "",
    ],
)
def test_no_other_name_is_one_of_them(name):
    found = Numbered(20)
    assert name not in found and 7 not in found
    with pytest.raises(ValueError, match="no client"):
        found.index(name)
    with pytest.raises(KeyError):
        Places(found)[name]


def test_a_place_outside_is_none():
    with pytest.raises(IndexError):
        Numbered(3)[3]
    assert Numbered(3)[-1] == "client-0003"
    with pytest.raises(ValueError, match="no client"):
        Numbered(9).index("client-0002", 4)


@pytest.mark.parametrize("of", [Numbered(3), ("ann", "bob", "cid")], ids=["numbered", "named"])
def test_what_is_known_by_name_is_a_mapping(of):
    known = ByName(names=of, numbers=np.array([1, 0, 1]), known=["few", "many"])
    assert dict(known) == dict(zip(of, ["many", "few", "many"], strict=True))
    assert list(known.values()) == ["many", "few", "many"] and known.get("zoe") is None
    assert dict(pickle.loads(pickle.dumps(known))) == dict(known)
    assert names_of(known) is of and names_of(dict(known)) == tuple(of)
    assert dict(ByName.counts(of, np.array([0, 300, 7]))) == dict(zip(of, [0, 300, 7], strict=True))
    assert list(ByName.alike(of, "x").values()) == ["x"] * 3
    assert dict(Places(of)) == {name: place for place, name in enumerate(of)}


@pytest.mark.parametrize("recent", [1, 4096])
def test_nodes_are_those_of_the_names(recent, monkeypatch):
    monkeypatch.setattr(names, "_RECENT", recent)
    of = Numbered(500)
    nodes = Nodes(of)
    expected = {flower.node_id(name): name for name in of}
    assert list(nodes) == list(nodes.ids) == list(expected) and len(nodes) == 500
    for _ in range(2):
        assert dict(nodes) == expected
        assert [nodes.place(node) for node in expected] == list(range(500))
        assert len(nodes._recent) <= recent
    strangers = [flower.node_id("client-0501"), 0, 2**63 - 1, -1]
    for node in strangers:
        assert node not in nodes
        with pytest.raises(KeyError):
            nodes[node]
        with pytest.raises(KeyError):
            nodes.place(node)
    assert np.int64(flower.node_id("client-0007")) in nodes
    assert "client-0001" not in nodes and not Nodes(())


def test_a_hundred_thousand_clients_take_less_than_three_megabytes():
    nodes = Nodes(Numbered(100_000))
    kept = (nodes.ids, nodes._sorted, nodes._places)
    assert sum(map(sys.getsizeof, kept)) < 30 * 100_000
