"""Many clients over many rounds: no reply is lost, and memory stays where it was."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import numpy as np
import pytest

from bract.server.connections.errands import Deadlines

from .federation import Running, fold_of, inline, model


def resident(pid: int | str) -> int:
    """Return the bytes that a process holds."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


@pytest.mark.parametrize(
    ("streams", "processes", "rounds"), [(48, 2, 12), pytest.param(200, 4, 50, marks=pytest.mark.soak)]
)
def test_many_streams_from_few_processes_lose_no_reply_and_hold_no_memory(streams, processes, rounds):
    """A quarter of the rounds warms up; after it nothing may grow by more than what a few rounds take."""
    here = Running(deadlines=Deadlines(round_deadline=120, stall_after=30, connect_for=60))
    try:
        names = [f"site-{number:03d}" for number in range(streams)]
        groups = [names[number::processes] for number in range(processes)]
        clients = [each.pid for each in here.clients(*groups, process=True)]
        arrays = model(10_000)
        expected = inline(names, arrays, capacity=1000)
        held = []
        for number in range(rounds):
            exchange = here.exchange(arrays, fold=fold_of(arrays, capacity=1000), round=number)
            assert here.codes(exchange) == [""] * streams
            assert exchange.total.count == streams and np.array_equal(exchange.total.total, expected)
            del exchange
            gc.collect()
            # What the allocator keeps for itself comes and goes in a process that had much more before.
            ctypes.CDLL(None).malloc_trim(0)
            held.append([resident("self"), *map(resident, clients)])
        for before, after in zip(held[rounds // 4], held[-1], strict=True):
            assert after - before < 6 << 20, [[size >> 20 for size in each] for each in held]
        print("\nMiB:", [size >> 20 for size in held[rounds // 4]], "to", [size >> 20 for size in held[-1]])
    finally:
        here.close()
