"""What pydantic finds wrong with a TOML file, as one sentence with key, value, mend, file and line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from . import toml
from .errors import InputError


def first_complaint(
    error: ValidationError, *, model: type[BaseModel], source: Path | None, text: str, kind: str = "experiment"
) -> InputError:
    """Return the complaint about a file that `model` describes, with the code `KIND-key` or `KIND-value`."""
    # Unknown keys first: a misspelt key is the cause of what else is wrong.
    found = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")[0]
    path, known = _in_the_file(model, found["loc"])
    name, where = ".".join(path), place(source, text, path)
    if found["type"] == "extra_forbidden":
        near = get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        what = "table" if len(path) == 1 else "key"
        return InputError(f"{kind}-key", f"{name}: unknown {what}; {hint}{where}")
    if found["type"] == "missing":
        return InputError(f"{kind}-value", f"{name}: missing; this key is needed{where}")
    return InputError(f"{kind}-value", f"{name} = {shown(found['input'])}: {_demand(found)}{where}")


def place(source: Path | None, text: str, path: tuple[str, ...]) -> str:
    """Return where a key stands, as ` (heart.toml, line 14)`, to end a complaint with."""
    if source is None:
        return ""
    line = toml.line_of(text, path)
    return f" ({source.name}, line {line})" if line else f" ({source.name})"


def shown(value: Any) -> str:
    """Return a value as it stands in a TOML file."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value}"


def _in_the_file(model: type[BaseModel], location: Iterable[int | str]) -> tuple[tuple[str, ...], list[str]]:
    """Return the keys of the file that a location names, and what is known where the last of them stands.

    Members of unions and elements of lists add names of their own to a location; those are left out.
    """
    path: list[str] = []
    known: list[str] = []
    inside: Any = model
    for part in location:
        if get_origin(inside) is not dict:
            # A table that may be left out.
            inside = next((member for member in get_args(inside) if _is_table(member)), inside)
        if isinstance(inside, type) and issubclass(inside, BaseModel):
            known = list(inside.model_fields)
            field = inside.model_fields.get(str(part))
            inside = field.annotation if field else None
        elif get_origin(inside) is dict and _is_table(get_args(inside)[1]):
            inside = get_args(inside)[1]
        else:
            break
        path.append(str(part))
    return tuple(path), known


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _demand(found: Any) -> str:
    context = found.get("ctx", {})
    match found["type"]:
        case "greater_than":
            return f"must be above {context['gt']:g}"
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}"
        case "less_than":
            return f"must be below {context['lt']:g}"
        case "less_than_equal":
            return f"must be at most {context['le']:g}"
        case "finite_number":
            return "must be a finite number"
        case "literal_error":
            return f"must be one of {context['expected']}"
        case "string_pattern_mismatch":
            return "must be letters, digits, dots, dashes and underscores"
        case "model_type" | "dict_type" | "model_attributes_type":
            return "must be a table"
        case "tuple_type":
            return "must be a list"
        case kind if kind.startswith(("int", "float", "bool", "string")):
            kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a string"}
            return f"must be {kinds[kind.split('_')[0]]}"
        case _:
            return str(found["msg"])
