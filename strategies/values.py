"""Checks of a strategy's keys: ValueError with one sentence, which [strategy] puts file and line to."""

from __future__ import annotations

import math


def number(name: str, value: object, *, above: float | None = None, least: float | None = None) -> float:
    """Return a finite number as float; raises ValueError unless it is above, or at least, the limit given."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} = {value!r}: must be a finite number")
    if above is not None and not value > above:
        raise ValueError(f"{name} = {value!r}: must be above {above:g}")
    if least is not None and not value >= least:
        raise ValueError(f"{name} = {value!r}: must be at least {least:g}")
    return float(value)


def whole_number(name: str, value: object, *, least: int) -> int:
    """Return a whole number; raises ValueError unless it is at least the limit."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} = {value!r}: must be a whole number of at least {least}")
    return value


def patterns(name: str, value: object) -> tuple[str, ...]:
    """Return a list of shell patterns; raises ValueError unless it is a list of strings."""
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise ValueError(f'{name} = {value!r}: must be a list of patterns of tensor names, as ["head.*"]')
    return tuple(value)


def fraction(name: str, value: object) -> float:
    """Return a number in [0, 1) as float; raises ValueError for any other."""
    checked = number(name, value, least=0)
    if not checked < 1:
        raise ValueError(f"{name} = {value!r}: must be below 1")
    return checked
