"""How near a client's training comes to what a core can multiply: each kernel, in turn with a large product.

    python benchmarks/roofline.py [--turns 9]

Prints a table: milliseconds a client (60 images, batches of 10), billions of floating-point operations a second, and
their share of a product of two 1,500 × 1,500 matrices on the same core. One thread; medians over the turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from bract.clients.kernels import sequential, traced
from bract.clients.local_model import LocalModel
from bract.clients.training import LocalTraining, reproducible
from bract.core.keys import Key
from bract.simulations.executors.worker_process import keep_memory
from bract.tasks.fashion_mnist import FashionMnist
from bract.tasks.task import Examples, initial_model

RECORDS, SIZE = 60, 1500
TRAINING = LocalTraining(batch_size=10, learning_rate=0.05)
KERNELS = {"sequential": sequential.train, "traced": traced.train}


def seconds(call: Callable[[], object], times: int) -> float:
    """Return the seconds of one of so many calls."""
    begun = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun) / times


def rates(name: str, turns: int) -> dict[str, tuple[float, float, float]]:
    """Return milliseconds, operations a second and their share of the large product's, by kernel."""
    task = FashionMnist(model=name)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(RECORDS, 1, 28, 28, generator=generator)
    examples = Examples(inputs, torch.randint(0, 10, (RECORDS,), generator=generator))
    key, square = Key.from_seed(0), torch.randn(SIZE, SIZE)
    calls = {}
    for kernel, train in KERNELS.items():
        model = LocalModel(initial_model(task.model, 0), TRAINING)
        calls[kernel] = lambda model=model, train=train: train(model, task.loss, examples, TRAINING, plan=None, key=key)
    with FlopCounterMode(display=False) as counter:
        calls["sequential"]()
    operations = counter.get_total_flops()
    times = max(1, round(1e8 / operations * 40))
    found: dict[str, list[tuple[float, float]]] = {kernel: [] for kernel in calls}
    for _ in range(turns):
        product = 2 * SIZE**3 / seconds(lambda: square @ square, 3)
        for kernel, call in calls.items():
            found[kernel].append((seconds(call, times), product))
    return {
        kernel: (
            1e3 * median(taken for taken, _ in each),
            median(operations / taken for taken, _ in each) / 1e9,
            median(operations / taken / product for taken, product in each),
        )
        for kernel, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=9, help="how often each is timed (default 9)")
    turns = parser.parse_args().turns
    keep_memory()
    print("| model | kernel | ms a client | GFLOP/s | of a large product |\n| --- | --- | --- | --- | --- |")
    with reproducible():
        for name in ("mlp", "small", "cnn"):
            for kernel, (taken, rate, share) in rates(name, turns).items():
                print(f"| {name} | {kernel} | {taken:.2f} | {rate:.0f} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
