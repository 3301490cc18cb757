"""FedBuff in the round loop: the paper's step, who is charged, who is idle, and nobody who waits for the slowest."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from bract.core import flower
from bract.core.errors import RunError
from bract.core.keys import Key
from bract.core.parameters import arrays_of, digest, record_of
from bract.server import checkpoint as checkpoints
from bract.server.accounts import Accounts
from bract.server.checkpoint import Checkpoint
from bract.server.cohort import CohortSampler
from bract.server.cohort_grid import CohortGrid
from bract.server.events import ClientReplied, Notice, RoundFinished, RoundStarted
from bract.server.grid import FlowerGrid
from bract.server.progress import Progress, Rules
from bract.server.rounds import RoundLoop
from bract.simulations.executors.executor import InlineExecutor
from bract.simulations.grid import VirtualGrid
from bract.strategies.fedavg import FedAvg
from bract.strategies.fedbuff import FedBuff
from bract.strategies.state import load_strategy_state, strategy_state

from .numpy_clients import descent, grid_of, start
from .timed_clients import KEY, broken, clock, descents, targets, timed


def loop_of(strategy, grid, initial, rounds, *, quorum=0.5, budget=None, emit=None):
    """Return loop and progress; the loop is bract's own."""
    loop = RoundLoop(
        strategy=strategy,
        grid=grid,
        clients=getattr(grid, "names", None) or {node: str(node) for node in grid.get_node_ids()},
        sampler=CohortSampler(sampling="all", per_round=None, key=KEY),
        budget=budget or Accounts({}),
        rules=Rules(rounds=rounds, quorum=quorum),
        evaluation=None,
        emit=emit or (lambda event: None),
        client_states=getattr(grid, "state_dict", dict),
        remember_clients=getattr(grid, "remember", lambda: lambda: None),
        virtual_time=getattr(grid, "virtual_time", lambda: None),
    )
    return loop, Progress(round=0, arrays=dict(initial))


def run(strategy, grid, initial, rounds, **options):
    """Return the model and the rounds' records."""
    lines = []
    listener = options.pop("emit", None)

    def emit(event):
        if isinstance(event, RoundFinished):
            lines.append(event.record)
        if listener:
            listener(event)

    loop, progress = loop_of(strategy, grid, initial, rounds, emit=emit, **options)
    loop.run(progress)
    return progress.arrays, lines


def reference(grid, strategy, rounds):
    """Return the models of Algorithm 1 in plain numpy: an event at a time, each client on the version it was sent."""
    clients = descents(len(grid.names))
    models, flights, now, idle, stale = [np.ones(2)], [], 0.0, list(grid.names), 0
    for number in range(1, rounds + 1):
        order = Key.from_seed(strategy.seed).child("fedbuff", number).stream().permutation(len(idle))
        room = (strategy.concurrency or len(grid.names)) - len(flights)
        drawn = [idle[place] for place in order[:room]]
        flights += [(now + clock().duration(node), node, number - 1) for node in drawn]
        flights.sort()
        total = np.zeros(2)
        for time, node, version in flights[: strategy.buffer]:
            now, age = time, number - 1 - version
            stale += age > 0
            trained = clients[grid.names[node]]({"w": models[version]}, number)["w"]
            total += (trained - models[version]) / math.sqrt(1 + age)
        flights = flights[strategy.buffer :]
        busy = {node for _, node, _ in flights}
        idle = [node for node in grid.names if node not in busy]
        models.append(models[-1] + strategy.server_learning_rate * total / strategy.buffer)
    return models, now, stale


@pytest.mark.parametrize("concurrency", [None, 6])
def test_the_paper_s_algorithm(concurrency):
    strategy = FedBuff(buffer=3, concurrency=concurrency, server_learning_rate=0.8, seed=5)
    grid = timed(descents())
    found, lines = run(strategy, grid, {"w": np.ones(2)}, 25)
    models, now, stale = reference(grid, strategy, 25)
    assert stale > 10
    np.testing.assert_allclose(found["w"], models[-1], atol=1e-12)
    assert lines[-1]["virtual_time"] == pytest.approx(now)
    assert [line["clients"] for line in lines] == [3] * 25


def test_staleness_weighs_by_its_exponent():
    found = {}
    for exponent in (0.0, 0.5, 2.0):
        strategy = FedBuff(buffer=1, server_learning_rate=1.0, staleness_exponent=exponent)
        # Two alike, so that the second arrives one version late: w = 0 − 1, then − 1 / 2^a.
        grid = timed({name: descent(np.float64(-1.0)) for name in ("ann", "bob")}, spread=0.0)
        found[exponent] = run(strategy, grid, {"w": np.zeros(1)}, 2)[0]["w"][0]
    assert found == pytest.approx({0.0: -2.0, 0.5: -1 - 1 / math.sqrt(2), 2.0: -1.25})


