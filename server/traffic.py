"""What travels in a round, in bytes: known from the model's form, before anything is sent."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.parameters import Layout
from ..strategies.codec import layout_bytes
from ..strategies.compression import Compression
from ..strategies.local_rule import LocalRule


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The bytes of the tensors that one client gets and sends in one round, and how many compression saves."""

    down: int
    up: int
    saved: int = 0


def traffic_of(layout: Layout, rule: LocalRule, compression: Compression | None) -> Traffic:
    """Return a round's bytes: the model, and each record that the strategy's rule has beside it, which stays whole."""
    model = layout_bytes(layout)
    update = compression.codec(layout).nbytes if compression else model
    return Traffic(down=model * (1 + len(rule.receives)), up=update + model * len(rule.sends), saved=model - update)
