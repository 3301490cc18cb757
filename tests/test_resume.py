"""Nothing is lost: a run that was interrupted or killed ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import bract
from bract.clients.kernels import dp_engines
from bract.core.errors import InputError, RunError
from bract.server.events import Evaluated, RoundFinished

SECRET = {"privacy.unit": "record", "privacy.noise_multiplier": 4.0, "experiment.rounds": 6}


class InterruptAfter:
    """A listener that sends this process a real SIGINT after a round."""

    def __init__(self, round):
        self.round = round

    def __call__(self, event):
        if isinstance(event, RoundFinished) and event.round == self.round:
            os.kill(os.getpid(), signal.SIGINT)


def rounds(run):
    return [json.loads(line)["round"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """Return a function: the uninterrupted result for keys, each computed once."""
    results = {}

    def make(**keys):
        name = json.dumps(keys, sort_keys=True)
        if name not in results:
            results[name] = bract.simulate(tiny(**keys), out=tmp_path_factory.mktemp("whole") / "run")
        return results[name]

    return make


@pytest.mark.parametrize(
    "keys",
    [
        {},
        SECRET,
        {"train.personal": ["1.*"], "train.model": "mlp"} | SECRET,
        {"strategy.name": "flwr.serverapp.strategy:FedAdam", "experiment.rounds": 6},
        {"clients.sampling": "fixed", "clients.per_round": 2, "experiment.rounds": 6},
    ],
    ids=["plain", "private", "personal", "stateful strategy", "cohorts"],
)
def test_an_interrupted_run_ends_with_the_same_bytes(tiny, whole, tmp_path, keys):
    if "train.personal" in keys:
        keys = dict(keys)
        mlp = bract.simulate(tiny(**{"train.model": "mlp"}), out=tmp_path / "names").model
        keys["train.personal"] = [name for name, _ in mlp.named_parameters()][-2:]
    first = bract.simulate(tiny(**keys), out=tmp_path / "run", listeners=[InterruptAfter(3)])
    assert (first.status, first.exit_status, first.record["rounds"]) == ("interrupted", 130, 3)
    assert rounds(tmp_path / "run") == [1, 2, 3]
    second = bract.simulate(resume=tmp_path / "run")
    assert second.status == "completed"
    assert rounds(tmp_path / "run") == list(range(1, tiny(**keys).experiment.rounds + 1))
    assert second.model_sha256 == whole(**keys).model_sha256
    assert second.guarantee == whole(**keys).guarantee
    assert second.metrics == whole(**keys).metrics


def test_an_interrupt_within_a_round_spends_it_once(tiny, whole, tmp_path):
    """Between two clients of a round: the round is trained again with the same noise, and counts once."""
    from bract.server.events import ClientReplied

    def interrupt(event):
        if isinstance(event, ClientReplied) and event.round == 2 and event.client == "client-0002":
            os.kill(os.getpid(), signal.SIGINT)

    first = bract.simulate(tiny(**SECRET), out=tmp_path / "run", listeners=[interrupt])
    assert first.status == "interrupted" and first.record["rounds"] == 1
    second = bract.simulate(resume=tmp_path / "run")
    assert second.model_sha256 == whole(**SECRET).model_sha256
    assert second.guarantee == whole(**SECRET).guarantee


CHILD = """
import sys, bract
from pathlib import Path
from bract.experiment import Experiment
mode, path, out = sys.argv[1:]
listeners = [lambda event: print(type(event).__name__, getattr(event, "round", 0), flush=True)]
if mode == "start":
    result = bract.simulate(path, out=out, listeners=listeners)
else:
    result = bract.simulate(resume=out, listeners=listeners)
print("sha", result.model_sha256, flush=True)
"""


def test_a_killed_process_resumes_to_the_same_bytes(tiny, whole, tmp_path):
    """SIGKILL at three moments of one run, each in a real process."""
    keys = SECRET | {"server.checkpoint_every": 0.0, "experiment.rounds": 16, "task.clients": 2}
    path, out = tmp_path / "tiny.toml", tmp_path / "run"
    path.write_text(tiny(**keys).to_toml())
    child = None
    for mode, after in (("start", 3), ("resume", 7), ("resume", 11)):
        command = [sys.executable, "-c", CHILD, mode, str(path), str(out)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            if line.split()[:2] == ["Checkpointed", str(after)]:
                # Some moment of what follows: training, a checkpoint half written, the metrics' line.
                time.sleep(0.005 * after)
                break
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert not (out / "result.json").exists()
    last = subprocess.run(
        [sys.executable, "-c", CHILD, "resume", str(path), str(out)], capture_output=True, text=True, check=True
    )
    first_round = next(line for line in last.stdout.splitlines() if line.startswith("RoundFinished"))
    assert int(first_round.split()[1]) > 11, "it must not begin anew"
    assert last.stdout.splitlines()[-1] == f"sha {whole(**keys).model_sha256}"
    assert rounds(out) == list(range(1, 17))


def test_a_secret_run_resumes_with_its_own_key(tiny, tmp_path):
    keys = SECRET | {"privacy.randomness": "secret"}
    first = bract.simulate(tiny(**keys), out=tmp_path / "run", listeners=[InterruptAfter(2)])
    key = (tmp_path / "run" / "private" / "key").read_text()
    second = bract.simulate(resume=tmp_path / "run")
    assert first.status == "interrupted" and second.status == "completed"
    assert (tmp_path / "run" / "private" / "key").read_text() == key


def test_other_data_are_refused(tiny, tmp_path):
    """The same noise over other records' gradients would reveal their difference."""
    from sklearn.datasets import make_classification

    inputs, labels = make_classification(60, n_features=2, n_informative=2, n_redundant=0, random_state=0)

    def write(rows):
        table = "\n".join(f"{a:.4f},{b:.4f},{label}" for (a, b), label in rows)
        (tmp_path / "data.csv").write_text("a,b,sick\n" + table + "\n")

    rows = list(zip(inputs.tolist(), labels.tolist(), strict=True))
    write(rows)
    features = {name: {"range": [-3, 3]} for name in "ab"}
    keys = SECRET | {"task.name": "tabular", "task.data": "data.csv", "task.target": "sick", "task.positive": 1}
    experiment = tiny(tmp_path, **keys, **{"task.features": features})
    tables = experiment.model_dump(exclude_none=True)
    for name in ("clients", "records", "classes"):
        tables["task"].pop(name)
    experiment = type(experiment).of(tables, folder=tmp_path)
    bract.simulate(experiment, out=tmp_path / "run", listeners=[InterruptAfter(2)])
    write(rows[1:])
    with pytest.raises(InputError) as caught:
        bract.simulate(resume=tmp_path / "run")
    assert caught.value.code == "run-changed" and "data" in caught.value.sentence


