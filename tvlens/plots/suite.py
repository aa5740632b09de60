"""Several models side by side: mean accuracy by normalised depth, and the paper's bars.

A curve means something only between its levels, so each model's are drawn with it: demonstrations above, the
bare query and a random vector below.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from tvlens.plots._notes import notes
from tvlens.plots.accuracy_bars import accuracy_bars
from tvlens.plots.palette import BLUE, GREEN, INK, MUTED, ORANGE, PAPER, PURPLE, SKY, VERMILION
from tvlens.plots.theme import ROLES, Role, figure, label, percent, titled

# Okabe and Ito's; markers tell them apart in greyscale.
_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK)
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star-triangle-down")
_LEVELS = ("regular", "baseline", "control")


def accuracy_by_depth(
    curves: xr.Dataset, *, x: str = "depth", title: str | None = None
) -> go.Figure:
    """Draw mean accuracy over tasks by depth, one line for each model.

    Args:
        curves: What `tvlens.experiments.suite.Suite.curves` gives: ``hypothesis`` and ``control`` by model
            and layer, ``regular`` and ``baseline`` by model, each with ``_low`` and ``_high``; ``peak``.
        x: ``"depth"`` (0 first layer, 1 last), or ``"layer"``.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: bands are 95 % intervals, stars the layer with the highest mean on dev, flat lines the
        levels of each model.

    Raises:
        ValueError: The data lacks a variable, or there is no such axis.

    Example:
        >>> accuracy_by_depth(result.curves())  # doctest: +SKIP

    References:
        Hendel et al. 2023, arXiv 2310.15916, figure 3.
    """
    needed = ("hypothesis", "hypothesis_low", "hypothesis_high", "peak", *_LEVELS)
    missing = [name for name in needed if name not in curves]
    if missing:
        raise ValueError(
            f"the data lacks {', '.join(missing)}; it has: {', '.join(map(str, curves))}"
        )
    if x not in ("depth", "layer"):
        raise ValueError(f"x is 'depth' or 'layer'; {x!r} arrived")
    fig, several = figure(), curves.sizes["model"] > 1
    for i, name in enumerate(map(str, curves["model"].values)):
        color, symbol = _COLORS[i % len(_COLORS)], _SYMBOLS[i % len(_SYMBOLS)]
        role = Role(name if several else ROLES["hypothesis"].name, color, "solid", symbol)
        one = curves.isel(model=i)
        one = one.isel(layer=slice(int(one["n_layers"])))
        at = one[x].values.astype(float)
        _levels(fig, one, name, at, color=color if several else None)
        _curve(fig, one, name, at, role, named="top center" if i % 2 == 0 else "bottom center")
    if several:
        _keys(fig)
    fig.update_xaxes(title_text="depth (layer / last layer)" if x == "depth" else "layer")
    fig.update_yaxes(range=[-0.02, 1.04], tickvals=[0, 0.25, 0.5, 0.75, 1], title_text="accuracy")
    fig.update_layout(height=490, legend={"y": -0.17}, hovermode="closest", meta={"min_width": 460})
    said = curves.attrs.get("finding", "") if title is None else title
    note = notes(curves)
    shots = f"{note['shots']} shots" if "shots" in note else ""
    seeds = f"{len(note['seeds'])} seed{'s' * (len(note['seeds']) > 1)}" if "seeds" in note else ""
    small = ["mean over tasks", shots, seeds, "95% bands", "★ highest mean on dev"]
    return titled(fig, said, subtitle=" · ".join(filter(None, small)))


def _curve(
    fig: go.Figure, one: xr.Dataset, name: str, at: np.ndarray, role: Role, *, named: str
) -> None:
    low, high = one["hypothesis_low"].values, one["hypothesis_high"].values
    y, shared = one["hypothesis"].values, {"legendgroup": name}
    fig.add_scatter(
        x=np.concatenate([at, at[::-1]]), y=np.concatenate([high, low[::-1]]), fill="toself",
        fillcolor=role.faint(0.15), line_width=0, mode="lines", hoverinfo="skip", showlegend=False,
        **shared,
    )  # fmt: skip
    texts = [
        f"<b>{label(name)}</b><br>layer {layer}<br>task vector {percent(v)} [{percent(a)}, {percent(b)}]"
        f"<br>random vector {percent(c)}"
        for layer, v, a, b, c in zip(
            one["layer"].values, y, low, high, one["control"].values, strict=True
        )
    ]
    hover = {"customdata": texts, "hovertemplate": "%{customdata}<extra></extra>"}
    fig.add_scatter(
        x=at, y=y, mode="lines+markers", name=label(role.name), line={"color": role.color, "width": 2.4},
        marker={"size": 5, "symbol": role.symbol}, **hover, **shared,
    )  # fmt: skip
    best = int(one["peak"])
    star = {
        "symbol": "star",
        "size": 15,
        "color": role.color,
        "line": {"color": PAPER, "width": 1},
    }
    fig.add_scatter(
        x=[at[best]], y=[y[best]], mode="markers+text", marker=star, text=f"layer {best}",
        textposition=named, textfont={"color": role.color, "size": 12}, cliponaxis=False,
        showlegend=False, customdata=[texts[best]], hovertemplate="%{customdata}<extra></extra>", **shared,
    )  # fmt: skip


def _levels(
    fig: go.Figure, one: xr.Dataset, name: str, at: np.ndarray, *, color: str | None
) -> None:
    """Draw what has no layer as flat lines; the random vector as its mean at the peak."""
    for run in _LEVELS:
        role = ROLES[run]
        share = one.isel(layer=int(one["peak"])) if run == "control" else one
        value, low, high = (float(share[f"{run}{end}"]) for end in ("", "_low", "_high"))
        text = f"<b>{label(name)}</b><br>{role.name} {percent(value)} [{percent(low)}, {percent(high)}]"
        fig.add_scatter(
            x=at, y=np.full(len(at), value), mode="lines", name=role.name, legendgroup=run if color is None
            else name, showlegend=color is None, customdata=[text] * len(at),
            line={"color": color or role.color, "width": 1.6, "dash": role.dash}, opacity=0.85,
            hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip


def _keys(fig: go.Figure) -> None:
    """Say what the dashes mean where colours mean models."""
    for run in _LEVELS:
        line = {"color": MUTED, "width": 1.6, "dash": ROLES[run].dash}
        fig.add_scatter(
            x=[None], y=[None], mode="lines", name=ROLES[run].name, line=line, hoverinfo="skip"
        )


def model_bars(
    table: pd.DataFrame,
    *,
    n_tasks: int,
    reported: Mapping[str, tuple[float, float, float]] | None = None,
    title: str | None = None,
) -> go.Figure:
    """Draw baseline, hypothesis and regular accuracy of each model, mean over tasks.

    Args:
        table: One row for each model: ``model, baseline, hypothesis, regular`` with their intervals, and
            floors, as `tvlens.plots.accuracy_bars` takes them.
        n_tasks: Over how many tasks.
        reported: Baseline, hypothesis and regular that the paper reports for its models; drawn below the
            measured ones, without intervals.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure.

    Raises:
        ValueError: A needed column is missing, or the table is empty.

    Example:
        >>> rows = [{"model": "m", "baseline": 0.1, "hypothesis": 0.5, "regular": 0.6}]
        >>> len(model_bars(pd.DataFrame(rows), n_tasks=18).data)
        3

    References:
        Hendel et al. 2023, arXiv 2310.15916, figure 4 and table 2.
    """
    if "model" not in table or table.empty:
        raise ValueError("the table needs a column 'model' and one row for each model")
    rows = table.rename(columns={"model": "task"})
    if reported:
        rows = rows.assign(family="measured here")
        runs = ("baseline", "hypothesis", "regular")
        others: list[dict[str, Any]] = [
            {
                "task": name,
                "family": "reported by Hendel et al. 2023",
                **dict(zip(runs, v, strict=True)),
            }
            for name, v in reported.items()
        ]
        rows = pd.concat([rows, pd.DataFrame(others)], ignore_index=True)
    said = "; ".join(
        f"{row['model']}: baseline {percent(row['baseline'])}, hypothesis {percent(row['hypothesis'])}, "
        f"regular {percent(row['regular'])}"
        for row in table.to_dict("records")
    )
    return accuracy_bars(rows, title=title or f"Mean of {n_tasks} tasks: {said}")
