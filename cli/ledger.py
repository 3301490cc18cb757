"""`bract ledger`: make the ledger of a site, show what is spent and left, check that nothing was changed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .output import JsonOption, finish, print_error, print_json, print_table


class Action(StrEnum):
    """What to do with a ledger."""

    init = "init"
    show = "show"
    verify = "verify"


def ledger(
    action: Annotated[Action, typer.Argument(help="Make a ledger, show what is spent, or check its chain.")],
    state: Annotated[Path, typer.Argument(metavar="STATE", help="The state directory of the site.")],
    as_json: JsonOption = False,
) -> None:
    """Make the ledger of a site, show what is spent and left per data set, or verify that nothing was changed."""
    match action:
        case Action.init:
            _init(state, as_json=as_json)
        case Action.show:
            _show(state, as_json=as_json)
        case Action.verify:
            _verify(state, as_json=as_json)


def _init(state: Path, *, as_json: bool) -> None:
    from ..privacy.ledger.ledger import Ledger

    with Ledger.create(state) as made:
        head = made.head()
    if as_json:
        print_json({"schema": 1, "ledger": str(state), "head": head.to_dict()})
    else:
        print(f"{state}: a new ledger. Keep ledger.key with it, readable by you alone; never put back an older copy.")


def _show(state: Path, *, as_json: bool) -> None:
    from ..privacy.ledger.ledger import Ledger

    with Ledger.open(state) as opened:
        spendings = [opened.spending(name) for name in opened.data_sets()]
        head = opened.head()
    if as_json:
        sets = [spending.to_dict() for spending in spendings]
        print_json({"schema": 1, "ledger": str(state), "head": head.to_dict(), "data_sets": sets})
        return
    if not spendings:
        print(f"{state}: no data set has a budget yet; the site's policy declares it.")
        return
    print_table(
        ("data set", "spent", "left", "budget", "delta", "unit", "neighbours", "runs", "how it was counted"),
        [
            (
                each.data_set,
                each.shown["spent"],
                each.shown["left"],
                f"{each.budget:g}",
                f"{each.delta:g}",
                each.unit,
                each.relation,
                str(each.runs),
                each.counted,
            )
            for each in spendings
        ],
    )


def _verify(state: Path, *, as_json: bool) -> None:
    from ..privacy.ledger.ledger import Ledger

    with Ledger.open(state) as opened:
        found = opened.verify()
        head = None if found else opened.head()
    if as_json:
        findings = [{"sequence": each.sequence, "what": each.what} for each in found]
        status = "refused" if found else "completed"
        print_json({"schema": 1, "status": status, "head": head and head.to_dict(), "findings": findings})
    elif head:
        print(f"{state}: {head.sequence} entries, and the chain is whole.")
    for each in found:
        print_error(
            f"{state}: {'the ledger' if each.sequence is None else f'entry {each.sequence}'}: {each.what}",
            code="ledger-tampered",
        )
    if found:
        finish(3)
