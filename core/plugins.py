"""Find what a user names: `package.module:Name`, or an entry point that an installed package declares."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from .errors import InputError


def resolve(path: str, *, folder: Path | None, key: str) -> Any:
    """Return the object at `package.module:Name`; the experiment's folder is searched first.

    Raises InputError `plugin-missing`, which names `key`.
    """
    module_name, separator, name = path.partition(":")
    if not separator or not module_name or not name:
        raise InputError("plugin-missing", f'{key} = "{path}": write it as "package.module:Name"')
    with _first_on_path(folder):
        _forget_namesake(module_name.partition(".")[0], folder)
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            where = f" in {folder}" if folder else ""
            raise InputError(
                "plugin-missing", f'{key} = "{path}": there is no module {error.name!r}{where} or installed'
            ) from error
        except Exception as error:
            raise InputError(
                "plugin-missing", f'{key} = "{path}": importing it raised {type(error).__name__}: {error}'
            ) from error
    try:
        found: Any = module
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        near = get_close_matches(name, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError("plugin-missing", f'{key} = "{path}": the module has no {name!r}{hint}') from error
    return found


def declared(group: str) -> Mapping[str, EntryPoint]:
    """Return the entry points that installed packages declare in a group, by name."""
    return {point.name: point for point in sorted(entry_points(group=group), key=lambda point: point.name)}


def construct(factory: Callable[..., Any], keywords: Mapping[str, Any], *, table: str, place: str) -> Any:
    """Call a class with the own keys of its table; raises InputError `experiment-key` for one it does not take."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise InputError(
            "plugin-invalid", f"{table}.name: {factory!r} is no class that bract can make{place}"
        ) from error
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    known = [name for name, parameter in signature.parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    for name in keywords:
        if name not in known and not takes_any:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(known) or 'no keys'}"
            raise InputError("experiment-key", f"{table}.{name}: unknown key{hint}{place}")
    for name, parameter in signature.parameters.items():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and name not in keywords:
            raise InputError("experiment-key", f"{table}.{name}: this key is needed{place}")
    try:
        return factory(**keywords)
    except (TypeError, ValueError) as error:
        raise InputError("experiment-value", f"{table}: {error}{place}") from error


def _forget_namesake(name: str, folder: Path | None) -> None:
    """Drop an imported module of this name that lies elsewhere: each experiment means the one beside it."""
    if folder is None or name not in sys.modules:
        return
    own = [folder.resolve() / f"{name}.py", folder.resolve() / name / "__init__.py"]
    imported = getattr(sys.modules[name], "__file__", None)
    if any(path.exists() for path in own) and imported is not None and Path(imported).resolve() not in own:
        for module in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[module]


@contextmanager
def _first_on_path(folder: Path | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(entry)
