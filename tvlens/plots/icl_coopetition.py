"""Two mechanisms that share factors: losses over steps, and how often the first one is transient."""

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from tvlens.plots._axes import color_bar, powers
from tvlens.plots.palette import BLUE, EMPTY, GREY, ORANGE, SEQUENTIAL
from tvlens.plots.theme import Role, figure, percent, titled

MECHANISMS = {
    "loss_1": Role("mechanism 1 (in context)", BLUE, "solid", "circle"),
    "loss_2": Role("mechanism 2 (in weights)", ORANGE, "dash", "square"),
}
_COST = Role("cost of both", GREY, "dot", "x")
_FLOOR = 1e-8


def coopetition_curves(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw the losses of both mechanisms over steps: thin lines are seeds, thick ones their medians.

    Args:
        data: ``loss_1``, ``loss_2`` and ``cost`` by setting, seed and step, and ``alpha`` by setting; one
            panel a setting.
        title: The sentence that says what came out.

    Returns:
        The figure, both axes logarithmic.

    Raises:
        ValueError: A variable is missing.

    Example:
        >>> coopetition_curves(result.data)  # doctest: +SKIP

    References:
        Singh et al. 2025, arXiv 2503.05631.
    """
    missing = {*MECHANISMS, "cost", "alpha"} - set(map(str, data.variables))
    if missing:
        raise ValueError(
            f"the data lacks {', '.join(sorted(missing))}; it has: {', '.join(map(str, data))}"
        )
    n = data.sizes["setting"]
    heads = [_head(float(alpha)) for alpha in data["alpha"].values]
    fig = make_subplots(
        1, n, shared_yaxes=True, subplot_titles=heads, figure=figure(), horizontal_spacing=0.05
    )
    fig.update_annotations(font_size=13)
    step = data["step"].values
    for i in range(n):
        for name, role in {**MECHANISMS, "cost": _COST}.items():
            _lines(fig, step, np.maximum(data[name].isel(setting=i).values, _FLOOR), role, i + 1)
    learnt: Any = {"line": {"color": GREY, "dash": "dash", "width": 1}, "row": 1, "col": "all"}
    fig.add_hline(y=0.01, **learnt)
    last = np.log10(step[-1] + 1)
    ends = [min(1.0, last / 2), last]
    fig.update_xaxes(
        **powers(10 ** ends[0], 10**last), title_text="step, counted from 1", range=ends
    )
    low = int(np.floor(np.log10(max(_FLOOR, float(data["loss_2"].min())))))
    least = max(low, -8)
    fig.update_yaxes(**powers(10.0**least, 1, most=10), range=[least - 0.1, 0.6])
    fig.update_yaxes(title_text="loss", col=1)
    fig.update_layout(height=400, margin_t=46, meta={"min_width": 320 * n})
    small = "Dashed at .01: learnt. Thin lines: seeds; thick: their median."
    return titled(fig, title or "Two mechanisms that share factors", subtitle=small)


def _head(alpha: float) -> str:
    return f"<b>cost alpha = {alpha:g}</b>" if alpha else "<b>control: no cost</b>"


def _lines(fig: go.Figure, step: Any, curves: Any, role: Role, col: int) -> None:
    # A logarithmic axis has no place for step 0; what is hovered is the step itself.
    seeds, x = len(curves), step + 1
    # One trace for all seeds, with gaps: forty seeds must not be forty legend entries.
    gap = np.full((seeds, 1), np.nan)
    fig.add_scatter(
        x=np.tile(np.append(x, np.nan), seeds), y=np.hstack([curves, gap]).ravel(), mode="lines",
        line={"color": role.faint(0.35), "width": 1}, legendgroup=role.name, showlegend=False,
        hoverinfo="skip", row=1, col=col,
    )  # fmt: skip
    fig.add_scatter(
        x=x, y=np.median(curves, axis=0), customdata=step, mode="lines", name=role.name,
        legendgroup=role.name, showlegend=col == 1,
        line={"color": role.color, "width": 2.6, "dash": role.dash},
        hovertemplate=f"{role.name}<br>step %{{customdata:,}}: %{{y:.2g}}<extra></extra>", row=1, col=col,
    )  # fmt: skip


def coopetition_dials(rates: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """Draw how often mechanism 1 is transient, by cost and by the length of its rival's own factor.

    Args:
        rates: ``alpha, mu1, mu2, width, transient, low, high, least_1, final_1`` as ``Coopetition.rates()``
            gives them; a column of panels for each ``mu1``, and a row for each ``mu2``.
        title: The sentence that says what came out.

    Returns:
        The figure.

    Raises:
        ValueError: A column is missing, or a setting has several rows.

    Example:
        >>> coopetition_dials(result.rates())  # doctest: +SKIP

    References:
        Singh et al. 2025, arXiv 2503.05631.
    """
    needed = {"alpha", "mu1", "mu2", "width", "transient", "low", "high", "least_1", "final_1"}
    if missing := needed - set(rates.columns):
        raise ValueError(
            f"the table lacks {', '.join(sorted(missing))}; it has: {', '.join(rates.columns)}"
        )
    across, down = (sorted(set(rates[name])) for name in ("mu1", "mu2"))
    panels = list(product(down, across))
    fig = make_subplots(
        len(down), len(across), shared_yaxes=True, figure=figure(), horizontal_spacing=0.04,
        vertical_spacing=0.28 / len(down),
        subplot_titles=[f"<b>mu1 = {mu1:g}, mu2 = {mu2:g}</b>" for mu2, mu1 in panels],
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    for i, (mu2, mu1) in enumerate(panels):
        some: Any = rates[(rates["mu1"] == mu1) & (rates["mu2"] == mu2)]
        grids = {k: some.pivot(index="width", columns="alpha", values=k)
                 for k in ("transient", "low", "high", "least_1", "final_1")}  # fmt: skip
        share = grids["transient"]
        fig.add_heatmap(
            z=share.values, x=[f"{a:g}" for a in share.columns], y=[f"{w:g}" for w in share.index],
            zmin=0, zmax=1, colorscale=SEQUENTIAL, showscale=i == 0, xgap=1, ygap=1,
            text=[[percent(v) for v in row] for row in share.values], texttemplate="%{text}",
            colorbar=color_bar("share of seeds", height=230 * len(down)), textfont={"size": 12},
            customdata=np.stack([grids[k].values for k in ("low", "high", "least_1", "final_1")], axis=-1),
            hovertemplate="alpha %{x}, %{y} numbers in d<br>transient %{z:.2f} [%{customdata[0]:.2f}, "
            "%{customdata[1]:.2f}]<br>L1 at best %{customdata[2]:.2g}, in the end %{customdata[3]:.2g}"
            "<extra></extra>", row=i // len(across) + 1, col=i % len(across) + 1,
        )  # fmt: skip
    fig.update_xaxes(type="category", showgrid=False)
    fig.update_xaxes(title_text="cost alpha", row=len(down))
    fig.update_yaxes(type="category", showgrid=False)
    fig.update_yaxes(title_text="numbers in d", col=1)
    height, width = 100 + 230 * len(down), 260 * len(across)
    fig.update_layout(height=height, margin_t=46, meta={"min_width": width}, plot_bgcolor=EMPTY)
    return titled(
        fig, _most(rates) if title is None else title,
        subtitle="Share of seeds in which mechanism 1 came and went; d is mechanism 2's own factor.",
    )  # fmt: skip


def _most(rates: pd.DataFrame) -> str:
    """Where mechanism 1 comes and goes in most seeds."""
    top: Any = rates.loc[rates["transient"].idxmax()]
    if not top["transient"]:
        return f"Mechanism 1 came and went in no seed of {len(rates)} settings"
    dials = f"alpha = {top['alpha']:g}, mu1 = {top['mu1']:g}, mu2 = {top['mu2']:g}"
    return (
        f"Mechanism 1 came and went in up to {top['transient']:.0%} of seeds: at {dials}, with "
        f"{top['width']:g} numbers in d"
    )
