"""Virtual clients a second: bract on the workload of `benchmarks/peers`, alone or in turn with another script.

    python benchmarks/simulation.py --model mlp --rounds 4 --cohort 20
    python benchmarks/simulation.py --model mlp --pair benchmarks/peers/plain_loop.py

The first prints one JSON line, as the peers do. The second runs bract and the other script in turn, each in a process
of its own, and prints their lines and the median of the ratios: on a machine that is not idle only that means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import bract
from bract.experiment import Experiment
from bract.server.events import Event, RoundFinished
from bract.tasks.fashion_mnist import FashionMnist
from bract.tasks.partition import client_names
from bract.tasks.task import SiteData

HERE = Path(__file__).parent


class EvenFashionMnist(FashionMnist):
    """Fashion-MNIST dealt out evenly: each of 1,000 clients has 60 images to train on, as `peers/workload.py` does."""

    def __init__(self, *, clients: int, model: str = "mlp") -> None:
        super().__init__(model=model)
        self._clients = clients

    def partitions(self, source: Path | None) -> dict[str, SiteData]:
        whole = super().partitions(source)["all"]
        train = np.array_split(np.random.default_rng(0).permutation(len(whole.train)), self._clients)
        test = np.array_split(np.arange(len(whole.test)), self._clients)
        return {
            name: SiteData(
                train=whole.train.select(torch.from_numpy(mine)), test=whole.test.select(torch.from_numpy(held))
            )
            for name, mine, held in zip(client_names(self._clients), train, test, strict=True)
        }


def experiment(args: argparse.Namespace) -> Experiment:
    """Return the workload as an experiment: one round more than is timed."""
    task: dict[str, Any] = {"name": f"{Path(__file__).stem}:{EvenFashionMnist.__name__}", "clients": args.clients}
    if "FASHION_MNIST" in os.environ:
        task["data"] = str(Path(os.environ["FASHION_MNIST"]).resolve())
    if args.app:
        return Experiment.of(
            {
                "experiment": {"name": f"app-{args.model}", "rounds": args.rounds + 1},
                "task": {"model": f"flower_app:{args.model}_model"},
                "clients": {
                    "app": f"flower_app:{args.model}",
                    "count": args.clients,
                    "sampling": "fixed",
                    "per_round": args.cohort,
                },
                "simulation": {"workers": args.threads, "curves": False, "baselines": False},
            },
            folder=HERE / "peers",
        )
    tables: dict[str, dict[str, Any]] = {
        "experiment": {"name": f"fashion-{args.model}", "rounds": args.rounds + 1},
        "task": task,
        "clients": {"sampling": "fixed", "per_round": args.cohort},
        "train": {"model": args.model, "batch_size": 10, "learning_rate": 0.05, "device": args.device},
        "simulation": {"workers": args.threads, "curves": False, "baselines": False, "precision": args.precision},
    }
    if args.private:
        tables["privacy"] = {"unit": "record", "noise_multiplier": 1.0, "clipping_norm": 1.0}
    return Experiment.of(tables, folder=HERE)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the line of one run of bract: clients a second after the first round, accuracy on all test images."""
    marks: list[float] = []

    def mark(event: Event) -> None:
        if isinstance(event, RoundFinished):
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        result = bract.simulate(experiment(args), out=Path(folder) / "run", listeners=[mark])
    rate = args.rounds * args.cohort / (marks[-1] - marks[0])
    # A Flower app's clients evaluate by themselves, if at all.
    accuracy = result.metrics.get("accuracy")
    return {"peer": "bract", "model": args.model, "clients_per_s": round(rate, 2), "accuracy": accuracy}


def pair(args: argparse.Namespace) -> None:
    """Run bract and another script in turn, and print their lines and the ratio of their rates."""
    flags = [f"--{name}={getattr(args, name)}" for name in ("model", "clients", "cohort", "rounds", "threads")]
    own = [f"--{name}" for name in ("app", "private") if getattr(args, name)]
    ratios = []
    for _ in range(args.pairs):
        ours = _line(
            [sys.executable, __file__, *flags, f"--device={args.device}", f"--precision={args.precision}", *own]
        )
        theirs = _line([args.python, args.pair, *flags])
        ratios.append(ours["clients_per_s"] / theirs["clients_per_s"])
    found = {"model": args.model, "pairs": len(ratios), "ratio": round(median(ratios), 2)}
    print(json.dumps(found | {"lowest": round(min(ratios), 2), "highest": round(max(ratios), 2)}))


def _line(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    print(lines[-1], flush=True)
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def arguments() -> argparse.Namespace:
    """Parse the peers' flags, and those of a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=FashionMnist.models, default="mlp")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--cohort", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=4, help="timed rounds, after one that is not")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="processes of bract, threads of the others")
    parser.add_argument("--device", default="cpu", help='where bract trains: "cpu", "cuda" or "auto"')
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of bract's products")
    parser.add_argument("--app", action="store_true", help="have bract run the stock Flower ClientApp of peers/")
    parser.add_argument("--private", action="store_true", help="have bract train by DP-SGD: clip 1, sigma 1, Poisson")
    parser.add_argument("--pair", metavar="SCRIPT", help="run this script in turn with bract: itself, for --private")
    parser.add_argument("--pairs", type=int, default=5, help="how many times each")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the other script")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    if given.pair:
        pair(given)
    else:
        print(json.dumps(measure(given)))
