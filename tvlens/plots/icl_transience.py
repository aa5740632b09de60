"""In-context learning over training: when copying comes, and when each group of classes gives it up."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from tvlens.plots._axes import powers
from tvlens.plots.palette import BLUE, MUTED, VERMILION
from tvlens.plots.theme import Role, figure, titled

GROUPS = {
    "high": Role("common classes", BLUE, "solid", "circle"),
    "low": Role("rare classes", VERMILION, "solid", "diamond"),
}
_BESIDE = {"high": "dot", "low": "dashdot"}


def transience_curves(
    data: xr.Dataset, times: pd.DataFrame, *, chance: float | None = None, title: str | None = None
) -> go.Figure:
    """Draw the error with moved labels over training steps, thin lines for seeds.

    Args:
        data: ``error`` by trained, seed, step and probe.
        times: ``half``, ``predicted`` and ``measured`` steps by group.
        chance: Where to draw the line of guessing.
        title: The sentence that says what came out.

    Returns:
        The figure, steps on a logarithmic axis; vertical lines are crossovers.

    Raises:
        ValueError: The data has no errors.

    Example:
        >>> transience_curves(result.data, result.times())  # doctest: +SKIP

    References:
        Chan et al. 2025, arXiv 2410.23042; Singh et al. 2023, arXiv 2311.08360.
    """
    if "error" not in data:
        raise ValueError(f"the data lacks 'error'; it has: {', '.join(map(str, data))}")
    fig, step = figure(), data["step"].values
    for group, role in GROUPS.items():
        curves = data["error"].sel(trained="transformer", probe=f"relevant {group} flipped")
        curves = curves.transpose("seed", "step").values
        gap = np.full((len(curves), 1), np.nan)
        fig.add_scatter(
            x=np.tile(np.append(step, np.nan), len(curves)), y=np.hstack([curves, gap]).ravel(), mode="lines",
            line={"color": role.faint(0.3), "width": 1}, hoverinfo="skip", showlegend=False,
            legendgroup=group,
        )  # fmt: skip
        fig.add_scatter(
            x=step, y=curves.mean(axis=0), mode="lines+markers", name=role.name, legendgroup=group,
            line={"color": role.color, "width": 2.5}, marker={"symbol": role.symbol, "size": 5},
            hovertemplate=f"{role.name}<br>step %{{x:,}}: %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
        known = (
            data["error"].sel(trained="transformer", probe=f"irrelevant {group} base").mean("seed")
        )
        fig.add_scatter(
            x=step, y=known.values, mode="lines", name=f"{role.name}, irrelevant context",
            line={"color": role.color, "width": 1.5, "dash": _BESIDE[group]},
            hovertemplate=f"{role.name}, irrelevant context<br>step %{{x:,}}: %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
        _crossovers(fig, times.loc[group], role)
    if chance is not None:
        fig.add_hline(y=chance, line={"color": MUTED, "width": 1, "dash": "dot"}, layer="below")
    # Lines do not widen an axis by themselves.
    crossings = times[["predicted", "measured"]].to_numpy()
    drawn = np.append(step, crossings[np.isfinite(crossings)])
    low, high = drawn.min() / 1.2, drawn.max() * 1.1
    fig.update_xaxes(
        **powers(low, high), title_text="training step", range=[np.log10(low), np.log10(high)]
    )
    fig.update_yaxes(title_text="error", range=[-0.04, 1.04])
    fig.update_layout(height=480, legend={"y": -0.2}, meta={"min_width": 640})
    small = (
        "Solid: relevant context, moved labels (0: copies, 1: recalls). Vertical: predicted crossover "
        "N* (dashed) and measured with in-weight predictors (dash-dotted). Curves without marks: irrelevant "
        "context, true labels; dotted line: guessing."
    )
    return titled(fig, title or "In-context learning over training", subtitle=small)


def _crossovers(fig: go.Figure, row: Any, role: Role) -> None:
    for name, dash in (("predicted", "dash"), ("measured", "dashdot")):
        if np.isfinite(row[name]):
            fig.add_vline(x=row[name], line={"color": role.faint(0.7), "width": 1.2, "dash": dash})
