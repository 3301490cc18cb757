"""A data owner as a process serves it: its records, its secret key, the mechanisms that cover what it releases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from ..core.keys import Key
from ..core.parameters import Arrays, digest
from ..privacy.dpsgd.passes import Hide
from ..privacy.local import LocalPlan
from ..privacy.mechanism import RecordLevelPlan
from ..privacy.release import EvaluationPlan
from ..tasks.task import SiteData


class Owners(Protocol):
    """Many data owners by name, each made when it is asked for."""

    @property
    def data(self) -> Mapping[str, SiteData]:
        """Their records."""

    @property
    def evaluation(self) -> EvaluationPlan | None:
        """What covers the metrics that each of them releases."""

    def __getitem__(self, name: str) -> Site:
        """Return an owner."""

    def key_of(self, name: str) -> Key:
        """Return an owner's key."""

    def plan_of(self, name: str) -> RecordLevelPlan | None:
        """Return what noises each of an owner's steps."""


class Content:
    """Arrays that one or many messages bring; hashed once, however many clients they are sent to."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of names, types, shapes and values."""
        return digest(self.arrays)


def plain_key(key: Key, purpose: str, config: Mapping[str, Any]) -> Key:
    """Return an owner's key for a message, where no noise comes from it."""
    return key.child(purpose, int(config["server-round"]))


def private_key(
    key: Key,
    purpose: str,
    config: Mapping[str, Any],
    received: Mapping[str, Content],
    kept: Mapping[str, Content],
) -> Key:
    """Return an owner's key for a message, where noise comes from it: it follows from all that the round starts from.

    The same round from elsewhere then draws other batches and other noise, a repeated round from the same place the
    same ones.
    """
    # The same noise over two models' gradients would reveal their difference, and the server's word that a model
    # is the same is not enough.
    key = plain_key(key, purpose, config).child(str(config.get("model-version", "")))
    for origin, contents in (("received", received), ("kept", kept)):
        for name in sorted(contents):
            key = key.child(origin, name, contents[name].digest)
    return key


@dataclass(frozen=True, kw_only=True)
class Site:
    """One data owner: its records, its secret key, and the mechanisms that cover what it releases.

    `plan` noises each of its steps, `local` its whole update; `evaluation` is None where no metrics may leave. Whether
    code raises may follow from one record: with `hide`, which is told, such a record counts as zero under a plan, and
    as the lowest score where metrics are noised.
    """

    name: str
    data: SiteData
    key: Key
    plan: RecordLevelPlan | None
    evaluation: EvaluationPlan | None
    local: LocalPlan | None = None
    hide: Hide | None = None

    def message_key(
        self,
        purpose: str,
        config: Mapping[str, Any],
        received: Mapping[str, Content],
        kept: Mapping[str, Content],
    ) -> Key:
        """Return the key of all randomness with which a message is answered.

        It follows from the round, and under privacy also from the model, what came beside it, and what the client kept.
        """
        if self.plan is None and self.local is None:
            return plain_key(self.key, purpose, config)
        return private_key(self.key, purpose, config, received, kept)