def test_an_experiment_that_was_edited_is_refused(tiny, tmp_path):
    """Another clipping norm under the same noise would reveal a gradient."""
    bract.simulate(tiny(**SECRET), out=tmp_path / "run", listeners=[InterruptAfter(2)])
    path = tmp_path / "run" / "experiment.toml"
    path.write_text(path.read_text().replace("clipping_norm = 1.0", "clipping_norm = 1.5"))
    with pytest.raises(InputError) as caught:
        bract.simulate(resume=tmp_path / "run")
    assert caught.value.code == "run-changed" and "experiment" in caught.value.sentence


def test_a_completed_run_resumes_to_itself(tiny, tmp_path):
    first = bract.simulate(tiny(**SECRET), out=tmp_path / "run")
    again = bract.simulate(resume=tmp_path / "run")
    assert (again.status, again.model_sha256, again.metrics) == ("completed", first.model_sha256, first.metrics)
    assert again.guarantee == first.guarantee


def test_other_software_is_refused(tiny, tmp_path):
    bract.simulate(tiny(), out=tmp_path / "run", listeners=[InterruptAfter(2)])
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"torch": "1.0"}))
    with pytest.raises(InputError) as caught:
        bract.simulate(resume=tmp_path / "run")
    assert caught.value.code == "run-changed" and "torch 1.0" in caught.value.sentence


def test_another_kernel_is_refused(tiny, tmp_path):
    """It may round otherwise, and the same noise over other sums would reveal their difference."""
    bract.simulate(tiny(**SECRET), out=tmp_path / "run", listeners=[InterruptAfter(2)])
    path = tmp_path / "run" / "manifest.json"
    # As if its model could not be stacked any more.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kernel": "stacked"}))
    with pytest.raises(InputError) as caught:
        bract.simulate(resume=tmp_path / "run")
    assert caught.value.code == "run-changed"
    assert caught.value.sentence.startswith('simulation.kernel: the run began with "stacked", and its model now takes')


def test_another_engine_is_refused(tiny, tmp_path, monkeypatch):
    """It rounds otherwise, and the same noise over other sums would reveal their difference."""
    out = tmp_path / "run"
    bract.simulate(tiny(**SECRET), out=out, listeners=[InterruptAfter(2)])
    assert json.loads((out / "manifest.json").read_text())["dp_engine"] == "bookkeeping"
    # As if the task's code now had a layer that book-keeping does not know.
    monkeypatch.setattr(dp_engines, "supports", lambda module, like: False)
    with pytest.raises(InputError) as caught:
        bract.simulate(resume=out)
    assert caught.value.code == "run-changed"
    assert caught.value.sentence.startswith('train.dp_engine: the run began with "bookkeeping"')
    assert '"opacus"' in caught.value.sentence


def test_an_engine_that_does_not_fit_leaves_no_run_behind(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(dp_engines, "supports", lambda module, like: False)
    with pytest.raises(InputError) as caught:
        bract.simulate(tiny(**SECRET, **{"train.dp_engine": "bookkeeping"}), out=tmp_path / "run")
    assert caught.value.code == "model-not-private" and not (tmp_path / "run").exists()


def test_without_record_level_privacy_there_is_no_engine(tiny, tmp_path):
    bract.simulate(tiny(), out=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["dp_engine"] is None


def test_no_run_no_resume(tmp_path):
    with pytest.raises(InputError) as caught:
        bract.simulate(resume=tmp_path)
    assert caught.value.code == "run-missing"


def test_a_used_directory_is_refused(tiny, tmp_path):
    (tmp_path / "mine.txt").write_text("dear")
    with pytest.raises(InputError) as caught:
        bract.simulate(tiny(), out=tmp_path)
    assert caught.value.code == "run-exists"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("kind", [Evaluated, RoundFinished])
def test_a_round_that_was_trained_and_not_told_of_is_finished_when_the_run_is_resumed(tiny, whole, tmp_path, kind):
    """As when the disk is full: the model of round 3 is there, its metrics or its line are not."""
    keys = SECRET | {"server.evaluate_every": 1, "server.patience": 6}

    def fail(event):
        if isinstance(event, kind) and event.round == 3:
            raise RunError("run-unwritable", "no space left")

    with pytest.raises(RunError, match="no space left"):
        bract.simulate(tiny(**keys), out=tmp_path / "run", listeners=[fail])
    second = bract.simulate(resume=tmp_path / "run")
    assert second.status == "completed" and rounds(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert second.model_sha256 == whole(**keys).model_sha256
    assert second.metrics == whole(**keys).metrics
