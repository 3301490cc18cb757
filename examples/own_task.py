"""An own task in a few lines: is a breast tumour malignant or benign? Run: bract simulate examples/own_task.toml"""

import hashlib

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from bract.tasks.classification import Classification
from bract.tasks.task import Examples, SiteData

# Published ranges of radius, texture, perimeter, area, smoothness: constants, never the data's own minimum and maximum.
LOW, HIGH = np.array([5, 5, 30, 100, 0.04]), np.array([30, 40, 200, 2500, 0.18])


class Tumours(Classification):
    classes = ("malignant", "benign")

    def model(self):
        return nn.Linear(len(LOW), self.outputs)

    def partitions(self, source):  # one client "all", which clients.partitioner deals out
        return {"all": self.records(*load_breast_cancer(return_X_y=True))}

    def site(self, path):  # a real client's own file
        with np.load(path) as file:
            return self.records(file["measurements"], file["labels"])

    def records(self, measurements, labels):
        scaled = 2 * (np.clip(measurements[:, : len(LOW)], LOW, HIGH) - LOW) / (HIGH - LOW) - 1
        ids = [hashlib.sha256(row.tobytes()).hexdigest() for row in np.ascontiguousarray(measurements)]
        examples = Examples(torch.tensor(scaled, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64))
        return SiteData.split(examples, ids)
