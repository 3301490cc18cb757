"""`bract tasks`: what can be learned here."""

from __future__ import annotations

from .output import JsonOption, print_json, print_table


def tasks(as_json: JsonOption = False) -> None:
    """List the tasks that are built in or that installed packages declare, with their models."""
    from ..tasks.registry import available_tasks

    found = available_tasks()
    if as_json:
        rows = [{"name": i.name, "summary": i.summary, "models": list(i.models), "origin": i.origin} for i in found]
        print_json({"schema": 1, "tasks": rows})
        return
    print_table(
        ("name", "models", "origin", "summary"),
        [(item.name, ", ".join(item.models), item.origin, item.summary) for item in found],
    )
    print('\nOne of your own: task.name = "my_module:MyTask".')
