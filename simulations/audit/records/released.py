"""What leaves and what is charged for it: tensors, weights, steps."""

from __future__ import annotations

from flwr.app import ArrayRecord, Message, RecordDict

from ....clients.parts import local_rule
from ....core import flower
from ....core.parameters import arrays_of
from ....strategies.asynchronous import Asynchronous
from ....strategies.fedavg import COUNT_KEY
from ..finding import Finding, failed
from .probe import Visit
from .subject import Subject

_SITES = 3


def release(subject: Subject) -> Finding:
    """A reply holds the trained shared tensors and what the strategy names, and is a function of noised sums alone.

    With every record silent, other records' inputs in the same batch must not change one byte of it: a running
    statistic, a count of what was seen, a loss would.
    """
    rule = local_rule(subject.experiment, subject.strategy)
    allowed = {name for name, tensor in subject.model.module.named_parameters() if tensor.requires_grad}
    records = {"arrays", "metrics", *rule.sends}
    for site in list(subject.data)[:_SITES]:
        with subject.probe.silence(site):
            visit = subject.replay(site)
            reply = visit.reply
            inputs = subject.probe.inputs(site)
            before = inputs.clone()
            # Other records in the same places: nothing of the plan changes.
            inputs.copy_(-before.flip(0) if inputs.is_floating_point() else before.flip(0))
            try:
                other = subject.replay(site).reply
            finally:
                inputs.copy_(before)
        assert reply is not None and other is not None
        content = _decoded(subject, visit)
        odd = sorted(set(content) - records)
        odd += sorted(set(arrays_of(content.array_records["arrays"])) - allowed)
        odd += sorted(set(content.metric_records["metrics"]) - {COUNT_KEY, *rule.reports})
        if odd:
            return failed("release", f"{site} sends {odd[0]}, which no mechanism covers", {"tensors": odd})
        moved = difference(reply, other)
        if moved is not None:
            return failed(
                "release",
                f"{moved} of the reply of {site} depends on records past the noised sum",
                {"site": site, "part": moved},
            )
    return Finding(
        name="release",
        passed=True,
        sentence=f"nothing leaves but {len(allowed)} trained tensors; records move them through the noised sum alone",
        figures={"tensors": len(allowed), "sites": min(_SITES, len(subject.data))},
    )


def weights(subject: Subject) -> Finding:
    """Every site's weight is 1: a number of records would scale what one record does, and is not to be told."""
    found = {}
    for visit in subject.trained().visits:
        if visit.reply is not None and visit.reply.has_content():
            found[visit.site] = visit.reply.content.metric_records["metrics"].get(COUNT_KEY)
    odd = {site: weight for site, weight in found.items() if weight != 1}
    if odd:
        site, weight = next(iter(odd.items()))
        return failed("weights", f"{site} has the weight {weight}; under privacy all weigh 1", {"weights": odd})
    if not found:
        return Finding(name="weights", passed=None, sentence="could not be tried: no site replied")
    return Finding(
        name="weights", passed=True, sentence=f"each of {len(found)} sites weighs 1", figures={"sites": len(found)}
    )


def ledger(subject: Subject) -> Finding:
    """What was charged for a few rounds of the loop is what the kernel did: rounds, and the steps of each."""
    trained = subject.trained()
    ran = {site: sum(len(visit.steps) for visit in trained.visits if visit.site == site) for site in subject.data}
    charged = {site: plan.accounted_steps(trained.rounds(site)) for site, plan in subject.mechanisms.items()}
    # Who is charged when a message leaves may reply after the last round, or not at all.
    late = isinstance(subject.strategy, Asynchronous) or any(_failed_visit(visit) for visit in trained.visits)
    for site, plan in subject.mechanisms.items():
        bounded = late or plan.accounted_records is not None
        if ran[site] > charged[site] or (ran[site] < charged[site] and not bounded):
            return failed(
                "ledger",
                f"the kernel took {ran[site]} steps at {site}, and {charged[site]} were charged",
                {"site": site, "ran": ran[site], "charged": charged[site]},
            )
    return Finding(
        name="ledger",
        passed=True,
        sentence=f"{sum(ran.values())} steps ran over {len(ran)} sites, and {sum(charged.values())} were charged",
        figures={"ran": ran, "charged": charged},
    )


def _failed_visit(visit: Visit) -> bool:
    return visit.reply is None or visit.reply.has_error()


def _decoded(subject: Subject, visit: Visit) -> RecordDict:
    """Return the records of a reply, a compressed model as the server makes it out."""
    assert visit.reply is not None and visit.message is not None
    compression = subject.federation.compression
    content = flower.copy_records(visit.reply.content)
    return content if compression is None else compression.decode(visit.message, content)


def difference(one: Message, other: Message) -> str | None:
    """Return the name of a part in which two replies differ."""
    for name in sorted(set(one.content) | set(other.content)):
        left, right = one.content.get(name), other.content.get(name)
        if isinstance(left, ArrayRecord) and isinstance(right, ArrayRecord):
            ours, theirs = arrays_of(left), arrays_of(right)
            for tensor in sorted(set(ours) | set(theirs)):
                if tensor not in ours or tensor not in theirs or ours[tensor].tobytes() != theirs[tensor].tobytes():
                    return tensor
        elif left is None or right is None or dict(left) != dict(right):
            return name
    return None
