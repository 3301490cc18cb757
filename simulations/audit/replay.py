"""A train message that an audit sends a client's app by itself: the strategy's own, for any round and any model."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict

from ...core import flower
from ...core.parameters import Arrays, digest, record_of


def addressed(template: Message, site: str, *, round: int, arrays: Arrays, initial: Arrays) -> tuple[Message, Context]:
    """Return the message of a round to a site, and the site's context before its first round."""
    content = flower.copy_records(template.content)
    content["arrays"] = record_of(arrays)
    content["config"] = ConfigRecord(
        {
            **content.config_records["config"],
            "server-round": round,
            # A server may lie about it, so nothing may hang on it alone.
            "model-version": digest(initial),
        }
    )
    node = flower.node_id(site)
    message = Message(content, node, "train")
    flower.set_message_id(message, "1")
    return message, Context(run_id=1, node_id=node, node_config={"name": site}, state=RecordDict(), run_config={})
