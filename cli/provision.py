"""`bract provision`: the federation's certificate authority, and the identities of its server and its sites."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from .output import JsonOption, print_json, print_table


class Action(StrEnum):
    """What to do, and at which side."""

    authority = "authority"
    server = "server"
    request = "request"
    approve = "approve"
    install = "install"
    renew = "renew"
    revoke = "revoke"
    list = "list"
    show = "show"


# What is given beside each, and whether it has to be.
_TAKES: dict[Action, Mapping[str, bool]] = {
    Action.authority: {"--name": False, "--days": False},
    Action.server: {"--authority": True, "--name": False, "--address": False, "--days": False},
    Action.request: {"--out": True},
    Action.approve: {"--authority": True, "--name": False, "--fingerprint": False, "--out": False, "--days": False},
    Action.install: {"--identity": True, "--fingerprint": False},
    Action.renew: {"--authority": True, "--out": False, "--days": False},
    Action.revoke: {"--authority": True},
    Action.list: {},
    Action.show: {},
}


def provision(
    action: Annotated[
        Action,
        typer.Argument(
            help="At the federation's keeper: authority DIR, server DIR, approve REQUEST, renew NAME, "
            "revoke NAME|SERIAL, list DIR. At a site: request NAME, install FILE. Anywhere: show DIR."
        ),
    ],
    what: Annotated[str, typer.Argument(metavar="WHAT", help="What the action is for: a folder, a name or a file.")],
    authority: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The authority's folder (server, approve, renew, revoke).")
    ] = None,
    identity: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder of the identity to install into (install).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder of the new identity (request), or the file to write (approve, renew)."),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="A host name of the server, again for more; the name expected (approve), or given (authority)."
        ),
    ] = None,
    address: Annotated[
        list[str] | None, typer.Option(metavar="IP", help="An address of the server, again for more (server).")
    ] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(metavar="SHA256", help="The authority's (install) or the site's key's (approve), as it was told."),
    ] = None,
    days: Annotated[int | None, typer.Option(help="How long a certificate is valid; 365, an authority's 3650.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the federation's authority, and the identities by which server and sites know each other."""
    given = {
        "--authority": authority,
        "--identity": identity,
        "--out": out,
        "--name": name,
        "--address": address,
        "--fingerprint": fingerprint,
        "--days": days,
    }
    _check(action, given)
    now = datetime.now(UTC)
    limit = {} if days is None else {"days": days}
    match action:
        case Action.authority:
            shown, lines = _authority(Path(what), name or [], now, limit)
        case Action.server:
            shown, lines = _server(Path(what), _path(authority), name or [], address or [], now, limit)
        case Action.request:
            shown, lines = _request(what, _path(out))
        case Action.approve:
            shown, lines = _approve(Path(what), _path(authority), out, name or [], fingerprint, now, limit)
        case Action.install:
            shown, lines = _install(Path(what), _path(identity), fingerprint, now)
        case Action.renew:
            shown, lines = _renew(what, _path(authority), out, now, limit)
        case Action.revoke:
            shown, lines = _revoke(what, _path(authority), now)
        case Action.list:
            shown, lines = _list(Path(what), now, table=not as_json)
        case Action.show:
            shown, lines = _show(Path(what), now)
    if as_json:
        print_json({"schema": 1, "status": "completed", **shown})
    elif lines:
        print("\n".join(lines))


Shown = tuple[dict[str, Any], list[str]]


def _authority(folder: Path, names: list[str], now: datetime, limit: dict[str, int]) -> Shown:
    from ..transport.authority import Authority

    made = Authority.create(folder, name=(names or ["bract-federation"])[0], now=now, **limit)
    return {"authority": str(folder), "fingerprint": made.fingerprint}, [
        f"{folder}: the federation's authority, valid until {made.certificate.not_valid_after_utc:%Y-%m-%d}.",
        "Keep it off the network, back it up, and give ca.key to nobody. Each site is told, as by telephone:",
        f"  {made.fingerprint}",
    ]


def _server(
    folder: Path, authority: Path, names: list[str], addresses: list[str], now: datetime, limit: dict[str, int]
) -> Shown:
    from ..transport import provisioning
    from ..transport.authority import Authority
    from ..transport.certificates import Hosts

    hosts = Hosts.of(names, addresses)
    made = provisioning.serve(Authority.open(authority), folder, hosts, now=now, **limit)
    return {
        "identity": str(folder),
        "name": made.name,
        "hosts": list(hosts.listed),
        "expires": made.expires.isoformat(),
    }, [f"{folder}: the server's identity for {', '.join(hosts.listed)}, valid until {made.expires:%Y-%m-%d}."]


def _request(name: str, folder: Path) -> Shown:
    from ..transport import provisioning

    made = provisioning.request(name, folder)
    return {"name": name, "request": str(made.file), "key_fingerprint": made.key_fingerprint}, [
        f"{made.file}: send it to whoever runs the federation, and tell them the fingerprint of its key, by telephone:",
        f"  {made.key_fingerprint}",
        "The key itself stays here. What comes back goes to `bract provision install`.",
    ]


