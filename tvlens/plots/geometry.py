"""How thetas lie: a map of them, their distances, and the tasks' centroids.

A task has a colour by its family and a symbol of its own, and its name stands above its points, so that the
map can be read without the legend and without the colours.
"""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from numpy.typing import ArrayLike

from tvlens.plots._axes import color_bar
from tvlens.plots._cells import number
from tvlens.plots._labels import rows
from tvlens.plots._notes import notes
from tvlens.plots.palette import (
    BLUE,
    EMPTY,
    GREEN,
    INK,
    ORANGE,
    PAPER,
    PURPLE,
    SEQUENTIAL,
    SKY,
    VERMILION,
)
from tvlens.plots.theme import MONO, ROLES, figure, label, titled, token_label

_COLORS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, INK)
_SYMBOLS = (
    "circle", "diamond", "square", "triangle-up", "cross", "x", "star", "hexagon", "triangle-down",
    "pentagon", "circle-open", "diamond-open", "square-open", "triangle-up-open",
)  # fmt: skip
_NAMES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
_BINS = 60
_LETTER = 0.0125  # of the axis: how wide a letter of a name is


def theta_map(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw the vectors of all tasks on their map, each task's name above its points.

    Args:
        data: The data of a `tvlens.experiments.geometry.Geometry`, with ``finding`` among its attributes.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure. Hover for the demonstrations behind a vector, its silhouette and its nearest centroid.

    Example:
        >>> theta_map(result.data)  # doctest: +SKIP

    References:
        Hendel et al. 2023, arXiv 2310.15916.
    """
    fig = figure(height=560)
    families = [str(name) for name in data["family"].values]
    order = list(dict.fromkeys(families))
    for i, name in enumerate(data["task"].values.tolist()):
        color = _COLORS[order.index(families[i]) % len(_COLORS)]
        symbol = _SYMBOLS[families[:i].count(families[i]) % len(_SYMBOLS)]
        fig.add_trace(_cloud(data.isel(task=i), str(name), families[i], color, symbol))
    for name, (x, y) in _places(data).items():
        fig.add_annotation(
            x=x, y=y, text=f"<b>{label(name)}</b>", showarrow=False, font={"size": 11, "color": INK},
            yanchor="bottom",
        )  # fmt: skip
    note = notes(data)
    names = _axis_names(data["embedding"])
    fig.update_xaxes(title_text=names[0], showticklabels=names[0].startswith("PC"))
    fig.update_yaxes(title_text=names[1], showticklabels=names[1].startswith("PC"))
    small = [note.get("model"), f"layer {note.get('layer', '?')}", _chance(data)]
    fig.update_layout(meta={"min_width": 560}, legend={"y": -0.14})
    sentence = data.attrs.get("finding", "") if title is None else title
    return titled(fig, sentence, subtitle=" · ".join(map(str, filter(None, small))))


def _places(data: xr.Dataset) -> dict[str, tuple[float, float]]:
    """Where the tasks' names stand: above their clouds, moved up where another name stands already."""
    clouds = data["embedding"].transpose("task", "prompt", "axis").values
    span = np.ptp(clouds.reshape(-1, 2), axis=0)
    names = [str(name) for name in data["task"].values]
    tall = 0.045 * float(span[1])
    middles, tops = clouds[..., 0].mean(axis=1), clouds[..., 1].max(axis=1) + 0.3 * tall
    widths = [_LETTER * float(span[0]) * len(name) for name in names]
    lifted = rows(middles.tolist(), tops.tolist(), widths, tall=tall)
    return {
        name: (float(x), float(y) + tall * row)
        for name, x, y, row in zip(names, middles, tops, lifted, strict=True)
    }


def _chance(data: xr.Dataset) -> str:
    return f"control, labels shuffled: nearest centroid {float(data['shuffled'].mean()):.2f}"


def _axis_names(places: xr.DataArray) -> tuple[str, str]:
    method = str(places.attrs.get("method", "map"))
    if "explained" in places.attrs:
        first, second = np.asarray(places.attrs["explained"], float)
        return f"PC 1 ({first:.0%} of variance)", f"PC 2 ({second:.0%})"
    return f"{_NAMES.get(method, method)} 1", f"{_NAMES.get(method, method)} 2"


def _cloud(one: xr.Dataset, name: str, family: str, color: str, symbol: str) -> go.Scatter:
    """The vectors of one task."""
    x, y = one["embedding"].transpose("axis", "prompt").values
    return go.Scatter(
        x=x,
        y=y,
        mode="markers",
        name=label(name),
        legendgroup=family,
        marker={
            "color": color, "symbol": symbol, "size": 7, "opacity": 0.7,
            "line": {"width": 0.5, "color": PAPER if "open" not in symbol else color},
        },
        customdata=[_told(one, i) for i in range(len(x))],
        hovertemplate=f"<b>{label(name)}</b> ({label(family)})<br>%{{customdata}}<extra></extra>",
    )  # fmt: skip


def _told(one: xr.Dataset, i: int) -> str:
    row = one.isel(prompt=i)
    shown = str(row["demonstrations"].values).splitlines()
    lines = [token_label(line, limit=60) for line in shown[:8]]
    lines += [f"… {len(shown) - 8} more"] if len(shown) > 8 else []
    lines.append(f"silhouette {number(float(row['silhouette']), 2)}")
    lines.append(f"nearest centroid: {label(row['nearest'].values)}")
    return "<br>".join(lines)


def distance_histogram(
    within: ArrayLike, between: ArrayLike, *, title: str = "Distances within and between tasks"
) -> go.Figure:
    """Draw how cosine distances are spread, within tasks and between them.

    Args:
        within: Distances of vectors of one task, without those to themselves.
        between: Distances of vectors of two tasks.
        title: The sentence above it.

    Returns:
        The figure; a line stands at each mean.

    Raises:
        ValueError: There are no distances.

    Example:
        >>> len(distance_histogram([0.1, 0.2], [0.5, 0.7]).data)
        2

    References:
        Hendel et al. 2023, arXiv 2310.15916.
    """
    groups = {
        "within tasks": np.asarray(within, float),
        "between tasks": np.asarray(between, float),
    }
    if not all(len(values) for values in groups.values()):
        raise ValueError("distances within and between tasks are needed; one of them is empty")
    edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), bins=_BINS)
    fig = figure(barmode="overlay", bargap=0, height=340)
    for (name, values), role in zip(groups.items(), ("hypothesis", "baseline"), strict=True):
        share = np.histogram(values, edges)[0] / len(values)
        fig.add_bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=share,
            name=f"{name}, {len(values):,} pairs",
            marker={"color": ROLES[role].faint(0.55), "line": {"width": 0}},
            hovertemplate=f"{name}<br>distance %{{x:.3f}}<br>share %{{y:.3f}}<extra></extra>",
        )
        mean = float(values.mean())
        fig.add_vline(
            x=mean, line={"color": ROLES[role].color, "dash": ROLES[role].dash, "width": 2},
            annotation={"text": f"{name.split()[0]} {mean:.3f}", "font": {"size": 12, "color": INK},
                        "textangle": 0, "yanchor": "bottom"},
        )  # fmt: skip
    fig.update_xaxes(title_text="cosine distance", rangemode="tozero")
    fig.update_yaxes(title_text="share of pairs", rangemode="tozero")
    fig.update_layout(meta={"min_width": 480}, margin_t=50)
    return titled(fig, title, subtitle="a vector is never compared with itself")


