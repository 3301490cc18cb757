"""`bract audit quick`: sound experiments pass every check, and each mutation of the real code fails the one it should.

The audit draws a fresh key, so a sound build fails one of a run's checks of chance with a probability of about 1e-6 at
most; a mutation is missed with a probability that is far smaller.
"""

from __future__ import annotations

import csv
import itertools
import json
import time

import numpy as np
import pytest
import torch
from torch import nn

from bract.cli.main import main
from bract.clients import local_model
from bract.clients.gate import Gate
from bract.clients.kernels import dp_engines, sequential
from bract.clients.owner import Site
from bract.clients.training import LocalTraining, reproducible
from bract.core.errors import InputError
from bract.core.keys import Key, Stream
from bract.experiment import Experiment
from bract.privacy import accounting
from bract.privacy.dpsgd import bookkeeping, clipping, dpsgd
from bract.privacy.dpsgd.stream_optimizer import StreamOptimizer
from bract.privacy.mechanism import RecordLevelPlan
from bract.server.accounts import Accounts
from bract.simulations import federation
from bract.simulations.audit.records.subject import MOST_SITES, subject_of
from bract.simulations.audit.run import CHECKS, quick
from bract.tasks.synthetic import Synthetic
from bract.tasks.tabular import Tabular
from bract.tasks.task import Examples, SiteData

PRIVATE = {"privacy.unit": "record", "privacy.noise_multiplier": 4.0}
SMALL = PRIVATE | {"task.clients": 2}
ALL = list(CHECKS["record"])

OWN_TASK = """
from dataclasses import replace
from bract.tasks.tabular import Tabular


class Standardised(Tabular):
    def partitions(self, source):
        return {name: scaled(site) for name, site in super().partitions(source).items()}


def scaled(site):
    mean, deviation = site.train.inputs.mean(0), site.train.inputs.std(0).clamp(min=1e-6)
    return replace(
        site, train=replace(site.train, inputs=(site.train.inputs - mean) / deviation),
        test=replace(site.test, inputs=(site.test.inputs - mean) / deviation),
    )
"""


def failing(experiment, *checks, task=None):
    """Return the names of the checks that fail, and their sentences; of the given checks or of all."""
    if checks:
        with reproducible():
            subject = subject_of(experiment, task=task)
            found = [CHECKS["record"][name](subject) for name in checks]
    else:
        found = list(quick(experiment, task=task))
        assert [finding.name for finding in found] == ALL
    return {finding.name: finding.sentence for finding in found if finding.passed is False}


def table(folder, task="tabular", *, rows=200, **keys):
    """Return the experiment of a small CSV with two clients."""
    draws = np.random.default_rng(5)
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clinic", "age", "dose", "outcome"])
        for row in range(rows):
            age, dose = draws.integers(20, 80), round(float(draws.uniform(0, 5)), 3)
            writer.writerow([f"clinic-{row % 2}", age, dose, int(age + 10 * dose + draws.normal(0, 9) > 75)])
    (folder / "own_tables.py").write_text(OWN_TASK)
    tables = {
        "experiment": {"name": "table", "rounds": 4},
        "task": {
            "name": task,
            "data": "table.csv",
            "target": "outcome",
            "positive": [1],
            "client_column": "clinic",
            "features": {"age": {"range": [20, 80]}, "dose": {"range": [0, 5]}},
        },
        "train": {"batch_size": 20},
        "privacy": {"unit": "record", "noise_multiplier": 3.0},
    }
    for path, value in keys.items():
        section, _, key = path.partition(".")
        tables.setdefault(section, {})[key] = value
    return Experiment.of(tables, folder=folder)


@pytest.fixture
def small(tiny):
    return tiny(**SMALL)


def test_the_built_in_experiment_passes_within_a_minute(capsys):
    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        main(["audit", "quick", "--json"])
    seconds = time.monotonic() - started
    told = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert (told["status"], told["experiment"], told["unit"]) == ("completed", "heart-disease", "record")
    assert [check["name"] for check in told["checks"]] == ALL
    assert all(check["passed"] is True for check in told["checks"]), told
    assert seconds < 60 and told["seconds"] < 60


