"""A page is what a report is, in Markdown: findings, tables and the command that made them.

It is for repositories and documents, where an HTML report with its figures is too much. Everything on it
comes from the results, so the same command makes the same page.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from tvlens._errors import needs
from tvlens.results import Result


def page(
    results: Result | Iterable[Result],
    *,
    title: str | None = None,
    command: str | None = None,
) -> str:
    """Write results as a page of Markdown.

    Args:
        results: One result or several.
        title: Heading; the result's own if there is one alone.
        command: What made them, as typed into a shell.

    Returns:
        The page.

    Raises:
        ValueError: There are no results.

    Example:
        >>> print(page(sweep, command="tvlens run layer_sweep"))  # doctest: +SKIP
    """
    needs("results", results, (Result, Iterable), "a Result or several")
    found = [results] if isinstance(results, Result) else list(results)
    if not found:
        raise ValueError("a page needs at least one result, got none")
    for item in found:
        needs("a result of a page", item, Result, "a Result, as tv.load or an experiment gives")
    alone = len(found) == 1
    heading = title or (found[0].title if alone else f"{len(found)} results")
    lines = [f"# {_plain(heading)}", ""]
    lines += [
        f"{_made(found[0].provenance)}, by" if command else f"{_made(found[0].provenance)}.",
        "",
    ]
    lines += ["```bash", command, "```", ""] if command else []
    kinds = dict.fromkeys(type(result) for result in found)
    for kind in kinds:
        same = [result for result in found if type(result) is kind]
        lines += _captioned(kind.overview_tables(same)) if len(same) > 1 else []
    for result in found:
        lines += [] if alone else [f"## {_plain(result.title)}", ""]
        lines += [f"> {_plain(result.finding())}", "", *_captioned(result.tables())]
    methods = list(dict.fromkeys(result.method for result in found if result.method))
    lines += (
        ["## Method", "", *(line for method in methods for line in (method, ""))] if methods else []
    )
    return "\n".join(lines).rstrip("\n") + "\n"


def cells(frame: pd.DataFrame, *, digits: int = 2) -> list[list[str]]:
    """Write out a table as text; ``x_low`` and ``x_high``, or ``low`` and ``high`` after ``x``, join ``x``.

    Args:
        frame: The table; its index is the first column unless it has no name.
        digits: Decimal places.

    Returns:
        The names of the columns, and then row by row.

    Example:
        >>> cells(pd.DataFrame({"x": [0.5], "x_low": [0.4], "x_high": [0.6]}))
        [['x'], ['0.50 (0.40 to 0.60)']]
    """
    whole = _named(frame.reset_index() if any(frame.index.names) else frame)
    ends = {f"{name}{end}" for name in whole.columns for end in ("_low", "_high")}
    columns = [str(name) for name in whole.columns if name not in ends]
    rows = [[_cell(row, name, digits) for name in columns] for row in whole.to_dict("records")]
    return [[name.replace("_", " ") for name in columns], *rows]


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """Say whose ends ``low`` and ``high`` are: those of the column before them."""
    columns = [str(name) for name in frame.columns]
    whose = columns[columns.index("low") - 1] if "low" in columns[1:] else ""
    ends = {"low": f"{whose}_low", "high": f"{whose}_high"} if whose else {}
    return frame.set_axis([ends.get(name, name) for name in columns], axis=1)


def _captioned(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    return [
        line
        for name, frame in tables.items()
        for line in (f"**{_plain(name)}**", "", *_table(frame), "")
    ]


_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")


def _plain(text: str) -> str:
    """Write a text on one line, so that Markdown takes neither HTML nor a link out of it; code stays code."""
    text, shown, at = " ".join(text.splitlines()), [], 0
    for code in [*_CODE.finditer(text), None]:
        said = text[at : code.start() if code else len(text)]
        said = said.replace("&", "&amp;").replace("<", "&lt;").replace("](", "]\\(")
        shown += [said, code[0] if code else ""]
        at = code.end() if code else at
    return "".join(shown)


def _table(frame: pd.DataFrame) -> list[str]:
    head, *rows = cells(frame, digits=3)
    return [_line(head), "|" + "---|" * len(head), *map(_line, rows)]


def _made(made: Mapping[str, Any]) -> str:
    """Where, with what and when."""
    model = made.get("model_facts", {})
    where = model.get("device") or made.get("device")
    device = f" on {where}" if where else ""
    seed = f", seed {made['seed']}" if made.get("seed") is not None else ""
    versions = made.get("versions", {})
    torch = f", torch {versions['torch']}" if "torch" in versions else ""
    return f"Made{device} on {str(made['created'])[:10]}{torch}{seed}"


def _cell(row: Mapping[Any, Any], name: str, digits: int) -> str:
    shown = _value(row[name], digits)
    if shown and f"{name}_low" in row and row[f"{name}_low"] == row[f"{name}_low"]:
        shown += f" ({_value(row[f'{name}_low'], digits)} to {_value(row[f'{name}_high'], digits)})"
    return shown


def _value(value: Any, digits: int) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _line(cells: Iterable[str]) -> str:
    safe = (_plain(cell).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(safe)} |"