def _approve(
    file: Path,
    authority: Path,
    out: Path | None,
    names: list[str],
    fingerprint: str | None,
    now: datetime,
    limit: dict[str, int],
) -> Shown:
    from ..transport import pem
    from ..transport.authority import Authority

    opened = Authority.open(authority)
    request = pem.read(file, what="the request", mend="`bract provision request NAME --out DIR` makes it at the site")
    expected = names[0] if names else None
    issued = opened.approve(request, where=str(file), now=now, name=expected, fingerprint=fingerprint, **limit)
    answer = out or file.with_name(f"{issued.name}.certificate.pem")
    pem.write(answer, opened.answer(issued))
    lines = [f"{answer}: send it to {issued.name}; valid until {issued.expires[:10]} (serial {issued.serial})."]
    if fingerprint is None:
        lines.append(f"Before you send it, have {issued.name} confirm the fingerprint of its key, by telephone:")
        lines.append(f"  {issued.key_fingerprint}")
    return {**issued.to_dict(now), "certificate": str(answer)}, lines


def _install(file: Path, folder: Path, fingerprint: str | None, now: datetime) -> Shown:
    from ..transport import provisioning

    if provisioning.is_list(file):
        provisioning.install_list(file, folder)
        return {"identity": str(folder)}, [f"{folder}: the list of revoked certificates holds from now on."]
    made = provisioning.install(file, folder, fingerprint=fingerprint, now=now)
    return {"identity": str(folder), "name": made.name, "role": made.role, "expires": made.expires.isoformat()}, [
        f"{folder}: the identity of {made.name}, valid until {made.expires:%Y-%m-%d}."
    ]


def _renew(name: str, authority: Path, out: Path | None, now: datetime, limit: dict[str, int]) -> Shown:
    from ..transport import pem, provisioning
    from ..transport.authority import Authority

    opened = Authority.open(authority)
    issued = opened.renew(name, now=now, **limit)
    answer = out or Path(f"{issued.name.replace(':', '_')}.certificate.pem")
    pem.write(answer, opened.answer(issued))
    lines = [f"{answer}: valid until {issued.expires[:10]} (serial {issued.serial})."]
    if provisioning.hand_over(opened, issued, now=now):
        lines.append(f"Installed in {issued.folder}; a running server shows it from the next connection on.")
    else:
        lines.append(
            f"Send it to {issued.name}, to be installed by `bract provision install`; until then the old holds."
        )
    return {**issued.to_dict(now), "certificate": str(answer)}, lines


def _revoke(which: str, authority: Path, now: datetime) -> Shown:
    from ..transport import provisioning
    from ..transport.authority import Authority

    opened = Authority.open(authority)
    revoked = opened.revoke(which, now=now)
    reached, elsewhere = provisioning.publish(opened)
    lines = [f"{each.name}: certificate {each.serial} is revoked." for each in revoked]
    lines += [f"{folder}: has the list; a running server follows it within seconds." for folder in reached]
    lines += [
        f"{folder}: is not on this machine; copy {opened.folder}/revoked.pem into the server's identity folder."
        for folder in elsewhere
    ]
    return {
        "revoked": [each.to_dict(now) for each in revoked],
        "reached": [str(each) for each in reached],
        "elsewhere": [str(each) for each in elsewhere],
    }, lines


def _list(folder: Path, now: datetime, *, table: bool) -> Shown:
    from ..transport.authority import Authority

    opened = Authority.open(folder)
    rows = [each.to_dict(now) for each in opened.index()]
    if table and rows:
        print_table(
            ("name", "side", "state", "expires", "serial", "hosts"),
            [
                (row["name"], row["role"], row["state"], row["expires"][:10], row["serial"], ", ".join(row["hosts"]))
                for row in rows
            ],
        )
    return {"authority": str(folder), "fingerprint": opened.fingerprint, "certificates": rows}, (
        [] if rows else [f"{folder}: nothing was issued yet."]
    )


def _show(folder: Path, now: datetime) -> Shown:
    from ..transport.authority import KEY, Authority
    from ..transport.identities import Identity, role_in, warn

    if (folder / KEY).exists():
        opened = Authority.open(folder)
        end = opened.certificate.not_valid_after_utc
        return {"authority": str(folder), "fingerprint": opened.fingerprint, "expires": end.isoformat()}, [
            f"{folder}: the federation's authority, valid until {end:%Y-%m-%d}; its fingerprint:",
            f"  {opened.fingerprint}",
        ]
    loaded = Identity.load(folder, role=role_in(folder), now=now)
    warning = warn(loaded, now)
    lines = [
        f"{folder}: the identity of {loaded.role} {loaded.name}, valid until {loaded.expires:%Y-%m-%d} "
        f"(serial {loaded.serial:040x}); it trusts the authority",
        f"  {loaded.fingerprint}",
    ]
    return {
        "identity": str(folder),
        "role": loaded.role,
        "name": loaded.name,
        "serial": f"{loaded.serial:040x}",
        "expires": loaded.expires.isoformat(),
        "fingerprint": loaded.fingerprint,
        "warning": warning,
    }, [*lines, *([f"warning: {warning}"] if warning else [])]


def _check(action: Action, given: Mapping[str, object]) -> None:
    """Refuse an option that an action would not look at, and ask for one that it needs."""
    takes = _TAKES[action]
    for option, value in given.items():
        if value and option not in takes:
            raise click.UsageError(f"provision {action} takes no {option}")
        if not value and takes.get(option):
            raise click.UsageError(f"provision {action} needs {option}")
    names = given["--name"]
    if action is not Action.server and isinstance(names, list) and len(names) > 1:
        raise click.UsageError(f"provision {action} takes one --name")


def _path(given: Path | None) -> Path:
    assert given is not None
    return given
