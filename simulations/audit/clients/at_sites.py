"""What leaves a client that noises its own update, whatever its training ends with."""

from __future__ import annotations

import math

import numpy as np
from flwr.app import Message

from ....clients.parts import local_rule
from ....core import flower
from ....core.errors import BractError
from ....core.parameters import arrays_of
from ....strategies.fedavg import COUNT_KEY
from ..finding import Finding, failed, figure, not_tried
from ..records.released import difference
from .released import counts_in
from .rounds import norm_of
from .sites import Sites
from .subject import ClientSubject
from .updates import bad_answers, outlier_updates


def sensitivity(subject: ClientSubject) -> Finding:
    """Without the noise, what a client sends is at most C long, whatever its training ends with; no change is none."""
    sites, norm = _sites(subject), subject.local.clipping_norm
    largest, tried = 0.0, 0
    nothing = {"that is zero": np.zeros(subject.layout.size)}
    for site in sites.names:
        for what, update in {**outlier_updates(subject), **nothing}.items():
            moved = norm_of(sites.released(site, update, noise=False)) / norm
            limit = 0.0 if what in nothing else 1.0
            largest, tried = max(largest, moved), tried + 1
            if not moved <= limit + _rounding(subject):
                return failed(
                    "sensitivity",
                    f"an update {what} leaves {site} with a length of {moved:.4g} C, which may be at most "
                    f"{'C' if limit else '0'}",
                    {"moved": figure(moved), "site": site},
                )
    if largest == 0:
        return not_tried("sensitivity", "no update leaves a client")
    return Finding(
        name="sensitivity",
        passed=True,
        sentence=f"an update of 1e4 leaves a client with a length of at most {largest:.4g} C (of {tried} tried), where "
        "C is allowed",
        figures={"moved": largest, "updates": tried},
    )


def independence(subject: ClientSubject) -> Finding:
    """A client's reply is the same, byte for byte, whatever other clients did before it."""
    sites, outlier = _sites(subject), outlier_updates(subject)["of 1e4"]
    names = sites.names
    for place, site in enumerate(names):
        before = sites.released(site, 0.1 * outlier)
        for other in {names[place - 1], names[(place + 1) % len(names)]}:
            sites.released(other, outlier)
            sites.released(other, np.full(subject.layout.size, math.nan))
        moved = norm_of(sites.released(site, 0.1 * outlier) - before)
        if moved != 0:
            return failed(
                "independence",
                f"what other clients do changes the update of {site} by {moved:.4g}",
                {"moved": figure(moved), "site": site},
            )
    return Finding(
        name="independence",
        passed=True,
        sentence=f"each client's update stays, byte for byte, whatever the others send ({len(names)} tried)",
        figures={"tried": len(names)},
    )


def bad_updates(subject: ClientSubject) -> Finding:
    """An update that holds a number that is none counts as no change, and is sent with the same noise."""
    sites, tried = _sites(subject), 0
    for site in sites.names:
        for what, answer in bad_answers(subject):
            if answer.update is None:
                continue
            for noise in (False, True):
                try:
                    found = sites.released(site, answer.update, noise=noise)
                except BractError as error:
                    sentence = f"an update with {what} ends in an error, which tells of it: {error.sentence}"
                    return failed("bad-updates", sentence, {"site": site})
                nothing = sites.released(site, np.zeros(subject.layout.size), noise=noise)
                moved, tried = norm_of(found - nothing) / subject.local.clipping_norm, tried + 1
                if not moved <= _rounding(subject):
                    return failed(
                        "bad-updates",
                        f"an update of {site} with {what} is sent as one of {moved:.4g} C, where it should be zero",
                        {"moved": figure(moved), "site": site},
                    )
    return Finding(
        name="bad-updates",
        passed=True,
        sentence=f"NaN and infinite updates are sent as no change ({tried} tried)",
        figures={"tried": tried},
    )


