"""Theta on the move: bars of what arrives through a map, and a matrix of what one task does for another."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens._errors import unknown
from tvlens.plots._axes import color_bar
from tvlens.plots._bars import grouped, headed, share_bars, task_axes
from tvlens.plots._cells import written_cells
from tvlens.plots.palette import EMPTY, SEQUENTIAL, SKY
from tvlens.plots.theme import ROLES, figure, label, percent

_CONTROLS = ("mean", "shuffled", "random")
_RUNS = {
    "regular": ("demonstrations", ROLES["regular"].color),
    "own": ("own theta", ROLES["hypothesis"].color),
    "mapped": ("theta through the map", ROLES["majority"].color),
    "unmapped": ("theta as it is", SKY),
    "mean": ("mean of other tasks", ROLES["query_blind"].color),
    "shuffled": ("theta through a shuffled map", SKY),
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
    fig, places, step = grouped(len(tasks), len(chosen))
    for run, at in zip(chosen, places, strict=True):
        name, color = _RUNS[run]
        one = data.sel(run=run)
        hatched = run in _CONTROLS
        share_bars(
            fig, one, tasks, at=at, width=step * 0.9, name=name, color=color, hatched=hatched
        )
    task_axes(fig, tasks)
    fig.update_layout(height=420, meta={"min_width": 100 * len(tasks) + 120})
    small = "each map was fitted without the task · hatched: controls · error bars: 95% intervals"
    return headed(fig, data, title, small)


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
            colorbar=color_bar("accuracy", height=30 * len(rows)),
        )
    )  # fmt: skip
    ticks = {"tickvals": list(range(len(tasks))), "ticktext": [label(name) for name in tasks]}
    fig.update_xaxes(
        **ticks, side="top", tickangle=-30, showgrid=False, ticks="", title_text="whose queries"
    )
    ticks = {"tickvals": list(range(len(rows))), "ticktext": [label(name) for name in rows]}
    fig.update_yaxes(**ticks, autorange="reversed", showgrid=False, ticks="")
    width = 64 * len(tasks) + 240
    fig.update_layout(
        height=30 * len(rows) + 124, meta={"min_width": width}, plot_bgcolor=EMPTY, margin_b=20,
        margin_t=104,
    )  # fmt: skip
    title = str(data.attrs.get("crossed", "")) if title is None else title
    return headed(fig, data, title)
