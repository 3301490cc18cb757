"""What makes the sequential kernel quick changes nothing: torch's steps bit for bit, arrays that stay as they were."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import nn

from bract.clients.kernels.memory_format import in_order, memory_format
from bract.clients.local_model import LocalModel
from bract.clients.sgd import SGD
from bract.clients.training import LocalTraining, reproducible
from bract.core.parameters import arrays_of, record_of


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("l2", [0.0, 0.01])
def test_sgd_takes_torchs_steps_bit_for_bit(momentum, l2):
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(shape, generator=generator) for shape in [(3, 4), (7,), ()]]
    ours, theirs = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    mine = SGD(ours, learning_rate=0.1, momentum=momentum, l2=l2)
    torchs = torch.optim.SGD(theirs, lr=0.1, momentum=momentum, weight_decay=l2)
    for step in range(5):
        gradients = [torch.randn(tensor.shape, generator=generator) for tensor in start]
        mine.zero_grad()
        torchs.zero_grad()
        for parameters in (ours, theirs):
            # A parameter that the loss does not reach in some step.
            for index, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                parameter.grad = None if index == 1 and step % 2 else gradient.clone()
        mine.step()
        torchs.step()
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


class Viewed(nn.Module):
    """A module that only takes images in torch's own order."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.out = nn.Linear(4 * 36, 2)

    def forward(self, inputs):
        return self.out(self.conv(inputs).view(len(inputs), -1))


def order_of(module, images):
    return memory_format(LocalModel(module, LocalTraining()), images)


def test_channels_last_is_taken_where_the_module_takes_it():
    images = torch.zeros(4, 3, 8, 8)
    flattened = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    assert order_of(flattened, images) is torch.channels_last and flattened.training
    assert order_of(Viewed(), images) is torch.contiguous_format
    assert order_of(nn.Linear(8, 2), images) is torch.contiguous_format
    assert order_of(nn.Sequential(nn.Conv2d(3, 4, 3)), images[0]) is torch.contiguous_format


@pytest.mark.parametrize("images", [torch.rand(4, 3, 8, 8), torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)])
def test_all_layers_see_images_channels_last(images):
    """Also images of one channel, and bytes; weights travel as before."""

    class Floats(nn.Module):
        def forward(self, inputs):
            return inputs.float() / 255

    module = nn.Sequential(Floats(), nn.Conv2d(images.shape[1], 5, 3), nn.MaxPool2d(2, 1), nn.Conv2d(5, 6, 2))
    model = LocalModel(module, LocalTraining())
    before, seen = model.shared_arrays(), []
    for layer in module[1:]:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.stride(1)))
    module(images)
    assert 1 not in seen
    seen.clear()
    order = memory_format(model, images)
    seen.clear()
    module(in_order(images, order))
    assert seen == [1, 1, 1]
    for name, array in model.shared_arrays().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_record_holds_what_flower_s_own_would_send():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    ours, flowers = record_of({"w": array})["w"], Array(array)
    assert (ours.dtype, ours.shape, ours.stype, ours.data) == (
        flowers.dtype,
        flowers.shape,
        flowers.stype,
        flowers.data,
    )
    assert ours.object_id == flowers.object_id
    assert Array(ours.dtype, ours.shape, ours.stype, ours.data).numpy().tobytes() == array.tobytes()


def test_an_app_s_changes_stay_with_the_app():
    """A ClientApp may work in place on what it was sent: Flower's own arrays are the reader's to change."""
    record = record_of({"w": np.ones(3)})
    record["w"].numpy()[:] = 7
    record.to_torch_state_dict()["w"].mul_(9)
    np.testing.assert_array_equal(arrays_of(record)["w"], np.ones(3))
    with pytest.raises(ValueError, match="read-only"):
        arrays_of(record)["w"][0] = 5


def test_a_record_survives_a_pipe():
    record = pickle.loads(pickle.dumps(record_of({"w": np.ones(3), "b": np.array(2, np.int64)})))
    assert isinstance(record, ArrayRecord)
    assert {name: array.tolist() for name, array in arrays_of(record).items()} == {"w": [1.0, 1.0, 1.0], "b": 2}


def test_what_makes_training_reproducible_is_put_back():
    def settings():
        fill = torch.utils.deterministic.fill_uninitialized_memory
        return torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), fill

    before = settings()
    with pytest.raises(RuntimeError, match="stop"), reproducible():
        assert settings() == (1, True, False)
        raise RuntimeError("stop")
    assert settings() == before
