"""transport/: what is sent arrives bit for bit, and what is malformed is refused with a code, at no cost of memory."""

from __future__ import annotations

import hashlib
import math
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from bract import __version__
from bract.core.errors import BractError, InputError, RunError
from bract.core.parameters import arrays_of, record_of
from bract.transport import channel, wire
from bract.transport.body import Body, Digests, Incoming
from bract.transport.federation_pb2 import Frame, Header, Manifest
from bract.transport.greeting import Hello, refuse_version
from bract.transport.tensors import bfloat16


def header_of(body: Body, **changes) -> Header:
    return Header(
        **{"message": "m", "size": body.size, "manifest": len(body.manifest), "sha256": body.sha256, **changes}
    )


def carried(body: Body, *, limit: int = 1 << 40) -> RecordDict | Error:
    incoming = Incoming(header_of(body), limit=limit)
    frames = list(body.pieces())
    assert all(len(frame) <= wire.FRAME for frame in frames)
    for frame in frames:
        piece = wire.read(frame)
        assert isinstance(piece, memoryview)
        # The fast way of writing is the protocol's own.
        assert Frame(piece=bytes(piece)).SerializeToString() == frame
        incoming.add(piece)
    assert incoming.remaining == 0
    return incoming.content()


RECORDS = RecordDict(
    {
        "z": record_of(
            {
                "scalar": np.float32(0.1),
                "empty": np.zeros((0, 3), np.float64),
                "half": np.arange(5, dtype=np.float16),
                "bool": np.array([True, False]),
                "big": np.arange(3, dtype=">i4"),
                "columns": np.asfortranarray(np.arange(12, dtype=np.int64).reshape(3, 4)),
                "strided": np.arange(10, dtype=np.uint8)[::3],
                "nan": np.array([np.nan, -0.0, np.inf, 5e-324]),
            }
        ),
        "a": ConfigRecord(
            {"i": -3, "f": 0.1, "s": "é", "b": b"\0\xff" * 700, "t": True, "texts": ["", "x"], "bs": [b"", b"1"]}
        ),
        "m": MetricRecord({"n": 2**62, "loss": math.inf, "ints": [1, -(2**63)], "floats": [0.1, -0.0]}),
        "none": ConfigRecord({}),
        "no arrays": ArrayRecord(),
        "list": ConfigRecord({"truths": [True, False], "nothing": []}),
    }
)


def test_records_arrive_bit_for_bit():
    found = carried(Body.of(RECORDS))
    assert list(found) == list(RECORDS)
    for name, record in RECORDS.items():
        assert type(found[name]) is type(record) and list(found[name]) == list(record)
        if isinstance(record, ArrayRecord):
            for tensor, array in arrays_of(record).items():
                got = arrays_of(found[name])[tensor]
                assert got.shape == array.shape and got.dtype == array.dtype.newbyteorder("<")
                assert got.tobytes() == array.astype(got.dtype).tobytes()
                assert not got.flags.writeable and got.ctypes.data % got.dtype.itemsize == 0
        else:
            assert repr(dict(found[name])) == repr(dict(record))


def test_a_stock_flower_array_and_an_error_arrive():
    record = ArrayRecord([np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.ones((2, 2)))])
    found = carried(Body.of(RecordDict({"a": record})))
    for name, array in record.items():
        assert np.array_equal(found["a"][name].numpy(), array.numpy())
    error = carried(Body.of_error(Error(1000, "client-failed: a\x1b[2J\nb")))
    assert (error.code, error.reason) == (1000, "client-failed: a?[2J?b")


def test_bfloat16_travels_as_16_bits_and_is_read_as_float32():
    torch = pytest.importorskip("torch")
    values = np.array([0.1, -3.14159, 1e38, 3.4e38, np.inf, -np.inf, 1.00390625, 1.01171875, 1e-40, 0.0], np.float32)
    record = ArrayRecord()
    record["w"] = bfloat16(values)
    body = Body.of(RecordDict({"a": record}))
    assert body.segments[0].nbytes == 2 * len(values)
    array = carried(body)["a"]["w"]
    assert array.dtype == "bfloat16"
    received = ArrayRecord()
    received["w"] = array
    expected = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    assert arrays_of(received)["w"].tobytes() == expected.tobytes()
    assert np.isnan(bfloat16(np.array([np.nan], np.float32)).live).all()


def test_a_message_of_several_pieces_is_sent_from_its_own_buffer():
    weights = np.random.default_rng(1).random(1_000_003, np.float32)
    content = RecordDict({"a": record_of({"w": weights, "v": np.ones(7, np.int8)})})
    body = Body.of(content)
    assert body.segments[0].obj.base is not None and np.shares_memory(np.asarray(body.segments[0]), weights)
    assert len(list(body.pieces())) == math.ceil(body.size / wire.PIECE) == 4
    assert np.array_equal(arrays_of(carried(body)["a"])["w"], weights)


