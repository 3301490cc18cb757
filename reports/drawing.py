"""From a matplotlib figure to inline SVG and to PNG, without pyplot and without global state of ours.

The SVG keeps its text as text, takes its colours from the page's variables (so dark mode and print can change them),
names no address, and has ids that no other drawing on the page has.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, MUTED, GRID, PAPER = "#1b2430", "#5d6876", "#e2e6eb", "#fffffe"
BLUE, ORANGE, GREY = "#0b62a6", "#c4570b", "#98a2ae"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "rule", PAPER: "paper", BLUE: "blue", ORANGE: "orange", GREY: "grey"}
"""Colours that the page's style sheet defines again as variables; blue and orange stay apart for all kinds of sight."""

_SETTINGS = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Liberation Sans", "Arial", "Helvetica", "DejaVu Sans"],
    "font.size": 8.0,
    "axes.labelsize": 8.0,
    "axes.titlesize": 9.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 2.5,
    "ytick.major.size": 0.0,
    "xtick.major.width": 0.6,
    "text.color": INK,
    "text.parse_math": False,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
}


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing: file name without suffix, title, one sentence on how to read it, and whether it is private."""

    name: str
    title: str
    caption: str
    figure: Figure
    private: bool = False


@contextmanager
def style() -> Iterator[None]:
    """The settings under which a figure is made and written; they end with the block."""
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():  # type: ignore[arg-type]
        # A font without some script's letters measures them badly; the browser draws them with its own.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def canvas(width: float = 4.4, height: float = 2.75) -> tuple[Figure, Axes]:
    """Return an empty figure (inches) with one axes that fills it."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05))
    return figure, figure.add_subplot()


def inline_svg(plot: Plot) -> str:
    """Return the drawing as an `<svg>` element that fits the width of its container."""
    buffer = io.StringIO()
    with style(), matplotlib.rc_context({"svg.hashsalt": plot.name}):
        plot.figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # without XML declaration and document type, which HTML has no use for
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, body = text[: text.index(">") + 1], text[text.index(">") + 1 :]
    box = re.search(r'viewBox="([\d. ]+)"', head)
    if box is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    # Outside of tags and attributes a name could read like an id: only markup is rewritten.
    body = re.sub(r"<[^!/][^>]*>", lambda tag: _localised(tag[0], plot.name), body)
    return f'<svg class="plot" viewBox="{box[1]}" role="img" aria-labelledby="{plot.name}-title">{body.strip()}'


def save_png(plot: Plot, path: Path) -> None:
    """Write the drawing with its title as PNG on white, 200 dots per inch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with style():
        plot.figure.axes[0].set_title(plot.title, color=INK, pad=8)
        plot.figure.savefig(path, format="png", dpi=200, facecolor="white", metadata={"Software": None})


def _localised(tag: str, prefix: str) -> str:
    tag = re.sub(r'\bid="([^"]*)"', rf'id="{prefix}-\1"', tag)
    tag = re.sub(r"url\(#([^)]*)\)", rf"url(#{prefix}-\1)", tag)
    tag = re.sub(r'(?:xlink:)?href="#([^"]*)"', rf'href="#{prefix}-\1"', tag)
    for colour, variable in VARIABLES.items():
        tag = tag.replace(colour, f"var(--{variable})")
    return tag
