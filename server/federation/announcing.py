"""What a server announces of its experiment: all that a site builds from, and nothing of the server's own machine."""

from __future__ import annotations

from ...core import toml
from ...experiment import Experiment

# Tables and keys that say nothing to a site, or where something lies on the server's disk.
_OWN_TABLES = {"simulation", "server"}
_OWN_KEYS = {"task": {"data"}, "train": {"device"}, "clients": {"partitioner", "partitioner_options", "minimum"}}


def announced(experiment: Experiment) -> str:
    """Return the experiment as clients are told of it, in TOML."""
    tables = experiment.model_dump(mode="json", exclude_none=True)
    return toml.write(
        {
            name: {key: value for key, value in table.items() if key not in _OWN_KEYS.get(name, ())}
            for name, table in tables.items()
            if name not in _OWN_TABLES
        }
    )
