"""server/checkpoint.py: what is on disk is whole at any moment, and comes back as it went."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bract.core.errors import RunError
from bract.server import checkpoint as checkpoints
from bract.server.checkpoint import Checkpoint

WRITER = """
import sys
import numpy as np
from pathlib import Path
from bract.server import checkpoint as checkpoints
print("ready", flush=True)
for round in range(1, 10**6):
    arrays = {"w": np.full(200_000, round, np.float32)}
    checkpoints.save(Path(sys.argv[1]), checkpoints.Checkpoint(round=round, arrays=arrays))
"""


def test_everything_comes_back(tmp_path):
    saved = Checkpoint(
        round=3,
        arrays={"w": np.arange(4, dtype=np.float32), "scalar": np.array(2, np.int64)},
        strategy={"m_t": {"w": np.ones(2)}, "eta": 0.1, "none": None, "name": "x", "list": [1, np.zeros(1)]},
        progress={"best": None, "budget": {"rounds": {"a": 3}}},
        clients={"a": {"personal": {"kind": "array", "value": {"head": np.eye(2, dtype=np.float32)}}}},
    )
    checkpoints.save(tmp_path, saved)
    found = checkpoints.load(tmp_path)
    assert found is not None
    assert found.round == 3
    assert found.arrays["w"].dtype == np.float32 and found.arrays["scalar"].shape == ()
    np.testing.assert_array_equal(found.strategy["m_t"]["w"], [1, 1])
    np.testing.assert_array_equal(found.strategy["list"][1], [0])
    assert {key: found.strategy[key] for key in ("eta", "none", "name")} == {"eta": 0.1, "none": None, "name": "x"}
    assert found.progress == saved.progress
    np.testing.assert_array_equal(found.clients["a"]["personal"]["value"]["head"], np.eye(2))


def test_the_newest_counts_and_the_old_goes(tmp_path):
    for round in (1, 2, 10):
        checkpoints.save(tmp_path, Checkpoint(round=round, arrays={"w": np.zeros(1)}))
    assert [path.name for path in tmp_path.iterdir()] == ["round-00000010.safetensors"]
    assert checkpoints.load(tmp_path).round == 10


def test_none_is_none_and_damage_is_said(tmp_path):
    assert checkpoints.load(tmp_path) is None
    checkpoints.save(tmp_path, Checkpoint(round=1, arrays={"w": np.zeros(100)}))
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(RunError) as caught:
        checkpoints.load(tmp_path)
    assert caught.value.code == "run-unreadable"


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    missing = tmp_path / "missing" / "file"
    with pytest.raises(RunError) as caught:
        checkpoints.write_atomically(missing, b"new")
    assert caught.value.code == "run-unwritable"
    assert target.read_bytes() == b"old"


def test_kills_at_any_moment_leave_a_whole_checkpoint(tmp_path):
    delays = np.random.default_rng(0).uniform(0.0, 0.15, 12)
    last = 0
    for delay in delays:
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        found = checkpoints.load(tmp_path)
        if found is not None:
            last = max(last, found.round)
            np.testing.assert_array_equal(found.arrays["w"], np.full(200_000, found.round, np.float32))
    assert last > 0