def test_a_table_passes_within_a_minute_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment, started = table(tmp_path), time.monotonic()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert failing(experiment) == {}
    assert time.monotonic() - started < 60
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "__pycache__"} == before


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy.name": "scaffold"},
        pytest.param({"strategy.name": "fedprox", "strategy.mu": 0.1}, marks=pytest.mark.soak),
        {"strategy.name": "fedbuff", "strategy.buffer": 2},
        pytest.param({"train.optimizer": "adam", "train.epochs": 2}, marks=pytest.mark.soak),
        {"train.batch_size": 100},
        {"train.microbatch_size": 8, "privacy.clipping": "per-layer", "train.model": "mlp"},
        {"train.personal": ["bias"]},
        {"train.dp_engine": "opacus"},
        {"compression.top_k": 0.5, "compression.bits": 8},
        pytest.param({"task.clients": 40, "privacy.noise_multiplier": 0.6}, marks=pytest.mark.soak),
    ],
    ids=lambda keys: ", ".join(f"{name} {value}" for name, value in keys.items()),
)
def test_sound_experiments_of_other_kinds_pass(tiny, keys):
    assert failing(tiny(**SMALL | keys)) == {}


def test_no_more_than_eight_sites_are_audited_the_smallest_and_the_largest_among_them(tiny):
    experiment = tiny(**PRIVATE | {"task.clients": 30})
    subject = subject_of(experiment)
    sizes = [len(site.train) for site in subject.data.values()]
    assert len(sizes) == MOST_SITES < subject.sites_in_all == 30
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.soak
def test_digits_pass_within_a_minute():
    tables = {
        "experiment": {"rounds": 5},
        "task": {"name": "digits"},
        "clients": {"partitioner": "iid", "count": 4},
        "train": {"batch_size": 64},
        "privacy": {"unit": "record", "epsilon": 4.0},
    }
    started = time.monotonic()
    assert failing(Experiment.of(tables)) == {}
    assert time.monotonic() - started < 60


@pytest.mark.soak
def test_sound_programs_pass_again_and_again(tiny):
    """A hundred fresh keys: a test of chance whose significance is not what it says would fail some of them."""
    chances = ("sensitivity", "bad-records", "sampling", "noise", "fresh-noise", "ledger")
    assert [failing(tiny(**PRIVATE), *chances) for _ in range(100)] == [{}] * 100


# Mutations of the mechanism.


def halved(plan):
    return plan.noise_multiplier * plan.clipping_norm / 2


def test_halved_noise_fails(small, monkeypatch):
    monkeypatch.setattr(RecordLevelPlan, "noise_deviation", property(halved))
    found = failing(small)
    assert set(found) == {"noise", "canary", "bad-records"}
    times = float(found["noise"].split(" has ")[1].split()[0])
    assert 0.4 < times < 0.6 and "guessed, more than" in found["canary"]


@pytest.mark.soak
def test_noise_that_is_a_tenth_short_fails(small, monkeypatch):
    blocks = Stream.single_blocks
    monkeypatch.setattr(Stream, "single_blocks", lambda stream, count: (0.9 * each for each in blocks(stream, count)))
    mlp = small.model_copy(update={"train": small.train.model_copy(update={"model": "mlp"})})
    assert "noise" in failing(mlp, "noise")


@pytest.mark.soak
def test_noise_that_is_not_gaussian_fails(small, monkeypatch):
    def laplace(stream, count):
        uniforms = stream.uniforms(count) - 0.5
        yield (-np.sign(uniforms) * np.log1p(-2 * np.abs(uniforms)) / np.sqrt(2)).astype(np.float32)

    monkeypatch.setattr(Stream, "single_blocks", laplace)
    mlp = small.model_copy(update={"train": small.train.model_copy(update={"model": "mlp"})})
    assert "noise" in failing(mlp, "noise")


@pytest.mark.soak
def test_noise_that_skips_a_tensor_fails(small, monkeypatch):
    add = StreamOptimizer.add_noise

    def forgetful(self):
        add(self)
        self._parameters[-1].grad.zero_()

    monkeypatch.setattr(StreamOptimizer, "add_noise", forgetful)
    found = failing(small, "noise")
    assert "bias has 0 times" in found["noise"]


def test_noise_reused_between_rounds_fails(small, monkeypatch):
    def forgets_the_round(site, purpose, config, received, kept):
        return site.key.child(purpose)

    monkeypatch.setattr(Site, "message_key", forgets_the_round)
    found = failing(small)
    # What is drawn again and again may also lie far from the planned deviation.
    assert {"fresh-noise", "sampling"} <= set(found) <= {"fresh-noise", "sampling", "noise"}
    assert "two rounds of client-" in found["fresh-noise"] or "two models" in found["fresh-noise"]
    assert "draw the same records" in found["sampling"]


