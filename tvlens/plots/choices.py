"""Every variant of a task vector as a dot: which choice moves accuracy, and which is worth nothing."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens.plots._notes import notes
from tvlens.plots.palette import GRID, MUTED, PAPER
from tvlens.plots.theme import ROLES, figure, label, titled

_HEADINGS = {
    "default": "",
    "mode": "how it is written",
    "source": "where theta comes from",
    "site": "site",
    "position": "position",
    "dummies": "dummy queries",
    "shots": "demonstrations",
}
_REQUIRED = ("factor", "accuracy", "low", "high", "control", "difference_low", "difference_high")


def choices_dots(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw a row for each variant, grouped by the choice that it varies.

    Args:
        data: What `tvlens.experiments.choices.Choices.drawn` gives, with ``finding`` among its attributes.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: filled dots are variants whose paired difference to the default is clear, white ones
        those where it is not; crosses are random vectors; lines stand for the default, baseline and
        regular.

    Raises:
        ValueError: The data has no such variables.

    Example:
        >>> choices_dots(result.drawn())  # doctest: +SKIP
    """
    missing = [name for name in _REQUIRED if name not in data]
    if missing:
        raise ValueError(
            f"the data lacks {', '.join(missing)}; it has: {', '.join(map(str, data))}"
        )
    names = [str(name) for name in data["variant"].values]
    floors = {name: float(data["accuracy"].sel(variant=name)) for name in ("baseline", "regular")}
    rows = data.sel(variant=[name for name in names if name not in floors])
    heights, headings = _heights([str(name) for name in rows["factor"].values])
    fig = figure()
    _lines(fig, floors | {"default": float(rows["accuracy"][0])}, max(heights))
    _intervals(fig, rows, heights)
    _dots(fig, rows, heights)
    fig.update_yaxes(
        tickvals=[*heights, *headings], range=[max(heights) + 0.7, -0.7], showgrid=False, ticks="",
        ticktext=[
            *(label(name) for name in rows["variant"].values),
            *(f'<b style="color:{MUTED}">{label(text)}</b>' for text in headings.values()),
        ],
    )  # fmt: skip
    fig.update_xaxes(title_text="accuracy on test queries", range=[-0.02, 1.02])
    tall = 21 * (max(heights) + 2)
    fig.update_layout(height=tall + 130, legend={"y": -60 / tall}, meta={"min_width": 620})
    note = notes(data)
    tasks = note.get("tasks", [])
    on = str(tasks[0]) if len(tasks) == 1 else f"mean of {len(tasks)} tasks" if tasks else ""
    small = " · ".join(filter(None, [on, str(note.get("model", ""))]))
    sentence = data.attrs.get("finding", "") if title is None else title
    return titled(fig, sentence, subtitle=small)


def _heights(factors: list[str]) -> tuple[list[float], dict[float, str]]:
    """Give every row a height, top to bottom, and every group a heading above it."""
    heights: list[float] = []
    headings: dict[float, str] = {}
    at, before = 0.0, factors[0]
    for factor in factors:
        if factor != before:
            headings[at + 0.15] = _HEADINGS.get(factor, factor)
            at, before = at + 1.1, factor
        heights.append(at)
        at += 1
    return heights, headings


def _lines(fig: go.Figure, values: dict[str, float], bottom: float) -> None:
    for name, value in values.items():
        role = ROLES["hypothesis" if name == "default" else name]
        word = "default (paper A)" if name == "default" else role.name
        fig.add_scatter(
            x=[value, value], y=[-0.7, bottom + 0.7], mode="lines", name=f"{word} {value:.2f}",
            line={"color": role.color, "dash": "solid" if name == "default" else role.dash, "width": 1.2},
            opacity=0.7, hoverinfo="skip",
        )  # fmt: skip


def _intervals(fig: go.Figure, rows: xr.Dataset, heights: list[float]) -> None:
    """95 % intervals as lines, and a faint track from the control."""
    accuracy, low, high = (rows[name].values for name in ("accuracy", "low", "high"))
    gaps = np.full(len(heights), np.nan)
    tracks = (
        (rows["control"].values, accuracy, GRID, 1.5),
        (low, high, ROLES["hypothesis"].color, 2),
    )
    for start, end, color, width in tracks:
        fig.add_scatter(
            x=np.stack([start, end, gaps], axis=1).ravel(), y=np.repeat(heights, 3), mode="lines",
            line={"color": color, "width": width}, hoverinfo="skip", showlegend=False,
        )  # fmt: skip


def _dots(fig: go.Figure, rows: xr.Dataset, heights: list[float]) -> None:
    role, control = ROLES["hypothesis"], ROLES["control"]
    clear = (rows["difference_low"].values > 0) | (rows["difference_high"].values < 0)
    clear[0] = True
    kinds = (
        (clear, role.color, "differs from the default"),
        (~clear, PAPER, "does not clearly differ"),
    )
    hover = np.array([_hover(rows.isel(variant=i)) for i in range(len(heights))], object)
    at, tall = rows["accuracy"].values, np.array(heights)
    for chosen, fill, word in kinds:
        marker: dict[str, Any] = {
            "symbol": role.symbol, "size": 10, "color": fill, "line": {"color": role.color, "width": 2},
        }  # fmt: skip
        fig.add_scatter(
            x=at[chosen], y=tall[chosen], mode="markers", name=word, marker=marker,
            customdata=hover[chosen], hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    fig.add_scatter(
        x=rows["control"].values, y=heights, mode="markers", name="same variant, random directions",
        marker={"symbol": control.symbol, "size": 8, "color": control.color,
                "line": {"color": control.color, "width": 1.6}},
        customdata=hover, hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


def _hover(row: xr.Dataset) -> str:
    """All that is known of one variant."""
    value = {name: float(row[name]) for name in row.data_vars if name != "factor"}
    lines = [
        f"<b>{label(row['variant'].values)}</b>",
        f"accuracy {value['accuracy']:.3f} ({value['low']:.3f} to {value['high']:.3f})",
        f"against the default {value['difference']:+.3f} "
        f"({value['difference_low']:+.3f} to {value['difference_high']:+.3f})",
        f"random directions {value['control']:.3f}",
        f"layer {value['layer']:g}",
    ]
    return "<br>".join(lines).replace("-0", "−0")
