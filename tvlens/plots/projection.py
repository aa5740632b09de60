"""What does a vector say? The tokens at both ends of its row of the vocabulary.

Largest values stand at the left, smallest at the right; colours tell how far from the mean token each is.
"""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens.plots._axes import color_bar
from tvlens.plots._cells import number, written_cells
from tvlens.plots._notes import notes
from tvlens.plots.palette import DIVERGING
from tvlens.plots.theme import figure, label, titled, token_label


def projection_heatmap(data: xr.Dataset, *, ranks: int = 6, title: str | None = None) -> go.Figure:
    """Draw the tokens at both ends of each vector's row of the vocabulary.

    Args:
        data: A `tvlens.Projection` result's data.
        ranks: How many tokens at either end.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: rows downwards; the largest values at the left, the smallest at the right; colours in
        standard deviations from the mean token.

    Raises:
        ValueError: The data holds no projection, or ``ranks`` is less than 1.

    Example:
        >>> projection_heatmap(result.data, ranks=4)  # doctest: +SKIP

    References:
        Geva et al. 2022, arXiv 2203.14680.
    """
    if "top_token" not in data or "bottom_token" not in data:
        raise ValueError(f"the data is no projection; it has: {', '.join(map(str, data))}")
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    data = data.isel(rank=slice(ranks)).transpose("row", "rank", ...)
    fig = figure()
    fig.add_trace(_trace(data))
    n, k = data.sizes["row"], data.sizes["rank"]
    names = [label(str(name)) for name in data["label"].values]
    step = max(1, round(n / 40))
    fig.update_xaxes(
        tickvals=[*range(k), *range(k + 1, 2 * k + 1)],
        ticktext=[*map(str, range(1, k + 1)), *(f"−{i}" for i in range(k, 0, -1))],
        showgrid=False, ticks="", title_text="rank",
    )  # fmt: skip
    fig.update_yaxes(
        tickvals=list(range(0, n, step)), ticktext=names[::step], showgrid=False, ticks="",
        autorange="reversed", tickfont_size=11,
    )  # fmt: skip
    fig.update_layout(
        height=_tall(n) + 110, margin_r=10, meta={"min_width": 74 * (2 * k + 1) + 160}
    )
    said = str(data.attrs.get("finding", "")) if title is None else title
    return titled(fig, said, subtitle=f"{notes(data).get('model', '')} · ␣ space".lstrip(" ·"))


def _tall(n: int) -> float:
    """How tall the map is, in pixels: rows become flatter where there are many."""
    return max(float(np.clip(560 / n, 17, 30)) * n, 90.0)


def _ends(data: xr.Dataset, what: str) -> np.ndarray:
    """Both ends side by side, with an empty column between."""
    top, bottom = (data[f"{end}_{what}"].values.astype(object) for end in ("top", "bottom"))
    gap = np.full((len(top), 1), "" if what == "token" else np.nan, dtype=object)
    return np.concatenate([top, gap, bottom[:, ::-1]], axis=1)


def _trace(data: xr.Dataset) -> go.Heatmap:
    tokens, values = _ends(data, "token"), _ends(data, "value").astype(float)
    spread = data["spread"].values[:, None]
    away = (values - data["mean"].values[:, None]) / np.where(spread > 0, spread, 1)
    half = float(np.nanmax(np.abs(away), initial=0)) or 1.0
    hover = [
        [
            f"<b>{label(str(name))}</b><br>{token_label(repr(str(t)))}<br>{number(float(v))} "
            f"({number(float(z), 1)} standard deviations)"
            for t, v, z in zip(*row, strict=True)
        ]
        for name, *row in zip(data["label"].values, tokens, values, away, strict=True)
    ]
    words = [
        [token_label(str(t), limit=11) if v == v else "" for t, v in zip(*row, strict=True)]
        for row in zip(tokens, values, strict=True)
    ]
    return written_cells(
        away,
        words,
        hover,
        colorscale=DIVERGING,
        zmin=-half,
        zmax=half,
        colorbar=color_bar("standard deviations from the mean token", height=_tall(len(tokens))),
    )
