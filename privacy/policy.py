"""The policy of a site: what its owner lets servers ask for. It denies whatever it does not name.

The file is read, and refused, without anything heavy; clients/site/admission.py holds what a run asks for against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from ..core import toml
from ..core.complaints import first_complaint, place, shown
from ..core.errors import InputError, Refusal
from .accounting import Relation
from .ledger.book import DataSetBudget

Update = Literal["dp-sgd", "noised", "raw"]
Metrics = Literal["withheld", "noised", "raw"]

SMALLEST_CLIPPING_NORM = 1e-6
LARGEST_CLIPPING_NORM = 1e6

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*( [A-Za-z0-9._-]+)*$")]
_Count = Annotated[int, Field(ge=1, strict=True)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteTable(_Table):
    """[site]: `server` is the certificate name that may see raw updates and metrics; without it nobody may."""

    name: _Name | None = None
    server: str | None = None


class DataTable(_Table):
    """[data.NAME]: `records` is the declared number of training records, public; without `epsilon` there is no budget.

    `path` starts at the folder of the policy file; it may be left out where the data's place is given otherwise. `task`
    holds the task's options, which are the owner's: they say how the data are read.
    """

    path: str | None = None
    records: _Count
    unit: Literal["record", "client"] = "record"
    relation: Relation = "zero-out"
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = None
    task: dict[str, Any] = {}
    node_config: dict[str, bool | int | float | str] = {}

    def budget(self, name: str) -> DataSetBudget | None:
        """Return the budget that the ledger holds all runs to, None where there is none."""
        if self.epsilon is None or self.delta is None:
            return None
        return DataSetBudget(name=name, unit=self.unit, relation=self.relation, epsilon=self.epsilon, delta=self.delta)


class AllowTable(_Table):
    """[allow]: what may run, how large it may be, and what may be released."""

    tasks: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    apps: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    epochs: Annotated[int, Field(ge=0, strict=True)] = 0
    message_bytes: Annotated[int, Field(ge=0, strict=True)] = 0
    updates: tuple[Update, ...] = ()
    metrics: Metrics = "withheld"


class Policy(_Table):
    """A site's policy file as one typed model."""

    site: SiteTable = SiteTable()
    data: dict[str, DataTable] = {}
    allow: AllowTable = AllowTable()

    _source: Path | None = PrivateAttr(default=None)
    _text: str = PrivateAttr(default="")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the policy of a TOML file. Raises InputError."""
        path = Path(path)
        tables, text = toml.read(path, kind="policy")
        return cls.of(tables, source=path, text=text)

    @classmethod
    def of(cls, tables: Mapping[str, Any], *, source: Path | None = None, text: str = "") -> Self:
        """Return the policy of nested tables. Raises InputError."""
        try:
            policy = cls.model_validate(tables)
        except ValidationError as error:
            raise first_complaint(error, model=cls, source=source, text=text, kind="policy") from None
        policy._source, policy._text = source, text
        policy._refuse_conflicts()
        return policy

    def choose(self, name: str | None = None) -> str:
        """Return the name of a data set, by default the only one. Raises Refusal."""
        if name is None and len(self.data) == 1:
            return next(iter(self.data))
        if not self.data:
            raise self.refusal("data", why="no data set is declared, so none is used", write="a table [data.NAME]")
        if name not in self.data:
            known = ", ".join(self.data)
            what = "several are declared, name one" if name is None else f"{name} is not declared"
            raise Refusal("policy-refused", f"data: {what}; declared: {known}{self.place('data')}")
        return name

    def path_of(self, name: str) -> Path:
        """Return where a data set lies. Raises InputError where nobody has said it."""
        given = self.data[name].path
        if given is None:
            place = self.place("data", name)
            raise InputError("policy-value", f"data.{name}.path: missing; write it, or give --data PATH{place}")
        return self.folder / given

    @property
    def folder(self) -> Path:
        """The folder of the policy file, at which the paths of its data sets start."""
        return self._source.parent if self._source else Path()

    def at(self, name: str, path: Path) -> Self:
        """Return this policy with a data set at another place, from the working directory. Raises InputError."""
        table = self.data[name].model_copy(update={"path": str(path.absolute())})
        moved = self.model_copy(update={"data": {**self.data, name: table}})
        moved._refuse_conflicts()
        return moved

    def place(self, *path: str) -> str:
        """Return where a key stands, as ` (policy.toml, line 14)`, to end a refusal with."""
        return place(self._source, self._text, path)

    def refusal(self, *path: str, why: str, write: str) -> Refusal:
        """Return the refusal of what a key does not allow: one sentence, with what the owner would have to write.

        It may hold names and numbers of the policy, and is meant for the site alone; to the server goes its code.
        """
        return Refusal("policy-refused", f"{'.'.join(path)}: {why}; to allow it, write {write}{self.place(*path)}")

    def refuse_unlisted(self, key: Literal["tasks", "strategies", "apps", "options", "updates"], name: str) -> None:
        """Raise Refusal unless a list of [allow] names this."""
        listed = getattr(self.allow, key)
        if name not in listed:
            now = shown_list(listed) if listed else "nothing"
            raise self.refusal(
                "allow", key, why=f'"{name}" is not listed ({now} is)', write=f"{key} = {shown_list((*listed, name))}"
            )

    def refuse_untrusted(self, server: str | None, what: str) -> None:
        """Raise Refusal unless the server, by the name in its certificate, may see what nothing protects."""
        if server is None:
            why = f"{what} would be seen by a server without a certificate, whoever it is"
            write = 'server = "NAME", and connect with an identity to the server whose certificate has that name'
            raise self.refusal("site", "server", why=why, write=write)
        if server != self.site.server:
            why = f'{what} would be seen by "{server}", which is not trusted'
            raise self.refusal("site", "server", why=why, write=f'server = "{server}"')

    def _refuse_conflicts(self) -> None:
        paths: dict[Path, str] = {}
        for name, table in self.data.items():
            given = [key for key in ("epsilon", "delta") if getattr(table, key) is not None]
            if len(given) == 1:
                other = "delta" if given == ["epsilon"] else "epsilon"
                raise self._conflict("data", name, given[0], why=f"goes with {other}; write both, or neither")
            if table.delta is not None and table.delta * table.records > 1:
                raise self._conflict(
                    "data", name, "delta", why="must be below one in the number of records, or it promises nothing"
                )
            first = name if table.path is None else paths.setdefault(self.path_of(name).resolve(), name)
            if first != name:
                raise self._conflict(
                    "data", name, "path", why=f"is that of {first}; one data set under two names has two budgets"
                )

    def _conflict(self, *path: str, why: str) -> InputError:
        value: Any = self
        for part in path:
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        return InputError("policy-value", f"{'.'.join(path)} = {shown(value)}: {why}{self.place(*path)}")


def shown_list(names: tuple[str, ...]) -> str:
    """Return names as a list in a TOML file."""
    return "[" + ", ".join(shown(name) for name in names) + "]"
