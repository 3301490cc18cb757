"""bract: the private layer around Flower.

`simulate` trains over virtual clients on this machine and returns a `Result`; `load` gives the model of a run back.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Flower reads these when it is imported: bract phones nobody unless its user asks for it.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

if TYPE_CHECKING:
    from .core.errors import BractError
    from .experiment import Experiment
    from .privacy.guarantee import Guarantee
    from .server.result import Result
    from .server.trained_model import load
    from .simulations.run import simulate

__version__ = "0.1.0"

__all__ = ["BractError", "Experiment", "Guarantee", "Result", "__version__", "load", "simulate"]

# Where each public name lives; it is imported when it is first asked for (PEP 562).
_HOMES = {
    "BractError": ".core.errors",
    "Experiment": ".experiment",
    "Guarantee": ".privacy.guarantee",
    "Result": ".server.result",
    "load": ".server.trained_model",
    "simulate": ".simulations.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