def release(subject: ClientSubject) -> Finding:
    """A reply holds the noised model, a weight and what the strategy names, and nothing of an update past the noise.

    When training ends with no change, the reply must be the same whatever the records and the updates of other rounds
    are, and one that asks for metrics must be refused.
    """
    sites = _sites(subject)
    rule = local_rule(subject.experiment, subject.strategy)
    nothing = np.zeros(subject.layout.size)
    for site in sites.names:
        message, reply = sites.ask(sites.app, site, nothing)
        compression = subject.federation.compression
        content = reply.content
        if compression is not None:
            content = compression.decode(message, flower.copy_records(content))
        odd = sorted(set(content) - {"arrays", "metrics", *rule.sends})
        odd += sorted(set(arrays_of(content.array_records["arrays"])) - set(subject.layout.names))
        odd += sorted(set(content.metric_records["metrics"]) - {COUNT_KEY, *rule.reports})
        if odd:
            return failed("release", f"{site} sends {odd[0]}, which no mechanism covers", {"parts": odd})
        # Longer than C and so clipped to the same: whatever leaves past the clipped update would tell them apart.
        one, other = (_clipped(subject, site, factor) for factor in (50.0, 5000.0))
        moved = difference(one, other)
        if moved is not None:
            return failed(
                "release",
                f"{moved} of the reply of {site} depends on its update past the clipped and noised one",
                {"site": site, "part": moved},
            )
        if not _evaluation_is_refused(sites, message, site):
            return failed("release", f"{site} answers a message that asks for metrics", {"site": site})
    counted = counts_in(subject.whole.files[0], subject.federation.names)
    if counted is not None:
        return failed("release", f"manifest.json tells how many records {counted} has", {"client": counted})
    if subject.whole.open:
        return failed("release", f"{subject.whole.open[0]} may be read by others", {"open": subject.whole.open})
    return Finding(
        name="release",
        passed=True,
        sentence=f"nothing leaves but {len(subject.layout.names)} tensors of a noised update, and no metrics",
        figures={"tensors": len(subject.layout.names), "sites": len(sites.names)},
    )


def weights(subject: ClientSubject) -> Finding:
    """Every client's weight is 1: a number of records is not to be told."""
    sites = _sites(subject)
    for site in sites.names:
        _, reply = sites.ask(sites.app, site, None)
        weight = reply.content.metric_records["metrics"].get(COUNT_KEY) if reply.has_content() else None
        if weight != 1:
            return failed("weights", f"{site} has the weight {weight}; all weigh 1", {"site": site})
    return Finding(
        name="weights",
        passed=True,
        sentence=f"each of {len(sites.names)} clients weighs 1",
        figures={"sites": len(sites.names)},
    )


def _clipped(subject: ClientSubject, site: str, factor: float) -> Message:
    """Return a reply to an update in one direction, past C; powers of two, so that clipping leaves the same digits."""
    update = np.zeros(subject.layout.size)
    start = subject.layout.flatten(subject.federation.initial)
    place = int(np.abs(subject.direction("clipped")).argmax())
    update[place] = factor * max(subject.local.clipping_norm, abs(start[place]))
    sites = _sites(subject)
    _, reply = sites.ask(sites.app, site, update)
    return reply


def _evaluation_is_refused(sites: Sites, message: Message, site: str) -> bool:
    from flwr.app import Context, RecordDict

    node = flower.node_id(site)
    asked = Message(flower.copy_records(message.content), node, "evaluate")
    flower.set_message_id(asked, "1")
    context = Context(run_id=1, node_id=node, node_config={"name": site}, state=RecordDict(), run_config={})
    try:
        return bool(sites.app(asked, context).has_error())
    except BractError:
        return True


def _sites(subject: ClientSubject) -> Sites:
    assert subject.sites is not None
    return subject.sites


def _rounding(subject: ClientSubject) -> float:
    """Return how much of a length, in units of C, is that of rounding to the model's float32."""
    start = norm_of(subject.layout.flatten(subject.federation.initial))
    return 2.0**-22 * (1 + start / subject.local.clipping_norm)
