"""How much accuracy federation and privacy cost on the heart data, paired on the same five folds.

    python benchmarks/heart_disease.py [--seeds 5] [--folds 5] [--epsilon 2] [--set TABLE.KEY=VALUE] [--json]

Three models are trained on each fold's training records and scored on the test records of all four hospitals:
scikit-learn's logistic regression on the pooled records, bract's federated one without privacy, and bract's at epsilon
with several seeds. The experiment is the one that `bract simulate` runs without a file.

The figures are exact, so they are the experimenter's alone; what a run at epsilon releases is printed beside them. The
runs take `privacy.randomness = "seed"`, so that they can be repeated; a secret key draws from the same distributions.
As called without options, the exit status is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import bract
from bract.experiment import Experiment, PrivacyTable
from bract.simulations.comparison import pooled
from bract.simulations.experiments import DEFAULT_EXPERIMENT
from bract.tasks.heart_disease import HeartDisease
from bract.tasks.task import Examples

# A fold is one of the five parts of the data, whatever --folds says: that only says how many of them are tested on.
PARTS = 5
METRICS = ("accuracy", "auc")
MOST_LOST_TO_FEDERATION = 0.02
LEAST_AT_EPSILON_2 = {"accuracy": 0.78, "auc": 0.86}

Scores = dict[str, float]
Summary = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """The scores of one fold's models; `private` (exact) and `released` have one entry for each seed."""

    number: int
    epsilon: float
    train_records: int
    test_records: int
    pooled: Scores
    federated: Scores
    private: list[Scores]
    released: list[Scores]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs at epsilon on each fold (default 5)")
    parser.add_argument("--folds", type=int, default=PARTS, choices=range(1, PARTS + 1), help="folds (default 5)")
    parser.add_argument("--epsilon", type=float, default=2.0, help="over the whole run, delta 1e-5 (default 2)")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="change the experiment")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds: must be at least 1")

    started = time.monotonic()
    folds = []
    for fold in range(options.folds):
        try:
            folds.append(compare(fold, seeds=options.seeds, epsilon=options.epsilon, overrides=options.set))
        except bract.BractError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_status
        print(f"fold {fold} done after {time.monotonic() - started:.0f} s", file=sys.stderr)
    summary = summarise(folds)
    usual = (options.folds, options.seeds, options.epsilon, options.set) == (PARTS, 5, 2.0, [])
    targets = judge(summary) if usual else {}
    if options.json:
        setting = {"seeds": options.seeds, "epsilon": options.epsilon, "delta": 1e-5, "set": options.set}
        print(
            json.dumps(
                {"setting": setting, "folds": [asdict(fold) for fold in folds], "summary": summary, "targets": targets},
                indent=2,
            )
        )
    else:
        print(table(folds, summary, epsilon=options.epsilon))
        for target, reached in targets.items():
            print(f"{'reached' if reached else 'MISSED'}: {target}")
    return 0 if all(targets.values()) else 1


def compare(fold: int, *, seeds: int, epsilon: float, overrides: Sequence[str]) -> Fold:
    """Train the three models on one fold and score them."""
    task = HeartDisease(fold=fold, folds=PARTS)
    sites = task.partitions(None)
    inputs = torch.cat([site.train.inputs for site in sites.values()])
    targets = torch.cat([site.train.targets for site in sites.values()])
    tests = pooled(sites)

    regression = LogisticRegression(max_iter=1000).fit(inputs.numpy(), targets.numpy())
    plain = train(experiment(fold, 0, epsilon=None, overrides=overrides))
    private = [train(experiment(fold, seed, epsilon=epsilon, overrides=overrides)) for seed in range(seeds)]
    return Fold(
        number=fold,
        epsilon=private[0].guarantee.epsilon or math.inf,
        train_records=len(targets),
        test_records=len(tests),
        pooled=scores(task, torch.from_numpy(regression.predict_proba(tests.inputs.numpy())), tests),
        federated=model_scores(task, plain.model, tests),
        private=[model_scores(task, run.model, tests) for run in private],
        released=[released(run) for run in private],
    )


