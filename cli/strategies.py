"""`bract strategies`: how updates can be aggregated here."""

from __future__ import annotations

from .output import JsonOption, print_json, print_table


def strategies(as_json: JsonOption = False) -> None:
    """List the strategies that are built in or that installed packages declare."""
    from ..strategies.registry import available_strategies

    found = available_strategies()
    if as_json:
        rows = [{"name": item.name, "summary": item.summary, "origin": item.origin} for item in found]
        print_json({"schema": 1, "strategies": rows})
        return
    print_table(("name", "origin", "summary"), [(item.name, item.origin, item.summary) for item in found])
    print('\nAny of Flower\'s or your own: strategy.name = "flwr.serverapp.strategy:FedMedian".')
