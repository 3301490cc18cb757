"""core/flower.py: the internals of Flower that bract needs; a Flower that changes them fails here."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import bract.core.flower as flower


def message() -> Message:
    flower.identify_process(7)
    return Message(RecordDict({"config": ConfigRecord({"a": 1})}), 12, "train")


def test_identity_lets_messages_be_made():
    assert message().metadata.run_id == 7
    assert (TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id) == (7, flower.SERVER_NODE_ID, 7)


def test_message_ids_stick_and_replies_refer_to_them():
    sent = message()
    flower.set_message_id(sent, "abc")
    assert sent.metadata.message_id == "abc"
    assert Message(RecordDict(), reply_to=sent).metadata.reply_to_message_id == "abc"


def test_error_replies_carry_code_and_sentence():
    reply = flower.error_reply(message(), "client-failed", "one sentence: with a colon")
    assert reply.has_error() and not reply.has_content()
    assert flower.code_and_sentence(reply.error) == ("client-failed", "one sentence: with a colon")


def test_other_errors_do_not_leak_their_reason():
    assert flower.code_and_sentence(Error(code=2, reason="KeyError: patient 17")) == (
        "client-failed",
        "the client's app raised an error",
    )


def test_client_state_survives_being_taken_apart():
    state = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(np.arange(3, dtype=np.float32))}),
            "metrics": MetricRecord({"n": 3, "losses": [0.5, 0.25]}),
            "config": ConfigRecord({"name": "x", "raw": b"\x00\xff", "flag": True, "list": [b"a", b"b"]}),
        }
    )
    again = flower.tree_to_state(flower.state_to_tree(state))
    np.testing.assert_array_equal(again["arrays"]["w"].numpy(), [0, 1, 2])
    assert dict(again["metrics"]) == {"n": 3, "losses": [0.5, 0.25]}
    assert dict(again["config"]) == {"name": "x", "raw": b"\x00\xff", "flag": True, "list": [b"a", b"b"]}


def test_node_ids_fit_flowers_signed_64_bits_and_differ():
    ids = {flower.node_id(f"site {number}") for number in range(1000)}
    assert len(ids) == 1000
    assert all(0 <= number < 2**63 for number in ids)


def test_random_is_put_back():
    random.seed(1)
    expected = random.random()
    random.seed(1)
    with flower.seeded_random(5):
        first = random.random()
    assert random.random() == expected
    with flower.seeded_random(5):
        assert random.random() == first


def test_importing_bract_turns_flowers_calls_home_off():
    code = "import bract, os; print(os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['FLWR_DISABLE_UPDATE_CHECK'])"
    env = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert out.stdout.split() == ["0", "1"]


def told(sent: Message) -> dict[str, object]:
    """Return all that a message says of itself, but when it was made and how long it keeps."""
    known = {name.lstrip("_"): value for name, value in vars(sent.metadata).items()}
    return {name: value for name, value in known.items() if name not in ("created_at", "ttl", "message_id")}


def test_many_instructions_are_as_flower_makes_each():
    content = message().content
    sent = flower.instructions(content, [12, 13, 14], "train")
    assert flower.instructions(content, [], "train") == []
    for node, each in zip((12, 13, 14), sent, strict=True):
        assert told(each) == told(Message(content, node, "train"))
        assert each.content is content and each.has_content() and not each.has_error()
    flower.set_message_id(sent[1], "b")
    assert (sent[0].metadata.message_id, sent[1].metadata.message_id) == ("", "b")


def test_a_reply_is_as_flower_makes_it():
    sent, content = message(), RecordDict({"metrics": MetricRecord({"loss": 1.5})})
    flower.set_message_id(sent, "abc")
    assert told(flower.reply(sent, content)) == told(Message(content, reply_to=sent))
    assert flower.reply(sent, content).content == content


def test_a_record_of_numbers_is_as_flower_makes_it():
    numbers = {"num-examples": 3, "loss": 0.5, "counts": [1, 2]}
    assert flower.numbers_record(numbers) == RecordDict({"metrics": MetricRecord(numbers)})
    assert flower.numbers_record({}) == RecordDict({"metrics": MetricRecord({})})
