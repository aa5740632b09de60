"""Does the estimate agree? Every cell as a point: what it was estimated to do, against what it does.

On the dashed line an estimate is right. Points outside the band about it are off by more than a tenth of the
largest effect; they are drawn larger, and the worst are named.
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens.plots._cells import number
from tvlens.plots._notes import metric_of, notes
from tvlens.plots.palette import INK, MUTED, faint
from tvlens.plots.theme import ROLES, figure, label, titled, token_label

_SYMBOLS = (
    "circle",
    "diamond",
    "square",
    "triangle-up",
    "cross",
    "x",
    "star",
    "hexagon",
    "pentagon",
)
_NAMED = 5
_APART = 0.08  # of the axes: nearer points would have their names on top of each other


def agreement_scatter(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw estimated against true effects, one point a cell; hover names it.

    Args:
        data: By ``cell``: ``estimated``, ``true``, ``site``, ``layer``, and if there, ``head``,
            ``position``, ``token``; the attribute ``far`` says how far off a cell is a failure.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure.

    Raises:
        ValueError: The data has no such variables.

    Example:
        >>> agreement_scatter(drawn)  # doctest: +SKIP

    References:
        Nanda 2023, nanda2023attribution.
    """
    for name in ("estimated", "true"):
        if name not in data:
            raise ValueError(f"the data has no {name!r}; it has: {', '.join(map(str, data))}")
    x, y = data["true"].values, data["estimated"].values
    far = np.abs(y - x) > float(data.attrs.get("far", np.inf))
    sites = data["site"].values if "site" in data else np.full(len(x), "cell")
    fig = figure(height=520)
    _line(fig, x, y, float(data.attrs.get("far", 0.0)))
    for i, site in enumerate(dict.fromkeys(map(str, sites))):
        symbol = _SYMBOLS[i % len(_SYMBOLS)]
        for failed in (False, True):
            at = np.flatnonzero((sites == site) & (far == failed))
            if len(at):
                fig.add_trace(_points(data, at, site, symbol, failed=failed))
    _name_worst(fig, data, far)
    note = notes(data)
    metric = label(metric_of(note))
    fig.update_xaxes(title_text=f"change of {metric}, truly patched", zeroline=True)
    fig.update_yaxes(title_text=f"change of {metric}, estimated", zeroline=True)
    fig.update_layout(legend_y=-0.16)
    sentence = data.attrs.get("finding", "") if title is None else title
    small = " · ".join(
        p for p in (str(note.get("model", "")), "band: a tenth of the largest true effect") if p
    )
    return titled(fig, sentence, subtitle=small)


def _line(fig: go.Figure, x: np.ndarray, y: np.ndarray, far: float) -> None:
    """The diagonal on which an estimate is right, and the band about it."""
    both = np.concatenate([x, y, [0.0]])
    ends = np.array([both.min(), both.max()])
    fig.add_trace(
        go.Scatter(
            x=np.concatenate([ends, ends[::-1]]), y=np.concatenate([ends - far, ends[::-1] + far]),
            fill="toself", fillcolor=faint(MUTED, 0.1), line_width=0, mode="lines",
            hoverinfo="skip", showlegend=False,
        )
    )  # fmt: skip
    fig.add_trace(
        go.Scatter(
            x=ends, y=ends, mode="lines", line={"color": MUTED, "dash": "dash", "width": 1},
            hoverinfo="skip", showlegend=False,
        )
    )  # fmt: skip


def _points(
    data: xr.Dataset, at: np.ndarray, site: str, symbol: str, *, failed: bool
) -> go.Scatter:
    role = ROLES["query_blind" if failed else "hypothesis"]
    return go.Scatter(
        x=data["true"].values[at],
        y=data["estimated"].values[at],
        mode="markers",
        name=f"{label(site)}{', outside the band' if failed else ''}",
        marker={
            "symbol": symbol, "size": 9 if failed else 6, "color": role.faint(0.85 if failed else 0.5),
            "line": {"width": 1 if failed else 0, "color": INK},
        },
        customdata=[_cell(data, i) for i in at.tolist()],
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


def _cell(data: xr.Dataset, i: int) -> str:
    one = data.isel(cell=i)
    names = [f"{d} {one[d].values}" for d in ("layer", "head", "position") if d in one]
    token = str(one["token"].values).partition(": ")[2] if "token" in one else ""
    head = ", ".join([str(one["site"].values) if "site" in one else "", *names]).strip(", ")
    return (
        f"<b>{label(head)}</b>  {token_label(token) if token else ''}"
        f"<br>true: {number(float(one['true']))}<br>estimated: {number(float(one['estimated']))}"
    )


def _name_worst(fig: go.Figure, data: xr.Dataset, far: np.ndarray) -> None:
    x, y = data["true"].values, data["estimated"].values
    error = np.where(far, np.abs(y - x), 0)
    named: list[int] = []
    for i in np.argsort(-error, kind="stable").tolist():
        if not far[i] or len(named) == _NAMED:
            break
        near = [abs(x[i] - x[j]) + abs(y[i] - y[j]) for j in named]
        if near and min(near) < _APART * max(np.ptp(x), np.ptp(y)):
            continue
        named.append(i)
        one: Any = data.isel(cell=i)
        place = ".".join(str(one[d].values) for d in ("layer", "head", "position") if d in one)
        fig.add_annotation(
            x=float(one["true"]), y=float(one["estimated"]), text=label(place), showarrow=False,
            xshift=8, xanchor="left", font={"size": 11, "color": MUTED},
        )  # fmt: skip
