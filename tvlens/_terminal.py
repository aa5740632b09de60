"""How results look in a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

    from tvlens.results import Result

# What one line of a terminal has room for; everything else is in the files and in --json.
_COLUMNS = ("task", "layer", "baseline", "hypothesis", "regular", "ratio")
_FLOORS = ("majority", "query_blind", "control")
_HEADERS = {
    "hypothesis": "hypo-\nthesis",
    "query_blind": "query\nblind",
    "control": "random\nvector",
}


def summary_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """Show summaries: accuracies with their intervals below them, floors without."""
    table = Table(
        title="Accuracy on test queries, with 95 % intervals",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        leading=1,
        show_edge=False,
    )
    keys = [key for key in (*_COLUMNS, *_FLOORS) if key in summaries[0]]
    for key in keys:
        table.add_column(
            _HEADERS.get(key, key),
            justify="left" if key == "task" else "right",
            no_wrap=key == "task",
        )
    for summary in summaries:
        table.add_row(*(_cell(summary, key) for key in keys))
    return table


def _cell(summary: dict[str, Any], key: str) -> str:
    value = summary[key]
    if value is None:
        return "-"
    if not isinstance(value, float):
        return escape(str(value))
    if f"{key}_low" in summary and key not in _FLOORS:
        low, high = summary[f"{key}_low"], summary[f"{key}_high"]
        return f"[bold]{_short(value)}[/bold]\n[dim]{_short(low)}-{_short(high)}[/dim]"
    return _short(value)


def _short(share: float) -> str:
    """Write a share as papers do: .92, 1.00."""
    return f"{share:.2f}".removeprefix("0") if 0 <= share < 1 else f"{share:.2f}"


def show_tables(results: "Sequence[Result]") -> None:
    """Print what results found, with their tables."""
    from tvlens.pages import cells

    console = Console()
    for result in results:
        console.print(escape(result.finding()))
        for caption, frame in result.tables().items():
            head, *rows = cells(frame)
            table = Table(
                box=box.SIMPLE_HEAD,
                padding=(0, 1, 0, 0),
                title=escape(caption),
                title_justify="left",
            )
            for name in head:
                table.add_column(escape(name))
            for row in rows:
                table.add_row(*map(escape, row))
            console.print(table)


def show(frame: "pd.DataFrame", columns: Sequence[str], *, as_json: bool) -> None:
    """Print the columns that a terminal has room for, or all of them as JSON."""
    if as_json:
        typer.echo(frame.to_json(orient="records", force_ascii=False))
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        numeric = frame[column].dtype.kind in "if"
        table.add_column(
            column.replace("_", " "),
            justify="right" if numeric else "left",
            no_wrap=column == columns[0],
        )
    for row in frame[list(columns)].itertuples(index=False):
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else escape(str(v)) for v in row))
    Console().print(table)
