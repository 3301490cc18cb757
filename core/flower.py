"""The few internals of Flower that bract needs, in one place; `tests/test_flower.py` fails when they change."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .parameters import arrays_of, record_of

if TYPE_CHECKING:
    from flwr.app import Error, Message, RecordDict

SERVER_NODE_ID = 1
# Flower's error codes are small integers; this one says "see the reason", which holds bract's code and sentence.
ERROR_CODE = 1000


def node_id(name: str) -> int:
    """Return a client's node id: 63 bits of SHA-256 of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def identify_process(run_id: int) -> None:
    """Tell Flower which run this process serves: a Message cannot be made without it."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE_ID
    TaskIdentity.task_id = run_id


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, as Flower's own link does when it takes one in."""
    message.metadata.__dict__["_message_id"] = message_id


def error_reply(message: Message, code: str, sentence: str) -> Message:
    """Return the error reply that carries a code of bract's catalogue and one sentence."""
    from flwr.app import Error, Message

    return Message(Error(code=ERROR_CODE, reason=f"{code}: {sentence}"), reply_to=message)


def instructions(content: RecordDict, nodes: Iterable[int], message_type: str) -> list[Message]:
    """Return the same message to many nodes: made once by Flower, and then copied, which takes a third of the time."""
    from flwr.app import Message

    messages: list[Message] = []
    first: Message | None = None
    for node in nodes:
        if first is None:
            first = Message(content, node, message_type)
            messages.append(first)
        else:
            messages.append(_with(first, content, _dst_node_id=node))
    return messages


def reply(message: Message, content: RecordDict) -> Message:
    """Return the reply to a message of this process: without the expiry of one that travels, which takes time."""
    asked = message.metadata
    return _with(
        message,
        content,
        _message_id="",
        _reply_to_message_id=asked.message_id,
        _src_node_id=asked.dst_node_id,
        _dst_node_id=asked.src_node_id,
        _src_task_id=asked.dst_task_id,
        _dst_task_id=asked.src_task_id,
    )


def _with(message: Message, content: RecordDict, **changed: Any) -> Message:
    """Return a message with another's metadata but for what is changed, and without the checks that it has passed."""
    metadata = object.__new__(type(message.metadata))
    metadata.__dict__.update(message.metadata.__dict__, **changed)
    made = object.__new__(type(message))
    made.__dict__.update(_metadata=metadata, _content=content, _error=None)
    return made


def numbers_record(numbers: Mapping[str, Any]) -> RecordDict:
    """Return a reply's records that are numbers alone, of bract's own making: without a check of each of them."""
    from flwr.app import MetricRecord, RecordDict

    metrics, records = MetricRecord(), RecordDict()
    metrics.__dict__["_data"].update(numbers)
    records.__dict__["_data"]["metrics"] = metrics
    return records


def code_and_sentence(error: Error) -> tuple[str, str]:
    """Return code and sentence of an error reply, `client-failed` for one that bract did not make."""
    code, separator, sentence = (error.reason or "").partition(": ")
    if error.code == ERROR_CODE and separator:
        return code, sentence
    return "client-failed", "the client's app raised an error"


def without_arrays(content: RecordDict) -> RecordDict:
    """Return the records that are not arrays: what is left of a reply once it was folded."""
    from flwr.app import ArrayRecord, RecordDict

    return RecordDict({name: record for name, record in content.items() if not isinstance(record, ArrayRecord)})


def copy_records(content: RecordDict) -> RecordDict:
    """Return records of its own over the same arrays, whose bytes nobody changes in place."""
    from flwr.app import RecordDict

    copies: dict[str, Any] = {name: type(record)(dict(record)) for name, record in content.items()}  # type: ignore[arg-type]
    return RecordDict(copies)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Flower's log below errors: bract shows its own progress."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def seeded_random(seed: int) -> Iterator[None]:
    """Seed the global `random`, from which Flower's strategies draw, and put it back afterwards."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


def state_to_tree(state: RecordDict) -> dict[str, Any]:
    """Return a client's Context.state as nested dicts of numbers, strings and numpy arrays."""
    from flwr.app import ArrayRecord, MetricRecord

    tree: dict[str, Any] = {}
    for name, record in state.items():
        if isinstance(record, ArrayRecord):
            tree[name] = {"kind": "array", "value": arrays_of(record)}
        else:
            kind = "metric" if isinstance(record, MetricRecord) else "config"
            tree[name] = {"kind": kind, "value": {key: _bytes_to_text(value) for key, value in record.items()}}
    return tree


def tree_to_state(tree: Mapping[str, Any]) -> RecordDict:
    """Return the Context.state that `state_to_tree` took apart."""
    from flwr.app import ConfigRecord, MetricRecord, RecordDict

    state = RecordDict()
    for name, item in tree.items():
        if item["kind"] == "array":
            state[name] = record_of(item["value"])
        else:
            values = {key: _text_to_bytes(value) for key, value in item["value"].items()}
            state[name] = MetricRecord(values) if item["kind"] == "metric" else ConfigRecord(values)
    return state


def _bytes_to_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_bytes_to_text(item) for item in value]
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def _text_to_bytes(value: Any) -> Any:
    if isinstance(value, list):
        return [_text_to_bytes(item) for item in value]
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value
