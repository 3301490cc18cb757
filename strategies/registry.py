"""Strategies by name, by dotted path, or from an installed package's entry point group `bract.strategies`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from ..core.plugins import construct, declared, resolve

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

GROUP = "bract.strategies"
BUILT_IN = {
    "fedavg": ("bract.strategies.fedavg:FedAvg", "mean of the clients' models (McMahan et al. 2017)"),
    "fedavgm": ("bract.strategies.server_rules:FedAvgM", "server momentum (Hsu et al. 2019)"),
    "fedadam": ("bract.strategies.server_rules:FedAdam", "Adam on the server (Reddi et al. 2021)"),
    "fedyogi": ("bract.strategies.server_rules:FedYogi", "Yogi on the server (Reddi et al. 2021)"),
    "fedadagrad": ("bract.strategies.server_rules:FedAdagrad", "Adagrad on the server (Reddi et al. 2021)"),
    "fedbuff": ("bract.strategies.fedbuff:FedBuff", "asynchronous clients, a buffer of updates (Nguyen et al. 2022)"),
    "fedmedian": ("bract.strategies.coordinatewise:FedMedian", "median of each coordinate (Yin et al. 2018)"),
    "fedtrimmedavg": ("bract.strategies.coordinatewise:FedTrimmedAvg", "trimmed mean (Yin et al. 2018)"),
    "krum": ("bract.strategies.krum:Krum", "the model nearest to its neighbours (Blanchard et al. 2017)"),
    "multikrum": ("bract.strategies.krum:MultiKrum", "mean of those that Krum ranks first (Blanchard et al. 2017)"),
    "bulyan": ("bract.strategies.krum:Bulyan", "Krum, then a trimmed mean (Guerraoui & Rouault 2018)"),
    "geometricmedian": ("bract.strategies.geometric_median:GeometricMedian", "RFA (Pillutla et al. 2022)"),
    "fedprox": ("bract.strategies.fedprox:FedProx", "local training near the received model (Li et al. 2020)"),
    "scaffold": ("bract.strategies.scaffold:Scaffold", "control variates against drift (Karimireddy et al. 2020)"),
    "fednova": ("bract.strategies.fednova:FedNova", "changes divided by local steps (Wang et al. 2020)"),
    "feddyn": ("bract.strategies.feddyn:FedDyn", "dynamic regularization (Acar et al. 2021)"),
    "qfedavg": ("bract.strategies.qfedavg:QFedAvg", "clients with a high loss count for more (Li et al. 2020)"),
    "fedper": ("bract.strategies.personal:FedPer", "each client keeps the last layers (Arivazhagan et al. 2019)"),
    "fedrep": ("bract.strategies.personal:FedRep", "own heads, trained before the body (Collins et al. 2021)"),
    "fedbn": ("bract.strategies.personal:FedBN", "each client keeps its normalization layers (Li et al. 2021)"),
    "ditto": ("bract.strategies.ditto:Ditto", "each client has a model of its own beside (Li et al. 2021)"),
}

# Flower's strategies draw a cohort of their own. The round loop already drew it and shows nobody else, so they must
# take every node that they see, one being enough.
_TAKE_ALL = {
    "fraction_train": 1.0,
    "min_train_nodes": 1,
    "fraction_evaluate": 1.0,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
}

# They ask the client for a term in its loss, or for its loss, which bract's own client gives to bract's own strategies.
_OWN_INSTEAD = {"FedProx": "fedprox", "QFedAvg": "qfedavg"}


@dataclass(frozen=True, kw_only=True)
class StrategyInfo:
    """One line of `bract strategies`."""

    name: str
    summary: str
    origin: str


def available_strategies() -> list[StrategyInfo]:
    """Return the strategies that are installed, plug-ins included, without importing any."""
    built_in = [StrategyInfo(name=name, summary=text, origin="bract") for name, (_, text) in BUILT_IN.items()]
    plug_ins = [
        StrategyInfo(name=name, summary=point.value, origin=point.dist.name if point.dist else "plug-in")
        for name, point in declared(GROUP).items()
    ]
    return built_in + plug_ins


def load_strategy(name: str, own: Mapping[str, Any], *, folder: Path | None = None, place: str = "") -> Strategy:
    """Return the strategy of [strategy]; raises InputError that names strategy.KEY.

    A strategy by dotted path takes whole cohorts: its own sampling arguments, where it has them, are set so.
    """
    factory = _find(name, folder, place)
    for key in own:
        if inspect.isclass(factory) and key in _TAKE_ALL and key in _parameters(factory):
            raise InputError(
                "experiment-key", f"strategy.{key}: the cohort is drawn by [clients]; use clients.per_round{place}"
            )
    strategy = construct(factory, dict(own), table="strategy", place=place)
    missing = [
        method
        for method in ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")
        if not callable(getattr(strategy, method, None))
    ]
    if missing:
        raise InputError("plugin-invalid", f'strategy.name = "{name}": it has no method {missing[0]}{place}')
    return strategy  # type: ignore[no-any-return]


def take_whole_cohorts(strategy: Any) -> None:
    """Have a strategy of Flower's kind take every client that it is shown, wrapped ones too.

    The round loop has drawn the cohort already; a strategy that waits for two clients would wait for ever for one.
    """
    for key, value in _TAKE_ALL.items():
        if hasattr(strategy, key):
            setattr(strategy, key, value)
    wrapped = getattr(strategy, "strategy", None)
    if wrapped is not None:
        take_whole_cohorts(wrapped)


def refuse_unserved(strategy: Any) -> None:
    """Raise InputError for a strategy of Flower's whose client half bract's own client does not run."""
    for base in type(strategy).__mro__:
        if base.__module__.startswith("flwr.") and base.__name__ in _OWN_INSTEAD:
            raise InputError(
                "experiment-value",
                f"strategy.name: Flower's {base.__name__} needs a client of its own; use "
                f'"{_OWN_INSTEAD[base.__name__]}", or a Flower ClientApp by clients.app',
            )


def _find(name: str, folder: Path | None, place: str) -> Any:
    if ":" in name:
        return resolve(name, folder=folder, key="strategy.name")
    if name in BUILT_IN:
        return resolve(BUILT_IN[name][0], folder=None, key="strategy.name")
    plug_ins = declared(GROUP)
    if name in plug_ins:
        return resolve(plug_ins[name].value, folder=None, key="strategy.name")
    near = get_close_matches(name, [*BUILT_IN, *plug_ins], n=1)
    hint = f"did you mean {near[0]}?" if near else "`bract strategies` lists what is installed"
    raise InputError("plugin-missing", f'strategy.name = "{name}": there is no such strategy; {hint}{place}')


def _parameters(factory: type[Any]) -> set[str]:
    """Return the keywords of a class whose constructor may hand **kwargs on to its bases."""
    names: set[str] = set()
    for base in factory.__mro__:
        if "__init__" in vars(base):
            names |= set(inspect.signature(base.__init__).parameters)  # type: ignore[misc]
    return names