def test_a_broadcast_is_hashed_once(monkeypatch):
    hashed = []
    real = hashlib.sha256
    monkeypatch.setattr("bract.transport.body.hashlib.sha256", lambda data: hashed.append(len(data)) or real(data))
    record, digests = record_of({"w": np.zeros(1000, np.float32)}), Digests()
    for number in range(5):
        Body.of(RecordDict({"a": record, "c": ConfigRecord({"n": number})}), digests)
    assert hashed.count(4000) == 1


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("place", [0, 10, -1, -500_000, -3_900_000])
def test_a_flipped_bit_is_seen(place, ahead):
    body = Body.of(RecordDict({"a": record_of({"w": np.zeros(1_000_000, np.float32)})}))
    whole = bytearray(b"".join(bytes(wire.read(frame)) for frame in body.pieces()))
    whole[place] ^= 1
    incoming = Incoming(header_of(body), limit=1 << 30)
    for first in range(0, len(whole), wire.PIECE):
        incoming.add(memoryview(whole)[first : first + wire.PIECE])
        if ahead:
            incoming.hash_ahead()
    with pytest.raises(RunError) as caught:
        incoming.content()
    assert caught.value.code == "message-damaged"


def test_what_was_hashed_while_it_arrived_is_not_hashed_again(monkeypatch):
    arrays = {"v": np.ones(700_001, np.int8), "w": np.arange(1_000_003, dtype=np.float32)}
    body = Body.of(RecordDict({"a": record_of(arrays), "c": ConfigRecord({"b": b"1234", "n": [1, 2, 3]})}))
    hashed, real = [], hashlib.sha256

    class Counting:
        def __init__(self, data=b""):
            self.real = real(data)
            hashed.append(len(data))

        def update(self, data):
            hashed.append(len(data))
            self.real.update(data)

        def digest(self):
            return self.real.digest()

    monkeypatch.setattr("bract.transport.ahead.hashlib.sha256", Counting)
    incoming = Incoming(header_of(body), limit=1 << 30)
    for frame in body.pieces():
        incoming.add(wire.read(frame))
        incoming.hash_ahead()
    before = sum(hashed)
    content = incoming.content()
    assert sum(hashed) == before > 4_700_000
    assert all(np.array_equal(array, arrays[name]) for name, array in arrays_of(content["a"]).items())
    assert dict(content["c"]) == {"b": b"1234", "n": [1, 2, 3]}


