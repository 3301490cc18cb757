"""strategies/: FedAvg's mean is exact, its totals merge, and state goes to disk and back."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from bract.core import flower
from bract.core.errors import InputError, RunError
from bract.core.parameters import arrays_of, record_of
from bract.strategies.fedavg import FedAvg
from bract.strategies.fold import only
from bract.strategies.registry import available_strategies, load_strategy
from bract.strategies.state import load_strategy_state, strategy_state


class Nodes:
    """The part of a Grid that configure_train asks."""

    def __init__(self, count):
        self.count = count

    def get_node_ids(self):
        return list(range(1, self.count + 1))


def replies(strategy, values, counts):
    flower.identify_process(1)
    arrays = record_of({"w": np.zeros((2, 2), np.float32), "b": np.zeros(1, np.float32)})
    messages = strategy.configure_train(1, arrays, ConfigRecord(), Nodes(len(values)))
    answers = []
    for message, value, count in zip(messages, values, counts, strict=True):
        content = RecordDict(
            {
                "arrays": record_of({"w": np.full((2, 2), value, np.float32), "b": np.full(1, -value, np.float32)}),
                "metrics": MetricRecord({"num-examples": count}),
            }
        )
        answers.append(Message(content, reply_to=message))
    return answers


@pytest.mark.parametrize(("weights", "expected"), [("equal", 2.0), ("counted", (1 * 1 + 2 * 2 + 3 * 7) / 10)])
def test_the_mean(weights, expected):
    strategy = FedAvg(weights=weights)
    arrays, metrics = strategy.aggregate_train(1, replies(strategy, [1.0, 2.0, 3.0], [1, 2, 7]))
    found = arrays_of(arrays)
    np.testing.assert_allclose(found["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["b"], -expected, rtol=1e-6)
    assert found["w"].dtype == np.float32
    assert isinstance(metrics, MetricRecord)


def test_flowers_own_loop_gets_the_same_model_as_from_flowers_fedavg():
    """bract's strategies are Flower strategies: whole replies fold to what Flower computes."""
    values, counts = [0.25, -1.5, 3.125], [3, 5, 11]
    ours, theirs = FedAvg(weights="counted"), FlowerFedAvg()
    mine, _ = ours.aggregate_train(1, replies(ours, values, counts))
    other, _ = theirs.aggregate_train(1, list(replies(FedAvg(), values, counts)))
    for name in ("w", "b"):
        np.testing.assert_allclose(arrays_of(mine)[name], arrays_of(other)[name], atol=1e-7)


def test_any_order_and_any_grouping_give_the_same_bytes():
    strategy = FedAvg(weights="counted")
    batch = list(replies(strategy, np.random.default_rng(0).normal(size=7), [1, 2, 3, 4, 5, 6, 7]))
    fold = strategy.fold()
    straight, left, right = fold.start(), fold.start(), fold.start()
    for reply in batch:
        fold.add(straight, reply.content)
    for index, reply in enumerate(reversed(batch)):
        fold.add(left if index % 3 else right, reply.content)
    left.merge(right)
    one, _ = strategy.aggregate_total(1, straight)
    two, _ = strategy.aggregate_total(1, left)
    for name in ("w", "b"):
        assert arrays_of(one)[name].tobytes() == arrays_of(two)[name].tobytes()


@pytest.mark.parametrize("count", [-1, 2.5, float("nan"), float("inf"), 1e18])
def test_a_weight_that_lies_is_left_out(count):
    """A client that claims a count of 1e18 would otherwise be the model."""
    strategy = FedAvg(weights="counted")
    arrays, _ = strategy.aggregate_train(1, replies(strategy, [1.0, 100.0], [4, count]))
    np.testing.assert_allclose(arrays_of(arrays)["w"], 1.0)


def test_no_reply_and_no_weight_leave_the_model():
    strategy = FedAvg(weights="counted")
    list(replies(strategy, [1.0], [1]))
    assert strategy.aggregate_train(1, []) == (None, None)
    assert strategy.aggregate_train(1, replies(strategy, [1.0, 2.0], [0, 0])) == (None, None)


def test_evaluation_metrics_are_weighted_means():
    flower.identify_process(1)
    strategy = FedAvg()
    arrays = record_of({"w": np.zeros(1, np.float32)})
    messages = list(strategy.configure_evaluate(1, arrays, ConfigRecord(), Nodes(2)))
    metrics = [MetricRecord({"accuracy": 1.0, "num-examples": 3}), MetricRecord({"accuracy": 0.0, "num-examples": 1})]
    answers = [Message(RecordDict({"m": m}), reply_to=msg) for m, msg in zip(metrics, messages, strict=True)]
    assert dict(strategy.aggregate_evaluate(1, answers)) == {"accuracy": 0.75}


def test_a_reply_holds_one_record_of_a_kind():
    with pytest.raises(RunError) as caught:
        only(RecordDict({"a": ArrayRecord(), "b": ArrayRecord()}), ArrayRecord)
    assert "holds 2" in caught.value.sentence


def test_flower_state_goes_and_comes_back():
    strategy = FedAdam(eta=0.5)
    arrays = record_of({"w": np.ones((2, 2), np.float32), "b": np.ones(1, np.float32)})
    strategy.configure_train(1, arrays, ConfigRecord(), Nodes(2))
    strategy.aggregate_train(1, list(replies(FedAvg(), [2.0, 3.0], [1, 1])))
    again = FedAdam(eta=0.1)
    load_strategy_state(again, strategy_state(strategy))
    assert again.eta == 0.5
    np.testing.assert_array_equal(again.m_t["w"], strategy.m_t["w"])
    np.testing.assert_array_equal(again.v_t["b"], strategy.v_t["b"])
    assert not np.allclose(again.m_t["w"], 0)


def test_own_strategies_are_found_by_path(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from bract.strategies.fedavg import FedAvg\n"
        "class Mine(FedAvg):\n"
        "    def __init__(self, *, factor):\n"
        "        super().__init__()\n"
        "        self.factor = factor\n"
    )
    assert load_strategy("mine:Mine", {"factor": 2}, folder=tmp_path).factor == 2
    with pytest.raises(InputError) as caught:
        load_strategy("mine:Mine", {}, folder=tmp_path)
    assert "strategy.factor" in caught.value.sentence


def test_own_strategies_are_found_by_entry_point(tmp_path, monkeypatch):
    (tmp_path / "plugged.py").write_text("from bract.strategies.fedavg import FedAvg as Plugged\n")
    info = tmp_path / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bract.strategies]\nplugged = plugged:Plugged\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [info.origin for info in available_strategies() if info.name == "plugged"] == ["plugged"]
    assert isinstance(load_strategy("plugged", {}), FedAvg)


def test_two_folders_may_name_their_modules_alike(tmp_path):
    """Each experiment means the module beside it, whichever was imported first."""
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "alike.py").write_text(
            f"from bract.strategies.fedavg import FedAvg\nclass Mine(FedAvg):\n    number = {number}\n"
        )
    found = [load_strategy("alike:Mine", {}, folder=tmp_path / str(number)).number for number in (1, 2, 1)]
    assert found == [1, 2, 1]