@pytest.mark.soak
def test_noise_reused_for_another_model_fails(small, monkeypatch):
    def trusts_the_version(site, purpose, config, received, kept):
        return site.key.child(purpose, int(config["server-round"]), str(config["model-version"]))

    monkeypatch.setattr(Site, "message_key", trusts_the_version)
    found = failing(small)
    assert set(found) == {"fresh-noise"} and "two models in one round" in found["fresh-noise"]


@pytest.mark.soak
def test_one_noise_stream_for_all_clients_and_rounds_fails(small, monkeypatch):
    child = Key.child

    def cached(key, *path):
        return Key.from_seed(1) if path == ("noise",) else child(key, *path)

    monkeypatch.setattr(Key, "child", cached)
    found = failing(small)
    # Batches stay fresh, so the sampler is not to blame.
    assert {"fresh-noise"} <= set(found) <= {"fresh-noise", "noise"}


@pytest.mark.soak
def test_noise_shared_by_clients_alone_fails(small, monkeypatch):
    def forgets_the_site(site, purpose, config, received, kept):
        arrays = {name: array.tobytes().hex() for name, array in received["shared"].arrays.items()}
        return Key.from_seed(3).child(purpose, int(config["server-round"]), str(arrays))

    monkeypatch.setattr(Site, "message_key", forgets_the_site)
    found = failing(small)
    assert set(found) == {"fresh-noise"} and "two clients" in found["fresh-noise"]


class Repeating:
    """A stream that gives the same numbers at every call."""

    def __init__(self, stream):
        self._stream, self._drawn = stream, None

    def single_blocks(self, count):
        if self._drawn is None:
            self._drawn = self._stream.single_normals(count)
        yield self._drawn


@pytest.mark.soak
def test_noise_that_repeats_by_step_fails(small, monkeypatch):
    add = StreamOptimizer.add_noise

    def repeating(self):
        if not isinstance(self._noise, Repeating):
            self._noise = Repeating(self._noise)
        add(self)

    monkeypatch.setattr(StreamOptimizer, "add_noise", repeating)
    assert "two steps" in failing(small, "fresh-noise")["fresh-noise"]


@pytest.mark.soak
def test_noise_that_repeats_by_tensor_fails(tiny, monkeypatch):
    def by_tensor(self):
        most = self._noise.single_normals(max(p.numel() for p in self._parameters))
        for p in self._parameters:
            part = torch.from_numpy(most[: p.numel()]).view_as(p) * self._deviation
            p.grad = (part.to(p.dtype) + (0 if p.summed_grad is None else p.summed_grad)) / self.expected_batch_size

    monkeypatch.setattr(StreamOptimizer, "add_noise", by_tensor)
    for model in ("logistic", "mlp"):
        assert "two tensors" in failing(tiny(**SMALL | {"train.model": model}), "fresh-noise")["fresh-noise"]


# Mutations of one engine alone: the audit uses the one that the run trains with.


class HalfNoise(StreamOptimizer):
    def __init__(self, *given, **known):
        super().__init__(*given, **known)
        self._deviation /= 2


def no_clipping(layers, norm):
    return [torch.ones(len(rows[0])) if rows else None for rows in layers]


@pytest.mark.parametrize(
    ("name", "mutant", "checks"),
    [
        ("StreamOptimizer", HalfNoise, {"noise", "bad-records", "canary"}),
        ("clip_factors", no_clipping, {"sensitivity", "bad-records", "canary"}),
    ],
)
def test_a_mutation_of_book_keeping_fails_where_it_is_used(small, tiny, monkeypatch, name, mutant, checks):
    monkeypatch.setattr(bookkeeping, name, mutant)
    # An engine that clips otherwise would not pass its own comparison with autograd, and not be chosen.
    monkeypatch.setattr(dp_engines, "supports", lambda module, like: True)
    assert set(failing(small, *sorted(checks))) == checks
    assert failing(tiny(**SMALL | {"train.dp_engine": "opacus"}), *sorted(checks)) == {}


def test_a_nan_that_spreads_in_book_keeping_fails(small, monkeypatch):
    monkeypatch.setattr(bookkeeping, "cleaning_of", lambda factors: bookkeeping.unchanged)
    assert "bad-records" in failing(small, "bad-records")


class Unknown(nn.Module):
    """A layer that book-keeping does not know."""

    def __init__(self, width, outputs):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.norm = nn.GroupNorm(1, outputs)

    def forward(self, inputs):
        return self.norm(self.linear(inputs)) + self.linear(inputs)