def test_a_claim_costs_no_memory():
    tracemalloc.start()
    for size, manifest, code in (
        (1 << 60, 10, "message-too-large"),
        (1 << 31, 10, "message-too-large"),
        (10, 11, "frame-invalid"),
        (1 << 29, 1 << 28, "frame-invalid"),
    ):
        with pytest.raises(RunError) as caught:
            Incoming(Header(size=size, manifest=manifest), limit=1 << 30)
        assert caught.value.code == code
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def forged(change) -> Incoming:
    """Return a message whose manifest was changed, with a digest that fits."""
    body = Body.of(RecordDict({"a": record_of({"w": np.zeros(4, np.float32)}), "c": ConfigRecord({"b": b"1234"})}))
    manifest = Manifest.FromString(body.manifest)
    change(manifest)
    written = manifest.SerializeToString()
    whole = written.ljust(-(-len(written) // 64) * 64, b"\0") + bytes(16) + bytes(48) + b"1234"
    header = Header(size=len(whole), manifest=len(written), sha256=hashlib.sha256(written).digest())
    incoming = Incoming(header, limit=1 << 20)
    incoming.add(memoryview(whole))
    return incoming


FORGERIES = {
    "object": lambda m: setattr(m.records[0].tensors[0], "dtype", "|O"),
    "text": lambda m: setattr(m.records[0].tensors[0], "dtype", "<U4"),
    "fields": lambda m: setattr(m.records[0].tensors[0], "dtype", "i4,i4"),
    "big endian": lambda m: setattr(m.records[0].tensors[0], "dtype", ">f4"),
    "nonsense": lambda m: setattr(m.records[0].tensors[0], "dtype", "∑"),
    "too many": lambda m: m.records[0].tensors[0].shape.append(2),
    "huge": lambda m: m.records[0].tensors[0].shape.append(1 << 63),
    "huge and empty": lambda m: m.records[0].tensors[0].shape.extend([0, 1 << 63]),
    "dimensions": lambda m: m.records[0].tensors[0].shape.extend([1] * 1000),
    "short segment": lambda m: setattr(m.records[0].tensors[0].segment, "size", 3),
    "long segment": lambda m: setattr(m.records[1].values[0].bytes, "size", 1 << 62),
    "same record": lambda m: m.records.append(m.records[1]),
    "same tensor": lambda m: m.records[0].tensors.append(m.records[0].tensors[0]),
    "same key": lambda m: m.records[1].values.append(m.records[1].values[0]),
    "no kind": lambda m: m.records[1].values.add(key="x"),
    "bytes as metric": lambda m: setattr(m.records[1], "kind", 1),
    "left over": lambda m: m.records[1].values.pop(),
    "half a number": lambda m: m.records[1].values[0].integers.CopyFrom(m.records[1].values[0].bytes),
    "failure and more": lambda m: setattr(m.failure, "reason", "x"),
}


def test_the_forgery_without_a_forgery_is_good():
    assert list(forged(lambda manifest: None).content()) == ["a", "c"]


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_manifest_is_refused(change):
    with pytest.raises(RunError) as caught:
        forged(change).content()
    assert caught.value.code in ("frame-invalid", "message-damaged")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_refused(raw):
    for given_bytes in (raw, b"\x0a" + raw, b"\x12" + raw):
        try:
            wire.read(given_bytes)
        except RunError as error:
            assert error.code == "frame-invalid"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_bytes_are_a_message_or_refused(raw, manifest):
    try:
        header = Header(size=len(raw), manifest=manifest, sha256=hashlib.sha256(raw[:manifest]).digest())
        incoming = Incoming(header, limit=1000)
        incoming.add(memoryview(raw))
        incoming.content()
    except BractError as error:
        assert error.code in ("frame-invalid", "message-damaged")


def test_pieces_must_be_as_long_as_they_can_be():
    body = Body.of(RecordDict({"a": record_of({"w": np.zeros(1_000_000, np.float32)})}))
    incoming = Incoming(header_of(body), limit=1 << 30)
    for data in (b"", b"1", bytes(wire.PIECE + 1), bytes(wire.PIECE - 1)):
        with pytest.raises(RunError, match="to come"):
            incoming.add(memoryview(data))


@pytest.mark.parametrize("value", [2**63, {"a": 1}, [1, "a"], [[1]]])
def test_what_cannot_be_sent_is_said(value):
    record = ConfigRecord()
    dict.__setitem__(record, "key", value) if isinstance(record, dict) else record._data.__setitem__("key", value)
    with pytest.raises(RunError, match="'key'"):
        Body.of(RecordDict({"c": record}))


def test_a_list_as_long_as_a_model_is_neither_sent_nor_read(monkeypatch):
    content = RecordDict({"m": MetricRecord({"all": [0.5] * 1000})})
    body = Body.of(content)
    monkeypatch.setattr("bract.transport.records._LONGEST_LIST", 7_999)
    with pytest.raises(RunError, match="'all'"):
        Body.of(content)
    with pytest.raises(RunError, match="sent as an array"):
        carried(body)


def test_other_serialisations_are_not_sent():
    array = Array(dtype="float32", shape=(1,), stype="pickle", data=b"cos\nsystem\n")
    with pytest.raises(RunError, match="pickle"):
        Body.of(RecordDict({"a": ArrayRecord({"w": array})}))


def test_hello_carries_what_a_site_says():
    said = {"protocol": 1, "bract": "0.1", "task": "t", "data": "id", "ledger": {"sequence": 3, "mac": "ab"}}
    capabilities = {"records": 5, "unit": "record", "updates": ["a", "b"], "none": [], "epochs": 1.5}
    sent = Hello.of({**said, **capabilities, "metrics": None}, name="ann").write(instance=b"1", holds=["x"])
    hello = Hello.read(type(sent).FromString(sent.SerializeToString()))
    assert hello == Hello(**said, capabilities=capabilities, name="ann")


@pytest.mark.parametrize("protocol", [0, 2, 2**31])
def test_another_protocol_is_refused_with_both_versions(protocol):
    with pytest.raises(RunError) as caught:
        refuse_version(protocol, "9.9", __version__, side="client")
    assert (
        caught.value.code == "protocol-unsupported"
        and "9.9" in caught.value.sentence
        and __version__ in caught.value.sentence
    )


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "192.168.0.3:1", "example.org:1", "[::]:1", "[2001:db8::1]:1", "127.0.0.1.evil.org:1"]
)
def test_insecure_is_for_the_loopback_alone(address):
    with pytest.raises(InputError) as caught:
        channel.refuse_insecure(address)
    assert caught.value.code == "insecure-refused"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.8.8.8:1", "localhost:1", "[::1]:1"])
def test_the_loopback_is_known(address):
    channel.refuse_insecure(address)


@pytest.mark.parametrize("address", ["", "127.0.0.1", ":1", "a:b", "a:65536", "::1:1", "[a:1", "a:-1"])
def test_an_address_is_host_and_port(address):
    with pytest.raises(InputError) as caught:
        channel.split_address(address)
    assert caught.value.code == "address-unusable"


def test_keys_are_not_shown():
    assert "secret" not in repr(channel.Credentials(certificate=b"c", key=b"secret", authority=b"a"))
