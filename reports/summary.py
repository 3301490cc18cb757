"""The few lines that close a run on stdout: what was released, the guarantee, the report, and what is not private."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table as Grid
from rich.text import Text

from . import words
from .comparison import Table, table_of
from .run import RunView, read_run

HEADING = "not private, simulation only"
WIDTH = 80


def print_summary(run_dir: Path, console: Console | None = None) -> None:
    """Print the end of a run: in colour and wrapped in a terminal, as plain text elsewhere. Raises InputError."""
    console = console or Console()
    run = read_run(run_dir)
    _line(console, "", _outcome(run), style="bold", wrap=True)
    _line(console, "released   ", _released(run))
    if "bytes_up" in run.result:
        _line(console, "traffic    ", _traffic(run))
    if run.guarantee is not None:
        _line(console, "guarantee  ", words.printable(run.guarantee.sentence), wrap=True)
    if (run_dir / "report.html").is_file():
        # Never wrapped: a path is there to be clicked or copied.
        _line(console, "report     ", str(run_dir / "report.html"))
    if run.comparison is None:
        return
    for sites in (8, 0):  # with all sites as columns, and if that is too wide their spread
        tables = [table_of(run.comparison, metric, sites=sites, lone=10, digits=2) for metric in ("accuracy", "auc")]
        there = [table for table in tables if table is not None]
        if not there:
            return
        grid = _grid(there, terminal=console.is_terminal)
        width = min(WIDTH, console.width)
        if sites == 0 or console.measure(grid, options=console.options.update(width=400)).minimum <= width:
            break
    console.print()
    console.print(Text(HEADING, style="bold yellow"))
    what = " and ".join("AUC" if table.metric == "auc" else table.metric for table in there)
    console.print(Text(f"{what} of each model on each site's test records"))
    console.print(grid, width=width)


def _outcome(run: RunView) -> str:
    title = words.state(run.status)[0].lower()
    rounds = words.plural(run.rounds_run, "round")
    if run.rounds_run != run.rounds_planned:
        rounds = f"{words.count(run.rounds_run)} of {words.plural(run.rounds_planned, 'round')}"
    seconds = run.result.get("seconds")
    return f"{words.printable(run.name)}: {title}, {rounds}" + (
        f" in {words.duration(float(seconds))}" if seconds else ""
    )


def _released(run: RunView) -> str:
    shown = [
        f"{'AUC' if name == 'auc' else words.printable(name)} {words.number(value)}"
        for name, value in run.metrics.items()
    ]
    return ", ".join(shown) or "no metrics"


def _traffic(run: RunView) -> str:
    up, down, saved = (int(run.result.get(f"bytes_{name}", 0)) for name in ("up", "down", "saved"))
    compressed = f" (compressed, {decimal(saved)} less)" if saved > 0 else ""
    return f"{decimal(up)} up{compressed}, {decimal(down)} down"


def _line(console: Console, label: str, text: str, *, style: str = "", wrap: bool = False) -> None:
    if wrap and console.is_terminal:
        grid = Grid.grid()
        if label:
            grid.add_column(width=len(label), no_wrap=True)
            grid.add_row(Text(label, style="dim"), Text(text, style=style))
        else:
            grid.add_row(Text(text, style=style))
        console.print(grid, width=min(console.width, 100))
        return
    # One line, whatever its length: what is piped is searched, not read.
    console.print(Text.assemble((label, "dim"), (text, style)), soft_wrap=True)


def _grid(tables: list[Table], *, terminal: bool) -> Grid:
    """Return one grid whose cells hold each metric side by side."""
    # Between the columns two spaces (the box has one of its own) and no lines: it must fit, and be read when piped.
    grid = Grid(
        box=box.SIMPLE_HEAD if terminal else None, padding=(0, 1 if terminal else 2, 0, 0), pad_edge=False,
        show_edge=False, header_style="bold" if terminal else "",
    )  # fmt: skip
    grid.add_column("", max_width=26, overflow="fold")
    for name in tables[0].columns:
        grid.add_column(
            Text(_header(name)),
            justify="right",
            vertical="bottom",
            overflow="fold",
            width=_narrowest(name, len(tables)),
        )
    for index, row in enumerate(tables[0].rows):
        rows = [table.rows[index] for table in tables]
        cells = []
        for parts in zip(*(each.cells for each in rows), strict=True):
            cell = Text()
            for number, part in enumerate(parts):
                cell.append(" " if number else "")
                cell.append(part.text.rjust(4), style="bold cyan" if part.best and terminal else "")
            cells.append(cell)
        # "federated" stands one row above, and 80 columns are few.
        model = words.printable(row.model.removeprefix("federated, ") if row.kind == "reference" else row.model)
        grid.add_row(Text(model, style="bold" if row.kind == "federated" and terminal else ""), *cells)
    return grid


def _header(name: str) -> str:
    return words.shortened(name, 24)


def _narrowest(name: str, metrics: int) -> int:
    """The width below which a word of the header or a cell would be cut."""
    return min(12, max(5 * metrics - 1, *(len(word) for word in _header(name).split())))
