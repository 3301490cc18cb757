"""How numbers, states and names are written, the same on the page, in the terminal and in the plots."""

from __future__ import annotations

import math
import unicodedata

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"

STATES: dict[str, tuple[str, str]] = {
    "completed": ("Completed", "All planned rounds were run."),
    "stopped-early": (
        "Stopped early",
        "Training ended before its planned rounds, because the released metrics no longer improved.",
    ),
    "budget-exhausted": (
        "Budget exhausted",
        "The next round would have spent more privacy than the experiment allows. The model up to here was saved.",
    ),
    "refused": ("Refused", "The budget or the policy said no."),
    "interrupted": ("Interrupted", "The run was stopped by hand. It can go on from its last checkpoint."),
    "failed": ("Failed", "The run ended with an error."),
    "unfinished": ("Unfinished", "There is no result yet: the run still goes on, or its process was killed."),
}
"""What the status of a result means: a title and one sentence."""


def state(status: str) -> tuple[str, str]:
    """Return title and sentence of a status; an unknown one stands for itself."""
    return STATES.get(status, (printable(status), ""))


def number(value: float | None, digits: int = 3) -> str:
    """Return a metric with fixed digits; a dash where there is none."""
    if value is None or math.isnan(value):
        return DASH
    return f"{value:.{digits}f}".replace("-", MINUS)


def count(value: int) -> str:
    """Return a count with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}").replace("-", MINUS)


def epsilon(value: float | None, digits: int = 3) -> str:
    """Return epsilon with fixed decimals, rounded up so that what is shown never claims more than what holds."""
    if value is None:
        return DASH
    if math.isinf(value):
        return "\N{INFINITY}"
    # What floating point adds to 2 is no reason to show 2.001.
    return f"{math.ceil(value * 10**digits - 1e-6) / 10**digits:.{digits}f}"


def delta(value: float | None) -> str:
    """Return delta as 0, 1e-5 or 2.5e-6."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: float) -> str:
    """Return a duration as a person says it: 0.2 s, 6.1 s, 2 min 05 s, 3 h 20 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plural(amount: int, singular: str, many: str | None = None) -> str:
    """Return an amount with its noun: 1 round, 20 rounds."""
    return f"{count(amount)} {singular if amount == 1 else many or singular + 's'}"


def metric(name: str) -> str:
    """Return the name of a metric as a title: auc is AUC, accuracy is Accuracy."""
    return "AUC" if name == "auc" else printable(name).replace("_", " ").capitalize()


def printable(text: str) -> str:
    """Return text on one line without control characters: names and errors of others reach terminals, too."""
    return "".join(
        " "
        if character.isspace()
        else "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(character)[0] == "C"
        else character
        for character in text
    ).strip()


def shortened(text: str, width: int) -> str:
    """Return printable text of at most `width` characters, cut with an ellipsis."""
    text = printable(text)
    return text if len(text) <= width else text[: width - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
