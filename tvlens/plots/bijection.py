"""Bars side by side: demonstrations, one theta, and what tells its failure from the model's.

Small marks on a bar show its queries by direction: where they stand far apart, the vector knows one way only.
"""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens._errors import unknown
from tvlens.plots._notes import notes
from tvlens.plots.theme import INK, MUTED, ROLES, figure, label, percent, titled

# Run: what it is called, its colour.
_RUNS = {
    "regular_one_way": ("demonstrations of the query's direction alone", "#7d8896"),
    "regular": ("demonstrations of both ways", ROLES["regular"].color),
    "theta": ("one theta of both ways", ROLES["hypothesis"].color),
    "same_way": ("theta, dummy queries of the query's direction", "#56B4E9"),
    "other_way": ("theta, dummy queries of the other direction", "#b3d3ec"),
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
    fig, step = figure(barmode="overlay", bargap=0), 0.86 / len(runs)
    for j, run in enumerate(runs):
        at = np.arange(len(tasks)) + (j - (len(runs) - 1) / 2) * step
        _bars(fig, data.sel(run=run), run, tasks, at, step)
    for direction, symbol in _MARKS.items():
        marker = {"symbol": symbol, "size": 7, "color": MUTED}
        fig.add_scatter(
            x=[None], y=[None], mode="markers", marker=marker, name=f"its {direction} queries"
        )
    ticks = {"tickvals": list(range(len(tasks))), "ticktext": [label(name) for name in tasks]}
    fig.update_xaxes(**ticks, range=[-0.52, len(tasks) - 0.48], showgrid=False, ticks="")
    fig.update_yaxes(range=[-0.015, 1.02], title_text="accuracy")
    fig.update_layout(height=430, meta={"min_width": 110 * len(tasks) + 120})
    note = notes(data)
    shots = f"{note['shots']} shots" if "shots" in note else ""
    parts = [str(note.get("model", "")), shots, "error bars: 95% intervals"]
    said = str(data.attrs.get("finding", "")) if title is None else title
    return titled(fig, said, subtitle=" · ".join(filter(None, parts)), width=92)


def _bars(
    fig: go.Figure, data: xr.Dataset, run: str, tasks: list[str], at: np.ndarray, step: float
) -> None:
    name, color = _RUNS[run]
    both = data.sel(direction="both")
    rate, low, high = (both[part].values for part in ("accuracy", "low", "high"))
    ways = {way: data.sel(direction=way)["accuracy"].values for way in _MARKS}
    texts = [
        f"<b>{label(task)}</b><br>{name} {percent(rate[i])} [{percent(low[i])}, {percent(high[i])}]"
        + "".join(f"<br>{way} {percent(values[i])}" for way, values in ways.items())
        for i, task in enumerate(tasks)
    ]
    fig.add_bar(
        x=at, y=rate, width=step * 0.9, name=name, marker={"color": color, "line": {"width": 0}},
        error_y={"type": "data", "array": high - rate, "arrayminus": rate - low,
                 "color": "#7d8896", "thickness": 1.1, "width": 2},
        customdata=texts, hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    for way, symbol in _MARKS.items():
        shift = step * (0.17 if way == "forward" else -0.17)
        line = {"color": "white", "width": 0.8}
        fig.add_scatter(
            x=at + shift, y=ways[way], mode="markers", showlegend=False, hoverinfo="skip",
            marker={"symbol": symbol, "size": 7, "color": INK, "line": line},
        )  # fmt: skip
