"""The experiment file as one typed model: the only place that knows its keys.

Every complaint is one sentence with key, value, mend, file and line, raised before any data is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from .core import toml
from .core.complaints import first_complaint, place, shown
from .core.errors import InputError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, strict=True)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _OpenTable(_Table):
    """A table whose other keys belong to the class that `name` stands for."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def own(self) -> dict[str, Any]:
        """The keys that belong to the named class."""
        return dict(self.model_extra or {})


class RunTable(_Table):
    """[experiment]"""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "experiment"
    rounds: Count = 10
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0


class TaskTable(_OpenTable):
    """[task]: `model` names the starting weights of a Flower ClientApp; the other keys are the task's own."""

    name: str = ""
    model: str | None = None


class ClientsTable(_Table):
    """[clients]"""

    app: str | None = None
    run_config: dict[str, bool | int | float | str] = {}
    partitioner: str = "natural"
    partitioner_options: dict[str, Any] = {}
    count: Count | None = None
    minimum: Count | None = None
    sampling: Literal["all", "fixed", "poisson", "cyclic"] = "all"
    per_round: Count | None = None


class TrainTable(_Table):
    """[train]: what one client does in one round."""

    model: str | None = None
    epochs: Count = 1
    batch_size: Count = 32
    microbatch_size: Count | None = None
    optimizer: Literal["sgd", "adam", "adagrad"] = "sgd"
    learning_rate: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    l2: NotNegative = 0.0
    personal: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    buffers: tuple[str, ...] | None = None
    device: str = "auto"
    dp_engine: Literal["auto", "bookkeeping", "opacus"] = "auto"


class StrategyTable(_OpenTable):
    """[strategy]: the other keys are the strategy's own."""

    name: str = "fedavg"


class RecordTable(_Table):
    """[privacy.record]: DP-SGD at the clients beneath client-level privacy."""

    epsilon: Positive | None = None
    noise_multiplier: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 1e-5
    clipping_norm: Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)] = 1.0
    clipping: Literal["flat", "per-layer"] = "flat"


class PrivacyTable(_Table):
    """[privacy]"""

    unit: Literal["none", "record", "client"] = "none"
    epsilon: Positive | None = None
    noise_multiplier: Positive | None = None
    epsilon_budget: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 1e-5
    clipping_norm: Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)] = 1.0
    clipping: Literal["flat", "per-layer"] = "flat"
    adaptive_clipping: bool = False
    bands: Count | None = None
    clipping_quantile: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.5
    randomness: Literal["secret", "seed"] = "secret"
    trust: Literal["server", "nobody"] = "server"
    record: RecordTable | None = None


class CompressionTable(_Table):
    """[compression]: how a client's update is made smaller on its way to the server."""

    top_k: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    bits: Annotated[int, Field(ge=2, le=16, strict=True)] | None = None


class SimulationTable(_Table):
    """[simulation]"""

    workers: Count | Literal["auto"] = "auto"
    executor: Literal["auto", "inline", "processes", "ray"] = "auto"
    ray_address: str | None = None
    kernel: Literal["auto", "sequential", "traced", "stacked"] = "auto"
    precision: Literal["float32", "bf16"] = "float32"
    speed_spread: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 0.0
    curves: bool = True
    baselines: bool | Literal["auto"] = "auto"


class ServerTable(_Table):
    """[server]: times in seconds; those of a round are of real clients alone."""

    quorum: Share = 0.5
    round_deadline: Positive = 3600.0
    stall_after: Annotated[float, Field(ge=0.5, allow_inf_nan=False)] = 60.0
    connect_for: Positive = 300.0
    evaluate_every: Annotated[int, Field(ge=0, strict=True)] = 0
    patience: Annotated[int, Field(ge=0, strict=True)] = 0
    checkpoint_every: NotNegative = 10.0


