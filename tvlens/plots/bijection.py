"""Bars side by side: demonstrations, one theta, and what tells its failure from the model's.

Small marks on a bar show its queries by direction: where they stand far apart, the vector knows one way only.
"""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens._errors import unknown
from tvlens.plots._bars import grouped, headed, share_bars, task_axes, told_shots
from tvlens.plots.palette import GREY, INK, MUTED, PAPER, SKY
from tvlens.plots.theme import ROLES, percent

# Run: what it is called, its colour.
_RUNS = {
    "regular_one_way": ("demonstrations of the query's direction alone", GREY),
    "regular": ("demonstrations of both ways", ROLES["regular"].color),
    "theta": ("one theta of both ways", ROLES["hypothesis"].color),
    "same_way": ("theta, dummy queries of the query's direction", SKY),
    "other_way": ("theta, dummy queries of the other direction", SKY),
    "one_way": ("theta of the query's direction alone", ROLES["majority"].color),
    "wrong_way": ("theta of the other direction alone", ROLES["query_blind"].color),
    "random": ("random vector", ROLES["control"].color),
    "baseline": ("query only", ROLES["baseline"].color),
}
_SHOWN = (
    "regular_one_way",
    "regular",
    "theta",
    "same_way",
    "other_way",
    "one_way",
    "wrong_way",
    "random",
)
_CONTROLS = ("other_way", "wrong_way", "random")
_MARKS = {"forward": "triangle-right", "backward": "triangle-left"}


def bijection_bars(
    data: xr.Dataset, *, runs: tuple[str, ...] = _SHOWN, title: str | None = None
) -> go.Figure:
    """Draw accuracies by task and run as grouped bars, with intervals and both directions marked.

    Args:
        data: What `tvlens.experiments._bijection.Bijection.drawn` gives.
        runs: Which runs.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure.

    Raises:
        ValueError: There is no such run.

    Example:
        >>> bijection_bars(result.drawn(), runs=("regular", "theta"))  # doctest: +SKIP
    """
    for name in runs:
        if name not in _RUNS:
            raise unknown("run", name, _RUNS)
    tasks = [str(name).removesuffix("_both") for name in data["task"].values]
    fig, places, step = grouped(len(tasks), len(runs))
    for run, at in zip(runs, places, strict=True):
        _bars(fig, data.sel(run=run), run, tasks, at, step)
    for direction, symbol in _MARKS.items():
        marker = {"symbol": symbol, "size": 7, "color": MUTED}
        fig.add_scatter(
            x=[None], y=[None], mode="markers", marker=marker, name=f"its {direction} queries",
            hoverinfo="skip",
        )  # fmt: skip
    task_axes(fig, tasks, floor=-0.015)
    fig.update_layout(height=430, meta={"min_width": 110 * len(tasks) + 120})
    return headed(
        fig, data, title, told_shots(data), "hatched: controls · error bars: 95% intervals"
    )


def _bars(
    fig: go.Figure, data: xr.Dataset, run: str, tasks: list[str], at: np.ndarray, step: float
) -> None:
    name, color = _RUNS[run]
    ways = {way: data.sel(direction=way)["accuracy"].values for way in _MARKS}
    more = [
        "<br>".join(f"{way} {percent(values[i])}" for way, values in ways.items())
        for i in range(len(tasks))
    ]
    both = data.sel(direction="both")
    share_bars(
        fig, both, tasks, at=at, width=step * 0.9, name=name, color=color, more=more,
        hatched=run in _CONTROLS,
    )  # fmt: skip
    for way, symbol in _MARKS.items():
        shift = step * (0.17 if way == "forward" else -0.17)
        line = {"color": PAPER, "width": 0.8}
        fig.add_scatter(
            x=at + shift, y=ways[way], mode="markers", showlegend=False, hoverinfo="skip",
            marker={"symbol": symbol, "size": 7, "color": INK, "line": line},
        )  # fmt: skip
