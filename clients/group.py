"""A group: many clients' messages answered in one call, by the process that serves them all.

Each client's update is the one with which the app would answer, from the same key; but a sum takes it from the resident
model as it stands, and no message is made. For rounds in which a client sends nothing but its model and keeps nothing.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from ..core.errors import RunError
from ..core.keys import Key
from ..core.parameters import Arrays
from ..privacy.release import histogram, release
from ..strategies.fedavg import COUNT_KEY
from ..strategies.fold import Fold, SumFold, Total
from ..tasks.pool import Pool, rows_of
from ..tasks.task import Task
from .gate import HISTOGRAM_KEY, Gate, public_words
from .kernels import sequential, stacked
from .kernels.kernel import KERNELS
from .kernels.stack_form import Form
from .local_model import LocalModel
from .owner import Content, Owners, plain_key, private_key
from .pooled_evaluation import histograms
from .training import LocalTraining

Numbers = Mapping[str, int | float | list[int]]


class Answer(NamedTuple):
    """What one client answers: the numbers of its reply, and its arrays unless a sum has taken them; or an error.

    An error is a code and a sentence, with the trace that stays here. `seconds` is what it took, and `fold_seconds`
    what the sum took of it.
    """

    numbers: Numbers | None
    arrays: Arrays | None = None
    summed: bool = False
    error: tuple[str, str] | None = None
    trace: str | None = None
    seconds: float = 0.0
    fold_seconds: float = 0.0


class ClientGroup:
    """All of a process's clients, with one resident model, for a rule that is plain.

    None of them has more than `longest` records.
    """

    def __init__(
        self,
        owners: Owners,
        task: Task,
        training: LocalTraining,
        model: LocalModel,
        gate: Gate,
        *,
        longest: int,
    ) -> None:
        self._owners, self._task, self._training, self._model, self._gate = owners, task, training, model, gate
        like, first = next(iter(owners.data.values())).train, next(iter(owners.data))
        self._private = owners.plan_of(first) is not None
        self._form = Form.of(model, training, like, longest, private=self._private)

    @property
    def nbytes(self) -> int:
        """The bytes of one client's update."""
        layout = self._gate.layout
        return sum(np.dtype(dtype).itemsize * size for dtype, size in zip(layout.dtypes, layout.sizes, strict=True))

    @property
    def width(self) -> int:
        """How many clients are best asked at once."""
        return self._form.width if self._training.kernel == "stacked" else 1

    @property
    def _evaluates_together(self) -> bool:
        # Where a client by itself trains otherwise too, up to rounding.
        together = self._owners.evaluation is not None and isinstance(self._owners.data, Pool)
        return together and self._training.kernel == "stacked"

    def answers(
        self, kind: str, content: RecordDict, names: Sequence[str], *, fold: Fold | None, total: Total | None
    ) -> Iterator[Answer]:
        """Yield the clients' answers to messages of one content, in order; a sum's updates are added to its total."""
        # What is wrong with the content is so for each of them.
        try:
            shared = Content(self._gate.admit_arrays(content))
        except Exception as error:
            for name in names:
                yield _failed(name, error)
            return
        config: Any = content["config"]
        if kind == "evaluate" and self._evaluates_together:
            yield from self._evaluated_together(names, shared, config)
        elif kind == "evaluate":
            yield from self._each(names, lambda name: self._evaluated(name, shared, config))
        elif self._training.kernel == "stacked":
            yield from self._trained_in_stacks(names, shared, config, fold, total)
        else:
            yield from self._each(names, lambda name: self._trained(name, shared, config, fold, total))

    def _each(self, names: Iterable[str], answer: Callable[[str], Answer]) -> Iterator[Answer]:
        for name in names:
            began = time.perf_counter()
            try:
                found = answer(name)
            except Exception as error:  # whatever a client raises is that client's failure
                found = _failed(name, error)
            yield found._replace(seconds=time.perf_counter() - began)

    def _trained(
        self, name: str, shared: Content, config: Mapping[str, Any], fold: Fold | None, total: Total | None
    ) -> Answer:
        site, model = self._owners[name], self._model
        key = site.message_key("train", config, {"shared": shared}, {})
        records = site.data.train
        model.load(shared.arrays)
        KERNELS[self._training.kernel](
            model, self._task.loss, records, self._training, plan=site.plan, key=key, hide=site.hide
        )
        numbers: Numbers = {COUNT_KEY: self._weight(len(records))}
        if not isinstance(fold, SumFold) or total is None:
            arrays = model.shared_arrays()
            self._gate.check(arrays)
            return Answer(numbers, arrays=arrays)
        began, pieces = time.perf_counter(), model.shared_pieces()
        try:
            fold.add_pieces(total, pieces, numbers)
        except RunError as error:
            return self._refused(np.concatenate(pieces, dtype=np.float64), error)
        return Answer(numbers, summed=True, fold_seconds=time.perf_counter() - began)

    def _trained_in_stacks(
        self, names: Sequence[str], shared: Content, config: Mapping[str, Any], fold: Fold | None, total: Total | None
    ) -> Iterator[Answer]:
        _, _, sizes = rows_of(self._owners.data, names, "train")
        # A stack takes as many steps as its longest client, so those of one length go together.
        longest, found = np.argsort(-sizes, kind="stable").tolist(), dict[int, Answer]()
        for first in range(0, len(names), self.width):
            places = longest[first : first + self.width]
            answers = self._trained_together([names[place] for place in places], shared, config, fold, total)
            found.update(zip(places, answers, strict=True))
        for place in range(len(names)):
            yield found[place]

    def _trained_together(
        self, names: Sequence[str], shared: Content, config: Mapping[str, Any], fold: Fold | None, total: Total | None
    ) -> Iterator[Answer]:
        began = time.perf_counter()
        self._model.load(shared.arrays)
        try:
            rows, sizes = self._rows(names, shared, config)
        except Exception:  # what one client's records raise is no other's failure
            yield from self._each(names, lambda name: self._trained(name, shared, config, fold, total))
            return
        trained = time.perf_counter()
        numbers = [{COUNT_KEY: self._weight(size)} for size in sizes.tolist()]
        refused: Sequence[RunError | None] = [None] * len(names)
        sums = isinstance(fold, SumFold) and total is not None
        if isinstance(fold, SumFold) and total is not None:
            refused = fold.add_rows(total, rows, numbers)
        ended = time.perf_counter()
        seconds, fold_seconds = (ended - began) / len(names), (ended - trained) / len(names)
        for name, row, known, error in zip(names, rows, numbers, refused, strict=True):
            if sums and error is None:
                yield Answer(known, summed=True, seconds=seconds, fold_seconds=fold_seconds)
            else:
                yield from self._each([name], partial(self._answer, row, known, error))

    def _key(self, name: str, purpose: str, shared: Content, config: Mapping[str, Any]) -> Key:
        """Return the key that the client's site would answer with (`Site.message_key`)."""
        key = self._owners.key_of(name)
        if self._private:
            return private_key(key, purpose, config, {"shared": shared}, {})
        return plain_key(key, purpose, config)

    def _rows(
        self, names: Sequence[str], shared: Content, config: Mapping[str, Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return what a stack makes of the clients' models [clients, size], and their numbers of records [clients]."""
        examples, begins, sizes = rows_of(self._owners.data, names, "train")
        keys = [self._key(name, "train", shared, config) for name in names]
        known = self._model, self._task.loss, examples, begins
        if not self._private:
            return stacked.train(*known, sizes, self._training, self._form, keys=keys), sizes
        from .kernels import private_stack

        plans = [plan for name in names if (plan := self._owners.plan_of(name)) is not None]
        if [plan.records for plan in plans] != sizes.tolist():
            raise RunError("internal", "a plan is that of another number of records")
        return private_stack.train(*known, self._training, self._form, keys=keys, plans=plans), sizes

    def _answer(self, row: NDArray[np.floating[Any]], numbers: Numbers, error: RunError | None, name: str) -> Answer:
        return Answer(numbers, arrays=self._checked(row)) if error is None else self._refused(row, error)

    def _evaluated_together(self, names: Sequence[str], shared: Content, config: Mapping[str, Any]) -> Iterator[Answer]:
        began, plan = time.perf_counter(), self._owners.evaluation
        assert plan is not None
        self._model.load(shared.arrays)
        try:
            found = histograms(self._model, self._task, *rows_of(self._owners.data, names, "test"), plan)
        except Exception:  # what one client's records raise is no other's failure
            yield from self._each(names, lambda name: self._evaluated(name, shared, config))
            return
        for name, counts in zip(names, found, strict=True):
            released = release(counts, plan, self._key(name, "evaluate", shared, config).stream())
            seconds, began = time.perf_counter() - began, time.perf_counter()
            yield Answer({HISTOGRAM_KEY: released.tolist()}, seconds=seconds)

    def _checked(self, row: NDArray[np.floating[Any]]) -> Arrays:
        arrays = self._gate.layout.unflatten(row.astype(np.float64))
        self._gate.check(arrays)
        return arrays

    def _refused(self, row: NDArray[np.floating[Any]], error: RunError) -> Answer:
        self._checked(row)
        # As the process that folds would put it.
        return Answer(None, error=(error.code, error.sentence))

    def _weight(self, records: int) -> int:
        return 1 if self._gate.withhold_counts else records

    def _evaluated(self, name: str, shared: Content, config: Mapping[str, Any]) -> Answer:
        site = self._owners[name]
        if site.evaluation is None:
            raise RunError("metrics-withheld", "metrics are withheld")
        self._model.load(shared.arrays)
        inputs, targets = site.data.test.inputs, site.data.test.targets
        probabilities = sequential.predict(
            self._model, self._task.probabilities, inputs, classes=site.evaluation.classes
        )
        counts = histogram(probabilities, targets, site.evaluation)
        key = site.message_key("evaluate", config, {"shared": shared}, {})
        released = release(counts, site.evaluation, key.stream())
        return Answer({HISTOGRAM_KEY: [int(count) for count in released.ravel()]})


def _failed(name: str, error: Exception) -> Answer:
    trace = f"{name}: {''.join(traceback.format_exception(error))}"
    return Answer(None, error=public_words(error), trace=trace)
