"""experiment.py: every complaint is one sentence with key, value, mend, file and line."""

from __future__ import annotations

import pytest

from bract.core import toml
from bract.core.errors import InputError
from bract.experiment import Experiment

FILE = """\
[experiment]
name = "trial"   # line 2
rounds = 3

[task]
name = "digits"
own_key = 5

[clients]
count = 10
sampling = "fixed"
per_round = 4

[privacy]
unit = "record"
epsilon = 2.0
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "trial.toml"
    file.write_text(FILE)
    return file


def refused(path, *overrides, code):
    with pytest.raises(InputError) as caught:
        Experiment.load(path, overrides=overrides)
    assert caught.value.code == code
    assert caught.value.exit_status == 2
    assert "\n" not in caught.value.sentence
    return caught.value.sentence


def test_a_file_is_read_with_defaults(path):
    experiment = Experiment.load(path)
    assert experiment.experiment.rounds == 3
    assert experiment.privacy.delta == 1e-5
    assert experiment.task.own == {"own_key": 5}
    assert experiment.folder == path.parent


def test_the_resolved_file_reads_back_the_same(path, tmp_path):
    experiment = Experiment.load(path, overrides=["train.epochs=2", "train.personal=['head.*']"])
    again = tmp_path / "again.toml"
    again.write_text(experiment.to_toml())
    assert Experiment.load(again).model_dump() == experiment.model_dump()
    assert experiment.train.personal == ("head.*",)


def test_overrides_take_toml_or_plain_strings(path):
    experiment = Experiment.load(path, overrides=["train.model=cnn", "train.learning_rate=0.25", "task.extra=[1, 2]"])
    assert experiment.train.model == "cnn"
    assert experiment.train.learning_rate == 0.25
    assert experiment.task.own["extra"] == [1, 2]


def test_value_out_of_range_names_file_line_and_mend(path):
    path.write_text(FILE.replace("epsilon = 2.0", "epsilon = -1"))
    assert refused(path, code="experiment-value") == "privacy.epsilon = -1: must be above 0 (trial.toml, line 16)"


@pytest.mark.parametrize(
    ("override", "code", "says"),
    [
        ("privacy.epsilom=1", "experiment-key", "did you mean epsilon?"),
        ("privcy.epsilon=1", "experiment-key", "did you mean privacy?"),
        ("simulation.zzz=1", "experiment-key", "known here: workers, executor"),
        ("privacy.epsilon=inf", "experiment-value", "finite"),
        ("privacy.epsilon=nan", "experiment-value", "finite"),
        ("train.learning_rate=inf", "experiment-value", "finite"),
        ("privacy.delta=1.0", "experiment-value", "below 1"),
        ("privacy.clipping_norm=0", "experiment-value", "at least 1e-06"),
        ("privacy.unit=patient", "experiment-value", "'none', 'record' or 'client'"),
        ("experiment.rounds=0", "experiment-value", "at least 1"),
        ("experiment.rounds=2.5", "experiment-value", "whole number"),
        ("experiment.rounds=ten", "experiment-value", "whole number"),
        ("experiment.name=../up", "experiment-value", "letters, digits"),
        ("train.batch_size=true", "experiment-value", "whole number"),
        ("privacy.noise_multiplier=1.0", "experiment-conflict", "drop one of the two"),
        ("clients.per_round=11", "experiment-conflict", "at most clients.count, 10"),
        ("train.buffers=['*']", "experiment-conflict", "no mechanism covers a buffer"),
        ("server.patience=2", "experiment-conflict", "needs server.evaluate_every"),
        ("privacy.epsilon_budget=3", "experiment-conflict", "noise_multiplier"),
        ("clients.app=m:app", "experiment-conflict", "cannot see the gradients"),
        ("task.model=m:net", "experiment-conflict", "clients.app"),
        ("rounds=3", "experiment-key", "table.key=value"),
    ],
)
def test_each_bad_key_is_one_sentence(path, override, code, says):
    sentence = refused(path, override, code=code)
    assert says in sentence
    named = override.partition("=")[0]
    assert named in sentence or named.partition(".")[0] in sentence


def test_sampling_needs_its_number(path):
    path.write_text(FILE.replace("per_round = 4\n", ""))
    assert "needs clients.per_round (trial.toml, line 11)" in refused(path, code="experiment-conflict")


def test_privacy_needs_its_figure(path):
    path.write_text(FILE.replace("epsilon = 2.0\n", ""))
    assert "needs privacy.epsilon or privacy.noise_multiplier" in refused(path, code="experiment-conflict")


def test_broken_and_missing_files(path, tmp_path):
    path.write_text("[experiment\nname = 1")
    assert "line 1" in refused(path, code="experiment-syntax")
    assert "there is no such file" in refused(tmp_path / "none.toml", code="experiment-missing")
    assert "folder" in refused(tmp_path, code="experiment-missing")
    path.write_bytes(b"\xff\xfe\x00")
    refused(path, code="experiment-missing")


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (("experiment", "rounds"), 3),
        (("privacy", "epsilon"), 16),
        (("privacy", "delta"), 14),
        (("task",), 5),
        (("nowhere", "x"), None),
    ],
)
def test_lines_are_found_by_table_and_key(key, line):
    assert toml.line_of(FILE, key) == line


def test_an_epsilon_without_a_unit_is_refused_and_none_in_words_switches_privacy_off(path):
    path.write_text(FILE.replace('unit = "record"\n', ""))
    assert 'needs privacy.unit = "record"' in refused(path, code="experiment-conflict")
    assert Experiment.load(path, overrides=["privacy.unit=none"]).privacy.unit == "none"
