"""simulations/slab.py and contexts.py: what clients keep lies in a mapped file, and comes back bit for bit."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

import bract
from bract.core import flower
from bract.simulations import slab
from bract.simulations.contexts import ClientContexts
from bract.simulations.slab import Slab

NAMES = ("a", "b", "c")


def tree(value, size=5000):
    arrays = {"w": np.full((size, 2), value, np.float32), "n": np.array(value, np.int64)}
    return {"own": {"kind": "array", "value": arrays}, "told": {"kind": "metric", "value": {"x": value}}}


def same(one, other):
    assert one.keys() == other.keys()
    assert one["told"] == other["told"]
    for name, array in other["own"]["value"].items():
        found = one["own"]["value"][name]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found, array)


def test_states_come_back_and_rooms_are_taken_again(tmp_path):
    each = Slab(tmp_path)
    kept = [each.put(tree(value)) for value in range(200)]
    for value, one in enumerate(kept):
        same(one.tree, tree(value))
    full = each.nbytes
    assert full >= 200 * 40_000
    for one in kept[:150]:
        each.free(one)
    again = [each.put(tree(-value)) for value in range(150)]
    assert each.nbytes == full, "no more was taken"
    for value, one in enumerate(again):
        same(one.tree, tree(-value))
    for value, one in enumerate(kept[150:], start=150):
        same(one.tree, tree(value))
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_states_are_in_the_file_and_not_in_memory_of_their_own(tmp_path):
    each = Slab(tmp_path)
    kept = each.put(tree(1.0))
    assert np.shares_memory(kept.tree["own"]["value"]["w"], kept.room)
    with pytest.raises(ValueError, match="read-only"):
        kept.tree["own"]["value"]["w"][0] = 2
    large = each.put(tree(2.0, size=10**6))
    same(large.tree, tree(2.0, size=10**6))
    same(kept.tree, tree(1.0))


def test_small_states_take_no_room(tmp_path):
    each = Slab(tmp_path)
    same(each.put(tree(1.0, size=3)).tree, tree(1.0, size=3))
    each.free(each.put(tree(1.0, size=3)))
    assert each.nbytes == 0


def test_a_round_is_put_back_however_often_it_is_tried(tmp_path):
    contexts = ClientContexts(NAMES, folder=tmp_path)
    a, b, c = (flower.node_id(name) for name in NAMES)
    contexts.put(a, tree(1.0))
    contexts.put(b, tree(2.0))
    for attempt in range(5):
        before = contexts.remember()
        for node in (a, c):
            contexts.put(node, tree(10.0 + attempt))
            contexts.put(node, tree(20.0 + attempt))
        same(contexts.tree(a), tree(20.0 + attempt))
        same(contexts.tree(c), tree(20.0 + attempt))
        # A call that was left off has its context open.
        contexts.of(a).state = flower.tree_to_state(tree(30.0))
        contexts.restore(before)
        same(flower.state_to_tree(contexts.of(a).state), tree(1.0))
        contexts.settle(a)
        same(contexts.tree(a), tree(1.0))
        same(contexts.tree(b), tree(2.0))
        assert contexts.tree(c) == {} and contexts.states().keys() == {"a", "b"}
        assert not contexts.of(c).state
        contexts.settle(c)


def test_rounds_that_end_well_take_no_more_room_than_population_and_cohort(tmp_path):
    contexts = ClientContexts(NAMES, folder=tmp_path)
    nodes = [flower.node_id(name) for name in NAMES]
    rooms = set()
    for round in range(50):
        contexts.remember()
        for node in nodes:
            contexts.put(node, tree(float(round)))
            rooms.add(contexts._kept[node].room.ctypes.data)
    for node in nodes:
        same(contexts.tree(node), tree(49.0))
    assert len(rooms) == 2 * len(nodes)


def test_a_context_is_the_same_until_it_is_settled_and_its_state_lasts(tmp_path):
    contexts = ClientContexts(NAMES, folder=tmp_path)
    node = flower.node_id("b")
    context = contexts.of(node)
    assert contexts.of(node) is context and (context.node_id, context.node_config["partition-id"]) == (node, 1)
    context.state = flower.tree_to_state(tree(3.0))
    contexts.settle(node)
    assert contexts.of(node) is not context
    same(flower.state_to_tree(contexts.of(node).state), tree(3.0))
    contexts.of(node).state = flower.tree_to_state({})
    contexts.settle(node)
    assert contexts.states() == {}


def test_a_client_that_keeps_nothing_takes_no_note():
    contexts = ClientContexts(NAMES)
    for node in contexts.names:
        contexts.put(node, {})
    assert not contexts._before


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path, monkeypatch):
    def full(file, offset, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(slab.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        Slab(tmp_path).put(tree(1.0))


@pytest.mark.parametrize("workers", [1, 2])
def test_personal_layers_of_a_run_lie_in_its_private_folder(tiny, tmp_path, monkeypatch, workers):
    folders = set()
    original = Slab._extent
    monkeypatch.setattr(Slab, "_extent", lambda self, size: folders.add(self._folder) or original(self, size))
    keys = {"task.features": 2000, "train.model": "mlp", "train.personal": ("hidden.*",), "experiment.rounds": 3}
    result = bract.simulate(tiny(**keys, **{"simulation.workers": workers}), out=tmp_path / "run")
    assert result.status == "completed" and folders == {tmp_path / "run" / "private"}
