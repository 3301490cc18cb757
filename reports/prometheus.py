"""A server's figures in Prometheus' format over HTTP, at /metrics: nothing that its guarantee withholds."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..core.errors import BractError, InputError
from ..server.events import ClientFailed, ClientNoticed, Event, Listening, RoundFinished, RunStarted
from ..transport.channel import split_address
from .log import known

if TYPE_CHECKING:
    from ..server.connections.errands import ClientStatus

STATES = ("away", "idle", "waiting", "receiving", "working", "uploading")


class Exporter(Collector):
    """A listener that answers /metrics at host:port while it is open; InputError `address-unusable`.

    No client is named. Of a run with secret cohorts it says how many are connected, and neither what they do, nor how
    many failed, nor what travelled, nor how long a round took: all of them tell who was drawn.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._status: Callable[[], Sequence[ClientStatus]] | None = None
        self._secret = True
        self._rounds, self._planned = 0, 0
        self._epsilon: float | None = None
        self._seconds: float | None = None
        self._bytes = {"up": 0, "down": 0}
        self._failures: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._server: Any = None
        self.port = 0

    def __enter__(self) -> Self:
        host, port = split_address(self._address)
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, _ = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise InputError(
                "address-unusable", f"--metrics {self._address}: cannot be listened on ({error.strerror})"
            ) from error
        self.port = self._server.server_port
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __call__(self, event: Event) -> None:
        """Take an event, from any thread."""
        with self._lock:
            match event:
                case Listening():
                    self._status, self._secret = event.status, event.secret_cohorts
                case RunStarted():
                    self._planned, self._rounds = event.rounds, event.first_round - 1
                case ClientFailed():
                    self._failures[known(event.code)] += 1
                case ClientNoticed(what="refused"):
                    self._refused[known(event.code)] += 1
                case RoundFinished():
                    record = event.record
                    self._rounds = event.round
                    self._epsilon = record.get("epsilon", self._epsilon)
                    self._seconds = record.get("seconds")
                    for way in self._bytes:
                        self._bytes[way] += int(record.get(f"bytes_{way}", 0))
                case _:
                    return

    def collect(self) -> Iterator[Metric]:
        """Yield what is true now."""
        states = self._states()
        with self._lock:
            yield GaugeMetricFamily("bract_rounds_planned", "Rounds of the run.", value=self._planned)
            yield GaugeMetricFamily("bract_rounds_done", "Rounds behind the model.", value=self._rounds)
            if self._epsilon is not None:
                yield GaugeMetricFamily("bract_epsilon", "Epsilon of this run so far.", value=self._epsilon)
            clients = GaugeMetricFamily("bract_clients", "Clients by state.", labels=["state"])
            for state, number in states.items():
                clients.add_metric([state], number)
            yield clients
            yield _counter("bract_refused_clients", "Clients that were refused, by code.", self._refused)
            if self._secret:
                return
            yield _counter("bract_failed_replies", "Messages without a good reply, by code.", self._failures)
            travelled = CounterMetricFamily("bract_tensor_bytes", "Bytes of tensors in training.", labels=["way"])
            for way, number in self._bytes.items():
                travelled.add_metric([way], number)
            yield travelled
            if self._seconds is not None:
                yield GaugeMetricFamily("bract_round_seconds", "Seconds of the last round.", value=self._seconds)

    def describe(self) -> list[Metric]:
        """Return nothing: the names are those of `collect`."""
        return []

    def _states(self) -> dict[str, int]:
        try:
            status = list(self._status()) if self._status is not None else []
        except BractError:
            # The listener has ended.
            status = []
        if self._secret:
            away = sum(each.state == "away" for each in status)
            return {"away": away, "connected": len(status) - away}
        counted = Counter(str(each.state) for each in status)
        return {state: counted[state] for state in STATES}


def _counter(name: str, text: str, counted: Counter[str]) -> Metric:
    family = CounterMetricFamily(name, text, labels=["code"])
    for code, number in sorted(counted.items()):
        family.add_metric([code], number)
    return family