class Shared(Synthetic):
    def model(self):
        return Unknown(5, self.outputs)


def test_where_the_model_needs_opacus_the_canaries_are_planted_in_opacus(small, monkeypatch):
    task = Shared(clients=2, records=30, features=5, seed=3)
    monkeypatch.setattr(bookkeeping, "StreamOptimizer", HalfNoise)
    assert failing(small, "noise", "canary", task=task) == {}
    monkeypatch.setattr(dpsgd, "StreamOptimizer", HalfNoise)
    assert set(failing(small, "canary", task=task)) == {"canary"}


def test_clipping_that_is_off_fails(small, monkeypatch):
    monkeypatch.setattr(clipping, "_factors", lambda samples, norm: torch.ones(len(samples[0])))
    found = failing(small)
    assert {"sensitivity", "canary"} <= set(found) <= {"sensitivity", "canary", "bad-records"}
    assert "one record of client-" in found["sensitivity"]


@pytest.mark.soak
def test_clipping_each_tensor_on_its_own_fails(small, monkeypatch):
    factors = clipping._factors
    monkeypatch.setattr(clipping, "_factors", lambda samples, norm: factors(samples, norm * len(samples) ** 0.5 * 1.01))
    assert "sensitivity" in failing(small, "sensitivity")


def test_a_nan_that_is_not_caught_fails(small, monkeypatch):
    def trusting(samples, norm):
        norms = torch.stack([torch.linalg.vector_norm(sample, dim=1) for sample in samples], dim=1)
        return (norm / torch.linalg.vector_norm(norms, dim=1)).clamp(max=1.0)

    monkeypatch.setattr(clipping, "_factors", trusting)
    assert set(failing(small, "sensitivity", "independence", "bad-records")) == {"bad-records"}


@pytest.mark.soak
def test_an_empty_batch_without_noise_fails(small, monkeypatch):
    add = StreamOptimizer.add_noise

    def only_where_there_is_something(self):
        add(self)
        if all(p.summed_grad is None for p in self._parameters):
            for p in self._parameters:
                p.grad.zero_()

    monkeypatch.setattr(StreamOptimizer, "add_noise", only_where_there_is_something)
    found = failing(small, "bad-records")
    assert "0 times the planned variance" in found["bad-records"]


@pytest.mark.soak
def test_a_step_that_is_left_out_because_nobody_was_drawn_fails(small, monkeypatch):
    real = sequential.poisson_batches
    monkeypatch.setattr(
        sequential, "poisson_batches", lambda plan, stream: (batch for batch in real(plan, stream) if len(batch))
    )
    assert "of 64 planned steps" in failing(small, "bad-records")["bad-records"]


# Mutations of the sampler and of the accounting.


def test_a_sampler_that_draws_more_than_is_accounted_fails(small, monkeypatch):
    rate = RecordLevelPlan.accounted_rate.fget
    monkeypatch.setattr(RecordLevelPlan, "accounted_rate", property(lambda plan: rate(plan) * 0.75))
    found = failing(small)
    assert "sampling" in found and set(found) <= {"sampling", "accountants"}
    assert "is accounted for" in found["sampling"]


@pytest.mark.soak
def test_a_sampler_with_a_rate_of_its_own_fails(small, monkeypatch):
    def rounded(plan, stream):
        # As 1 / number of batches, which is what Opacus' loader makes of 24 records by 10.
        for _ in range(plan.steps_per_round):
            yield torch.from_numpy(stream.bernoulli(plan.records, 1 / plan.steps_per_round).nonzero()[0])

    monkeypatch.setattr(sequential, "poisson_batches", rounded)
    assert set(failing(small)) == {"sampling"}


@pytest.mark.soak
def test_batches_that_are_shuffled_instead_of_drawn_fail(tmp_path, monkeypatch):
    def shuffled(plan, stream):
        order = torch.from_numpy(stream.permutation(plan.records))
        yield from itertools.islice(itertools.cycle(order.split(plan.batch_size)), plan.steps_per_round)

    monkeypatch.setattr(sequential, "poisson_batches", shuffled)
    found = failing(table(tmp_path, **{"task.folds": 9, "train.batch_size": 30}, rows=270), "sampling")
    assert "sampling" in found


