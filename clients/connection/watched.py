"""A site as its owner watches it: each message that it works on, and each refusal, is one line on the screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message

from ...core import flower
from ...core.errors import Refusal
from ...privacy.ledger.chain import Head
from ..site.request import CONFIG, ROUND_KEY
from ..site.site import Site
from .screen import Screen

_ROUNDS_KEY = "bract-rounds"
_DOING = {"train": "training", "evaluate": "evaluating"}


class Watched:
    """A `Party` that is a site. The screen shows what the server knows too, and refusals, which are for the owner."""

    def __init__(self, site: Site, screen: Screen, *, warn: Callable[[], None] = lambda: None) -> None:
        self._site, self._screen, self._warn = site, screen, warn
        self.refusal: Refusal | None = None

    def hello(self) -> Mapping[str, Any]:
        """Return what the server is told."""
        return self._site.hello()

    def head(self) -> Head | None:
        """Return the head of the ledger."""
        return self._site.head()

    def refuse_rollback(self, head: Head) -> None:
        """Raise Refusal unless the ledger holds what the server has seen of it."""
        self._site.refuse_rollback(head)

    def forget_replies(self, run: str, up_to_round: int) -> None:
        """Delete stored replies of rounds that the server has checkpointed."""
        self._site.forget_replies(run, up_to_round)

    def handle(self, message: Message, *, progress: Callable[[Any], None]) -> Message:
        """Return the site's reply."""
        # A site may be connected for months, and its certificate not live as long.
        self._warn()
        where, fields = _place(message)
        kind = message.metadata.message_type
        self._screen("working", f"{_DOING.get(kind, 'working')}{where}", fields=fields)
        before = self._site.refusal
        reply = self._site.handle(message, progress=progress)
        refusal = self._site.refusal
        if not reply.has_error():
            self._screen("answered", f"the reply is ready{where}", fields=fields)
        elif refusal is not None and refusal is not before:
            self.refusal = refusal
            text = f"refused{where}: {refusal.sentence}"
            self._screen("refused", text, level="warning", fields={**fields, "code": refusal.code})
        else:
            code, sentence = flower.code_and_sentence(reply.error)
            text = f"not answered{where}: {sentence}; site.log in the state directory has the whole of it"
            self._screen("not-answered", text, level="warning", fields={**fields, "code": code})
        return reply


def _place(message: Message) -> tuple[str, dict[str, str | int]]:
    """Return the round of a message, in words and as fields; nothing of it was checked yet."""
    config = message.content.get(CONFIG) if message.has_content() else None
    if not isinstance(config, ConfigRecord):
        return "", {}
    number, rounds = config.get(ROUND_KEY), config.get(_ROUNDS_KEY)
    if type(number) is not int or number < 1:
        return "", {}
    if type(rounds) is not int:
        return f", round {number}", {"round": number}
    return f", round {number} of {rounds}", {"round": number, "rounds": rounds}
