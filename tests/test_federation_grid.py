"""The grid over the transport, on real sockets: whatever clients do, an exchange ends, and its total is exact."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from flwr.app import MetricRecord, RecordDict
from grpc_health.v1 import health_pb2

from bract.clients.connection.link import Link
from bract.core import flower
from bract.core.errors import BractError, InputError, RunError
from bract.core.parameters import Layout, arrays_of, record_of
from bract.core.ring import Ring
from bract.privacy.ledger.chain import Head
from bract.server.connections.errands import Deadlines
from bract.server.connections.listener import Listener
from bract.strategies.fold import WeightedSum
from bract.transport import federation_pb2 as pb
from bract.transport.body import Body
from bract.transport.channel import OPTIONS
from bract.transport.greeting import Hello
from bract.transport.wire import METHOD, Limits, control, piece, read

from .federation import NAMES, QUICK, Counter, Running, fold_of, inline, links, messages, model, start


@pytest.fixture
def run():
    made = []

    def make(**options):
        made.append(Running(**options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_replies_fold_to_the_inline_total_and_the_end_is_told(run):
    here = run()
    processes = here.clients(NAMES[:2], NAMES[2:], process=True)
    assert list(here.grid.names.values()) == NAMES
    arrays = model(700_000)
    exchange = here.exchange(arrays, fold=fold_of(arrays))
    replies = list(exchange)
    assert len(replies) == 4 and not any(reply.content.array_records for reply in replies)
    assert {reply.metadata.src_node_id for reply in replies} == set(here.grid.names)
    assert exchange.total.total.tobytes() == inline(NAMES, arrays).tobytes()
    whole = list(here.exchange(arrays))
    assert all(arrays_of(reply.content["arrays"])["w"].shape == (700_000,) for reply in whole)
    assert whole[0].content["metrics"]["big"] == [1.5, 2.5]
    here.listener.stop()
    assert [process.wait(10) for process in processes] == [0, 0]


def test_twenty_clients_at_once(run):
    here = run()
    names = [f"site-{number}" for number in range(20)]
    here.clients(*(names[start::4] for start in range(4)))
    arrays = model(50_000)
    for number in range(3):
        exchange = here.exchange(arrays, fold=fold_of(arrays), round=number)
        assert here.codes(exchange) == [""] * 20
        assert exchange.total.total.tobytes() == inline(names, arrays).tobytes()


def test_a_failure_is_a_code_and_its_text_stays(run):
    here = run()
    here.clients(NAMES)
    replies = list(here.exchange(fail="site-2"))
    (failed,) = [reply for reply in replies if reply.has_error()]
    assert here.grid.names[failed.metadata.src_node_id] == "site-2"
    assert flower.code_and_sentence(failed.error)[0] == "client-failed" and "patient" not in failed.error.reason


def test_one_message_at_a_time_and_each_exchange_its_own(run, tmp_path):
    here = run()
    here.clients(["site-0"], log=tmp_path / "log")
    first = here.exchange(seconds=0.3)
    assert here.codes(here.exchange(other=1)) == [""]
    assert here.codes(first) == [""]
    asked = [json.loads(line)[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(asked) == len(set(asked)) == 2


def test_until_takes_the_first_and_keeps_the_rest(run):
    here = run()
    here.clients(["site-0"], ["site-1"], ["site-2"])
    slow = [flower.node_id("site-2")]
    here.grid.exchange(messages(slow, seconds=1.0), until=0)
    arrays = model()
    exchange = here.exchange(arrays, nodes=["site-0", "site-1"], fold=fold_of(arrays), until=2)
    assert here.codes(exchange) == ["", ""] and exchange.total.count == 2
    assert exchange.total.total.tobytes() == inline(["site-0", "site-1"], arrays).tobytes()
    # An exchange without `until` gets its own alone, though the late one has been there for long.
    time.sleep(1.5)
    assert len(list(here.exchange(nodes=["site-0"]))) == 1
    late = list(here.grid.exchange([], until=5))
    assert [reply.metadata.src_node_id for reply in late] == slow


def test_late_replies_of_an_exchange_that_was_given_up_are_dropped(run):
    here = run()
    here.clients(["site-0"], ["site-1"])
    for number in range(3):
        # The client is not given the next before it has said that it is done with this one.
        given_up = here.exchange(nodes=["site-0"], seconds=0.5, number=number)
        here.until(lambda: here.state("site-0") != "idle")
        del given_up
    replies = list(here.exchange(nodes=["site-0", "site-1"], another=1))
    assert len(replies) == 2 and not any(reply.has_error() for reply in replies)
    assert {each[0] for each in here.told} == {"joined"}


def test_a_client_killed_in_its_upload_gets_the_message_again(run, tmp_path):
    here = run(limits=Limits(upload_bytes=1 << 30))
    (process,) = here.clients(["site-0"], process=True, log=str(tmp_path / "log"))
    here.clients(["site-1"])
    arrays = model(5_000_000)
    exchange = here.exchange(arrays, fold=fold_of(arrays))
    here.until(lambda: here.state("site-0") == "uploading")
    process.send_signal(signal.SIGKILL)
    here.until(lambda: here.state("site-0") == "away")
    here.clients(["site-0"], wait=False, log=tmp_path / "log")
    assert here.codes(exchange) == ["", ""]
    assert exchange.total.total.tobytes() == inline(["site-0", "site-1"], arrays).tobytes()
    asked = [json.loads(line)[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(asked) == 2 and len(set(asked)) == 1, "again, and under the same id"


SERVER = """
import sys, time, json
sys.path.insert(0, {folder!r})
from federation import Running, fold_of, model
here = Running(address="127.0.0.1:" + sys.argv[1])
here.listener.wait_for_clients(2, seconds=30)
exchange = here.exchange(fold=fold_of(model()), seconds=1.5)
print("sent", flush=True)
replies = list(exchange)
assert not any(reply.has_error() for reply in replies)
print(exchange.total.total.sum(), flush=True)
here.close()
"""


def test_a_killed_server_comes_back_and_no_client_works_twice(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = [sys.executable, "-c", SERVER.format(folder=os.path.dirname(__file__)), str(port)]
    clients = start(["site-0", "site-1"], f"127.0.0.1:{port}", log=str(tmp_path / "log"))
    first = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "sent\n"
        time.sleep(0.5)
        first.kill()
        first.wait()
        second = subprocess.run(program, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
        assert second.stdout.splitlines()[1] == str(inline(["site-0", "site-1"], model()).sum())
        assert clients.wait(10) == 0
        assert len((tmp_path / "log").read_text().splitlines()) == 2, "each worked once, the reply was for the second"
    finally:
        for process in (first, clients):
            process.kill()
            process.wait()


def test_a_lost_client_is_an_error_and_nothing_waits_for_ever(run):
    here = run(deadlines=Deadlines(round_deadline=20, stall_after=1, connect_for=1))
    (process,) = here.clients(["site-0"], process=True)
    here.clients(["site-1"])
    begun = time.monotonic()
    exchange = here.exchange(nodes=["site-0", "site-1", "never"], seconds=0.4)
    time.sleep(0.2)
    process.kill()
    assert here.codes(exchange) == ["", "client-lost", "client-lost"]
    assert time.monotonic() - begun < 8
    assert here.codes(here.exchange(again=1)) == [""]


def test_a_client_that_hangs_is_stalled_and_one_that_is_slow_is_late(run):
    here = run(deadlines=Deadlines(round_deadline=4, stall_after=1, connect_for=1))
    (hung,) = here.clients(["site-0"], process=True)
    here.clients(["site-1"])
    exchange = here.exchange(seconds=0.5)
    hung.send_signal(signal.SIGSTOP)
    assert here.codes(exchange) == ["", "client-lost"]
    assert ("left", "site-0", "client-stalled", "") in here.told
    hung.send_signal(signal.SIGCONT)
    here.until(lambda: here.state("site-0") == "idle")
    # Slow, but its heart beats: it is waited for until the round's deadline, and is there for the next.
    begun = time.monotonic()
    assert here.codes(here.exchange(nodes=["site-1"], seconds=5.5)) == ["client-late"]
    assert 3.5 < time.monotonic() - begun < 6
    here.until(lambda: here.state("site-1") == "idle")
    assert here.codes(here.exchange(more=1)) == ["", ""]


def test_at_most_two_uploads_are_in_flight(run):
    here = run(limits=Limits(upload_bytes=1 << 30))
    names = [f"site-{number}" for number in range(6)]
    here.clients(names[:3], names[3:])
    arrays = model(2_000_000)
    exchange = here.exchange(arrays)
    for left in range(6, 0, -1):
        # Two are whole and verified by then: the one that was taken last counts until the next is asked for.
        waiting = min(4, left - 1)
        here.until(lambda: [each.state for each in here.listener.status()].count("waiting") == waiting)  # noqa: B023
        next(exchange)
    small = run(limits=Limits(upload_bytes=1 << 20))
    small.clients(names[:3])
    arrived = small.exchange(arrays)
    small.until(lambda: [each.state for each in small.listener.status()].count("waiting") == 2)
    assert len(list(arrived)) == 3


def test_ends_are_told_apart(run):
    here = run()
    with pytest.raises(RunError) as caught:
        links(["site-0"], "127.0.0.1:1", connect_for=0.5)
    assert caught.value.code == "server-unreachable"
    with pytest.raises(RunError) as caught:
        here.listener.wait_for_clients(1, seconds=0.1)
    assert caught.value.code == "clients-missing"
    with pytest.raises(InputError) as caught:
        Listener(here.address, None).start()
    assert caught.value.code == "address-unusable"
    with pytest.raises(InputError) as caught:
        Listener("0.0.0.0:0", None)
    assert caught.value.code == "insecure-refused"


def test_a_second_process_takes_the_place_of_the_first_which_ends(run):
    here = run()
    (first,) = here.clients(["site-0"], process=True)
    here.clients(["site-0"], wait=False)
    assert first.wait(20) == 1
    assert here.codes(here.exchange()) == [""]


def test_admit_refuses_for_good_and_others_go_on(run):
    def admit(name: str, hello: Hello) -> None:
        if name == "site-1":
            raise RunError("request-invalid", f"task = {hello.task!r}: this federation learns another")

    here = run(admit=admit)
    here.clients(["site-0"])
    with pytest.raises(BractError, match="learns another"):
        links(["site-1"], here.address)
    assert [each.name for each in here.listener.status()] == ["site-0"]


def test_heads_come_back_and_replies_are_forgotten(run):
    here = run()
    seen = []

    class Remembering(Counter):
        def refuse_rollback(self, head: Head) -> None:
            seen.append(head)

    party = Remembering("site-0")
    for number in range(2):
        link = Link(party, here.address, None, name="site-0", backoff=QUICK)
        thread = threading.Thread(target=link.run)
        thread.start()
        here.until(lambda: here.state("site-0") == "idle")
        if number == 0:
            assert here.codes(here.exchange()) == [""]
            here.grid.forget_replies(3)
            here.until(lambda: party.forgot == [("run", 3)])
        here.until(lambda: len(party.forgot) == number + 1 and len(seen) == number)  # noqa: B023
        link.stop()
        thread.join(10)
        here.until(lambda: here.state("site-0") == "away")
    assert seen == [Head(sequence=1, mac="ab")] and party.forgot == [("run", 3)] * 2
    assert here.grid.heads() == {"site-0": {"id-site-0": {"sequence": 1, "mac": "ab"}}}


# ---- hostile clients: they speak the protocol by hand ----


class Hostile:
    """A stream by hand."""

    def __init__(self, address):
        self.channel = grpc.insecure_channel(address, options=[*OPTIONS, ("grpc.max_send_message_length", 64 << 20)])
        self.out = queue.SimpleQueue()
        self.call = self.channel.stream_stream(METHOD)(iter(self.out.get, None))

    def say(self, raw):
        self.out.put(raw)

    def hello(self, name, protocol=1, holds=()):
        said = Hello(bract="evil", name=name, protocol=protocol)
        self.say(control(hello=said.write(instance=b"1", holds=holds)))
        return self.frame()

    def frame(self):
        return read(next(self.call))

    def take(self):
        """Return the header of the message that comes, the message read."""
        while True:
            frame = self.frame()
            if not isinstance(frame, memoryview) and frame.WhichOneof("kind") == "header":
                left = frame.header.size
                while left:
                    left -= len(self.frame())
                return frame.header

    def code(self):
        """Return the code with which the server ends the stream or answers."""
        try:
            for raw in self.call:
                frame = read(raw)
                if not isinstance(frame, memoryview) and frame.WhichOneof("kind") in ("farewell", "receipt"):
                    return getattr(frame, frame.WhichOneof("kind")).code
        except grpc.RpcError as error:
            return error.code().name
        return "closed"

    def close(self):
        self.out.put(None)
        self.channel.close()


@pytest.fixture
def hostile():
    made = []

    def make(address):
        made.append(Hostile(address))
        return made[-1]

    yield make
    for each in made:
        each.close()


def reply_body(size=10):
    return Body.of(RecordDict({"a": record_of({"w": np.zeros(size, np.float32)})}))


def offer(body, message, **changes):
    fields = {"message": message, "size": body.size, "manifest": len(body.manifest), "sha256": body.sha256}
    return control(header=pb.Header(**{**fields, **changes}))


FIRST = {
    "garbage": b"\xff" * 100,
    "nothing": b"",
    "a piece": piece([memoryview(b"x")], 1),
    "a heartbeat": control(heartbeat=pb.Heartbeat()),
    "a long hello": control(hello=pb.Hello(protocol=1, name="evil", bract="x" * 100_000)),
    "no name": control(hello=pb.Hello(protocol=1)),
    "an odd name": control(hello=pb.Hello(protocol=1, name="a\x1b[2Jb")),
    "holds too much": control(hello=pb.Hello(protocol=1, name="evil", holds=["x"] * 9)),
}


def test_garbage_is_refused_and_the_server_serves_on(run, hostile):
    here = run()
    here.clients(["site-0"])
    for raw in FIRST.values():
        stream = hostile(here.address)
        stream.say(raw)
        assert stream.code() == "frame-invalid"
    stream = hostile(here.address)
    stream.say(bytes(8 << 20))
    assert stream.code() == "RESOURCE_EXHAUSTED"
    assert hostile(here.address).hello("evil", protocol=2).farewell.code == "protocol-unsupported"
    assert here.codes(here.exchange()) == [""]
    assert [each.name for each in here.listener.status()] == ["site-0"]


def test_ten_thousand_random_frames(run, hostile):
    here = run()
    here.clients(["site-0"])
    chance = np.random.default_rng(1)
    for stream_number in range(40):
        stream = hostile(here.address)
        assert stream.hello(f"evil-{stream_number % 3}").WhichOneof("kind") == "welcome"
        for _ in range(250):
            tag = bytes([chance.choice([0x0A, 0x12, 0x1A, 0x2A, 0x32, 0x3A, 0x42, 0x4A, 0x52, 0x5A])])
            body = chance.bytes(int(chance.integers(0, 40)))
            stream.say(tag + bytes([len(body)]) + body)
        assert stream.code() in ("frame-invalid", "client-replaced", "reply-unknown", "closed")
    assert here.codes(here.exchange(nodes=["site-0"])) == [""]


def test_lies_about_a_reply_are_the_liars_failure(run, hostile):
    here = run(limits=Limits(message_bytes=1 << 24))
    here.clients(["site-0"])
    body = reply_body()
    lies = {
        "message-too-large": lambda id: offer(body, id, size=1 << 60),
        "frame-invalid": lambda id: offer(body, id, manifest=1 << 31),
    }
    for number, (code, lie) in enumerate(lies.items()):
        stream = hostile(here.address)
        stream.hello("evil")
        exchange = here.exchange(number=number)
        stream.say(lie(stream.take().message))
        assert stream.code() == code
        assert here.codes(exchange) == ["", code]
    # Damaged bytes may be sent again, but not for ever.
    stream = hostile(here.address)
    stream.hello("evil")
    exchange = here.exchange(number=9)
    message = stream.take().message
    codes = []
    while not codes or (codes[-1] == "message-damaged" and len(codes) < 9):
        stream.say(offer(body, message, sha256=b"0" * 32))
        assert stream.frame().WhichOneof("kind") == "permit"
        for frame in body.pieces():
            stream.say(frame)
        frame = stream.frame()
        codes.append(frame.receipt.code)
        if here.state("evil") == "idle":
            break
    assert here.codes(exchange) == ["", "message-damaged"] and 1 < len(codes) < 9


def test_replays_and_replies_for_others_are_dropped_unread(run, hostile):
    here = run()
    here.clients(["site-0"])
    stream = hostile(here.address)
    stream.hello("evil")
    slow = here.exchange(nodes=["site-0"], seconds=0.8)
    own = here.exchange(nodes=["evil"])
    others = here.grid.create_message(RecordDict(), "train", 1, "")
    header = stream.take()
    body = reply_body()
    (of_site,) = here.listener.call(lambda: list(here.listener.roster.clients[flower.node_id("site-0")].errands))
    for message in (of_site, "unknown", "x" * 5000, others.metadata.message_id):
        stream.say(offer(body, message))
        assert stream.code() == "reply-unknown"
    stream.say(offer(body, header.message))
    assert stream.frame().WhichOneof("kind") == "permit"
    for frame in body.pieces():
        stream.say(frame)
    assert stream.code() == ""
    stream.say(offer(body, header.message))
    assert stream.code() == "reply-unknown"
    (reply,) = list(own)
    assert here.grid.names[reply.metadata.src_node_id] == "evil"
    (reply,) = list(slow)
    assert arrays_of(reply.content["arrays"])["w"].shape == (1000,), "the site's own"


def test_who_offers_twice_stands_in_line_once(run, hostile):
    here = run(limits=Limits(uploads=1))
    body = reply_body()
    streams = [hostile(here.address) for _ in range(2)]
    for number, stream in enumerate(streams):
        stream.hello(f"evil-{number}")
    exchange = here.exchange()
    ids = [stream.take().message for stream in streams]
    streams[0].say(offer(body, ids[0]))
    assert streams[0].frame().WhichOneof("kind") == "permit"
    for _ in range(2):
        streams[1].say(offer(body, ids[1]))
    assert streams[1].code() == "reply-unknown"
    assert here.state("evil-1") == "waiting"
    for number, stream in enumerate(streams):
        for frame in body.pieces():
            stream.say(frame)
        assert next(exchange).has_content()
        if number == 0:
            # The permit is free once the next reply is asked for.
            here.grid._give_back()
            assert streams[1].frame().WhichOneof("kind") == "permit"
    stream.say(control(heartbeat=pb.Heartbeat(count=5)))
    assert [streams[1].frame().WhichOneof("kind") for _ in range(2)] == ["receipt", "heartbeat"]


def test_pieces_without_a_permit_end_the_stream(run, hostile):
    here = run()
    stream = hostile(here.address)
    stream.hello("evil")
    exchange = here.exchange()
    header = stream.take()
    stream.say(piece([memoryview(b"x")], 1))
    assert stream.code() == "frame-invalid"
    stream = hostile(here.address)
    stream.hello("evil")
    header = stream.take()
    stream.say(offer(reply_body(), header.message))
    assert stream.frame().WhichOneof("kind") == "permit"
    stream.say(piece([memoryview(b"x")], 1))
    assert stream.code() == "frame-invalid"
    del exchange


def test_who_stalls_within_an_upload_keeps_nobody_waiting(run, hostile):
    here = run(deadlines=Deadlines(round_deadline=30, stall_after=1, connect_for=2))
    here.clients(["site-0"])
    body = reply_body(1_000_000)
    stalling = [hostile(here.address) for _ in range(2)]
    beating = threading.Event()
    for number, stream in enumerate(stalling):
        stream.hello(f"evil-{number}")
    exchange = here.exchange(seconds=0.5)
    for stream in stalling:
        stream.say(offer(body, stream.take().message))
    here.until(lambda: [each.state for each in here.listener.status()].count("uploading") == 2)
    stalling[0].say(next(iter(body.pieces())))

    def beat():
        while not beating.wait(0.2):
            stalling[0].say(control(heartbeat=pb.Heartbeat()))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        begun = time.monotonic()
        assert here.codes(exchange) == ["", "client-lost", "client-lost"]
        assert time.monotonic() - begun < 10
    finally:
        beating.set()
        thread.join()


def test_a_thousand_streams_and_one_that_never_speaks(run):
    here = run(limits=Limits(greeting=1.0, streams=100))
    here.clients(["site-0"])

    async def flood():
        channels = [
            grpc.aio.insecure_channel(here.address, options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(20)
        ]
        calls = [channels[number % 20].stream_stream(METHOD)() for number in range(1000)]
        await asyncio.sleep(0.3)
        await here_answers()
        for call in calls:
            call.cancel()
        for each in channels:
            await each.close()

    async def here_answers():
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, lambda: here.codes(here.exchange(nodes=["site-0"]))) == [""]

    asyncio.run(flood())
    time.sleep(1.2)
    here.until(lambda: len(here.listener.sessions) == 1)


def test_a_client_refuses_what_is_too_large(run):
    here = run(deadlines=Deadlines(round_deadline=20, stall_after=5, connect_for=1))
    here.clients(["site-0"], limits=Limits(message_bytes=1000))
    here.clients(["site-1"])
    assert here.codes(here.exchange()) == ["", "message-too-large"]
    here.until(lambda: here.state("site-0") == "idle")


def test_a_fold_that_stumbles_over_a_reply_is_that_clients_failure(run, hostile):
    here = run()
    stream = hostile(here.address)
    stream.hello("evil")
    arrays = model()
    fold = WeightedSum(layout=Layout.of(arrays), ring=Ring(capacity=10), weighted_by="n")
    exchange = here.exchange(arrays, fold=fold)
    header = stream.take()
    body = Body.of(RecordDict({"a": record_of(arrays), "m": MetricRecord({"n": float("inf")})}))
    stream.say(offer(body, header.message))
    for frame in body.pieces():
        stream.say(frame)
    assert here.codes(exchange) == ["reply-invalid"]


def test_health(run):
    here = run()
    with grpc.insecure_channel(here.address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        assert check(health_pb2.HealthCheckRequest(), timeout=5).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            check(health_pb2.HealthCheckRequest(service="other"), timeout=5)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def benchmark(name, *options):
    program = Path(__file__).parents[1] / "benchmarks" / name
    done = subprocess.run([sys.executable, program, *options], stdout=subprocess.PIPE, timeout=900, check=True)
    return json.loads(done.stdout)


def measured(megabytes, clients=2):
    options = ["--megabytes", str(megabytes), "--clients", str(clients), "--rounds", "2", "--memory-only"]
    return benchmark("transport.py", *options)


def test_the_benchmarks_run():
    found = benchmark("federation.py", "--turns", "1", "--megabytes", "2", "--rounds", "12", "--without-flower")
    assert 0 < found["noop_round_ms"] < 1000 and found["share_of_bare"] > 0


@pytest.mark.soak
@pytest.mark.parametrize("megabytes", [400, 2000])
def test_memory_is_bounded_and_two_gigabytes_pass(megabytes):
    """Beside the models, 100 MB for gRPC's buffers and the allocator."""
    found = measured(megabytes, clients=3 if megabytes < 1000 else 1)
    aside = 100 / megabytes
    assert found["server_models"] <= 4 + aside and found["client_models"] <= 3 + aside