@pytest.mark.soak
def test_batches_of_a_fixed_size_fail(small, monkeypatch):
    def fixed(plan, stream):
        for _ in range(plan.steps_per_round):
            yield torch.from_numpy(np.sort(stream.permutation(plan.records)[: plan.batch_size]))

    monkeypatch.setattr(sequential, "poisson_batches", fixed)
    assert "nearly one size" in failing(small, "sampling")["sampling"]


@pytest.mark.parametrize("more", [-1, 1])
def test_steps_that_are_not_those_charged_fail(small, monkeypatch, more):
    def other(plan, stream):
        for _ in range(plan.steps_per_round + more):
            yield torch.from_numpy(stream.bernoulli(plan.records, plan.sampling_rate).nonzero()[0])

    monkeypatch.setattr(sequential, "poisson_batches", other)
    assert "the kernel took" in failing(small, "ledger")["ledger"]


def test_rounds_that_are_not_charged_fail(small, monkeypatch):
    monkeypatch.setattr(Accounts, "charge", lambda accounts, cohort: None)
    assert set(failing(small)) == {"ledger"}


@pytest.mark.soak
@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_an_accountant_that_shows_too_little_fails(small, monkeypatch, factor):
    real = accounting.epsilon
    monkeypatch.setattr(accounting, "epsilon", lambda **known: factor * real(**known))
    assert set(failing(small)) == {"accountants"}


@pytest.mark.soak
@pytest.mark.parametrize("batch", [10, 100])
def test_an_accountant_that_shows_too_much_fails(tiny, monkeypatch, batch):
    experiment = tiny(**PRIVATE | {"train.batch_size": batch, "privacy.noise_multiplier": 2.0})
    assert failing(experiment, "accountants") == {}
    real = accounting.epsilon
    monkeypatch.setattr(accounting, "epsilon", lambda **known: 1.1 * real(**known))
    assert set(failing(experiment, "accountants")) == {"accountants"}


# Mutations of what leaves.


class Remembering(nn.Module):
    """Keeps the mean of the last batch in a buffer."""

    def __init__(self, width, outputs):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.watch = Watch(width)

    def forward(self, inputs):
        return self.linear(self.watch(inputs))


class Watch(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.register_buffer("seen", torch.zeros(width))

    def forward(self, inputs):
        if self.training and len(inputs):
            self.seen.copy_(inputs.detach().mean(0))
        return inputs


class WithBuffer(Synthetic):
    def model(self):
        return Remembering(5, self.outputs)


def with_buffer():
    return WithBuffer(clients=2, records=30, features=5, seed=3)


def test_a_forgotten_buffer_fails(small, monkeypatch):
    assert failing(small, task=with_buffer()) == {}
    monkeypatch.setattr(local_model, "_travelling_buffers", lambda module, training: module.named_buffers())
    found = failing(small, task=with_buffer())
    assert set(found) == {"release"} and "watch.seen" in found["release"]


@pytest.mark.soak
def test_a_parameter_that_takes_something_from_the_records_fails(small, monkeypatch):
    update = local_model.LocalModel.shared_arrays

    def leaking(model):
        arrays = update(model)
        buffers = dict(model.module.named_buffers())
        if "watch.seen" in buffers:
            arrays["linear.bias"] = arrays["linear.bias"] + float(buffers["watch.seen"].sum()) * 1e-3
        return arrays

    monkeypatch.setattr(local_model.LocalModel, "shared_arrays", leaking)
    found = failing(small, "release", task=with_buffer())
    assert "linear.bias" in found["release"] and "past the noised sum" in found["release"]


@pytest.mark.soak
def test_buffers_that_the_description_lets_out_fail(small, monkeypatch):
    real = LocalTraining.of.__func__

    def forgetful(cls, table, *, private):
        return real(cls, table, private=False)

    monkeypatch.setattr(LocalTraining, "of", classmethod(forgetful))
    assert "release" in failing(small, "release", task=with_buffer())


def test_weights_by_count_fail(small, monkeypatch):
    def counting(**known):
        return Gate(**known | {"withhold_counts": False})

    monkeypatch.setattr(federation, "Gate", counting)
    found = failing(small)
    assert set(found) == {"weights"} and "has the weight 2" in found["weights"]


# Mutations of the data and of the model.


def test_standardising_by_site_fails(tmp_path):
    experiment = table(tmp_path, "own_tables:Standardised")
    found = failing(experiment)
    assert set(found) == {"data"}
    assert "other records change" in found["data"]


@pytest.mark.soak
def test_a_split_that_follows_the_row_numbers_fails(tmp_path, monkeypatch):
    def by_row(self, inputs, targets, ids):
        examples = Examples(torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets, dtype=torch.int64))
        return SiteData.split(examples, [str(row) for row in range(len(examples))])

    monkeypatch.setattr(Tabular, "_site", by_row)
    assert "data" in failing(table(tmp_path), "data")