def experiment(fold: int, seed: int, *, epsilon: float | None, overrides: Sequence[str]) -> Experiment:
    """Return the default experiment on a fold, without what costs time and is not read here."""
    keys = [
        f"task.fold={fold}",
        f"task.folds={PARTS}",
        f"experiment.seed={seed}",
        f"privacy.epsilon={1.0 if epsilon is None else epsilon}",
        'privacy.randomness="seed"',
        "simulation.curves=false",
        "simulation.baselines=false",
    ]
    chosen = Experiment.load(DEFAULT_EXPERIMENT, overrides=[*keys, *overrides])
    if epsilon is not None:
        return chosen
    # An override cannot take privacy.epsilon away.
    return chosen.model_copy(update={"privacy": PrivacyTable(randomness="seed")})


def train(chosen: Experiment) -> bract.Result:
    """Run an experiment; its run directory is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        result = bract.simulate(chosen, out=Path(folder) / "run")
    if result.status != "completed":
        raise SystemExit(f"fold {chosen.task.own['fold']}, seed {chosen.experiment.seed}: the run was {result.status}")
    return result


def released(run: bract.Result) -> Scores:
    """Return the metrics that a run at epsilon releases; NaN where the noisy counts do not support one."""
    return {name: math.nan if run.metrics[name] is None else float(run.metrics[name] or 0) for name in METRICS}


def model_scores(task: HeartDisease, model: torch.nn.Module, examples: Examples) -> Scores:
    """Return a model's exact metrics."""
    with torch.no_grad():
        return scores(task, task.probabilities(model(examples.inputs)), examples)


def scores(task: HeartDisease, probabilities: Tensor, examples: Examples) -> Scores:
    """Return the exact metrics of probabilities [n, 2]."""
    metrics = task.metrics()
    for metric in metrics.values():
        metric.update(probabilities, examples.targets)
    return {name: float(metrics[name].compute()) for name in METRICS}


def summarise(folds: Sequence[Fold]) -> Summary:
    """Return the means over the folds; of the runs at epsilon, the median over the seeds and their range."""
    summary: Summary = {}
    for name in METRICS:
        by_seed = {
            kind: [
                mean(run[name] for run in runs) for runs in zip(*(getattr(fold, kind) for fold in folds), strict=True)
            ]
            for kind in ("private", "released")
        }
        summary[name] = {
            "pooled": mean(fold.pooled[name] for fold in folds),
            "federated": mean(fold.federated[name] for fold in folds),
            "private": median(by_seed["private"]),
            "private_lowest": min(by_seed["private"]),
            "private_highest": max(by_seed["private"]),
            "released": median(by_seed["released"]),
        }
    return summary


def judge(summary: Summary) -> dict[str, bool]:
    """Return each target and whether it was reached."""
    targets = {}
    for name, least in LEAST_AT_EPSILON_2.items():
        figures = summary[name]
        lost = abs(figures["pooled"] - figures["federated"])
        targets[f"{name}: federated within {MOST_LOST_TO_FEDERATION} of pooled"] = lost <= MOST_LOST_TO_FEDERATION
        targets[f"{name}: at least {least} at epsilon 2"] = figures["private"] >= least
    return targets


def table(folds: Sequence[Fold], summary: Summary, *, epsilon: float) -> str:
    """Return the figures as a Markdown table, accuracy / AUC, of the runs at epsilon the median over the seeds."""

    def cell(accuracy: float, auc: float) -> str:
        return f"{accuracy:.3f} / {auc:.3f}"

    def middle(runs: Sequence[Scores]) -> str:
        return cell(*(median(run[name] for run in runs) for name in METRICS))

    heads = ("fold", "test records", "pooled", "federated", f"epsilon {epsilon:g}", f"released at epsilon {epsilon:g}")
    rows = [
        (
            str(fold.number),
            str(fold.test_records),
            cell(**fold.pooled),
            cell(**fold.federated),
            middle(fold.private),
            middle(fold.released),
        )
        for fold in folds
    ]
    means = (
        cell(*(summary[name][kind] for name in METRICS)) for kind in ("pooled", "federated", "private", "released")
    )
    rows.append(("mean", str(sum(fold.test_records for fold in folds)), *means))
    lowest, highest = (cell(*(summary[name][f"private_{end}"] for name in METRICS)) for end in ("lowest", "highest"))
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(
        [
            "accuracy / AUC",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"5-fold mean at epsilon {epsilon:g}, lowest and highest of the seeds: {lowest} and {highest}",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
