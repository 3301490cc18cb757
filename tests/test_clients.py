"""clients/: what a client trains, what it keeps, and what passes the gate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import nn
from torch.nn import functional as F

from bract.clients.gate import Gate, histogram_of, release_error
from bract.clients.kernels import sequential
from bract.clients.local_model import LocalModel
from bract.clients.training import LocalTraining, choose_device, reproducible
from bract.core import flower
from bract.core.errors import BractError, InputError, RunError
from bract.core.keys import Key
from bract.core.parameters import Layout, record_of
from bract.privacy.mechanism import RecordLevelPlan
from bract.tasks.task import Examples

KEY = Key.from_seed(1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def examples(n=50):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 4, generator=generator)
    return Examples(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


def loss(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def train(module, training, plan=None, key=KEY):
    model = LocalModel(module, training)
    sequential.train(model, loss, examples(), training, plan=plan, key=key)
    return model


@pytest.mark.parametrize(
    ("training", "optimizer"),
    [
        (LocalTraining(learning_rate=0.1), lambda p: torch.optim.SGD(p, 0.1)),
        (LocalTraining(learning_rate=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        (LocalTraining(learning_rate=0.1, l2=0.01), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.01)),
        (LocalTraining(optimizer="adam", learning_rate=0.01), lambda p: torch.optim.Adam(p, 0.01)),
        (
            LocalTraining(optimizer="adagrad", learning_rate=0.05, l2=0.1),
            lambda p: torch.optim.Adagrad(p, 0.05, weight_decay=0.1),
        ),
    ],
    ids=["sgd", "momentum", "l2", "adam", "adagrad"],
)
def test_training_is_the_plain_loop(training, optimizer):
    """The reference kernel equals a loop anybody would write, over the same batches."""
    plain = nn.Linear(4, 3)
    start = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model = LocalModel(plain, training)
    sequential.train(model, loss, examples(), training, plan=None, key=KEY)
    other = nn.Linear(4, 3)
    other.load_state_dict(start)
    step = optimizer(other.parameters())
    data = examples()
    for batch in sequential.shuffled_batches(50, training, KEY):
        step.zero_grad()
        F.cross_entropy(other(data.inputs[batch]), data.targets[batch]).backward()
        step.step()
    for mine, theirs in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(plain.weight, start["weight"])


def test_batches_cover_each_record_once_an_epoch_in_a_new_order():
    training = LocalTraining(epochs=3, batch_size=8)
    batches = list(sequential.shuffled_batches(50, training, KEY))
    order = torch.cat(batches).view(3, 50)
    assert all(sorted(epoch.tolist()) == list(range(50)) for epoch in order)
    assert len({tuple(epoch.tolist()) for epoch in order}) == 3
    assert max(map(len, batches)) == 8


def test_torchs_generator_is_left_as_it_was_and_does_not_matter():
    torch.manual_seed(5)
    expected = torch.rand(3)
    results = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        dropped = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
        for parameter in dropped.parameters():
            nn.init.constant_(parameter, 0.1)
        torch.manual_seed(seed)
        results.append(train(dropped, LocalTraining()).shared_arrays())
        if seed == 5:
            assert torch.equal(torch.rand(3), expected)
    np.testing.assert_array_equal(results[0]["0.weight"], results[1]["0.weight"])


def test_l2_acts_after_clipping_and_noise():
    """With a huge L2 and no learning signal the weights shrink by lr·l2 each step, however small the clipping norm."""
    module = nn.Linear(4, 3)
    nn.init.constant_(module.weight, 5.0)
    plan = RecordLevelPlan(
        records=50, batch_size=50, epochs=1, rounds=1, clipping_norm=1e-6, noise_multiplier=1e-6, delta=1e-5
    )
    train(module, LocalTraining(learning_rate=0.1, l2=1.0), plan)
    torch.testing.assert_close(module.weight, torch.full_like(module.weight, 4.5), atol=1e-4, rtol=0)


def test_frozen_personal_and_shared_tensors():
    training = LocalTraining(frozen=("0.*",), personal=("3.*",))
    module = net()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = train(module, training)
    assert set(model.shared) == {"1.weight", "1.bias", "1.running_mean", "1.running_var"}
    assert set(model.personal) == {"3.weight", "3.bias"}
    assert torch.equal(module[0].weight, before["0.weight"])
    assert not torch.equal(module[3].weight, before["3.weight"])
    personal, shared = model.personal_arrays(), model.shared_arrays()
    # The next client starts from its own personal part, here none yet, not from this one's.
    model.load(shared)
    assert torch.equal(module[3].weight, before["3.weight"])
    assert torch.equal(module[1].num_batches_tracked, before["1.num_batches_tracked"])
    model.load(shared, personal)
    np.testing.assert_array_equal(module[3].weight.detach(), personal["3.weight"])


@pytest.mark.parametrize(
    ("buffers", "travel"),
    [(None, {"1.running_mean", "1.running_var"}), ((), set()), (("*.running_mean",), {"1.running_mean"})],
)
def test_only_listed_buffers_travel(buffers, travel):
    model = train(net(), LocalTraining(buffers=buffers))
    assert {name for name in model.shared if "running" in name or "num" in name} == travel


def test_without_a_cuda_device_asking_for_one_is_refused():
    if torch.cuda.is_available():
        assert choose_device("auto").type == "cuda"
    else:
        assert choose_device("auto").type == "cpu"
        with pytest.raises(InputError):
            choose_device("cuda")


def test_reproducible_puts_torch_back():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with reproducible():
        assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


@pytest.fixture
def gate():
    return Gate(layout=Layout.of({"w": np.zeros(2, np.float32)}), withhold_counts=True)


def message(arrays):
    flower.identify_process(1)
    return Message(RecordDict({"arrays": record_of(arrays), "config": ConfigRecord({"server-round": 1})}), 5, "train")


@pytest.mark.parametrize(
    "arrays",
    [
        {"w": np.array([1.0, np.nan], np.float32)},
        {"w": np.array([1.0, np.inf], np.float32)},
        {"w": np.zeros(3, np.float32)},
        {"w": np.zeros(2, np.float64)},
        {"w": np.zeros(2, np.float32), "extra": np.zeros(1, np.float32)},
        {},
    ],
)
def test_the_gate_admits_and_releases_only_what_fits(gate, arrays):
    with pytest.raises(RunError):
        gate.admit(message(arrays))
    with pytest.raises(RunError):
        gate.release_update(message({"w": np.zeros(2, np.float32)}), arrays, records=3)


def test_counts_are_withheld_under_privacy_and_nothing_else_leaves(gate):
    good = message({"w": np.ones(2, np.float32)})
    reply = gate.release_update(good, {"w": np.ones(2, np.float32)}, records=77)
    assert {name: dict(record) for name, record in reply.content.items() if name != "arrays"} == {
        "metrics": {"num-examples": 1}
    }
    assert list(reply.content["arrays"]) == ["w"]
    open_gate = Gate(layout=gate.layout, withhold_counts=False)
    reply = open_gate.release_update(good, {"w": np.ones(2, np.float32)}, records=77)
    assert reply.content["metrics"]["num-examples"] == 77


@pytest.mark.parametrize(
    "error",
    [ValueError("patient 17"), InputError("data-invalid", "patient 17"), RunError("reply-invalid", "patient 17")],
)
def test_errors_leave_without_their_text(error):
    reply = release_error(message({"w": np.zeros(2, np.float32)}), error)
    assert "17" not in str(reply.error.reason) and "patient" not in str(reply.error.reason)
    code, _ = flower.code_and_sentence(reply.error)
    assert code == (error.code if isinstance(error, BractError) and error.code == "reply-invalid" else "client-failed")


def test_histograms_come_back_in_their_shape(gate):
    counts = np.arange(8).reshape(2, 4) - 3
    reply = gate.release_histogram(message({"w": np.zeros(2, np.float32)}), counts)
    np.testing.assert_array_equal(histogram_of(reply.content, (2, 4)), counts)
    with pytest.raises(RunError):
        histogram_of(reply.content, (3, 4))


def test_a_site_draws_other_noise_for_another_model_and_the_same_for_the_same(tiny, tmp_path):
    """One round number with two models: their noise must not cancel in the difference."""
    from flwr.app import Context

    from bract.clients.app import client_app
    from bract.clients.owner import Site
    from bract.privacy.release import EvaluationPlan
    from bract.tasks.task import SiteData

    class Flat:
        """No gradient at all: the update is pure noise."""

        classes = ("a", "b", "c")

        def loss(self, outputs, targets):
            return (outputs * 0).sum(1)

    plan = RecordLevelPlan(
        records=50, batch_size=50, epochs=1, rounds=9, clipping_norm=1.0, noise_multiplier=4.0, delta=1e-5
    )
    training = LocalTraining(learning_rate=1.0, buffers=())
    model = LocalModel(nn.Linear(40, 30), training)
    inputs = Examples(torch.zeros(50, 40), torch.zeros(50, dtype=torch.int64))
    site = Site(
        name="a",
        data=SiteData(train=inputs, test=inputs),
        key=KEY,
        plan=plan,
        evaluation=EvaluationPlan(epsilon=1.0, releases=1, classes=3),
    )
    gate = Gate(layout=model.layout, withhold_counts=True)
    app = client_app({"a": site}, Flat(), training, model, gate)
    context = Context(run_id=1, node_id=5, node_config={"name": "a"}, state=RecordDict(), run_config={})
    start = model.shared_arrays()

    def noise(round, version):
        flower.identify_process(1)
        config = ConfigRecord({"server-round": round, "model-version": version})
        reply = app(Message(RecordDict({"arrays": record_of(start), "config": config}), 5, "train"), context)
        return reply.content["arrays"]["weight"].numpy().ravel() - start["weight"].ravel()

    first = noise(1, "x")
    np.testing.assert_array_equal(first, noise(1, "x"))
    deviation = 4.0 / 50
    assert first.std() == pytest.approx(deviation, rel=0.1)
    for other in (noise(1, "y"), noise(2, "x")):
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(first.size)
        assert (first - other).std() == pytest.approx(deviation * np.sqrt(2), rel=0.1)
