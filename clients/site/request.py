"""What a server asks of a site, in a message's config record: the only place that knows these keys.

A server can ask; the site decides. It checks a request against its policy, works out epsilon itself from its own
declared number of records, and its ledger holds a run to what the first message asked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from ...core.errors import RunError
from ...privacy.policy import Metrics, Update

CONFIG = "config"
ROUND_KEY = "server-round"
VERSION_KEY = "model-version"
PREFIX = "bract-"

Phase = Literal["train", "evaluate"]
Scalar = str | int | float

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/ -]{0,199}")
_LARGEST_COUNT = 2**40
_MOST_ROUNDS = 10**6
# Less noise than this is none, and takes accountants beyond what they can compute.
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e6


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What a run asks of a site, the same in each of its messages.

    `task` is the task's name, or a Flower ClientApp's dotted path. `update` says what the reply to a train message is:
    trained by DP-SGD; clipped and noised as a whole, once a message; or raw, with what the trusted server claims to
    spend (`claimed_epsilon`). The noise is `noise_multiplier`, or calibrated to `epsilon` over all rounds. `releases`
    histograms cost `metrics_epsilon` together.
    """

    run: str
    task: str
    strategy: str
    update: Update
    rounds: int
    epochs: int = 1
    batch_size: int = 32
    clipping_norm: float | None = None
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    claimed_epsilon: float | None = None
    metrics: Metrics = "withheld"
    metrics_epsilon: float | None = None
    releases: int = 1

    def to_config(self) -> dict[str, Scalar]:
        """Return the keys of a config record; what is None is left out."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {_key(name): value for name, value in named.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class MessageRequest:
    """One message: its run's request, and where in the run it stands. `model_version` is the server's word for it."""

    run: RunRequest
    phase: Phase
    round: int
    model_version: str
    message_id: str

    @classmethod
    def parse(cls, config: Mapping[str, Any], *, phase: str, message_id: str) -> MessageRequest:
        """Return the request of a config record; RunError `request-invalid` unless each key has its form.

        Keys that do not begin with `bract-` belong to the strategy.
        """
        if phase not in get_args(Phase):
            raise _invalid("the kind of the message", phase)
        known = {_key(each.name): each.name for each in fields(RunRequest)}
        for key in config:
            if key.startswith(PREFIX) and key not in known:
                raise _invalid(key, config[key])
        given = {name: _CHECKS[name](key, config[key]) for key, name in known.items() if key in config}
        for each in ("run", "task", "strategy", "update", "rounds"):
            if each not in given:
                raise _invalid(_key(each), None)
        run = RunRequest(**given)
        _check_together(run)
        return cls(
            run=run,
            phase=phase,  # type: ignore[arg-type]
            round=_round(config.get(ROUND_KEY), run, phase),
            model_version=_name(VERSION_KEY, config.get(VERSION_KEY)),
            message_id=_name("message id", message_id),
        )


def _check_together(run: RunRequest) -> None:
    """Raise RunError unless the keys that an update or a metric needs are there, and no others."""
    needed: dict[str, tuple[str, ...]] = {
        "dp-sgd": ("clipping_norm", "delta"),
        "noised": ("clipping_norm", "delta"),
        "raw": (),
    }
    for name in needed[run.update]:
        if getattr(run, name) is None:
            raise _invalid(_key(name), None)
    noises = [name for name in ("noise_multiplier", "epsilon") if getattr(run, name) is not None]
    if len(noises) != (0 if run.update == "raw" else 1):
        raise _invalid(_key("noise_multiplier"), f"{len(noises)} of noise_multiplier and epsilon")
    if run.claimed_epsilon is not None and (run.update != "raw" or run.delta is None):
        raise _invalid(_key("claimed_epsilon"), run.claimed_epsilon)
    if (run.metrics == "noised") != (run.metrics_epsilon is not None):
        raise _invalid(_key("metrics_epsilon"), run.metrics_epsilon)


def _key(name: str) -> str:
    return PREFIX + name.replace("_", "-")


def _round(value: Any, run: RunRequest, phase: str) -> int:
    number = _whole(0 if phase == "evaluate" else 1)(ROUND_KEY, value)
    if number > run.rounds:
        raise _invalid(ROUND_KEY, value)
    return number


def _name(key: str, value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise _invalid(key, value)
    return value


def _one_of(names: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(key: str, value: Any) -> str:
        if value not in names:
            raise _invalid(key, value)
        return str(value)

    return check


def _whole(least: int, most: int = _LARGEST_COUNT) -> Callable[[str, Any], int]:
    def check(key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _invalid(key, value)
        return value

    return check


def _number(low: float, high: float = math.inf) -> Callable[[str, Any], float]:
    def check(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _invalid(key, value)
        # A comparison with NaN is false.
        if not (math.isfinite(value) and low <= value <= high):
            raise _invalid(key, value)
        return float(value)

    return check


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "run": _name,
    "task": _name,
    "strategy": _name,
    "update": _one_of(get_args(Update)),
    "rounds": _whole(1, _MOST_ROUNDS),
    "epochs": _whole(1),
    "batch_size": _whole(1),
    # The policy refuses what lies outside of its bounds, and says so to the owner.
    "clipping_norm": _number(-math.inf),
    "noise_multiplier": _number(_LEAST_NOISE, _MOST_NOISE),
    "epsilon": _number(1e-6, 1e6),
    "delta": _number(1e-300, 1 - 1e-9),
    "claimed_epsilon": _number(0.0),
    "metrics": _one_of(get_args(Metrics)),
    "metrics_epsilon": _number(1e-9, 1e6),
    "releases": _whole(1, _MOST_ROUNDS),
}


def _invalid(key: str, value: Any) -> RunError:
    # Into the site's log: a server's value is shortened, as it may be long.
    return RunError("request-invalid", f"{key} = {repr(value)[:80]}: is not what a message may hold under this key")
