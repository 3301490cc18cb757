"""simulation.precision: the model's products are rounded, and nothing that a guarantee or a sum stands on."""

from __future__ import annotations

import json

import pytest
import torch

import bract
from bract.core.errors import InputError


def test_bf16_trains_nearly_the_same_model_the_same_with_any_number_of_workers(tiny, tmp_path):
    sums = {}
    for precision, workers in (("float32", 1), ("bf16", 1), ("bf16", 2)):
        keys = {"simulation.precision": precision, "simulation.workers": workers, "experiment.rounds": 3}
        result = bract.simulate(tiny(**keys), out=tmp_path / f"{precision}-{workers}")
        sums[precision, workers] = result.model_sha256
        described = json.loads((result.run_dir / "manifest.json").read_text())
        assert described["precision"] == precision
        tensors = list(result.model.state_dict().values())
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        if precision == "float32":
            exact = flat
        else:
            assert 0 < (flat - exact).abs().max() < 0.02 * exact.abs().max()
    assert sums["bf16", 1] == sums["bf16", 2] != sums["float32", 1]


def test_bf16_is_refused_where_records_are_private_or_an_app_trains(tiny, tmp_path):
    private = {"privacy.unit": "record", "privacy.noise_multiplier": 2.0}
    for keys, why in (
        (private, "record-level privacy takes float32"),
        ({"clients.app": "apps:app", "clients.count": 2, "task.model": "apps:net"}, "app's own"),
    ):
        with pytest.raises(InputError, match=why):
            bract.simulate(tiny(**{"simulation.precision": "bf16", **keys}), out=tmp_path / "run")
        assert not (tmp_path / "run").exists()
