"""Compression of updates: codes and positions, error feedback, refusals, and whole runs with fewer bytes."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

import bract
from bract.core import flower
from bract.core.errors import InputError, RunError
from bract.core.keys import Key
from bract.core.parameters import Layout, arrays_of, record_of
from bract.core.ring import Ring
from bract.experiment import CompressionTable
from bract.privacy.client_level import ClientLevelPlan
from bract.server.cohort_grid import CohortGrid
from bract.server.events import ClientFailed, Notice, RoundFinished
from bract.server.grid import Arrival, Exchange, RoundGrid, fold_in
from bract.strategies.clipped_sum import ClippedSum
from bract.strategies.codec import ENCODED, Codec
from bract.strategies.compression import MEMORY, Compression, Decoding, refuse_unproven
from bract.strategies.fedavg import FedAvg
from bract.strategies.fold import WeightedSum
from bract.strategies.quantization import (
    dequantize,
    levels,
    pack,
    packed_bytes,
    quantize,
    unpack,
)
from bract.strategies.sparse import kept, largest, positions_bytes, read_positions, write_positions
from bract.tasks.task import Examples, SiteData

from .federated import Point, Quadratics, train

KEY = Key.from_seed(11)
SHAPES = {"weight": (20, 30), "bias": (30,), "norm.running_var": (30,), "norm.num_batches_tracked": ()}


def model(seed, scale=1.0):
    generator = np.random.default_rng(seed)
    arrays = {name: (scale * generator.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}
    return arrays | {"norm.num_batches_tracked": np.array(seed, np.int64)}


RECEIVED, TRAINED = model(1), model(2, scale=2.0)
LAYOUT = Layout.of(RECEIVED)
COMPRESSIONS = [
    Compression(top_k=0.05),
    Compression(top_k=0.8),
    Compression(top_k=1.0),
    Compression(bits=2),
    Compression(bits=5),
    Compression(bits=8),
    Compression(bits=16),
    Compression(top_k=0.1, bits=4),
]
ALL = pytest.mark.parametrize("compression", COMPRESSIONS, ids=str)


# --- the parts


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50), st.integers(0, 32))
def test_packed_numbers_come_back(numbers, bits):
    numbers = np.array(numbers, np.int64) & ((1 << bits) - 1)
    packed = pack(numbers, bits)
    assert len(packed) == packed_bytes(len(numbers), bits) == -(-len(numbers) * bits // 8)
    assert (unpack(packed, bits, len(numbers)) == numbers).all()


@pytest.mark.parametrize("bits", [3, 8, 13])
def test_many_packed_numbers_come_back(bits):
    numbers = KEY.stream().words(150_001).astype(np.int64) & ((1 << bits) - 1)
    assert (unpack(pack(numbers, bits), bits, len(numbers)) == numbers).all()


@given(st.integers(1, 3000), st.floats(0.001, 1.0), st.integers(0, 2**32))
def test_positions_come_back_in_few_bytes(size, share, seed):
    count = kept(share, size)
    positions = np.sort(np.random.default_rng(seed).choice(size, count, replace=False))
    written = write_positions(positions, size)
    assert len(written) == positions_bytes(count, size)
    assert (read_positions(written, count, size) == positions).all()
    # Elias and Fano: at most 2 + log2(size / count) bits each, but for what fills up two bytes.
    assert len(written) <= min(-(-size // 8), count * (3 + max(0, np.log2(size / count))) / 8 + 2)


def test_one_position_in_a_hundred_takes_about_a_byte():
    assert positions_bytes(10_000, 1_000_000) / 10_000 < 1.08


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40), st.integers(1, 40))
def test_the_largest_are_taken_and_of_equal_ones_the_first(values, count):
    values, count = np.array(values, np.float32), min(count, len(values))
    by_size = sorted(range(len(values)), key=lambda index: (-abs(values[index]), index))
    assert largest(values, count).tolist() == sorted(by_size[:count])


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_quantization_is_unbiased_and_within_a_step(bits):
    values = np.array([0.0, 1.0, -1.0, 0.3, -0.77, 1e-3, 0.5], np.float32)
    borders, draws = [0, len(values)], 4000
    stream = KEY.child("unbiased", bits).stream()
    found = np.array([dequantize(*quantize(values, borders, bits, stream), borders, bits) for _ in range(draws)], float)
    step = 1 / levels(bits)
    assert np.abs(found - values).max() <= step + 1e-7
    assert set(found[:, 0]) == {0.0} and set(found[:, 1]) == {1.0} and set(found[:, 2]) == {-1.0}
    # The standard deviation of a mean is at most step / (2·sqrt(draws)); six of them.
    assert np.abs(found.mean(axis=0) - values).max() <= 3 * step / np.sqrt(draws) + 1e-7


def test_each_tensor_has_its_own_scale():
    values, borders = np.array([1e-6, -5e-7, 0, 0, 3e4], np.float32), [0, 2, 2, 4, 5]
    scales, codes = quantize(values, borders, 8, KEY.stream())
    assert scales.tolist() == np.array([1e-6, 0, 0, 3e4], np.float32).tolist()
    assert np.abs(dequantize(scales, codes, borders, 8) - values).max() < 1e-8


# --- one update


@ALL
def test_an_update_comes_back(compression):
    codec = compression.codec(LAYOUT)
    encoded = codec.encode(TRAINED, RECEIVED, None, KEY)
    found = compression.decode(instruction(), reply(encoded).content)
    decoded = arrays_of(found["arrays"])
    assert list(decoded) == list(SHAPES) and list(found) == ["arrays", "metrics"]
    LAYOUT.check(decoded)
    for whole in ("norm.running_var", "norm.num_batches_tracked"):
        assert (decoded[whole] == TRAINED[whole]).all()
    # What was kept of the change arrives, and what was left out is remembered: together they are the change.
    flat = [np.concatenate([arrays[name].ravel() for name in ("weight", "bias")]) for arrays in (decoded, RECEIVED)]
    truth = np.concatenate([(TRAINED[name].astype(float) - RECEIVED[name]).ravel() for name in ("weight", "bias")])
    arrived = flat[0].astype(float) - flat[1]
    if compression.top_k is not None:
        assert encoded.memory.dtype == np.float32
        assert np.allclose(arrived + encoded.memory, truth, atol=2e-6)
        assert (np.abs(arrived) > 1e-6).sum() <= codec.count
        assert compression.top_k < 1 or compression.bits or np.allclose(arrived, truth, atol=2e-6)
    else:
        assert encoded.memory is None
        assert np.abs(arrived - truth).max() <= np.abs(truth).max() / levels(compression.bits) * 1.001


@ALL
def test_the_length_is_known_beforehand_and_is_what_travels(compression):
    codec = compression.codec(LAYOUT)
    lengths = {
        sum(array.nbytes for record in codec.encode(trained, RECEIVED, None, KEY).records.values()
            for array in record.values())
        for trained in (TRAINED, RECEIVED, model(5))
    }  # fmt: skip
    assert lengths == {codec.nbytes}


@ALL
def test_the_same_key_gives_the_same_bytes(compression):
    codec = compression.codec(LAYOUT)

    def sent(key):
        records = codec.encode(TRAINED, RECEIVED, None, key).records
        return b"".join(array.tobytes() for record in records.values() for array in record.values())

    assert sent(KEY) == sent(KEY)
    assert (sent(KEY) != sent(KEY.child("other"))) == (compression.bits is not None)


def test_what_was_left_out_is_sent_later():
    codec = Codec(layout=LAYOUT, top_k=0.25, bits=None)
    memory, still = None, {name: np.array(array) for name, array in RECEIVED.items()}
    target, arrived = TRAINED, np.zeros(630)
    for turn in range(4):
        encoded = codec.encode(target, RECEIVED, memory, KEY)
        decoded = codec.decode(record_of(encoded.records[ENCODED]), record_of(encoded.records["arrays"]), RECEIVED)
        arrived += np.concatenate([(decoded[n].astype(float) - RECEIVED[n]).ravel() for n in ("weight", "bias")])
        memory, target = encoded.memory, still | {"norm.num_batches_tracked": np.array(turn, np.int64)}
    # After four quarters of one change, and no further change, all of it has arrived.
    truth = np.concatenate([(TRAINED[name].astype(float) - RECEIVED[name]).ravel() for name in ("weight", "bias")])
    assert np.allclose(arrived, truth, atol=1e-5)
    assert np.abs(memory).max() < 1e-5


def test_an_update_too_large_for_32_bits_is_refused():
    received = {"w": np.zeros(3)}
    codec = Codec(layout=Layout.of(received), top_k=None, bits=8)
    with pytest.raises(RunError) as caught:
        codec.encode({"w": np.array([1e300, 0, 0])}, received, None, KEY)
    assert caught.value.code == "value-out-of-range"


# --- what a client must not send


def instruction(arrays=None):
    flower.identify_process(1)
    message = Message(RecordDict({"arrays": record_of(arrays or RECEIVED), "config": ConfigRecord()}), 7, "train")
    flower.set_message_id(message, "1")
    return message


def reply(encoded, to=None):
    records = {name: record_of(arrays) for name, arrays in encoded.records.items()}
    return Message(RecordDict(records | {"metrics": MetricRecord({"num-examples": 1})}), reply_to=to or instruction())


def valid(compression):
    return reply(compression.codec(LAYOUT).encode(TRAINED, RECEIVED, None, KEY)).content


def part_of(content, name, record=ENCODED):
    return np.array(arrays_of(content[record])[name])


def put(name, change, record=ENCODED):
    """Return what changes one part of a reply."""

    def spoil(content):
        content[record][name] = record_of({name: change(part_of(content, name, record))})[name]

    return spoil


def serialised(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def bomb(content):
    # The header claims four terabytes of the type that is wanted.
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (2**42,)})
    content[ENCODED]["values"] = Array(dtype="uint8", shape=(2**42,), stype="numpy.ndarray", data=buffer.getvalue())


def mislabelled_bomb(content):
    """Say the right shape beside the header that claims another, over as many bytes as the right shape has."""
    wanted = part_of(content, "values")
    bomb(content)
    put_bytes(content, content[ENCODED]["values"].data + wanted.tobytes())


def put_bytes(content, data):
    shape = part_of(valid(BOTH), "values").shape
    content[ENCODED]["values"] = Array(dtype="uint8", shape=shape, stype="numpy.ndarray", data=data)


def pickled(content):
    content[ENCODED]["values"] = Array(
        dtype="uint8", shape=(3,), stype="numpy.ndarray", data=serialised(np.array([None], object))
    )


def duplicate(positions):
    """Make the first two of Elias and Fano's positions one: the second's high bit after the first's, equal low bits."""
    found = read_positions(positions, BOTH_COUNT, 630).copy()
    low = (630 // BOTH_COUNT).bit_length() - 1
    found[1] = found[0]
    bits = np.zeros(BOTH_COUNT + (629 >> low), np.uint8)
    bits[(found >> low) + np.arange(BOTH_COUNT)] = 1
    return np.concatenate([pack(found & ((1 << low) - 1), low), np.packbits(bits, bitorder="little")])


def beyond(positions):
    """Move the last position behind the model's last coordinate."""
    low = (630 // BOTH_COUNT).bit_length() - 1
    found = read_positions(positions, BOTH_COUNT, 630).copy()
    found[-1] = 630 | ((1 << low) - 1)
    bits = np.zeros(8 * (-(-(BOTH_COUNT + (629 >> low)) // 8)), np.uint8)
    bits[(found >> low) + np.arange(BOTH_COUNT)] = 1
    return np.concatenate([pack(found & ((1 << low) - 1), low), np.packbits(bits, bitorder="little")])


BOTH = Compression(top_k=0.1, bits=4)
BOTH_COUNT = kept(0.1, 630)
DENSE = Compression(top_k=0.5)
QUANTIZED = Compression(bits=4)
SPOILT = {
    "no encoding": (BOTH, lambda content: content.pop(ENCODED)),
    "the model instead": (BOTH, lambda content: content.__setitem__("arrays", record_of(TRAINED))),
    "no record of arrays": (BOTH, lambda content: content.__setitem__(ENCODED, MetricRecord({"values": 1}))),
    "a part missing": (BOTH, lambda content: content[ENCODED].pop("scales")),
    "a part too many": (BOTH, lambda content: content[ENCODED].__setitem__("more", content[ENCODED]["values"])),
    "whole tensors missing": (BOTH, lambda content: content.pop("arrays")),
    "another shape": (BOTH, put("norm.running_var", lambda array: array[:-1], "arrays")),
    "positions too short": (BOTH, put("positions", lambda array: array[:-1])),
    "positions too long": (BOTH, put("positions", lambda array: np.append(array, np.uint8(0)))),
    "too few positions": (BOTH, put("positions", lambda array: array * np.uint8(0))),
    "too many positions": (BOTH, put("positions", lambda array: array | np.uint8(255))),
    "a position twice": (BOTH, put("positions", duplicate)),
    "a position out of range": (BOTH, put("positions", beyond)),
    "a bitmap out of range": (DENSE, put("positions", lambda bits: np.append(bits[:-1] * 0 + 240, 255).astype("u1"))),
    "values too short": (BOTH, put("values", lambda array: array[:-1])),
    "values of another type": (BOTH, put("values", lambda array: array.astype(np.int8))),
    "a code that is none": (QUANTIZED, put("values", lambda array: array | np.uint8(255))),
    "a scale that is no number": (BOTH, put("scales", lambda array: array * np.float32("nan"))),
    "an infinite scale": (BOTH, put("scales", lambda array: array + np.float32("inf"))),
    "a scale below zero": (BOTH, put("scales", lambda array: -array - 1)),
    "a value that is no number": (DENSE, put("values", lambda array: array * np.float32("nan"))),
    "a bomb": (BOTH, bomb),
    "a bomb that says it is none": (BOTH, mislabelled_bomb),
    "a pickle": (BOTH, pickled),
    "another type in the bytes": (
        BOTH,
        lambda content: put_bytes(content, serialised(part_of(content, "values").astype(np.int8))),
    ),
    "bytes behind the array": (
        BOTH,
        lambda content: put_bytes(content, serialised(part_of(content, "values")) + b"more"),
    ),
    "no array": (BOTH, lambda content: content[ENCODED].__setitem__(
        "values", Array(dtype="uint8", shape=(32,), stype="numpy.ndarray", data=b"\x93NUMPY"))),
    "another library's": (BOTH, lambda content: content[ENCODED].__setitem__(
        "values", Array(dtype="uint8", shape=(32,), stype="jax", data=b""))),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPOILT)
def test_a_malformed_encoding_fails_that_client(kind):
    compression, spoil = SPOILT[kind]
    content = valid(compression)
    arrays_of(compression.decode(instruction(), content)["arrays"])
    spoil(content)
    with pytest.raises(RunError) as caught:
        compression.decode(instruction(), content)
    assert caught.value.code == "reply-invalid"


def test_a_model_that_is_not_finite_fails_that_client():
    content = valid(DENSE)
    put("values", lambda array: array * 0 + np.float32(3.4e38))(content)
    large = {name: np.full(shape, 3e38, np.float32) for name, shape in SHAPES.items()}
    received = large | {"norm.num_batches_tracked": RECEIVED["norm.num_batches_tracked"]}
    with pytest.raises(RunError) as caught:
        DENSE.decode(instruction(received), content)
    assert caught.value.code == "value-out-of-range"


@ALL
def test_bytes_of_flowers_own_arrays_are_read_too(compression):
    content = valid(compression)
    whole = arrays_of(compression.decode(instruction(), content)["arrays"])
    for name in (ENCODED, "arrays"):
        content[name] = ArrayRecord({key: Array(np.array(array)) for key, array in arrays_of(content[name]).items()})
    found = arrays_of(compression.decode(instruction(), content)["arrays"])
    assert all((found[name] == whole[name]).all() for name in whole)


# --- the exchange


class Loopback(RoundGrid):
    """A grid whose replies are given."""

    def __init__(self, replies):
        self.replies = replies

    def get_node_ids(self):
        return [7]

    def exchange(self, messages, *, fold=None, until=None):
        arrivals = [Arrival(instruction=message, reply=self.replies.pop(0)) for message in messages]
        return Exchange(arrivals, fold=fold, until=until)


@ALL
@pytest.mark.parametrize("folded", [False, True])
def test_the_exchange_decodes_and_counts(compression, folded):
    message = instruction()
    encoded = compression.codec(LAYOUT).encode(TRAINED, RECEIVED, None, KEY)
    bad = valid(compression)
    del bad[ENCODED]
    grid = Loopback([reply(encoded, message), Message(bad, reply_to=message)])
    view = CohortGrid(grid, [7], compression=compression)
    fold = WeightedSum(layout=LAYOUT, ring=Ring(capacity=2)) if folded else None
    exchange = view.exchange([message, message], fold=fold)
    good, refused = exchange
    assert refused.has_error() and flower.code_and_sentence(refused.error)[0] == "reply-invalid"
    expected = arrays_of(compression.decode(instruction(), valid(compression))["arrays"])
    if folded:
        assert exchange.total.count == 1 and list(good.content) == ["metrics"]
        assert np.allclose(exchange.total.mean(), LAYOUT.flatten(expected), atol=1e-6)
    else:
        found = arrays_of(good.content["arrays"])
        assert all((found[name] == expected[name]).all() for name in expected)
    codec = compression.codec(LAYOUT)
    size = sum(array.nbytes for array in RECEIVED.values())
    assert (view.bytes_up, view.bytes_down) == (codec.nbytes, 2 * size)


def test_a_query_is_not_decoded():
    message = Message(RecordDict({"q": ConfigRecord({"ask": 1})}), 7, "query.name")
    answer = Message(RecordDict({"a": ConfigRecord({"name": "x"})}), reply_to=message)
    view = CohortGrid(Loopback([answer]), [7], compression=BOTH)
    (found,) = view.send_and_receive([message])
    assert found.content["a"]["name"] == "x"


def test_the_server_clips_what_it_decoded():
    """Client-level privacy: whatever the compressor did, a client adds at most C to the sum."""
    plan = ClientLevelPlan(
        clients=10, cohort=5, sampling="poisson", rounds=1, clipping_norm=0.5, noise_multiplier=1.0, delta=1e-5,
        coordinates=LAYOUT.size,
    )  # fmt: skip
    clipped = ClippedSum(layout=LAYOUT, ring=plan.ring(0.5), model=LAYOUT.flatten(RECEIVED), clipping_norm=0.5)
    for compression in COMPRESSIONS:
        fold = Decoding(compression=compression, fold=clipped)
        total = fold.start()
        left, size = fold_in(fold, total, instruction(), Message(valid(compression), reply_to=instruction()))
        assert left.has_content() and size == compression.codec(LAYOUT).nbytes
        norm = np.linalg.norm(clipped.ring.decode(total.total))
        assert 0.49 < norm <= 0.5


# --- training


def reach(strategy=None, **keys):
    """Return how far from the optimum two unlike clients end."""
    task = Wide()
    trained = train(task, strategy or FedAvg(), rounds=120, **{"train.learning_rate": 0.05} | keys)
    assert not trained.failures
    return float(np.abs(trained.arrays["w"] - task.optimum_of_all()).max()), trained


class Wide(Quadratics):
    """Ten coordinates; clients agree on none, and each client's largest change is in a coordinate that sums to 0."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(3)
        pull = rng.uniform(-1, 1, (2, 10))
        pull[0, 0], pull[1, 0] = 12.0, -12.0
        pull[0, 1], pull[1, 1] = 11.0, -11.0
        self.centres = pull

    def optimum_of_all(self):
        return self.centres.mean(axis=0)

    def model(self):

        return Point(10)

    def partitions(self, source=None):

        sites = {}
        for number, centre in enumerate(self.centres):
            row = torch.tensor([[1.0, *centre.tolist()]], dtype=torch.float32)
            one = Examples(row, torch.zeros(1, dtype=torch.int64))
            sites[f"client-{number}"] = SiteData(train=one, test=one)
        return sites


def test_error_feedback_reaches_the_optimum_where_top_k_alone_stalls(monkeypatch):
    top_k = {"compression.top_k": 0.2}
    plain, _ = reach()
    with_memory, trained = reach(**top_k)
    assert set(trained.states["client-0"]) == {MEMORY}
    encode = Codec.encode

    def forgetful(codec, trained, received, memory, key):
        assert memory is None
        return dataclasses.replace(encode(codec, trained, received, None, key), memory=None)

    monkeypatch.setattr(Codec, "encode", forgetful)
    without_memory, _ = reach(**top_k)
    assert plain < 0.02
    # The two coordinates on which the clients disagree most take up all that is sent; the others never move.
    assert without_memory > 2.0
    assert with_memory < 0.35


@pytest.mark.parametrize("compression", [{"bits": 8}, {"top_k": 0.3, "bits": 6}])
def test_quantized_updates_reach_the_optimum_too(compression):
    distance, _ = reach(**{f"compression.{key}": value for key, value in compression.items()})
    assert distance < 0.6


STRATEGIES = (
    "fedadam",
    "fedbuff",
    "scaffold",
    "feddyn",
    "fednova",
    "qfedavg",
    "flwr.serverapp.strategy:FedAvg",
    "flwr.serverapp.strategy:FedAdam",
)


def private(unit):
    return {"privacy.unit": unit, "privacy.noise_multiplier": 2.0} if unit != "none" else {}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_kind_of_strategy_gets_whole_models(tiny, tmp_path, name):
    failed = []

    def listen(event):
        if isinstance(event, ClientFailed):
            failed.append(event)

    keys = {"strategy.name": name, "compression.top_k": 0.5, "compression.bits": 8}
    if name == "fedbuff":
        keys["strategy.buffer"] = 2
    result = bract.simulate(tiny(**keys), out=tmp_path / "run", listeners=[listen])
    assert result.status == "completed" and not failed


@pytest.mark.parametrize(
    "keys",
    [
        {"compression.top_k": 0.3, "compression.bits": 4, "strategy.name": "scaffold"},
        {"compression.top_k": 0.3, **private("record")},
        {"compression.bits": 6, **private("client"), "clients.sampling": "poisson", "clients.per_round": 2},
    ],
    ids=str,
)
def test_the_number_of_workers_and_an_interruption_change_no_byte(tiny, tmp_path, keys):
    def interrupt(event):
        if isinstance(event, RoundFinished) and event.round == 2:
            os.kill(os.getpid(), signal.SIGINT)

    one = bract.simulate(tiny(**keys, **{"simulation.workers": 1}), out=tmp_path / "one")
    two = bract.simulate(tiny(**keys, **{"simulation.workers": 2}), out=tmp_path / "two")
    stopped = bract.simulate(tiny(**keys), out=tmp_path / "run", listeners=[interrupt])
    assert stopped.status == "interrupted"
    resumed = bract.simulate(resume=tmp_path / "run")
    assert one.model_sha256 == two.model_sha256 == resumed.model_sha256
    for key in ("bytes_up", "bytes_down", "bytes_saved"):
        assert one.record[key] == two.record[key] == resumed.record[key]
    plain = {key: value for key, value in keys.items() if not key.startswith("compression.")}
    assert bract.simulate(tiny(**plain), out=tmp_path / "plain").model_sha256 != one.model_sha256


def test_bytes_count_what_travels(tiny, tmp_path):
    """SCAFFOLD's variates too, in both directions."""

    def records(name, **keys):
        result = bract.simulate(tiny(**keys), out=tmp_path / name)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert result.record["bytes_up"] == sum(line["bytes_up"] for line in lines)
        assert result.record["bytes_down"] == sum(line["bytes_down"] for line in lines)
        return result.record, lines

    plain, lines = records("plain")
    size = lines[0]["bytes_down"] // 4
    assert [(line["bytes_up"], line["bytes_down"]) for line in lines] == [(4 * size, 4 * size)] * 4
    assert "bytes_saved" not in plain
    scaffold, lines = records("scaffold", **{"strategy.name": "scaffold"})
    assert [(line["bytes_up"], line["bytes_down"]) for line in lines] == [(8 * size, 8 * size)] * 4
    small, lines = records("small", **{"strategy.name": "scaffold", "compression.bits": 8})
    assert small["bytes_saved"] == scaffold["bytes_up"] - small["bytes_up"] > 0
    assert lines[0]["bytes_up"] < lines[0]["bytes_down"] == 8 * size


def test_a_secret_cohort_does_not_show_in_the_bytes(tiny, tmp_path):
    keys = {"compression.bits": 8, **private("client"), "clients.sampling": "poisson", "clients.per_round": 2}
    found = [
        bract.simulate(tiny(**keys, **{"experiment.seed": seed}), out=tmp_path / str(seed)).record for seed in (1, 2)
    ]
    assert len({(record["bytes_up"], record["bytes_down"], record["bytes_saved"]) for record in found}) == 1
    lines = (tmp_path / "1" / "metrics.jsonl").read_text()
    assert "bytes" not in lines


def test_digits_are_learned_with_a_fraction_of_the_bytes(tmp_path):
    def run(name, **compression):
        tables = {
            "experiment": {"rounds": 12},
            "task": {"name": "digits"},
            "clients": {"partitioner": "iid", "count": 5},
            "train": {"learning_rate": 0.1},
            "compression": compression,
            "simulation": {"workers": 1, "curves": False, "baselines": False},
        }
        return bract.simulate(bract.Experiment.of(tables), out=tmp_path / name)

    whole, small = run("whole"), run("small", top_k=0.1, bits=4)
    assert whole.record["bytes_up"] > 30 * small.record["bytes_up"]
    assert small.record["bytes_saved"] == whole.record["bytes_up"] - small.record["bytes_up"]
    assert small.metrics["accuracy"] > whole.metrics["accuracy"] - 0.03 > 0.9


# --- what is refused


def test_a_unit_without_a_proof_is_refused(tiny):
    for unit in ("none", "record", "client"):
        refuse_unproven(tiny(**{"compression.bits": 8}, **private(unit)))
    proven = tiny(**{"compression.bits": 8})
    other = proven.model_copy(update={"privacy": proven.privacy.model_copy(update={"unit": "household"})})
    with pytest.raises(InputError, match="is not proven to hold"):
        refuse_unproven(other)
    refuse_unproven(other.model_copy(update={"compression": CompressionTable()}))


@pytest.mark.parametrize("name", ["fedmedian", "krum", "geometricmedian", "flwr.serverapp.strategy:FedMedian"])
def test_top_k_is_refused_under_robust_rules_and_quantization_is_not(tiny, tmp_path, name):
    with pytest.raises(InputError, match=r"^compression.top_k = 0.5: .*use compression.bits"):
        bract.simulate(tiny(**{"strategy.name": name, "compression.top_k": 0.5}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    keys = {"strategy.name": name, "compression.bits": 8, "experiment.rounds": 1, "task.clients": 5}
    assert bract.simulate(tiny(**keys), out=tmp_path / "run").status == "completed"


@pytest.mark.parametrize(
    ("key", "value"), [("top_k", 0.0), ("top_k", 1.5), ("bits", 1), ("bits", 17), ("bits", 8.0), ("bit", 8)]
)
def test_values_out_of_range_are_refused(tiny, key, value):
    with pytest.raises(InputError, match=rf"^compression\.{key}"):
        tiny(**{f"compression.{key}": value})


def test_a_flower_app_is_refused(tiny):
    keys = {"clients.app": "app:app", "clients.count": 2, "task.model": "app:net", "compression.bits": 8}
    with pytest.raises(InputError, match=r"^compression.bits = 8: a Flower ClientApp"):
        tiny(**keys)


def test_the_plan_shows_the_bytes_of_the_run(tiny, tmp_path):
    from bract.simulations.description import describe

    experiment = tiny(**{"compression.top_k": 0.5, "compression.bits": 4, "strategy.name": "scaffold"})
    sent, result = describe(experiment)["bytes"], bract.simulate(experiment, out=tmp_path / "run")
    assert sent["run"] == result.record["bytes_up"] + result.record["bytes_down"]
    assert 16 * sent["saved"] == result.record["bytes_saved"]


def test_counted_weights_that_are_withheld_are_said_to_be(tiny, tmp_path):
    for keys, said in ((private("record"), True), ({}, False)):
        notices = []
        bract.simulate(
            tiny(**keys, **{"strategy.weights": "counted", "experiment.rounds": 1}),
            out=tmp_path / str(said),
            listeners=[lambda event: notices.append(event.text) if isinstance(event, Notice) else None],  # noqa: B023
        )
        assert any('strategy.weights = "counted"' in text for text in notices) == said
