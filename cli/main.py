"""`bract`: finds the command, and turns everything that goes wrong into one sentence and an exit status.

Exit status: 0 done, 1 the run failed, 2 the input was wrong, 3 the budget or the policy said no, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn, get_type_hints

import click
import typer.core
import typer.main

from .. import __version__
from ..core.errors import BractError, InputError, Refusal
from .output import print_error, print_json

# A command is the function of its name in the module of its name; only the chosen one is imported.
COMMANDS = {
    "simulate": "Virtual clients on this machine; no FILE: four hospitals, heart disease.",
    "server": "Coordinate a federation of real clients over gRPC, with mutual TLS.",
    "sandbox": "A server and real client processes on this machine, over gRPC with mutual TLS.",
    "client": "Take part in a federation with your own data, policy and ledger.",
    "plan": "Epsilon, noise, bytes and steps of an experiment before anything runs.",
    "audit": "Does the program do what it claims: quick [FILE], in less than a minute.",
    "report": "Write the report page of a run again.",
    "ledger": "The owner's ledger of a site: init, show or verify STATE.",
    "provision": "The federation's certificate authority, and the identities of server and sites.",
    "tasks": "What can be learned here, plug-ins included.",
    "strategies": "How updates can be aggregated here, plug-ins included.",
    "doctor": "Is this machine fit: versions, GPU, ports, clock, permissions.",
    "explain": "What an error code means and what to do.",
}


class Command(typer.core.TyperCommand):
    """A command whose help shows its arguments once: typer writes them, and from click 8.5 on click does too."""

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Leave the arguments to typer."""


class Commands(click.Group):
    """The commands, each imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the house."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a name, or None."""
        if cmd_name not in COMMANDS:
            return None
        function = getattr(import_module(f".{cmd_name}", __package__), cmd_name)
        return as_command(function, name=cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def as_command(function: Callable[..., Any], *, name: str) -> click.Command:
    """Return the click command of a function with typer's annotations; an int that it returns is the exit status."""
    # Plain help: loading rich would double the time that it takes.
    typer.core.HAS_RICH = False
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command(name, cls=Command)(function)
    command = typer.main.get_command(app)
    # Under click 8.5 typer 0.20 loses the help of arguments.
    hints = get_type_hints(function, include_extras=True)
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            notes = getattr(hints[str(parameter.name)], "__metadata__", ())
            parameter.help = next((note.help for note in notes if hasattr(note, "help")), None)
    return command


def application() -> click.Group:
    """Return the whole command line as click sees it."""
    group = Commands(
        name="bract",
        help="The private layer around Flower: federated training that states exactly what it gives away.",
        epilog="Exit status: 0 done, 1 failed, 2 wrong input, 3 budget or policy said no, 130 interrupted.",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    return click.version_option(__version__, prog_name="bract", message="%(prog)s %(version)s")(group)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_status(given or ["--help"], as_json="--json" in given))


def _status(arguments: list[str], *, as_json: bool) -> int:
    try:
        status = application().main(arguments, prog_name="bract", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        _trace()
        return _failed("refused", "usage", _usage(error), status=2, as_json=as_json)
    except (KeyboardInterrupt, click.Abort):
        _trace()
        return _failed("interrupted", "interrupted", "interrupted", status=130, as_json=as_json)
    except BractError as error:
        _trace()
        kind = error.code if error.code in ("budget-exhausted", "interrupted") else "failed"
        if kind == "failed" and isinstance(error, (InputError, Refusal)):
            kind = "refused"
        return _failed(kind, error.code, error.sentence, status=error.exit_status, as_json=as_json)
    except Exception as error:
        _trace()
        what = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        return _failed("failed", "internal", f"bract did not foresee this: {what}", status=1, as_json=as_json)


def _failed(kind: str, code: str, sentence: str, *, status: int, as_json: bool) -> int:
    if as_json:
        print_json({"schema": 1, "status": kind, "error": {"code": code, "sentence": sentence}})
    print_error(sentence, code=None if code == "usage" else code)
    return status


def _usage(error: click.ClickException) -> str:
    sentence = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{sentence}; see `{context.command_path if context else 'bract'} --help`"


def _trace() -> None:
    if os.environ.get("BRACT_DEBUG") == "1":
        traceback.print_exc()
