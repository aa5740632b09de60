"""Theta on the move: bars of what arrives through a map, and a matrix of what one task does for another."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens._errors import unknown
from tvlens.plots._cells import written_cells
from tvlens.plots._notes import notes
from tvlens.plots.theme import INK, ROLES, SEQUENTIAL, figure, label, percent, titled

_RUNS = {
    "regular": ("demonstrations", ROLES["regular"].color),
    "own": ("own theta", ROLES["hypothesis"].color),
    "mapped": ("theta through the map", ROLES["majority"].color),
    "unmapped": ("theta as it is", "#56B4E9"),
    "mean": ("mean of other tasks", ROLES["query_blind"].color),
    "shuffled": ("theta through a shuffled map", "#b3d3ec"),
    "random": ("random vector", ROLES["control"].color),
    "baseline": ("query only", ROLES["baseline"].color),
}


def transfer_bars(
    data: xr.Dataset, *, runs: tuple[str, ...] | None = None, title: str | None = None
) -> go.Figure:
    """Draw accuracies by task and run as grouped bars with intervals.

    Args:
        data: What `tvlens.experiments._transfer.Transfer.drawn` gives.
        runs: Which runs; all that there are if not given.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure.

    Raises:
        ValueError: There is no such run.

    Example:
        >>> transfer_bars(result.drawn(), runs=("own", "mapped"))  # doctest: +SKIP
    """
    there = [name for name in _RUNS if name in data["run"].values]
    chosen = list(runs or there)
    for name in chosen:
        if name not in there:
            raise unknown("run", name, there)
    tasks = [str(name) for name in data["task"].values]
    fig, step = figure(barmode="overlay", bargap=0), 0.86 / len(chosen)
    for j, run in enumerate(chosen):
        name, color = _RUNS[run]
        one = data.sel(run=run)
        rate, low, high = (one[part].values for part in ("accuracy", "low", "high"))
        texts = [
            f"<b>{label(task)}</b><br>{name} {percent(r)} [{percent(lo)}, {percent(hi)}]"
            for task, r, lo, hi in zip(tasks, rate, low, high, strict=True)
        ]
        fig.add_bar(
            x=np.arange(len(tasks)) + (j - (len(chosen) - 1) / 2) * step, y=rate,
            width=step * 0.9, name=name, marker={"color": color, "line": {"width": 0}},
            error_y={"type": "data", "array": high - rate, "arrayminus": rate - low,
                     "color": "#7d8896", "thickness": 1.1, "width": 2},
            customdata=texts, hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    ticks = {"tickvals": list(range(len(tasks))), "ticktext": [label(name) for name in tasks]}
    fig.update_xaxes(**ticks, range=[-0.52, len(tasks) - 0.48], showgrid=False, ticks="")
    fig.update_yaxes(range=[0, 1.02], title_text="accuracy")
    fig.update_layout(height=420, meta={"min_width": 100 * len(tasks) + 120})
    return _titled(fig, data, title, "each map was fitted without the task · error bars: 95%")


def cross_matrix(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw the accuracy of theta of every task on the queries of every task.

    Args:
        data: What `tvlens.experiments._transfer.Transfer.drawn` gives.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: thetas downwards, queries to the right; two more rows are the random vector and the
        query alone.

    Example:
        >>> cross_matrix(result.drawn())  # doctest: +SKIP
    """
    data = data.transpose("vector", "task", "run", ...)
    tasks, vectors = ([str(v) for v in data[name].values] for name in ("task", "vector"))
    floors = [name for name in ("random", "baseline") if name in data["run"].values]
    below = [data.sel(run=name) for name in floors]
    parts: dict[str, Any] = {
        part: np.vstack([data[f"cross_{part}"].values, *(one[part].values for one in below)])
        for part in ("accuracy", "low", "high")
    }
    rows = [f"theta of {v}" for v in vectors] + [_RUNS[name][0] for name in floors]
    words = [[percent(value) for value in row] for row in parts["accuracy"]]
    hover = [
        [
            f"<b>{label(row)}</b><br>on queries of {label(task)}<br>{percent(values[0])} "
            f"[{percent(values[1])}, {percent(values[2])}]"
            for j, task in enumerate(tasks)
            for values in [[parts[part][i, j] for part in ("accuracy", "low", "high")]]
        ]
        for i, row in enumerate(rows)
    ]
    fig = figure()
    fig.add_trace(
        written_cells(
            parts["accuracy"], words, hover, colorscale=SEQUENTIAL, zmin=0, zmax=1,
            colorbar={"thickness": 10, "outlinewidth": 0, "title": "accuracy"},
        )
    )  # fmt: skip
    ticks = {"tickvals": list(range(len(tasks))), "ticktext": [label(name) for name in tasks]}
    fig.update_xaxes(**ticks, side="top", tickangle=-30, showgrid=False, ticks="")
    ticks = {"tickvals": list(range(len(rows))), "ticktext": [label(name) for name in rows]}
    fig.update_yaxes(**ticks, autorange="reversed", showgrid=False, ticks="")
    width = 64 * len(tasks) + 240
    fig.update_layout(height=30 * len(rows) + 130, meta={"min_width": width}, font_color=INK)
    fig.update_layout(margin_t=100)
    title = str(data.attrs.get("crossed", "")) if title is None else title
    return _titled(fig, data, title, "columns: whose queries", width=62)


def _titled(
    fig: go.Figure, data: xr.Dataset, title: str | None, more: str, *, width: int = 92
) -> go.Figure:
    said = str(data.attrs.get("finding", "")) if title is None else title
    model = str(notes(data).get("model", ""))
    return titled(fig, said, subtitle=" · ".join(filter(None, [model, more])), width=width)