def centroid_map(table: pd.DataFrame, *, title: str = "Distances between tasks") -> go.Figure:
    """Draw the cosine distance between the centroids of every two tasks; a frame marks each row's nearest.

    Args:
        table: What `tvlens.experiments.geometry.Geometry.neighbours` gives.
        title: The sentence above it.

    Returns:
        The figure. Hover for the rank, and for how often drawing the vectors again leaves it the nearest.

    Raises:
        ValueError: A column is missing.

    Example:
        >>> centroid_map(result.neighbours())  # doctest: +SKIP

    References:
        Hendel et al. 2023, arXiv 2310.15916.
    """
    missing = {"task", "other", "distance", "rank", "nearest_share"} - set(table.columns)
    if missing:
        raise ValueError(f"the table lacks {', '.join(sorted(missing))}")
    names = list(dict.fromkeys(table["task"]))
    z = table.pivot(index="task", columns="other", values="distance").loc[names, names].to_numpy()
    hover = [["" for _ in names] for _ in names]
    for row in table.to_dict("records"):
        hover[names.index(row["task"])][names.index(row["other"])] = _pair(row)
    digits = 2 if np.nanmax(z) >= 0.1 else 3
    fig = figure()
    fig.add_heatmap(
        z=z, x=np.arange(len(names)), y=np.arange(len(names)), coloraxis="coloraxis", xgap=1, ygap=1,
        text=[["" if v != v else number(v, digits) for v in row] for row in z],
        texttemplate="%{text}", textfont={"family": MONO, "size": 10},
        customdata=hover, hovertemplate="%{customdata}<extra></extra>", hoverongaps=False,
    )  # fmt: skip
    first = table[table["rank"] == 1]
    frame = {"color": ROLES["query_blind"].color, "width": 2}
    for other, task in zip(first["other"], first["task"], strict=True):
        x, y = names.index(other), names.index(task)
        fig.add_shape(type="rect", x0=x - 0.48, x1=x + 0.48, y0=y - 0.46, y1=y + 0.46, line=frame)
    marker = {"symbol": "square-open", "size": 12, "color": frame["color"], "line": {"width": 2}}
    fig.add_scatter(
        x=[None], y=[None], mode="markers", marker=marker, name="nearest task of the row",
        hoverinfo="skip", showlegend=True,
    )  # fmt: skip
    _map_axes(fig, names, float(np.nanmax(z)))
    return titled(fig, title, subtitle="cosine distance between mean vectors")


def _pair(row: dict[Any, Any]) -> str:
    return (
        f"from <b>{label(row['task'])}</b> to <b>{label(row['other'])}</b><br>"
        f"cosine distance {row['distance']:.3f}<br>rank {row['rank']}; the nearest in "
        f"{row['nearest_share']:.0%} of draws of the vectors"
    )


def _map_axes(fig: go.Figure, names: list[str], most: float) -> None:
    n = len(names)
    ticks = {"tickvals": list(range(n)), "ticktext": [label(name) for name in names], "ticks": ""}
    fig.update_xaxes(**ticks, showgrid=False, range=[-0.5, n - 0.5], tickangle=-35, title_text="to")
    fig.update_yaxes(**ticks, showgrid=False, range=[n - 0.5, -0.5], title_text="from")
    fig.update_layout(
        # Near is dark.
        coloraxis={
            "colorscale": [[1 - at, color] for at, color in reversed(SEQUENTIAL)],
            "cmin": 0, "cmax": 1.15 * most,
            "colorbar": color_bar("cosine distance", height=max(30 * n, 160)),
        },
        height=max(30 * n, 160) + 170,
        margin={"r": 20, "b": 70, "t": 60},
        legend={"y": 1.01, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        plot_bgcolor=EMPTY,
        meta={"min_width": 42 * n + 260},
    )  # fmt: skip
