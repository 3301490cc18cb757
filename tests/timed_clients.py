"""Clients in a few lines of numpy that are not alike in speed."""

from __future__ import annotations

import numpy as np

from bract.core.keys import Key
from bract.simulations.grid import VirtualGrid
from bract.simulations.virtual_clock import VirtualClock

from .numpy_clients import descent, grid_of

KEY = Key.from_seed(1)


def clock(spread=1.0):
    return VirtualClock(spread=spread, key=KEY)


def timed(clients, spread=1.0):
    """Return the grid of clients that are not alike in speed."""
    return VirtualGrid(grid_of(clients).executor, list(clients), clock=clock(spread))


def targets(count=12):
    return {f"client-{k}": np.float64(k % 4) for k in range(count)}


def descents(count=12, rate=0.5):
    return {name: descent(target, rate) for name, target in targets(count).items()}


def broken(model, number):
    raise ValueError("no such patient")
