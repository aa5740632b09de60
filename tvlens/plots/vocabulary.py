"""What does the task vector say, read through the model's own unembedding?

Each row is the vector of one layer sent through the final norm and the unembedding: the tokens that
it promotes most, first rank at the left. Tokens are written so that spaces and newlines are seen;
the same token may stand in many cells, so the axes are numbers and never token names.
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens.plots._axes import color_bar
from tvlens.plots._notes import chosen_layer, notes
from tvlens.plots.palette import SEQUENTIAL
from tvlens.plots.theme import MONO, ROLES, figure, titled, token_label, visible


def vocabulary(data: xr.Dataset, *, ranks: int = 8, title: str | None = None) -> go.Figure:
    """Draw the tokens that the task vector promotes, by layer and rank.

    Args:
        data: A layer sweep's data: ``top_token(layer, rank)`` and ``top_probability(layer, rank)``.
        ranks: How many ranks to draw, best first.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: layers upwards, ranks to the right, probability as colour; hover for the whole
        token.

    Raises:
        ValueError: The data has no projection, or ``ranks`` is less than 1.

    Example:
        >>> vocabulary(sweep.data, ranks=5)  # doctest: +SKIP

    References:
        Hendel et al. 2023, arXiv 2310.15916.
    """
    for needed in ("top_token", "top_probability"):
        if needed not in data:
            raise ValueError(f"the data has no {needed!r}; it has: {', '.join(map(str, data))}")
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    data = data.isel(rank=slice(ranks)).transpose(..., "layer", "rank")
    note = notes(data)
    tokens, shares = data["top_token"].values, data["top_probability"].values.astype(float)
    fig = figure()
    fig.add_trace(_cells(data["layer"].values, tokens, shares))
    best = chosen_layer(data)
    _axes(fig, data, best)
    if title is None:
        title = _sentence(data, note, best)
    small = f"{note.get('model', '')} · ␣ space, ↵ newline, ∅ empty token".lstrip(" ·")
    return titled(fig, title, subtitle=small)


def _cells(layers: np.ndarray, tokens: np.ndarray, shares: np.ndarray) -> go.Heatmap:
    hover = [[token_label(repr(str(token))) for token in row] for row in tokens]
    return go.Heatmap(
        z=shares,
        x=np.arange(1, tokens.shape[1] + 1),
        y=layers,
        text=[[token_label(str(token), limit=11) for token in row] for row in tokens],
        texttemplate="%{text}",
        textfont={"family": MONO, "size": 11},
        customdata=hover,
        hovertemplate="layer %{y}, rank %{x}<br><b>%{customdata}</b><br>"
        "probability %{z:.3f}<extra></extra>",
        hoverongaps=False,
        colorscale=SEQUENTIAL,
        zmin=0,
        # A floor on the scale: where nothing passes one in ten, nothing should look certain.
        zmax=max(float(np.nanmax(shares, initial=0)), 0.1),
        xgap=1,
        ygap=1,
        colorbar=color_bar("probability", height=_tall(len(layers))),
    )


def _tall(layers: int) -> int:
    """How tall the map is, in pixels."""
    return max(22 * layers, 120)


def _axes(fig: go.Figure, data: xr.Dataset, best: Any) -> None:
    layers = [int(layer) for layer in data["layer"].values]
    ranks = data.sizes["rank"]
    names = [f"<b>► {layer}</b>" if layer == best else str(layer) for layer in layers]
    fig.update_yaxes(
        tickvals=layers, ticktext=names, title_text="layer", showgrid=False, ticks="",
        range=[layers[0] - 0.5, layers[-1] + 0.5], tickfont_size=11,
    )  # fmt: skip
    fig.update_xaxes(
        tickvals=list(range(1, ranks + 1)), title_text="rank", showgrid=False, ticks="",
        range=[0.5, ranks + 0.5],
    )  # fmt: skip
    if best in layers:
        fig.add_shape(
            type="rect", x0=0.5, x1=ranks + 0.5, y0=best - 0.5, y1=best + 0.5,
            line={"color": ROLES["query_blind"].color, "width": 2}, layer="above",
        )  # fmt: skip
    fig.update_layout(
        height=_tall(len(layers)) + 110,
        margin_r=10,
        meta={"min_width": 96 * ranks},
    )


def _sentence(data: xr.Dataset, note: dict[str, Any], best: Any) -> str:
    task = note.get("task", "the task vector")
    if best is None or best not in data["layer"].values:
        return f"{task}: the tokens that its vector promotes, by layer"
    first = data["top_token"].sel(layer=best).values[:3]
    return f"{task}: at layer {best} the vector promotes " + ", ".join(
        visible(str(t), limit=16) for t in first
    )
