"""Shares as bars with intervals: a group for each task, a place in it for each run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens.plots._notes import notes
from tvlens.plots.palette import GREY, PAPER
from tvlens.plots.theme import figure, label, percent, titled


def grouped(n_groups: int, n_places: int) -> tuple[go.Figure, list[np.ndarray], float]:
    """Make an empty figure for bars in groups.

    Args:
        n_groups: How many groups stand side by side, one unit apart.
        n_places: How many places each has.

    Returns:
        The figure; the middle of every place in all groups; how wide a place is.
    """
    step = 0.86 / n_places
    places = [np.arange(n_groups) + (j - (n_places - 1) / 2) * step for j in range(n_places)]
    return figure(barmode="overlay", bargap=0), places, step


def share_bars(
    fig: go.Figure,
    data: xr.Dataset,
    tasks: Sequence[str],
    *,
    at: np.ndarray,
    width: float,
    name: str,
    color: str,
    what: str = "",
    more: Sequence[str] = (),
    hatched: bool = False,
    **trace: Any,
) -> None:
    """Add one bar a task, with its interval.

    Args:
        fig: The figure; it is changed.
        data: ``accuracy``, ``low`` and ``high`` by task.
        tasks: What the tasks are called.
        at: Where the bars stand.
        width: How wide they are.
        name: Whose accuracy it is.
        color: Their colour.
        what: What of it, for the hover.
        more: Further lines of each task's hover.
        hatched: Whether the bars are hatched, as those of controls are.
        **trace: What else Plotly is told of the bars.
    """
    rate, low, high = (data[part].values for part in ("accuracy", "low", "high"))
    texts = [
        "<br>".join(
            [
                f"<b>{label(task)}</b>",
                f"{name}{what} {percent(rate[i])} [{percent(low[i])}, {percent(high[i])}]",
                *more[i : i + 1],
            ]
        )
        for i, task in enumerate(tasks)
    ]
    marker: dict[str, Any] = {"color": color, "line": {"width": 0}}
    if hatched:
        marker["pattern"] = {"shape": "/", "fgcolor": PAPER, "fillmode": "overlay", "size": 6}
    fig.add_bar(
        x=at, y=rate, width=width, name=name, marker=marker,
        error_y={"type": "data", "array": high - rate, "arrayminus": rate - low, "color": GREY,
                 "thickness": 1.1, "width": 2},
        customdata=texts, hovertemplate="%{customdata}<extra></extra>", **trace,
    )  # fmt: skip


def task_axes(fig: go.Figure, tasks: Sequence[str], *, floor: float = 0) -> None:
    """Name the groups, and let accuracy go from 0 (or a little below, for marks) to 1."""
    ticks = {"tickvals": list(range(len(tasks))), "ticktext": [label(name) for name in tasks]}
    fig.update_xaxes(**ticks, range=[-0.52, len(tasks) - 0.48], showgrid=False, ticks="")
    fig.update_yaxes(range=[floor, 1.02], title_text="accuracy")


def headed(fig: go.Figure, data: xr.Dataset, title: str | None, *small: str) -> go.Figure:
    """Set the data's finding above a figure, unless there is a title, and below it model and notes."""
    said = str(data.attrs.get("finding", "")) if title is None else title
    parts = [str(notes(data).get("model", "")), *small]
    return titled(fig, said, subtitle=" · ".join(filter(None, parts)))


def told_shots(data: xr.Dataset) -> str:
    """How many demonstrations a prompt had, where that is known."""
    note = notes(data)
    return f"{note['shots']} shots" if "shots" in note else ""
