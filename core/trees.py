"""Nested dicts of numbers, strings and arrays as bytes, and back: deterministic, and safe to read from anywhere.

The arrays are safetensors, the rest is JSON in one of them: no pickle, and nothing is run by reading.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ARRAY = "__array__"
_TREE = "__tree__"


def pack(tree: Mapping[str, Any]) -> bytes:
    """Return a tree as bytes: the same tree in the same order gives the same bytes."""
    from safetensors.numpy import save

    tensors: dict[str, NDArray[np.generic]] = {}
    stripped = _strip(tree, tensors)
    tensors[_TREE] = np.frombuffer(json.dumps(stripped).encode(), dtype=np.uint8)
    return save(tensors)


def unpack(packed: bytes) -> dict[str, Any]:
    """Return the tree that `pack` made into bytes; ValueError if it did not."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(packed)
        tree = _fill(json.loads(tensors.pop(_TREE).tobytes()), tensors)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError("these bytes are no packed tree") from error
    if not isinstance(tree, dict):
        raise ValueError("these bytes are no packed tree")
    return tree


def _strip(value: Any, tensors: dict[str, NDArray[np.generic]]) -> Any:
    """Return the tree with each array replaced by its number in `tensors`."""
    if isinstance(value, np.ndarray):
        name = str(len(tensors))
        # safetensors writes the buffer as it lies, in the machine's byte order.
        tensors[name] = np.array(value, order="C", dtype=value.dtype.newbyteorder("="))
        return {_ARRAY: name}
    if isinstance(value, Mapping):
        return {str(key): _strip(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strip(item, tensors) for item in value]
    return value


def _fill(value: Any, tensors: Mapping[str, NDArray[np.generic]]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_ARRAY}:
            return tensors[value[_ARRAY]]
        return {key: _fill(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, tensors) for item in value]
    return value