def test_a_buffer_for_all_at_equal_speed_is_fedavg():
    initial = {"w": np.ones(2)}
    ours, lines = run(FedBuff(buffer=5), timed(descents(5), spread=0.0), initial, 6)
    np.testing.assert_allclose(ours["w"], start(FedAvg(), grid_of(descents(5)), initial, rounds=6)["w"], atol=1e-12)
    assert [line["virtual_time"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {line["staleness"] for line in lines} == {0.0}


def test_over_a_grid_whose_replies_come_at_once_it_is_fedavg_too():
    """Flower's own loop waits for all of them; bract's over a foreign grid takes the late ones in the next round."""
    initial = {"w": np.ones(2)}
    plain = start(FedAvg(), grid_of(descents(5)), initial, rounds=6)["w"]
    np.testing.assert_allclose(start(FedBuff(buffer=3), grid_of(descents(5)), initial, rounds=6)["w"], plain)
    foreign, _ = run(FedBuff(buffer=5), FlowerGrid(grid_of(descents(5))), initial, 6)
    np.testing.assert_allclose(foreign["w"], plain)
    found, lines = run(FedBuff(buffer=2), FlowerGrid(grid_of(descents(5))), initial, 40)
    assert [line["clients"] for line in lines] == [2] * 40
    assert "virtual_time" not in lines[0]
    # (5 − 2) / 2 versions late on average, once everyone is in flight.
    assert np.mean([line["staleness"] for line in lines[-10:]]) == pytest.approx(1.5)
    # The targets are 0, 1, 2, 3 and 0.
    assert np.abs(found["w"] - 1.2).max() < 0.5


def test_whoever_is_sent_a_model_is_idle_and_no_more_train_than_may():
    strategy, grid = FedBuff(buffer=3, concurrency=5), timed(descents())
    arrays, in_flight, drawn = record_of({"w": np.ones(2)}), set(), []
    for number in range(1, 80):
        cohort = strategy.draw(number, list(grid.names))
        assert cohort == strategy.draw(number, list(grid.names)), "to ask changes nothing"
        assert len(set(cohort)) == len(cohort) and not in_flight & set(cohort)
        in_flight |= set(cohort)
        drawn += cohort
        assert len(in_flight) == 5
        view = CohortGrid(grid, cohort)
        sent = list(strategy.configure_train(number, arrays, ConfigRecord(), view))
        replies = list(grid.exchange(sent, until=3))
        in_flight -= {reply.metadata.src_node_id for reply in replies}
        arrays, _ = strategy.aggregate_train(number, replies)
    # 242 draws over 12 clients: everyone has its turn.
    assert set(drawn) == set(grid.names)


def test_the_slow_are_stale_and_the_fast_come_often():
    """While one is in flight its version ages by a step a round: on average by (concurrency − buffer) / buffer."""
    strategy, grid = FedBuff(buffer=3), timed(descents(), spread=1.5)
    arrived = []
    _, lines = run(
        strategy,
        grid,
        {"w": np.ones(2)},
        300,
        emit=lambda event: isinstance(event, ClientReplied) and arrived.append(event.client),
    )
    assert np.mean([line["staleness"] for line in lines]) == pytest.approx((12 - 3) / 3, rel=0.05)
    by_speed = sorted(grid.names, key=clock(1.5).duration)
    fast, slow = (arrived.count(grid.names[node]) for node in (by_speed[0], by_speed[-1]))
    assert fast > 5 * slow > 0


def test_it_learns_in_less_time_than_rounds_that_wait_for_the_slowest():
    initial, clients = {"w": np.full(1, 30.0)}, descents(20, rate=0.3)
    times = {}
    for name, strategy in {"fedbuff": FedBuff(buffer=5), "fedavg": FedAvg()}.items():
        grid, far = timed(clients, spread=1.5), []
        loop, progress = loop_of(strategy, grid, initial, 1)
        while abs(progress.arrays["w"][0] - 1.5) >= 1:
            loop.rules = Rules(rounds=progress.round + 1, quorum=0.5)
            loop.run(progress)
            far.append(grid.virtual_time())
            assert len(far) < 500
        times[name] = far[-1]
    assert times["fedbuff"] < 0.5 * times["fedavg"], times


def test_a_stale_client_is_told_which_model_it_trains():
    """Under privacy its noise is keyed by that, and by the round in which it was sent."""
    seen, app = [], ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config, arrays = message.content["config"], arrays_of(message.content["arrays"])
        assert config["model-version"] == digest(arrays)
        seen.append((config["server-round"], config["model-version"], context.node_id))
        return Message(RecordDict({"arrays": record_of({"w": arrays["w"] + 1})}), reply_to=message)

    flower.identify_process(1)
    grid = VirtualGrid(InlineExecutor(app, log=print), list(targets()), clock=clock())
    _, lines = run(FedBuff(buffer=3), grid, {"w": np.ones(2)}, 12, quorum=1.0)
    assert [line["failed"] for line in lines] == [0] * 12
    # One model a round, and no client twice on the same of them.
    versions = {number: {version for at, version, _ in seen if at == number} for number, *_ in seen}
    assert all(len(each) == 1 for each in versions.values())
    assert len(set(seen)) == len(seen) == 36
    rounds = [number for number, *_ in seen]
    assert any(later < earlier for earlier, later in pairwise(rounds)), "some of them are late"


def test_versions_that_nobody_trains_on_are_forgotten():
    strategy, grid = FedBuff(buffer=3), timed(descents())
    run(strategy, grid, {"w": np.ones(2)}, 60)
    state = strategy.state_dict()
    assert len(state["in_flight"]) == 9
    assert {str(version) for version in state["in_flight"].values()} == set(state["versions"])
    assert len(grid.state_dict()["clock"]["contents"]) == len(state["versions"])


def test_updates_that_do_not_fit_are_left_out():
    clients = {name: descent(target) for name, target in targets(4).items()}
    clients["client-0"] = lambda model, number: {"w": np.full(2, np.nan)}
    notices = []
    found, lines = run(
        FedBuff(buffer=4),
        timed(clients),
        {"w": np.zeros(2)},
        1,
        emit=lambda event: isinstance(event, Notice) and notices.append(event.text),
    )
    np.testing.assert_allclose(found["w"], (1 + 2 + 3) / 3)
    assert notices == ["round 1: 1 of 4 replies did not fit the model and were left out"]
    assert lines[0]["staleness"] == 0.0


def test_running_statistics_take_the_mean_of_what_came():
    def client(model, number):
        return {"w": model["w"] + 1, "bn.running_var": np.full(2, 0.5), "bn.num_batches_tracked": np.array(7)}

    initial = {"w": np.zeros(2), "bn.running_var": np.full(2, 9.0), "bn.num_batches_tracked": np.array(0)}
    found, _ = run(FedBuff(buffer=2), timed({f"client-{k}": client for k in range(6)}), initial, 5)
    np.testing.assert_array_equal(found["bn.running_var"], 0.5)
    assert found["bn.num_batches_tracked"] == 7


# The round loop: charging, quorum, failures, repetition.


class Ledger(Accounts):
    """Accounts that also keep the order of what happened."""

    def __init__(self):
        super().__init__({})
        self.happened = []

    def charge(self, cohort):
        self.happened += [("charged", name) for name in cohort]
        super().charge(cohort)


def test_only_who_is_sent_a_message_is_charged_and_before_it_trains():
    ledger = Ledger()

    def client(name):
        return lambda model, number: ledger.happened.append(("trained", name)) or model

    grid = timed({name: client(name) for name in targets()})
    _, lines = run(FedBuff(buffer=3, concurrency=6), grid, {"w": np.ones(2)}, 20, budget=ledger)
    owed = dict.fromkeys(targets(), 0)
    for what, name in ledger.happened:
        owed[name] += 1 if what == "charged" else -1
        assert owed[name] in (0, 1), "one charge a message, before its training"
    charged = sum(what == "charged" for what, _ in ledger.happened)
    assert charged == 6 + 19 * 3 and sum(owed.values()) == 3
    assert [line["bytes_down"] for line in lines] == [16 * 6] + [16 * 3] * 19


def test_a_client_in_flight_that_fails_becomes_idle():
    def once(model, number):
        return broken(model, number) if number == 1 else model

    clients = descents() | {"client-3": once}
    strategy, grid = FedBuff(buffer=3), timed(clients)
    sent = []
    _, lines = run(
        strategy,
        grid,
        {"w": np.ones(2)},
        60,
        emit=lambda event: isinstance(event, ClientReplied) and sent.append(event.client),
    )
    assert sum(line["failed"] for line in lines) == 1
    assert [line["clients"] for line in lines] == [3] * 60
    assert "client-3" in sent


@pytest.mark.parametrize(("failing", "learns"), [(3, True), (4, False)])
def test_the_quorum_counts_against_the_buffer(failing, learns):
    """Five in flight, a buffer of four, a quorum of a half: two good replies are enough, one is not."""
    clients = {f"client-{k}": broken if k < failing else descent(np.float64(9.0)) for k in range(5)}
    events = []
    strategy = FedBuff(buffer=4)
    found, lines = run(strategy, timed(clients), {"w": np.zeros(1)}, 2, emit=events.append) if learns else (None, None)
    if learns:
        assert found["w"][0] > 0 and [(line["clients"], line["failed"]) for line in lines] == [(2, 3), (2, 3)]
    else:
        with pytest.raises(RunError) as caught:
            run(strategy, timed(clients), {"w": np.zeros(1)}, 2, emit=events.append)
        assert caught.value.code == "quorum-missed"
        notices = [event.text for event in events if isinstance(event, Notice)]
        assert notices[0].startswith("round 1: 1 of 4 clients replied, below the quorum")
        # Whoever arrived in a step that was none is idle, and is sent the model again.
        assert strategy.state_dict() == {"version": 0, "in_flight": {}, "versions": {}}
    assert [event.cohort for event in events if isinstance(event, RoundStarted)] == [4, 4]


def test_whoever_arrived_in_a_step_that_was_none_is_sent_the_model_again():
    """The quick reply once and then fail, the slow fail from the first: after the second step nobody is in flight."""
    speeds = {name: clock().duration(flower.node_id(name)) for name in targets(6)}
    quick = sorted(speeds, key=speeds.get)[:3]

    def client(name):
        return lambda model, number: model if name in quick and number == 1 else broken(model, number)

    strategy = FedBuff(buffer=3)
    _, lines = run(strategy, timed({name: client(name) for name in speeds}), {"w": np.ones(1)}, 3)
    assert [(line["clients"], line["failed"]) for line in lines] == [(3, 0), (0, 6), (0, 6)]
    assert [line["bytes_down"] // 8 for line in lines] == [6, 3, 6]


def test_a_step_that_was_none_makes_nobody_staler():
    """τ counts versions of the model, as in the paper, not rounds."""

    def fails_early(model, number):
        return broken(model, number) if number < 3 else model

    strategy, grid = FedBuff(buffer=2), timed(dict.fromkeys(targets(3), fails_early), spread=0.0)
    _, lines = run(strategy, grid, {"w": np.ones(1)}, 4)
    assert [line["clients"] for line in lines] == [0, 0, 2, 2]
    assert [line.get("staleness") for line in lines] == [None, None, 0.0, 0.5]


def test_a_step_that_failed_half_way_is_taken_again_from_where_it_began():
    strategy, grid = FedBuff(buffer=3), timed(descents())
    initial = {"w": np.ones(2)}
    whole, _ = run(copy.deepcopy(strategy), timed(descents()), initial, 9)

    class Stop(Exception):
        pass

    def stop(event):
        if isinstance(event, ClientReplied) and event.round == 5:
            raise Stop

    loop, progress = loop_of(strategy, grid, initial, 9, emit=stop)
    with pytest.raises(Stop):
        loop.run(progress)
    kept = loop.checkpoint(progress)
    assert kept.round == 4 and len(kept.strategy["in_flight"]) == 9 == len(kept.clients["clock"]["flights"])
    again, fresh = FedBuff(buffer=3), timed(descents())
    fresh.load_state_dict(kept.clients)
    loop, _ = loop_of(again, fresh, initial, 9)
    progress = loop.restore(kept)
    loop.run(progress)
    np.testing.assert_array_equal(progress.arrays["w"], whole["w"])


def test_its_state_goes_to_disk_and_back(tmp_path):
    strategy, grid = FedBuff(buffer=3), timed(descents())
    run(strategy, grid, {"w": np.ones(2)}, 7)
    checkpoints.save(tmp_path, Checkpoint(round=7, arrays={}, strategy=strategy_state(strategy)))
    again = FedBuff(buffer=3)
    load_strategy_state(again, checkpoints.load(tmp_path).strategy)
    assert again.draw(8, list(grid.names)) == strategy.draw(8, list(grid.names))
    assert again.state_dict()["in_flight"] == strategy.state_dict()["in_flight"]
    for version, arrays in strategy.state_dict()["versions"].items():
        np.testing.assert_array_equal(again.state_dict()["versions"][version]["w"], arrays["w"])
