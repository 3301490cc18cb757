"""A strategy's state, so that a resumed run goes on where it stopped.

bract's own strategies have `state_dict` and `load_state_dict` where they keep anything between rounds. Flower's have
neither: their state is what their attributes hold, as numbers, strings, arrays, or dicts and lists of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from ..core.errors import InputError
from ..core.parameters import arrays_of, record_of

_PLAIN = (type(None), bool, int, float, str)


def strategy_state(strategy: Any) -> dict[str, Any]:
    """Return the state as nested dicts and lists of numbers, strings and numpy arrays."""
    if hasattr(strategy, "state_dict"):
        return _encode(strategy.state_dict(), "state_dict()")  # type: ignore[no-any-return]
    return {name: _encode(value, name) for name, value in vars(strategy).items() if not _is_fixed(value)}


def load_strategy_state(strategy: Any, state: Mapping[str, Any]) -> None:
    """Put a state back that `strategy_state` returned."""
    if hasattr(strategy, "load_state_dict"):
        strategy.load_state_dict(_decode(state))
        return
    for name, value in state.items():
        setattr(strategy, name, _decode(value))


def remember_strategy(strategy: Any) -> Callable[[], None]:
    """Return what puts a strategy's state back to what it is now, for a round to be repeated.

    bract's own strategies put new arrays in the place of old ones and never write into one that they keep, so theirs
    are held by reference; of any other strategy's arrays a copy is held.
    """
    state, known = strategy_state(strategy), set(vars(strategy))
    if type(strategy).__module__.rpartition(".")[0] != __name__.rpartition(".")[0]:
        state = _copied(state)

    def put_back() -> None:
        if not hasattr(strategy, "load_state_dict"):
            for name in set(vars(strategy)) - known:
                delattr(strategy, name)
        load_strategy_state(strategy, state)

    return put_back


def _copied(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def refuse_unsaveable(strategy: Any) -> None:
    """Raise InputError at the start for a strategy that a resumed run could not restore."""
    try:
        strategy_state(strategy)
    except TypeError as error:
        raise InputError(
            "plugin-invalid",
            f"strategy {type(strategy).__name__}: {error}, which a resumed run could not restore; give the class "
            "state_dict() and load_state_dict()",
        ) from error


def _is_fixed(value: Any) -> bool:
    """Functions and layouts are set by the constructor or by each round anew, so they are no state."""
    return callable(value) or hasattr(value, "__dataclass_fields__")


def _encode(value: Any, name: str) -> Any:
    if isinstance(value, (*_PLAIN, np.ndarray)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, ArrayRecord):
        return {"__record__": arrays_of(value)}
    if isinstance(value, Mapping):
        return {str(key): _encode(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item, name) for item in value]
    raise TypeError(f"its attribute {name!r} is a {type(value).__name__}")


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"__record__"}:
            return record_of(value["__record__"])
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value
