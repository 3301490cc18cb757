"""`bract provision`: a federation is made, changed and shown by commands, and no key is ever printed."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bract.cli.main import main
from bract.transport.identities import Identity
from bract.transport.revocation import Revocations


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], words: str, *more: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["provision", *words.split(), *more])
    shown = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    for key in Path().rglob("*.key"):
        for line in key.read_text().splitlines():
            assert line not in shown.out + shown.err, f"{words}: shows {key}"
    return ended.value.code, shown.out, shown.err


def told(capsys: pytest.CaptureFixture[str], words: str, *more: str) -> dict:
    """Return the one JSON object of a command that succeeds."""
    status, shown, said = run(capsys, words, *more, "--json")
    assert (status, said) == (0, ""), said
    return json.loads(shown)


def federation(capsys: pytest.CaptureFixture[str]) -> str:
    """Make an authority, a server and the site berlin; return the authority's fingerprint."""
    fingerprint = told(capsys, "authority ca")["fingerprint"]
    told(capsys, "server srv --authority ca --name localhost --address 127.0.0.1")
    asked = told(capsys, "request berlin --out berlin")
    answer = told(capsys, f"approve {asked['request']} --authority ca --fingerprint", asked["key_fingerprint"])
    told(capsys, f"install {answer['certificate']} --identity berlin --fingerprint", fingerprint)
    return fingerprint


def test_a_federation_in_five_commands(here, capsys) -> None:
    fingerprint = federation(capsys)
    now = datetime.now(UTC)
    berlin, server = (
        Identity.load(here / "berlin", role="client", now=now),
        Identity.load(here / "srv", role="server", now=now),
    )
    assert (berlin.name, server.name) == ("berlin", "localhost")
    assert berlin.fingerprint == server.fingerprint == fingerprint
    listed = told(capsys, "list ca")
    assert listed["fingerprint"] == fingerprint
    assert [(each["name"], each["role"], each["state"], each["hosts"]) for each in listed["certificates"]] == [
        ("localhost", "server", "valid", ["localhost", "127.0.0.1"]),
        ("berlin", "client", "valid", []),
    ]


def test_people_are_told_what_to_do_next(here, capsys) -> None:
    _, made, _ = run(capsys, "authority ca")
    fingerprint = made.splitlines()[-1].strip()
    _, served, _ = run(capsys, "server srv --authority ca --name fl.example.org --address ::1")
    assert served.startswith("srv: the server's identity for fl.example.org, ::1, valid until ")
    _, asked, _ = run(capsys, "request berlin --out berlin")
    key = asked.splitlines()[1].strip()
    _, approved, _ = run(capsys, "approve berlin/berlin.request.pem --authority ca --out berlin.pem")
    assert "have berlin confirm" in approved and key in approved
    _, approved, _ = run(capsys, "approve berlin/berlin.request.pem --authority ca --out berlin.pem --fingerprint", key)
    assert "confirm" not in approved
    status, _, said = run(capsys, "install berlin.pem --identity berlin")
    assert status == 3 and "--fingerprint" in said and "bract explain identity-unpinned" in said
    _, installed, _ = run(capsys, "install berlin.pem --identity berlin --fingerprint", fingerprint)
    assert installed.startswith("berlin: the identity of berlin, valid until ")
    _, shown, _ = run(capsys, "show berlin")
    assert "client berlin" in shown and fingerprint in shown and "warning" not in shown
    _, shown, _ = run(capsys, "show ca")
    assert fingerprint in shown
    _, listed, _ = run(capsys, "list ca")
    assert [line.split()[:3] for line in listed.splitlines()[1:]] == [
        ["fl.example.org", "server", "valid"],
        ["berlin", "client", "valid"],
    ]


def test_renew_installs_at_a_server_that_is_here_and_writes_a_file_for_a_site(here, capsys) -> None:
    federation(capsys)
    before = told(capsys, "show srv")["serial"], told(capsys, "show berlin")["serial"]
    _, said, _ = run(capsys, "renew localhost --authority ca --out new-server.pem")
    assert "Installed in" in said
    renewed = told(capsys, "renew berlin --authority ca --out new.pem --days 20")
    assert told(capsys, "show berlin")["serial"] == before[1]
    told(capsys, "install new.pem --identity berlin")
    shown = told(capsys, "show berlin")
    assert shown["serial"] == renewed["serial"] != before[1]
    assert told(capsys, "show srv")["serial"] != before[0]
    assert "expires on" in shown["warning"]
    assert "\nwarning: " in run(capsys, "show berlin")[1]


def test_revoke_reaches_the_server_here_and_says_which_is_elsewhere(here, capsys) -> None:
    federation(capsys)
    server = Identity.load(here / "srv", role="server", now=datetime.now(UTC))
    revocations = Revocations(here / "srv" / "revoked.pem", server.authority)
    serial = told(capsys, "show berlin")["serial"]
    assert not revocations.is_revoked(int(serial, 16))
    gone = told(capsys, f"revoke {serial} --authority ca")
    assert gone["reached"] == [str(here / "srv")] and gone["elsewhere"] == []
    assert revocations.is_revoked(int(serial, 16))
    shutil.move(here / "srv", here / "away")
    _, said, _ = run(capsys, "revoke berlin --authority ca")
    assert f"{here / 'srv'}: is not on this machine; copy ca/revoked.pem" in said
    told(capsys, "install ca/revoked.pem --identity away")
    assert [each["state"] for each in told(capsys, "list ca")["certificates"]] == ["valid", "revoked"]


@pytest.mark.parametrize(
    ("words", "status", "code", "sentence"),
    [
        ("request berlin", 2, "usage", "provision request needs --out"),
        ("approve x --identity y --authority ca", 2, "usage", "provision approve takes no --identity"),
        ("authority other --name a --name b", 2, "usage", "takes one --name"),
        ("fly x", 2, "usage", "'fly' is not one of"),
        ("server s2 --authority ca", 2, "provision-value", "--name: a server needs a host name"),
        ("server s2 --authority ca --name x --days 0", 2, "provision-value", "--days = 0"),
        ("authority ca", 2, "authority-exists", "DIR = ca: already holds ca.pem"),
        ("request berlin --out berlin", 2, "identity-exists", "already is the identity of a client"),
        ("approve nowhere.pem --authority ca", 2, "identity-missing", "nowhere.pem: the request is not there"),
        ("approve ca/ca.pem --authority ca", 2, "identity-request", "ca.pem: is no certificate request"),
        ("list nowhere", 2, "identity-missing", "nowhere/ca.pem"),
        ("show nowhere", 2, "identity-missing", "holds neither server.key nor client.key"),
        ("renew atlantis --authority ca", 2, "identity-unknown", "atlantis: no certificate has this name"),
        ("install ca/revoked.pem --identity berlin", 2, "identity-mismatch", "a site reads no list"),
    ],
)
def test_what_goes_wrong_is_one_sentence(here, capsys, words, status, code, sentence) -> None:
    federation(capsys)
    ended, shown, said = run(capsys, words, "--json")
    error = json.loads(shown)["error"]
    assert (ended, error["code"]) == (status, code), said
    assert sentence in error["sentence"] and "\n" not in error["sentence"]
    assert "Traceback" not in said
