"""A notebook as a script: own task and strategy as objects of a cell."""

# %% What is learned: five synthetic clients and a small network
import tempfile
from pathlib import Path

from torch import nn

import bract
from bract.strategies.fedavg import FedAvg
from bract.tasks.synthetic import Synthetic


class Small(Synthetic):
    def model(self):
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, self.outputs))


# %% How updates are combined: FedAvg that waits for three clients
class Patient(FedAvg):
    def aggregate_total(self, server_round, total):
        arrays, metrics = super().aggregate_total(server_round, total)
        return (arrays if total.count >= 3 else None), metrics


# %% Run it
experiment = bract.Experiment.of(
    {
        "experiment": {"name": "notebook", "rounds": 3},
        "train": {"learning_rate": 0.5},
        "privacy": {"unit": "record", "epsilon": 4.0},
    }
)
task = Small(clients=5, records=60, features=8, classes=2)
result = bract.simulate(experiment, task=task, strategy=Patient(), out=Path(tempfile.mkdtemp()) / "run")

# %% What came out
print(result.status, result.metrics)
print(result.guarantee.sentence)

# %% The model again, from its directory
model = bract.load(result.run_dir, task=task)
print(sum(parameter.numel() for parameter in model.parameters()), "parameters;", result.report)
