"""Three accuracies per task, and the floors below which none of them means anything.

Bars are regular, hypothesis and baseline accuracy, dark to light; marks on the hypothesis bar are
its floors. A hypothesis bar that does not pass its floors shows no task vector, however long it is.
"""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tvlens.plots.palette import GREY, GRID, MUTED, PAPER
from tvlens.plots.theme import ROLES, figure, label, percent, titled

_BARS = ("regular", "hypothesis", "baseline")
_FLOORS = ("majority", "query_blind", "control")
_STEP = 0.28


def accuracy_bars(
    table: pd.DataFrame, *, sort: str = "given", title: str | None = None
) -> go.Figure:
    """Draw baseline, hypothesis and regular accuracy of every task, with intervals and floors.

    Args:
        table: One row per task. Needed: ``task, baseline, hypothesis, regular``. Used where
            present: ``family`` (groups the tasks), ``<accuracy>_low`` and ``<accuracy>_high``,
            ``layer``, ``model``, and the floors ``majority, query_blind, control``. NaN means "does
            not exist".
        sort: ``"given"`` keeps the order of the rows; a column name sorts by it, highest first, in
            each family.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: one row of bars per task.

    Raises:
        ValueError: A needed column is missing, the table is empty, or ``sort`` is no column.

    Example:
        >>> rows = [{"task": "to_upper", "baseline": 0.05, "hypothesis": 0.8, "regular": 0.9}]
        >>> len(accuracy_bars(pd.DataFrame(rows)).data) > 0
        True

    References:
        Hendel et al. 2023, arXiv 2310.15916.
    """
    missing = [name for name in ("task", *_BARS) if name not in table.columns]
    if missing:
        raise ValueError(
            f"the table lacks {', '.join(missing)}; it has: {', '.join(table.columns)}"
        )
    if table.empty:
        raise ValueError("the table has no rows: give one row per task")
    if sort != "given" and sort not in table.columns:
        raise ValueError(f"cannot sort by {sort!r}; the columns are: {', '.join(table.columns)}")
    table, headers = _rows(table, sort)
    fig = figure(barmode="overlay", bargap=0)
    for place, name in enumerate(_BARS):
        _bars(fig, table, name, offset=(place - 1) * _STEP)
    for name in _FLOORS:
        if name in table and bool(table[name].notna().to_numpy().any()):
            _floor(fig, table, name)
    _axes(fig, table, headers)
    small = "Error bars: 95% intervals. Marks on the hypothesis bars are its floors."
    return titled(fig, title or _sentence(table), subtitle=small)


def _rows(table: pd.DataFrame, sort: str) -> tuple[pd.DataFrame, dict[float, str]]:
    """Give every task a height on the axis, top to bottom, families together under a heading."""
    if sort != "given":
        table = table.sort_values(sort, ascending=False, kind="stable")
    families = table["family"].astype(str) if "family" in table else pd.Series("", table.index)
    headers: dict[float, str] = {}
    ordered, heights, at = [], [], 0.0
    for family in dict.fromkeys(families):
        if family:
            headers[at] = family
            at += 0.85
        block = table[families == family]
        ordered.append(block)
        heights += [at + i for i in range(len(block))]
        at += len(block) + 0.1
    return pd.concat(ordered).assign(_at=heights).reset_index(drop=True), headers


def _bars(fig: go.Figure, table: pd.DataFrame, name: str, *, offset: float) -> None:
    role, values = ROLES[name], table[name].astype(float)
    low, high = (
        table[end].astype(float) if (end := f"{name}_{side}") in table else values
        for side in ("low", "high")
    )
    texts = [
        f"<b>{label(task)}</b><br>{role.name} {percent(value)} [{percent(lo)}, {percent(hi)}]"
        for task, value, lo, hi in zip(table["task"], values, low, high, strict=True)
    ]
    if name == "hypothesis" and "layer" in table:
        texts = [
            f"{text}<br>layer {layer}" for text, layer in zip(texts, table["layer"], strict=True)
        ]
    error = {"type": "data", "array": high - values, "arrayminus": values - low}
    fig.add_bar(
        x=values,
        y=table["_at"] + offset,
        width=_STEP * 0.92,
        orientation="h",
        name=role.name,
        marker={"color": role.color, "line": {"width": 0}},
        error_x=error | {"color": GREY, "thickness": 1.2, "width": 2},
        customdata=texts,
        hovertemplate="%{customdata}<extra></extra>",
    )


def _floor(fig: go.Figure, table: pd.DataFrame, name: str) -> None:
    role = ROLES[name]
    texts = [
        f"<b>{label(task)}</b><br>floor: {role.name} {percent(value)}"
        for task, value in zip(table["task"], table[name], strict=True)
    ]
    symbol, size = {"majority": ("diamond-tall", 13), "query_blind": ("circle", 10)}.get(
        name, ("square", 6)
    )
    # A white rim keeps the marks apart from the bar and from each other where floors coincide.
    marker = {"symbol": symbol, "size": size, "color": role.color}
    fig.add_scatter(
        x=table[name],
        y=table["_at"],
        mode="markers",
        marker=marker | {"line": {"color": PAPER, "width": 1.3}},
        cliponaxis=False,
        name=f"floor: {role.name}",
        customdata=texts,
        hovertemplate="%{customdata}<extra></extra>",
    )


def _axes(fig: go.Figure, table: pd.DataFrame, headers: dict[float, str]) -> None:
    bottom, top = float(np.max(table["_at"])) + 0.62, -0.62
    for at, family in headers.items():
        fig.add_annotation(
            x=0, y=at, xref="paper", xanchor="left", showarrow=False,
            text=f"<b>{label(family)}</b>", font={"size": 12, "color": MUTED},
        )  # fmt: skip
        if at:
            fig.add_hline(y=at - 0.5, line={"color": GRID, "width": 1.5}, layer="below")
    plot_height = 36 * (bottom - top)
    names = [label(task) for task in table["task"]]
    fig.update_yaxes(
        range=[bottom, top],
        tickvals=table["_at"],
        ticktext=names,
        showgrid=False,
        ticks="",
        ticklabelstandoff=4,
    )
    ticks = [0, 0.25, 0.5, 0.75, 1]
    fig.update_xaxes(range=[-0.012, 1.02], tickvals=ticks, title_text="accuracy")
    fig.update_layout(
        height=plot_height + 190,
        legend={"y": -58 / plot_height, "traceorder": "normal"},
        meta={"min_width": 460},
    )


def _sentence(table: pd.DataFrame) -> str:
    mean = {name: float(np.nanmean(table[name].astype(float))) for name in _BARS}
    # The paper's own measure: how much of regular accuracy the vector alone reaches.
    part = f" ({mean['hypothesis'] / mean['regular']:.0%} of regular)" if mean["regular"] else ""
    over = f"Mean of {len(table)} tasks" if len(table) > 1 else str(table["task"].iloc[0])
    return (
        f"{over}: baseline {percent(mean['baseline'])}, hypothesis {percent(mean['hypothesis'])}"
        f"{part}, regular {percent(mean['regular'])}"
    )
