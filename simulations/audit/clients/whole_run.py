"""A few rounds of a run as a simulation makes it, with all that it writes down."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ....core.parameters import Layout
from ....experiment import Experiment
from ....privacy.guarantee import Guarantee
from ....server.cohort import CohortSampler
from ....server.grid import Arrival
from ....server.progress import Progress
from ....server.rounds import RoundLoop
from ....server.run import TrainingRun
from ....server.setting import Setting
from ....strategies.fold import Fold
from ....tasks.task import Task
from ...assembly import Assembly
from ...executors.executor import Call, InlineExecutor
from ...federation import Federation
from ...grid import VirtualGrid
from ...run import Simulation
from .puppets import FAILING, SILENT, Answer, Cast, Puppets

_COHORT = 4
ROUNDS = 2
MARKS = (271828183, 0.57721566)
"""A count and a number that clients send beside their updates, to be found again in no file."""
_PRIVATE = ("private", "checkpoint")
_TIMING = ("seconds", "clients_per_second", "created", "run_dir")

Files = dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Two runs of the same sums with other cohorts: what drew them, files that may be passed on, rounds, charges.

    `open` names files of `private/` and `checkpoint/` that others may read, `ran` counts the rounds in which clients
    were asked, `asked` the most messages of one client.
    """

    sampler: CohortSampler
    files: tuple[Files, Files]
    open: list[str]
    ran: int
    charged: dict[str, int]
    asked: int


def whole_run(experiment: Experiment, task: Task | None, *, folder: Path) -> Whole:
    """Run two times, under the same secrets, and return what is left of both.

    In the first run one client takes part and its count is 1; in the second several, of which all but another one fail,
    with marks beside its update. No update changes anything, so both have the same sums. Where each client noises its
    own update there is one run, of real clients.
    """
    first = last = _Cut(experiment, task)
    first.run(out=folder / "one")
    if first.aggregates:
        last = _Cut(experiment, task, before=first)
        last.run(out=folder / "two")
    rounds = Counter(name for _, name in last.asked)
    return Whole(
        sampler=last.rounds.sampler,
        files=(_shared(first.path), _shared(last.path)),
        open=_readable(last.path),
        ran=len({number for number, _ in last.asked}),
        charged=last.charged,
        asked=max(rounds.values(), default=0),
    )


class _Counting(InlineExecutor):
    """The real clients, whose messages are counted."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation.app, log=lambda trace: None)
        self.asked: dict[tuple[int, str], int] = {}

    def run(self, calls: Iterable[Call], *, fold: Fold | None) -> Iterator[Arrival]:
        """Yield each reply whole."""
        for call in calls:
            number = int(call.message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
            self.asked[number, call.client] = self.asked.get((number, call.client), 0) + 1
            yield from super().run([call], fold=fold)


class _Rounds(TrainingRun):
    """A run of a few rounds, with the cohort that the audit wants."""

    sampler: CohortSampler
    cohort: tuple[int, ...]

    def _loop(self, setting: Setting, should_stop: Callable[[], bool]) -> RoundLoop:
        loop = super()._loop(setting, should_stop)
        self.sampler = loop.sampler
        loop.sampler = cast(CohortSampler, Cast(by_round=(self.cohort,)))
        loop.rules = replace(loop.rules, rounds=min(ROUNDS, loop.rules.rounds))
        return loop


class _Cut(Simulation):
    """A simulation of a few rounds, of puppets where the server noises."""

    def __init__(self, experiment: Experiment, task: Task | None, *, before: _Cut | None = None) -> None:
        # Two runs must draw the same noise, that of bands included, so it comes from a seed.
        privacy = experiment.privacy.model_copy(update={"randomness": "seed"})
        simulation = experiment.simulation.model_copy(update={"workers": 1, "curves": False, "baselines": False})
        alike = experiment.model_copy(update={"privacy": privacy, "simulation": simulation})
        super().__init__(alike, task=task)
        self._run = self.rounds = _Rounds(alike)
        self.aggregates = False
        self._before = before
        self.guarantee: Guarantee | None = None
        self.asked: dict[tuple[int, str], int] = {}
        self.charged: dict[str, int] = {}
        self.path = Path()

    def _setting(self, assembly: Assembly) -> Setting:
        setting, plan, names = super()._setting(assembly), assembly.plan, assembly.federation.names
        few = tuple(range(min(_COHORT, len(names))))
        self.aggregates, self.path = plan.aggregate is not None, assembly.directory.path
        executor: Puppets | _Counting
        if plan.aggregate is None:
            self.rounds.cohort, executor = few, _Counting(assembly.federation)
        else:

            def marked(round: int, name: str) -> Answer:
                # One has a vote, as in the other run.
                return Answer(count=MARKS[0], beside=(("loss", MARKS[1]),)) if name == names[few[-1]] else FAILING

            self.rounds.cohort = few if self._before else few[:1]
            answers = marked if self._before else lambda round, name: SILENT
            executor = Puppets(Layout.of(assembly.federation.initial), answers)
        self.asked = executor.asked
        grid = VirtualGrid(executor, names)

        def guarantee(rounds: Mapping[str, int] | None = None) -> Guarantee:
            # That of the whole plan: others take a while to find out, and are of the same form.
            if self.guarantee is None:
                self.guarantee = self._before.guarantee if self._before else setting.guarantee()
            assert self.guarantee is not None
            return self.guarantee

        def after_round(progress: Progress) -> None:
            setting.after_round(progress)
            self.charged = dict(assembly.accounts.rounds)

        return replace(
            setting,
            grid=grid,
            clients=grid.names,
            guarantee=guarantee,
            report=setting.report if self._before or not self.aggregates else lambda path: None,
            compression=setting.compression if plan.aggregate is None else None,
            client_states=grid.state_dict,
            load_client_states=grid.load_state_dict,
            remember_clients=grid.remember,
            virtual_time=grid.virtual_time,
            after_round=after_round,
        )


def _shared(path: Path) -> Files:
    """Return the files of a run that may be passed on, without what says when and where it was made."""
    found = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and name.parts[0] not in _PRIVATE:
            content = file.read_bytes()
            if file.suffix == ".json":
                content = _timeless(json.loads(content))
            elif file.suffix == ".jsonl":
                content = b"\n".join(_timeless(json.loads(line)) for line in content.splitlines())
            found[str(name)] = content
    return found


def _timeless(record: dict[str, Any]) -> bytes:
    return json.dumps({name: value for name, value in record.items() if name not in _TIMING}, sort_keys=True).encode()


def _readable(path: Path) -> list[str]:
    """Return what lies in private folders and may be read by others than its owner."""
    others = stat.S_IRWXG | stat.S_IRWXO
    private = [path / name for name in _PRIVATE]
    files = [file for folder in private for file in folder.rglob("*") if folder.name == "private"]
    return [
        str(each.relative_to(path)) for each in (*private, *files) if each.exists() and each.stat().st_mode & others
    ]
