"""What a ledger says no to: a changed plan or message, a budget that does not go with the request, a spent one."""

from __future__ import annotations

import math

from ...core.errors import Refusal
from ..guarantee import rounded_up
from .book import Book, DataSetBudget, Request, Reserved


def check(book: Book, request: Request) -> None:
    """Raise Refusal unless a new request goes with the plan of its run and within the budget of its data set."""
    plan = book.plans.get((request.data_set, request.run), request.plan)
    if plan != request.plan or not plan.holds(request.phase, request.event):
        raise _changed(request)
    check_declared(book, request.data_set)
    budget = book.budgets[request.data_set]
    for each in request.plan.events:
        if each.event.relation != budget.relation:
            raise Refusal(
                "ledger-budget",
                f"{request.data_set}: its budget counts under {budget.relation}, but run {request.run} was planned "
                f"under {each.event.relation}; plan it under {budget.relation}",
            )
    if book.mixes(request):
        raise Refusal(
            "ledger-budget",
            f"{request.data_set}: one budget holds either what this site enforces or what a server claims, and run "
            f"{request.run} would mix them; declare the data under a second name",
        )
    if not book.admits(request):
        now = book.spending(request.data_set).spent
        what = "the next round" if (request.data_set, request.run) in book.plans else "the rounds"
        raise Refusal(
            "budget-exhausted",
            f"{request.data_set}: {what} of run {request.run} would exceed its budget of epsilon {budget.epsilon:g} "
            f"(delta {budget.delta:g}), of which {rounded_up(now) if math.isfinite(now) else 'more'} is spent; plan "
            "more noise or fewer rounds in a new run",
        )


def check_same(book: Book, request: Request, held: Reserved) -> None:
    """Raise Refusal unless a request that was charged before asks for what was charged then."""
    if book.plans[request.data_set, request.run] != request.plan or held.event != request.event:
        raise _changed(request)


def check_message(book: Book, request: Request) -> None:
    """Raise Refusal if a message of this id came before with other content, or is of a round that the server has."""
    for number in book.by_message.get((request.data_set, request.run, request.message_id), ()):
        if book.reserved[number].message_digest != request.message_digest:
            raise Refusal(
                "message-changed",
                f"message {request.message_id} of run {request.run}: came before with other content; send what changed "
                "under a new id",
            )
    if request.round <= book.forgotten.get((request.data_set, request.run), -1):
        raise Refusal(
            "reply-forgotten",
            f"message {request.message_id} of run {request.run}: the server said that it has round {request.round}, "
            "whose replies are deleted; resume the run from its latest checkpoint",
        )


def check_budget(book: Book, budget: DataSetBudget) -> None:
    """Raise Refusal if a budget that was drawn on would change its unit or its neighbouring relation."""
    known = book.budgets.get(budget.name)
    if known is None or budget.name not in book.charged:
        return
    for what in ("unit", "relation"):
        if getattr(known, what) != getattr(budget, what):
            raise Refusal(
                "ledger-budget",
                f"{budget.name}: its {what} is {getattr(known, what)} since it was first drawn on, and cannot become "
                f"{getattr(budget, what)}; declare the data under the {what} that it began with",
            )


def check_declared(book: Book, data_set: str) -> None:
    """Raise Refusal if a data set has no budget."""
    if data_set not in book.budgets:
        raise Refusal("ledger-budget", f"{data_set}: has no budget in the ledger; declare it in the site's policy")


def _changed(request: Request) -> Refusal:
    return Refusal(
        "run-plan-changed",
        f"run {request.run}: asks {request.data_set} for other noise, clipping, batches or rounds than it was planned "
        "with; start a new run",
    )