class Experiment(_Table):
    """One experiment: what is learned, by whom, how, and under which guarantee."""

    experiment: RunTable = RunTable()
    task: TaskTable = TaskTable()
    clients: ClientsTable = ClientsTable()
    train: TrainTable = TrainTable()
    strategy: StrategyTable = StrategyTable()
    privacy: PrivacyTable = PrivacyTable()
    compression: CompressionTable = CompressionTable()
    simulation: SimulationTable = SimulationTable()
    server: ServerTable = ServerTable()

    _source: Path | None = PrivateAttr(default=None)
    _folder: Path | None = PrivateAttr(default=None)
    _text: str = PrivateAttr(default="")

    @classmethod
    def load(cls, path: str | Path, *, overrides: Iterable[str] = (), folder: Path | None = None) -> Self:
        """Return the experiment of a TOML file; `overrides` are `table.key=value`.

        `folder` is where dotted paths and data are looked for, by default the file's own. Raises InputError.
        """
        path = Path(path)
        tables, text = toml.read(path)
        return cls.of(tables, overrides=overrides, source=path, folder=folder or path.parent, text=text)

    @classmethod
    def of(
        cls,
        tables: Mapping[str, Any],
        *,
        overrides: Iterable[str] = (),
        source: Path | None = None,
        folder: Path | None = None,
        text: str = "",
    ) -> Self:
        """Return the experiment of nested tables. Raises InputError."""
        merged = {name: dict(table) if isinstance(table, Mapping) else table for name, table in tables.items()}
        for override in overrides:
            toml.apply_override(merged, *toml.parse_override(override))
        try:
            experiment = cls.model_validate(merged)
        except ValidationError as error:
            raise first_complaint(error, model=Experiment, source=source, text=text) from None
        experiment._source, experiment._folder, experiment._text = source, folder, text
        experiment._refuse_conflicts()
        return experiment

    @property
    def source(self) -> Path | None:
        """The file that the experiment came from."""
        return self._source

    @property
    def folder(self) -> Path | None:
        """The folder in which dotted paths and data files are looked for first."""
        return self._folder

    def place(self, *path: str) -> str:
        """Return where a key stands, as ` (heart.toml, line 14)`, to end a complaint with."""
        return place(self._source, self._text, path)

    def to_toml(self) -> str:
        """Return the whole experiment, defaults included, as TOML."""
        return toml.write(self.model_dump(mode="json"))

    def conflict(self, *path: str, why: str) -> InputError:
        """Return the error for a key that does not go with another."""
        value: Any = self
        for part in path:
            value = getattr(value, part)
        name = ".".join(path)
        what = f"[{name}]" if isinstance(value, BaseModel) else f"{name} = {shown(value)}"
        return InputError("experiment-conflict", f"{what}: {why}{self.place(*path)}")

    def _refuse_conflicts(self) -> None:
        self._refuse_privacy_conflicts()
        self._refuse_client_level_conflicts()
        clients, server = self.clients, self.server
        for key in ("top_k", "bits") if clients.app else ():
            if getattr(self.compression, key) is not None:
                raise self.conflict(
                    "compression", key, why="a Flower ClientApp sends what it likes; goes with bract's own client"
                )
        if clients.app and not self.task.model:
            raise self.conflict("clients", "app", why='needs task.model = "package.module:callable" to start from')
        if clients.app and clients.count is None:
            raise self.conflict("clients", "app", why="needs clients.count")
        if self.task.model and not clients.app:
            raise self.conflict("task", "model", why="goes with clients.app; train.model chooses among a task's models")
        if clients.sampling != "all" and clients.per_round is None:
            raise self.conflict("clients", "sampling", why="needs clients.per_round")
        if clients.count is not None and clients.per_round is not None and clients.per_round > clients.count:
            raise self.conflict("clients", "per_round", why=f"must be at most clients.count, {clients.count}")
        if self.train.momentum and self.train.optimizer != "sgd":
            raise self.conflict("train", "momentum", why='goes with train.optimizer = "sgd"')
        if server.patience and not server.evaluate_every:
            raise self.conflict("server", "patience", why="needs server.evaluate_every, the rounds between releases")

    def _refuse_privacy_conflicts(self) -> None:
        privacy, train = self.privacy, self.train
        given = self._refuse_two_targets("privacy")
        # Said in so many words, "none" switches privacy off; a forgotten unit must not.
        if "unit" not in privacy.model_fields_set and given:
            raise self.conflict("privacy", given, why='needs privacy.unit = "record"')
        if privacy.unit != "none" and not given:
            raise self.conflict("privacy", "unit", why="needs privacy.epsilon or privacy.noise_multiplier")
        if privacy.epsilon_budget is not None and privacy.noise_multiplier is None:
            raise self.conflict("privacy", "epsilon_budget", why="goes with privacy.noise_multiplier alone")
        if privacy.clipping != "flat" and privacy.unit != "record":
            raise self.conflict("privacy", "clipping", why='goes with privacy.unit = "record" alone')
        if train.microbatch_size and privacy.unit != "record" and not privacy.record:
            raise self.conflict("train", "microbatch_size", why="goes with record-level privacy alone")
        if train.buffers and privacy.unit != "none":
            raise self.conflict(
                "train", "buffers", why="no mechanism covers a buffer, so under privacy none may leave; drop the key"
            )
        if self.clients.app and (privacy.unit == "record" or privacy.record or privacy.trust == "nobody"):
            raise self.conflict(
                "clients",
                "app",
                why="bract cannot see the gradients and updates within a Flower ClientApp; use "
                'privacy.unit = "none", or "client" with a trusted server',
            )

    def _refuse_client_level_conflicts(self) -> None:
        privacy, sampling = self.privacy, self.clients.sampling
        if privacy.unit != "client":
            for key in ("adaptive_clipping", "bands", "record"):
                if getattr(privacy, key):
                    raise self.conflict("privacy", key, why='goes with privacy.unit = "client" alone')
            if privacy.trust != "server":
                raise self.conflict("privacy", "trust", why='goes with privacy.unit = "client" alone')
            return
        if self.server.evaluate_every:
            raise self.conflict(
                "server",
                "evaluate_every",
                why="metrics of clients are withheld at the client level; the curves in private/ are exact",
            )
        if privacy.bands and sampling != "cyclic":
            raise self.conflict("privacy", "bands", why='goes with clients.sampling = "cyclic" alone')
        for key in ("adaptive_clipping", "bands"):
            if getattr(privacy, key) and privacy.trust == "nobody":
                raise self.conflict("privacy", key, why='needs a server that adds the noise: privacy.trust = "server"')
        if privacy.bands and privacy.adaptive_clipping:
            raise self.conflict("privacy", "bands", why="goes without privacy.adaptive_clipping")
        if privacy.record and not self._refuse_two_targets("privacy", "record"):
            raise self.conflict("privacy", "record", why="needs an epsilon or a noise_multiplier")

    def _refuse_two_targets(self, *path: str) -> str | None:
        """Return which of epsilon and noise_multiplier a table gives; raises InputError for both."""
        table: Any = self
        for part in path:
            table = getattr(table, part)
        given = [name for name in ("epsilon", "noise_multiplier") if getattr(table, name) is not None]
        if len(given) == 2:
            where = ".".join((*path, "epsilon"))
            raise self.conflict(*path, "noise_multiplier", why=f"goes without {where}; drop one of the two")
        return given[0] if given else None
