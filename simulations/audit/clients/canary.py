"""Planted clients: found no more often than the claimed noise allows, in the mechanism without sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from flwr.app import MetricRecord, RecordDict
from numpy.typing import NDArray

from ....clients.noised import noised_update
from ....core.keys import Key
from ....core.parameters import Layout, record_of
from ....core.ring import ExactSum
from ....privacy.canary import BLOCK, CANARIES, Canaries
from ....privacy.client_level import ClientLevelPlan
from ....server.private_aggregation import PrivateAggregation
from ....strategies.fedavg import COUNT_KEY
from ....strategies.fold import WeightedSum
from ..coins import guessed
from ..finding import Finding
from .noise import banded, worst_sensitivity
from .subject import ClientSubject

Vector = NDArray[np.float64]

_STEPS, _LOCAL_STEPS = 100, 16
_TOO_LONG = 10.0


def canary(subject: ClientSubject) -> Finding:
    """A thousand clients with updates on blocks of their own are in the server's sum or not, by a coin each.

    They are clipped, summed and noised by the server's own mechanism: each step is the first round of a run under a key
    of its own, with bands a whole run, of which what a client adds is read by its own part of C G + Z.
    """
    plan, key = subject.aggregate, subject.key.child("canary")
    coins = Canaries.toss(key, noise_multiplier=plan.noise_multiplier, steps=_STEPS)
    size = CANARIES * BLOCK
    layout = Layout.of({"canaries": np.zeros(size)})
    here = _with_room(plan, size)
    # Only those that are there take part. Ten times too long where it shall be clipped, one moves the sum by C.
    length = plan.clipping_norm * (coins.length if coins.length < 1 else _TOO_LONG)
    updates = coins.directions[coins.there].numpy().astype(np.float64) * length
    found = _summed(subject, here, layout, updates)
    total = sum((_step(here, layout, key.child("noise", step), *found) for step in range(coins.steps)), np.zeros(size))
    return guessed(coins.guess(coins.products(torch.from_numpy(total)) / plan.clipping_norm))


def canary_of_sites(subject: ClientSubject) -> Finding:
    """A thousand clients send an update of length C or none, by a coin each, clipped and noised as a site does it."""
    plan, key = subject.local, subject.key.child("canary")
    coins = Canaries.toss(key, noise_multiplier=plan.noise_multiplier, steps=_LOCAL_STEPS)
    layout = Layout.of({"canary": np.zeros(BLOCK)})
    length = plan.clipping_norm * (coins.length if coins.length < 1 else _TOO_LONG)
    model = {"canary": np.zeros(BLOCK)}
    total = np.zeros((CANARIES, BLOCK))
    for place, there in enumerate(coins.there.tolist()):
        block = coins.directions[place, place * BLOCK : (place + 1) * BLOCK].numpy().astype(np.float64)
        update = {"canary": block * length if there else np.zeros(BLOCK)}
        for step in range(coins.steps):
            stream = key.child("noise", place, step).stream()
            sent = noised_update(model, update, layout=layout, plan=plan, stream=stream)
            total[place] += sent["canary"]
    return guessed(coins.guess(coins.products(torch.from_numpy(total.ravel())) / plan.clipping_norm))


def _with_room(plan: ClientLevelPlan, size: int) -> ClientLevelPlan:
    """Return the plan for a thousand clients more: what noises stays as it is, bands with their period too."""
    if not plan.bands:
        return replace(plan, clients=plan.clients + CANARIES, sampling="fixed", coordinates=size)
    cohort = plan.cohort + CANARIES
    return replace(plan, clients=plan.period * cohort, cohort=cohort, coordinates=size)


def _summed(
    subject: ClientSubject, plan: ClientLevelPlan, layout: Layout, updates: Sequence[Vector] | Vector
) -> tuple[WeightedSum, ExactSum]:
    """Return the strategy's fold, and the clipped sum of the canaries by what the server has in its place."""
    cap = getattr(subject.strategy, "weight_cap", None)
    fold = WeightedSum(layout=layout, ring=plan.ring(1.0), weighted_by=None if cap is None else COUNT_KEY, cap=cap)
    clipped = PrivateAggregation(plan, layout=layout, key=subject.key).fold(_model(layout), subject.strategy, fold)
    total = clipped.start()
    for update in updates:
        arrays, metrics = record_of({"canaries": update}), MetricRecord({COUNT_KEY: cap or 1})
        clipped.add(total, RecordDict({"arrays": arrays, "metrics": metrics}))
    return fold, total


def _step(plan: ClientLevelPlan, layout: Layout, key: Key, fold: WeightedSum, total: ExactSum) -> Vector:
    """Return a noised sum, in which a canary moves what it moves and the noise is z · C; of bands their projection."""
    server = PrivateAggregation(plan, layout=layout, key=key)
    clipped = server.fold(_model(layout), None, fold)
    correlation = plan.correlation()
    if correlation is None:
        return server.release(1, clipped, total).mean() * plan.cohort
    matrix = banded(correlation, plan.rounds)
    takes_part = np.zeros(plan.rounds)
    takes_part[:: plan.period][: plan.participations] = 1.0
    # A canary adds this much of its update to the rows of C G + Z, which have independent noise.
    column = matrix @ takes_part
    combined, worst = column @ matrix / math.sqrt(column @ column), worst_sensitivity(correlation)
    found = np.zeros(layout.size)
    for round, weight in enumerate(combined):
        taken = total if takes_part[round] else clipped.start()
        found += weight * server.release(round + 1, clipped, taken).mean() * plan.cohort
    return found / worst


def _model(layout: Layout) -> dict[str, NDArray[np.generic]]:
    return layout.unflatten(np.zeros(layout.size))
