"""Sites that noise their own updates: the real app, told what its training ends with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp
from torch import Tensor

from ....clients.parts import local_rule
from ....core.keys import Key
from ....core.parameters import Arrays, Layout, arrays_of
from ....experiment import CompressionTable, Experiment
from ....privacy.local import LocalPlan
from ....server.plan import Plan
from ....server.run import TrainingRun
from ....strategies.local_rule import LocalRound, LocalRule, LocalSession, Sent
from ....tasks.task import SiteData, Task
from ...federation import Federation, virtual_federation
from ..replay import addressed
from .noise import Series
from .puppets import Vector

MOST_SITES = 4
_FEW = 4


class Dictation:
    """What training ends with: the model that was received with `update` [size] on it; None lets it train."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.update: Vector | None = None

    @contextmanager
    def of(self, layout: Layout, update: Vector | None) -> Iterator[None]:
        """Dictate an update for a while."""
        self.layout, self.update = layout, update
        try:
            yield
        finally:
            self.update = None

    def half_of(self, experiment: Experiment, strategy: object) -> _Half:
        """Return the client half of a strategy, with each of its sessions dictated to."""
        rule = local_rule(experiment, strategy)

        def session(round: LocalRound) -> LocalSession:
            return _Dictated(self, round, rule.session(round))

        return _Half(replace(rule, session=session))


@dataclass(frozen=True)
class _Half:
    """What `virtual_federation` asks of a strategy."""

    local_rule: LocalRule


class _Dictated:
    def __init__(self, dictation: Dictation, round: LocalRound, session: LocalSession) -> None:
        self._dictation, self._session = dictation, session
        self._tensors: Mapping[str, Tensor] = {**round.parameters}
        self._all = [*round.parameters.values(), *round.personal.values()]
        self._start = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}

    def correct(self) -> None:
        """Leave no gradient to step by, and put the dictated model in place."""
        dictation = self._dictation
        if dictation.update is None or dictation.layout is None:
            self._session.correct()
            return
        pieces = torch.from_numpy(dictation.update).split(list(dictation.layout.sizes))
        changes = dict(zip(dictation.layout.names, pieces, strict=True))
        with torch.no_grad():
            for tensor in self._all:
                tensor.grad = None
            for name, tensor in self._tensors.items():
                tensor.copy_(self._start[name].double().cpu() + changes[name].view(tensor.shape))

    def finish(self) -> Sent:
        """Send what the other session sends."""
        return self._session.finish()


@dataclass(frozen=True, kw_only=True)
class Sites:
    """A few clients, and the real app that serves them: `app` is the run's own, `plain` sends updates uncompressed.

    `noiseless` is `plain` under a plan without noise: what it sends is the clipped update.
    """

    names: tuple[str, ...]
    app: ClientApp
    plain: ClientApp
    noiseless: ClientApp
    plan: LocalPlan
    initial: Arrays
    layout: Layout
    dictation: Dictation
    template: Message

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        task: Task,
        data: Mapping[str, SiteData],
        plan: Plan,
        federation: Federation,
        *,
        key: Key,
        dictation: Dictation,
        template: Message,
    ) -> Self:
        """Return a few of the sites, the ones with the fewest and the most records among them."""
        assert plan.local is not None
        by_size = sorted(data, key=lambda name: len(data[name].train))
        places = np.linspace(0, len(by_size) - 1, min(MOST_SITES, len(by_size)))
        names = tuple(by_size[round(place)] for place in places)
        half = dictation.half_of(experiment, TrainingRun(experiment).strategy)
        uncompressed = experiment.model_copy(update={"compression": CompressionTable()})
        # What they train with does not matter, as their updates are dictated.
        little = {
            name: replace(data[name], train=data[name].train.select(list(range(min(_FEW, len(data[name].train))))))
            for name in names
        }

        def app(local: LocalPlan) -> ClientApp:
            here = replace(plan, mechanisms={}, local=local)
            return virtual_federation(uncompressed, task, little, here, key=key, strategy=half).app

        return cls(
            names=names,
            app=federation.app,
            plain=app(plan.local),
            noiseless=app(replace(plan.local, noise_multiplier=0.0)),
            plan=plan.local,
            initial=federation.initial,
            layout=Layout.of(federation.initial),
            dictation=dictation,
            template=template,
        )

    def ask(
        self, app: ClientApp, site: str, update: Vector | None, *, round: int = 1, arrays: Arrays | None = None
    ) -> tuple[Message, Message]:
        """Return the message of a round and what an app answers to it when its training ends with an update."""
        message, context = addressed(
            self.template,
            site,
            round=round,
            arrays=self.initial if arrays is None else arrays,
            initial=self.initial,
        )
        with self.dictation.of(self.layout, update):
            return message, app(message, context)

    def released(
        self, site: str, update: Vector | None, *, round: int = 1, arrays: Arrays | None = None, noise: bool = True
    ) -> Vector:
        """Return what a reply adds to the model, [size]."""
        _, reply = self.ask(self.plain if noise else self.noiseless, site, update, round=round, arrays=arrays)
        start = self.layout.flatten(self.initial if arrays is None else arrays)
        return self.layout.flatten(arrays_of(reply.content.array_records["arrays"])) - start

    def series(self, wanted: int) -> list[Series]:
        """Return the noise of each site's rounds over its planned deviation, while it changes nothing."""
        scale = self.plan.noise_multiplier * self.plan.clipping_norm
        nothing = np.zeros(self.layout.size)
        return [
            Series(
                owner=site,
                vectors=[
                    self.released(site, nothing, round=number) / scale
                    for number in range(1, max(3, -(-wanted // len(self.names))) + 1)
                ],
                repeated=[(self.released(site, nothing), self.released(site, nothing))],
            )
            for site in self.names
        ]