@pytest.mark.soak
@pytest.mark.parametrize("form", ["parquet", "npz"])
def test_other_forms_of_files_lose_a_row_too(tmp_path, form):
    if form == "npz":
        draws = np.random.default_rng(2)
        np.savez(tmp_path / "few.npz", images=draws.uniform(0, 16, (40, 8, 8)), labels=draws.integers(0, 10, 40))
        tables = {
            "task": {"name": "digits", "data": "few.npz"},
            "train": {"model": "logistic"},
            "privacy": {"unit": "record", "noise_multiplier": 2.0},
        }
        experiment = Experiment.of(tables, folder=tmp_path)
    else:
        import pandas

        experiment = table(tmp_path, **{"task.data": "table.parquet"})
        pandas.read_csv(tmp_path / "table.csv").to_parquet(tmp_path / "table.parquet")
    finding = CHECKS["record"]["data"](subject_of(experiment))
    assert finding.passed is True and finding.figures["rows"] == 4


def test_a_task_without_a_file_is_not_said_to_be_checked(small):
    finding = CHECKS["record"]["data"](subject_of(small))
    assert finding.passed is None and finding.verdict == "not checked"
    assert "reads no file" in finding.sentence


class Mixing(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.linear = nn.Linear(width, outputs)

    def forward(self, inputs):
        return self.linear(inputs - inputs.mean(0))


class Mixed(Synthetic):
    def model(self):
        return Mixing(5, self.outputs)


@pytest.mark.soak
def test_a_model_that_mixes_records_fails_though_nobody_refused_it(small, monkeypatch):
    monkeypatch.setattr(federation, "refuse_mixing", lambda module, like: None)
    found = failing(small, task=Mixed(clients=2, records=30, features=5, seed=3))
    assert "independence" in found and set(found) <= {"independence", "sensitivity", "bad-records"}
    assert "what the others add" in found["independence"]


# The command.


def test_without_privacy_there_is_nothing_to_audit(tiny):
    with pytest.raises(InputError, match=r'privacy.unit = "none": there is nothing to audit') as refused:
        next(quick(tiny()))
    assert refused.value.code == "experiment-conflict"


def test_a_task_that_raises_is_a_failed_check_and_not_a_traceback(small):
    class Broken(Synthetic):
        def loss(self, outputs, targets):
            raise ValueError("no such loss")

    found = failing(small, task=Broken(clients=2, records=30, features=5))
    assert "no round had a quorum" in found["ledger"] or "no such loss" in found["ledger"]


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["audit", *arguments])
    return ended.value.code, *capsys.readouterr()


def test_the_command_prints_a_line_for_each_check_and_fails_with_exit_1(tmp_path, monkeypatch, capsys):
    experiment = table(tmp_path)
    path = tmp_path / "table.toml"
    path.write_text(experiment.to_toml())
    monkeypatch.setattr(RecordLevelPlan, "noise_deviation", property(halved))
    code, out, err = command(capsys, "quick", str(path))
    assert code == 1
    lines = [line for line in out.splitlines() if not line.startswith(" ")]
    assert [line.split()[1] for line in lines] == ALL
    assert {line.split()[1] for line in lines if line.startswith("FAILED")} == {"noise", "canary", "bad-records"}
    assert err.startswith("error: table: 3 of 12 checks failed: bad-records, noise, canary\n")
    assert "bract explain audit-failed" in err
    code, out, err = command(capsys, "quick", str(path), "--json")
    told = json.loads(out)
    assert code == 1 and told["status"] == "failed" and told["error"]["code"] == "audit-failed"
    assert [check["name"] for check in told["checks"] if check["passed"] is False] == ["bad-records", "noise", "canary"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("quick", "nowhere.toml"), "experiment-missing"),
        (("quick", "--set", "privacy.unit=none", "--set", "privacy.epsilon=1"), "experiment-conflict"),
        (("thorough",), "usage"),
    ],
)
def test_wrong_input_ends_with_2(arguments, code, capsys):
    status, out, _ = command(capsys, *arguments, "--json")
    assert status == 2 and json.loads(out)["error"]["code"] == code
