"""Whole runs of FedBuff: they go on with clients in flight, and what cannot be is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

import bract
from bract.core.errors import InputError
from bract.server.events import ClientReplied, RoundFinished
from bract.strategies.registry import load_strategy

BUFF = {
    "strategy.name": "fedbuff",
    "strategy.buffer": 2,
    "task.clients": 6,
    "experiment.rounds": 7,
    "simulation.speed_spread": 1.0,
}
PRIVATE = {"privacy.unit": "record", "privacy.noise_multiplier": 4.0}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_seconds(lines):
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("extra", [{}, PRIVATE], ids=["plain", "private"])
def test_an_interrupted_run_ends_with_the_same_bytes(tiny, tmp_path, extra):
    """Between rounds, and within one: clients are in flight over both."""
    keys = BUFF | extra
    whole = bract.simulate(tiny(**keys), out=tmp_path / "whole")

    def interrupt(event):
        after = isinstance(event, RoundFinished) and event.round == 3
        within = isinstance(event, ClientReplied) and event.round == 5
        if after or within:
            os.kill(os.getpid(), signal.SIGINT)

    first = bract.simulate(tiny(**keys), out=tmp_path / "run", listeners=[interrupt])
    second = bract.simulate(resume=tmp_path / "run", listeners=[interrupt])
    last = bract.simulate(resume=tmp_path / "run")
    assert (first.record["rounds"], second.record["rounds"], last.status) == (3, 4, "completed")
    assert last.model_sha256 == whole.model_sha256
    assert last.guarantee == whole.guarantee
    lines = lines_of(tmp_path / "run")
    assert without_seconds(lines) == without_seconds(lines_of(tmp_path / "whole"))
    assert [line["clients"] for line in lines] == [2] * 7
    assert lines[-1]["staleness"] > 0


CHILD = """
import sys, bract
mode, path, out = sys.argv[1:]
listeners = [lambda event: print(type(event).__name__, getattr(event, "round", 0), flush=True)]
if mode == "start":
    result = bract.simulate(path, out=out, listeners=listeners)
else:
    result = bract.simulate(resume=out, listeners=listeners)
print("sha", result.model_sha256, flush=True)
"""


@pytest.mark.soak
def test_a_killed_run_ends_with_the_same_bytes(tiny, tmp_path):
    """SIGKILL in the midst of a step, in a real process."""
    keys = BUFF | PRIVATE | {"server.checkpoint_every": 0.0, "experiment.rounds": 12}
    whole = bract.simulate(tiny(**keys), out=tmp_path / "whole")
    path, out = tmp_path / "tiny.toml", tmp_path / "run"
    path.write_text(tiny(**keys).to_toml())
    command = [sys.executable, "-c", CHILD, "start", str(path), str(out)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if line.split()[:2] == ["ClientReplied", "6"]:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (out / "result.json").exists()
    command[3] = "resume"
    last = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert next(line for line in last if line.startswith("RoundFinished")) != "RoundFinished 1"
    assert last[-1] == f"sha {whole.model_sha256}"
    assert without_seconds(lines_of(out)) == without_seconds(lines_of(tmp_path / "whole"))


def test_the_number_of_workers_changes_nothing(tiny, tmp_path):
    models, lines = set(), []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        models.add(bract.simulate(tiny(**BUFF | PRIVATE | {"simulation.workers": workers}), out=out).model_sha256)
        lines.append(without_seconds(lines_of(out)))
    assert len(models) == 1 and lines[0] == lines[1]


def test_speeds_are_public_and_belong_to_the_seed(tiny, tmp_path):
    times = []
    for seed in (3, 3, 4):
        out = tmp_path / str(len(times))
        bract.simulate(tiny(**BUFF | {"experiment.seed": seed}), out=out)
        times.append([line["virtual_time"] for line in lines_of(out)])
    assert times[0] == times[1] != times[2]


def test_synchronous_rounds_tell_their_virtual_time_where_speeds_differ(tiny, tmp_path):
    bract.simulate(tiny(**{"simulation.speed_spread": 1.0}), out=tmp_path / "run")
    times = [line["virtual_time"] for line in lines_of(tmp_path / "run")]
    assert times == pytest.approx([number * times[0] for number in (1, 2, 3, 4)])
    bract.simulate(tiny(), out=tmp_path / "alike")
    assert "virtual_time" not in lines_of(tmp_path / "alike")[0]


def test_virtual_time_does_not_tell_who_is_in_a_secret_cohort(tiny, tmp_path):
    """Speeds are public, so the time of a round names its slowest client."""
    keys = {
        "privacy.unit": "client",
        "privacy.noise_multiplier": 2.0,
        "clients.sampling": "poisson",
        "clients.per_round": 3,
        "task.clients": 12,
        "simulation.speed_spread": 1.0,
    }
    bract.simulate(tiny(**keys), out=tmp_path / "run")
    assert len(lines_of(tmp_path / "run")) == 4
    assert all("virtual_time" not in line for line in lines_of(tmp_path / "run"))


def test_who_is_sent_less_spends_less(tiny, tmp_path):
    """Under privacy each message is one round of that client's plan: nobody pays for rounds of others."""
    spent = []
    for buffer in (2, 6):
        out = tmp_path / str(buffer)
        bract.simulate(tiny(**BUFF | PRIVATE | {"strategy.buffer": buffer}), out=out)
        spent.append(lines_of(out)[-1]["epsilon"])
    assert 0 < spent[0] < spent[1]


def test_a_lone_model_waits_for_nobody_and_the_reference_has_the_same_speeds(tiny, tmp_path):
    losses = []
    for spread in (0.0, 1.0):
        out = tmp_path / str(spread)
        keys = BUFF | PRIVATE | {"simulation.speed_spread": spread, "simulation.baselines": True, "task.clients": 3}
        bract.simulate(tiny(**keys), out=out)
        rows = json.loads((out / "private" / "comparison.json").read_text())["rows"]
        assert [row["kind"] for row in rows] == ["federated", "reference", "lone", "lone", "lone"]
        losses.append([row["all"]["loss"] for row in rows])
    assert losses[0][1] != losses[1][1] and losses[0][2:] == losses[1][2:]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"strategy.buffer": 7}, "strategy.buffer = 7: must be at most the number of clients, 6"),
        ({"strategy.buffer": 4, "strategy.concurrency": 3}, "buffer = 4: must be at most concurrency, 3"),
        ({"clients.sampling": "fixed", "clients.per_round": 2}, "FedBuff draws whom it sends a model"),
        ({"privacy.unit": "client", "privacy.noise_multiplier": 1.0}, "FedBuff goes with none or record only"),
        ({"simulation.speed_spread": -1.0}, "simulation.speed_spread = -1.0: must be at least 0"),
        ({"simulation.speed_spread": 11.0}, "simulation.speed_spread = 11.0: must be at most 10"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tiny, tmp_path, keys, says):
    with pytest.raises(InputError) as caught:
        bract.simulate(tiny(**BUFF | keys), out=tmp_path / "run")
    assert says in caught.value.sentence and "\n" not in caught.value.sentence
    assert not (tmp_path / "run").exists(), "what is refused leaves no folder behind"


@pytest.mark.parametrize(
    ("key", "value"),
    [("buffer", 0), ("concurrency", 0), ("server_learning_rate", 0), ("staleness_exponent", -1), ("seed", 0.5)],
)
def test_a_bad_key_is_named(key, value):
    with pytest.raises(InputError) as caught:
        load_strategy("fedbuff", {key: value})
    assert key in caught.value.sentence
