"""What record-level DP-SGD costs: bract's default kernel with and without it, and Opacus in a plain loop.

    python benchmarks/dp_sgd.py --model mlp [--clients 20] [--repeats 5]

The workload of `benchmarks/peers`: clients of 60 images, one epoch of batches of 10; clip 1, sigma 1, Poisson batches.
One process and one thread; they take turns, client by client, and processor time counts, since other work may share the
machine. Prints one JSON line: median milliseconds a client, and of each ratio the least, the median and the greatest of
the repeats.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn import functional

from bract.clients.kernels import dp_engines, traced
from bract.clients.local_model import LocalModel
from bract.clients.training import LocalTraining, reproducible
from bract.core.keys import Key
from bract.privacy.dpsgd.layers import make_private
from bract.privacy.mechanism import RecordLevelPlan
from bract.tasks.fashion_mnist import FashionMnist
from bract.tasks.task import Examples, initial_model

RECORDS, BATCH_SIZE, LEARNING_RATE = 60, 10, 0.05


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def clients(count: int) -> list[Examples]:
    """Return so many clients' images."""
    folder = os.environ.get("FASHION_MNIST")
    train = FashionMnist().partitions(Path(folder) if folder else None)["all"].train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return [train.select(order[RECORDS * place : RECORDS * (place + 1)]) for place in range(count)]


def plain_opacus(module: nn.Module, examples: Examples) -> None:
    """Train as Opacus' users do: its hooks, its optimizer, its noise; Poisson batches."""
    wrapped = GradSampleModule(module, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=LEARNING_RATE),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=BATCH_SIZE,
    )
    for _ in range(RECORDS // BATCH_SIZE):
        batch = (torch.rand(RECORDS) < BATCH_SIZE / RECORDS).nonzero()[:, 0]
        optimizer.zero_grad()
        loss(wrapped(examples.inputs[batch]), examples.targets[batch]).mean().backward()
        optimizer.step()
    wrapped.to_standard_module()


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Return the line of one model."""
    training = LocalTraining(batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, dp_engine=args.engine, kernel="traced")
    module, _ = make_private(initial_model(FashionMnist(model=args.model).model, 0))
    model, other = LocalModel(module, training), copy.deepcopy(module)
    plan = RecordLevelPlan(
        records=RECORDS,
        batch_size=BATCH_SIZE,
        epochs=1,
        rounds=1,
        clipping_norm=1.0,
        noise_multiplier=1.0,
        delta=1e-5,
    )
    start, key = model.shared_arrays(), Key.from_seed(0)

    def bract(examples: Examples, mechanism: RecordLevelPlan | None) -> None:
        model.load(start)
        traced.train(model, loss, examples, training, plan=mechanism, key=key)

    def opacus(examples: Examples, mechanism: RecordLevelPlan | None) -> None:
        other.load_state_dict(model.module.state_dict())
        plain_opacus(other, examples)

    runs: dict[str, tuple[Callable[[Examples, RecordLevelPlan | None], None], RecordLevelPlan | None]] = {
        "without": (bract, None),
        "noiseless": (bract, replace(plan, noise_multiplier=0.0)),
        "private": (bract, plan),
        "opacus": (opacus, None),
    }
    cohort = clients(args.clients)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):
        spent = dict.fromkeys(runs, 0.0)
        for examples in cohort:
            for name, (run, mechanism) in runs.items():
                started = time.process_time()
                run(examples, mechanism)
                spent[name] += time.process_time() - started
        # The first turn warms up.
        for name in runs if repeat else ():
            times[name].append(spent[name] / len(cohort))
    ratios = {
        "noiseless_over_without": [a / b for a, b in zip(times["noiseless"], times["without"], strict=True)],
        "over_without": [a / b for a, b in zip(times["private"], times["without"], strict=True)],
        "opacus_over": [a / b for a, b in zip(times["opacus"], times["private"], strict=True)],
    }
    return {
        "model": args.model,
        "engine": dp_engines.dp_engine(model, cohort[0].inputs[:2], training),
        **{f"{name}_ms": round(1e3 * median(found), 2) for name, found in times.items()},
        **{name: [round(f(found), 2) for f in (min, median, max)] for name, found in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=FashionMnist.models, default="mlp")
    parser.add_argument("--engine", choices=("bookkeeping", "opacus"), default="bookkeeping")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with reproducible(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
