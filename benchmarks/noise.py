"""Draws a second on one core: the exact discrete Gaussian, against two floating-point normals.

    python benchmarks/noise.py --count 2000000

Prints one JSON line: millions of draws a second of `bract.privacy.discrete_gaussian.sample` on a secret stream, of
`Stream.normals` (the same cipher, Box and Muller's transform) and of NumPy's PCG64 with its ziggurat (no secret: a
general-purpose generator), the median over the repeats, taken in turn; and the time that the tables of a sigma take.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from bract.core.keys import Key
from bract.privacy.discrete_gaussian import largest, sample


def measure(*, count: int, sigma: float, repeats: int) -> dict[str, Any]:
    """Return the line: rates in millions of draws a second."""
    started = time.perf_counter()
    largest(sigma)
    tables = time.perf_counter() - started
    stream, generator = Key.from_seed(0).stream(), np.random.default_rng(0)
    ways: dict[str, Callable[[], object]] = {
        "discrete_gaussian": lambda: sample(stream, sigma, count),
        "stream_normals": lambda: stream.normals(count),
        "stream_single_normals": lambda: stream.single_normals(count),
        "numpy_normal": lambda: generator.standard_normal(count),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    rates = {f"{name}_m_per_s": round(count / median(times) / 1e6, 2) for name, times in seconds.items()}
    return {"benchmark": "noise", "count": count, "sigma": sigma, **rates, "tables_s": round(tables, 3)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2_000_000, help="draws at a time")
    parser.add_argument("--sigma", type=float, default=2.0**50, help="standard deviation in units of the integers")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args(arguments)
    print(json.dumps(measure(count=given.count, sigma=given.sigma, repeats=given.repeats)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
