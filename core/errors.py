"""Errors that a user can act on: a code, one sentence, and the mend.

`bract explain CODE` prints the entry of CATALOGUE. The class decides the exit status: 2 the input was wrong,
3 the budget or the policy said no, 1 the run failed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What an error code means, and what to do about it."""

    meaning: str
    mend: str


class BractError(Exception):
    """An error with a code of CATALOGUE and one sentence that says what to mend."""

    exit_status = 1

    def __init__(self, code: str, sentence: str) -> None:
        if code not in CATALOGUE:
            raise ValueError(f"unknown error code {code!r}")
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence

    def __reduce__(self) -> tuple[type[BractError], tuple[str, str]]:
        return type(self), (self.code, self.sentence)


class InputError(BractError):
    """The input was wrong: nothing was read or trained."""

    exit_status = 2


class Refusal(BractError):
    """The budget or the policy said no."""

    exit_status = 3


class RunError(BractError):
    """The run failed."""

    exit_status = 1


CATALOGUE: dict[str, Explanation] = {
    "usage": Explanation(
        meaning="The command line has an option, an argument or a command that bract does not know, or lacks one.",
        mend="Compare it with `bract --help` and `bract COMMAND --help`.",
    ),
    "experiment-missing": Explanation(
        meaning="The experiment file does not exist or cannot be read.",
        mend="Check the path; `bract simulate` without a file runs the built-in heart-disease experiment.",
    ),
    "experiment-syntax": Explanation(
        meaning="The experiment file is not valid TOML.",
        mend="Mend the line that the message names; strings need quotes, tables stand in square brackets.",
    ),
    "experiment-key": Explanation(
        meaning="The experiment file has a table or a key that bract does not know.",
        mend="Take the nearest known name from the message, or delete the line; docs/experiment.md lists all keys.",
    ),
    "experiment-value": Explanation(
        meaning="A key of the experiment file has a value of the wrong type or out of range.",
        mend="Give the value that the message asks for.",
    ),
    "experiment-conflict": Explanation(
        meaning="Two settings of the experiment file exclude each other.",
        mend="Drop or change one of the two keys that the message names.",
    ),
    "plugin-missing": Explanation(
        meaning="A task, strategy or model that is named by dotted path or entry point could not be found or imported.",
        mend="Check the spelling `package.module:Name`; the folder of the experiment file is searched first.",
    ),
    "plugin-invalid": Explanation(
        meaning="A task or strategy was found but does not have the methods that bract calls, or refused its keys.",
        mend="Compare it with the protocol in docs/tasks.md or docs/strategies.md.",
    ),
    "data-missing": Explanation(
        meaning="A data file does not exist or cannot be read.",
        mend="Check `task.data`; a relative path starts at the folder of the experiment file.",
    ),
    "data-invalid": Explanation(
        meaning="A data file does not have the columns or the form that the task declares.",
        mend="Compare the columns that the message names with the keys of [task].",
    ),
    "data-empty": Explanation(
        meaning="A client has no record to train on.",
        mend="Use fewer clients, another partitioner, or drop that client.",
    ),
    "model-not-private": Explanation(
        meaning="The model holds a layer whose output for one record depends on other records, or that Opacus "
        "cannot compute per-example gradients for.",
        mend="Replace the layer that the message names (GroupNorm for BatchNorm), or freeze it.",
    ),
    "device-missing": Explanation(
        meaning="The device that the experiment asks for is not there.",
        mend='Use `train.device = "auto"` or "cpu".',
    ),
    "run-missing": Explanation(
        meaning="The directory is not a run of bract, or lacks the file that was asked for.",
        mend="Give the run directory itself: the one that holds manifest.json.",
    ),
    "run-exists": Explanation(
        meaning="The directory that --out names already holds something.",
        mend="Choose another directory, or go on with that run by --resume.",
    ),
    "run-in-use": Explanation(
        meaning="Another process runs in the run directory that --resume names.",
        mend="Wait for its end, or end it; one run has one server.",
    ),
    "run-finished": Explanation(
        meaning="A federated run that --resume names has come to its end.",
        mend="Start a new run; what it leaves stands in its directory.",
    ),
    "run-changed": Explanation(
        meaning="A run can only be resumed with the experiment, data and software that started it.",
        mend="Restore what the message names, or start a new run.",
    ),
    "run-unreadable": Explanation(
        meaning="A file of the run directory is damaged.",
        mend="Restore it from a backup, or start a new run.",
    ),
    "run-unwritable": Explanation(
        meaning="The run directory could not be written.",
        mend="Check the disk's space and the permissions of the folder.",
    ),
    "budget-exhausted": Explanation(
        meaning="The next round would spend more privacy than the experiment allows.",
        mend="The model so far is saved. Plan more noise or fewer rounds in a new run; a spent budget stays spent.",
    ),
    "policy-missing": Explanation(
        meaning="The site's policy file does not exist or cannot be read.",
        mend="Check the path; docs/policy.md shows a policy that can be copied.",
    ),
    "policy-syntax": Explanation(
        meaning="The site's policy file is not valid TOML.",
        mend="Mend the line that the message names; strings need quotes, tables stand in square brackets.",
    ),
    "policy-key": Explanation(
        meaning="The site's policy file has a table or a key that bract does not know.",
        mend="Take the nearest known name from the message, or delete the line; docs/policy.md lists all keys.",
    ),
    "policy-value": Explanation(
        meaning="A key of the site's policy file has a value of the wrong type or out of range.",
        mend="Give the value that the message asks for.",
    ),
    "policy-refused": Explanation(
        meaning="The site's policy does not allow what was asked.",
        mend="Ask for less, or have the site's owner write what the message at the site names into policy.toml.",
    ),
    "announcement-invalid": Explanation(
        meaning="What a server announced is no experiment that this version of bract can read.",
        mend="Run the same bract version on server and sites; the message says what is wrong in the server's file.",
    ),
    "experiment-unexpected": Explanation(
        meaning="A server announces another experiment than the one that the site's owner gave by --experiment.",
        mend="Ask who runs the federation; take over the new file once you agree with it.",
    ),
    "request-invalid": Explanation(
        meaning="A message asks a site for something that is not in the form of this version of bract.",
        mend="Run the same bract version on server and sites.",
    ),
    "data-undeclared": Explanation(
        meaning="A data set holds more records than its owner declared.",
        mend="Declare the number in policy.toml before a run begins; it is public from then on.",
    ),
    "ledger-missing": Explanation(
        meaning="The site's folder holds no ledger, and nothing is trained without one.",
        mend="Make one with `bract ledger init STATE`, once; if there was one, restore it with its key.",
    ),
    "ledger-exists": Explanation(
        meaning="The site's folder already holds a ledger or a ledger's key.",
        mend="Go on with that ledger; what is spent stays spent.",
    ),
    "ledger-unreadable": Explanation(
        meaning="The ledger or its key cannot be read, is no ledger, or is open to other users.",
        mend="Restore ledger.sqlite and ledger.key together, readable by their owner alone (chmod 600).",
    ),
    "ledger-unwritable": Explanation(
        meaning="The ledger could not be written, so nothing was trained and nothing was sent.",
        mend="Check the disk's space, the permissions of the folder, and whether another process holds the ledger.",
    ),
    "ledger-tampered": Explanation(
        meaning="The ledger's chain of MACs does not fit: an entry was changed, removed, moved or added.",
        mend="`bract ledger verify STATE` names the entries; restore the latest good ledger and find out who wrote.",
    ),
    "ledger-rolled-back": Explanation(
        meaning="The server has seen a later state of this ledger: an older copy of it was put back.",
        mend="Restore the latest ledger; without it, what was spent is unknown, and the data set may not be used.",
    ),
    "ledger-budget": Explanation(
        meaning="The data set has no budget in the ledger, or one that does not go with what is asked.",
        mend="Declare it in the site's policy; a budget that was used keeps its unit and its neighbouring relation.",
    ),
    "run-plan-changed": Explanation(
        meaning="A run asks for other noise, clipping, batches or rounds than it was planned with.",
        mend="Start a new run: a site fixes a run's plan when it reserves the first round.",
    ),
    "message-changed": Explanation(
        meaning="A message came again under its id, with other content.",
        mend="Send it under a new id: it then counts as new.",
    ),
    "reply-forgotten": Explanation(
        meaning="A message came again after the server had said that it has the reply.",
        mend="Resume the run from its latest checkpoint.",
    ),
    "authority-exists": Explanation(
        meaning="The folder already holds a certificate authority, or a part of one.",
        mend="Go on with it; only if its making was interrupted, delete the folder and make it again.",
    ),
    "identity-exists": Explanation(
        meaning="The folder already holds the identity of a server or of a site.",
        mend="Renew it by `bract provision renew NAME`, or choose another folder.",
    ),
    "identity-missing": Explanation(
        meaning="A key, a certificate or another file of an identity or of the authority is not there.",
        mend="Check the path; docs/identities.md shows how an identity is made.",
    ),
    "identity-unreadable": Explanation(
        meaning="A file of an identity or of the authority is damaged or cannot be read, or a key is open to others.",
        mend="Do what the message says; a key is readable by its owner alone (chmod 600).",
    ),
    "identity-mismatch": Explanation(
        meaning="A key, a certificate, an authority and a list of revoked certificates do not belong together.",
        mend="Take all from the same federation, for the side that the message names; do not go on with a stranger's.",
    ),
    "identity-expired": Explanation(
        meaning="A certificate is no longer valid, or not yet.",
        mend="Have it renewed by `bract provision renew NAME`, and install it; check the clocks.",
    ),
    "identity-revoked": Explanation(
        meaning="A certificate was revoked by the federation's authority.",
        mend="A site that is to come back makes a new key by `bract provision request`, in another folder.",
    ),
    "identity-rejected": Explanation(
        meaning="The server does not take this site's certificate.",
        mend="Compare the authority's fingerprint and the clocks of both sides (`bract provision show DIR`).",
    ),
    "identity-taken": Explanation(
        meaning="A valid certificate already has this name, or this key.",
        mend="Choose another name; if the key was lost, revoke the old certificate first.",
    ),
    "identity-unknown": Explanation(
        meaning="The authority has issued no certificate with this name or serial number.",
        mend="`bract provision list DIR` shows all.",
    ),
    "identity-unpinned": Explanation(
        meaning="A site was given its first certificate without the fingerprint of the authority.",
        mend="Ask who runs the federation for it, by telephone, and give it as --fingerprint.",
    ),
    "identity-request": Explanation(
        meaning="A file is not the request of a site in the form that bract makes.",
        mend="Have the site make it by `bract provision request NAME --out DIR`.",
    ),
    "provision-value": Explanation(
        meaning="A name, a host, an address or a number of days has a form that no certificate may have.",
        mend="Give the value that the message asks for.",
    ),
    "provision-unwritable": Explanation(
        meaning="A file of an identity or of the authority could not be written.",
        mend="Check the disk's space and the permissions of the folder; then run the same command again.",
    ),
    "peer-unnamed": Explanation(
        meaning="A client showed the server no certificate of a site.",
        mend="Give the site its own identity by `bract provision request`, `approve` and `install`.",
    ),
    "server-untrusted": Explanation(
        meaning="The server's certificate is not what this site may trust, or the server speaks no TLS.",
        mend="Do what the message says; if the address is right, ask who runs the server before you go on.",
    ),
    "client-failed": Explanation(
        meaning="A client raised an error while it trained or evaluated; the text stays on its side.",
        mend="Read the client's own log (private/clients.log of a simulation).",
    ),
    "value-out-of-range": Explanation(
        meaning="A client's update holds a number that is not finite or lies outside the public bound of the sum.",
        mend="Lower the learning rate, or clip the update.",
    ),
    "reply-invalid": Explanation(
        meaning="A client's reply does not have the tensors, shapes or types that were asked for.",
        mend="Run the same bract version and task on server and clients.",
    ),
    "metrics-withheld": Explanation(
        meaning="A client was asked for metrics that no mechanism of the run covers.",
        mend='Evaluate the model on public data, or use privacy.unit = "record", under which metrics are released.',
    ),
    "quorum-missed": Explanation(
        meaning="Too few clients of a round replied.",
        mend="Read why they failed; `server.quorum` sets the share that must reply.",
    ),
    "frame-invalid": Explanation(
        meaning="The other side sent something that is not in the form of bract's protocol.",
        mend="Run the same bract version on server and clients; if they are, somebody else speaks on that port.",
    ),
    "message-too-large": Explanation(
        meaning="A message is larger than the receiving side takes.",
        mend="Send a smaller model, or raise the receiver's limit.",
    ),
    "message-damaged": Explanation(
        meaning="The bytes of a message do not have the SHA-256 that came with them.",
        mend="It is sent again; if that happens often, check the network and the memory of both machines.",
    ),
    "protocol-unsupported": Explanation(
        meaning="Server and client speak different versions of bract's protocol.",
        mend="Install versions of bract on both sides that share a protocol; both are named in the message.",
    ),
    "client-lost": Explanation(
        meaning="A client went away, or never came, and was not back in time.",
        mend="Read the client's own log; `server.connect_for` says how long an absent client is waited for.",
    ),
    "client-unsuited": Explanation(
        meaning="A client's task, data set or policy does not go with the run of the server that it joined.",
        mend="Start the client for what the server announces; what its policy allows is for its owner to decide.",
    ),
    "client-late": Explanation(
        meaning="A client is there but did not reply before the round's deadline.",
        mend="`server.round_deadline` sets how long a round may take.",
    ),
    "client-stalled": Explanation(
        meaning="Nothing was heard from the other side, not even a heartbeat, or a message stopped in its middle.",
        mend="Check the network between the two; `server.stall_after` says how long silence is borne.",
    ),
    "client-replaced": Explanation(
        meaning="Another process joined under the same client's name, and took its place.",
        mend="Run one process per client, each with its own identity.",
    ),
    "clients-missing": Explanation(
        meaning="Fewer clients joined than the run needs.",
        mend="Start the missing clients, or lower `clients.minimum`.",
    ),
    "reply-unknown": Explanation(
        meaning="A reply answers no message that is in flight to that client: it is late, a replay, or another's.",
        mend="Nothing to do: the server dropped it unread.",
    ),
    "server-unreachable": Explanation(
        meaning="A client could not reach its server, or not stay connected.",
        mend="Check address, port and firewall, that the server runs, and the certificates of both sides.",
    ),
    "insecure-refused": Explanation(
        meaning="A connection without certificates was asked for on an address other than this machine's loopback.",
        mend="Make identities with `bract provision`, or use 127.0.0.1.",
    ),
    "address-unusable": Explanation(
        meaning="The address to listen on is malformed, is not this machine's, or is in use.",
        mend="Give host:port of this machine; port 0 takes a free one.",
    ),
    "strategy-failed": Explanation(
        meaning="The strategy raised an error.",
        mend="Read the trace in private/strategy.log of the run.",
    ),
    "audit-failed": Explanation(
        meaning="A check of `bract audit` found that the program does not do what its guarantee says.",
        mend="Believe no epsilon of this program: mend what the check names, your own task or strategy first.",
    ),
    "interrupted": Explanation(
        meaning="The run was stopped by the user.",
        mend="Go on with `bract simulate --resume RUN`.",
    ),
    "internal": Explanation(
        meaning="Something went wrong that bract did not foresee.",
        mend="Run again with BRACT_DEBUG=1 for the trace, and report it.",
    ),
}
