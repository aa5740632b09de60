"""How much of its tolerance each check of a model used, on one logarithmic axis, with the numbers.

A dot left of the line has passed. Counts of mistakes, whose tolerance is zero, have no ratio: they stand at
the left end when there are none, and beyond the line when there are some.
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens.plots._bars import headed
from tvlens.plots.palette import BLUE, GREY, INK, MUTED, VERMILION
from tvlens.plots.theme import figure, label

_LOOKS = {
    "passed": (BLUE, "circle"),
    "failed": (VERMILION, "x"),
    "skipped": (GREY, "line-ew-open"),
}
_LEFT, _RIGHT = 1e-6, 1e3  # of the axis, as shares of the tolerance
_ROW = 30  # pixels
_AXIS, _NUMBERS, _NOTES = 0.36, 0.38, 0.53  # of the width: where each ends or begins
_NOTE = 62  # characters of a note


def check_dots(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw each check's number as a share of its tolerance, with status, numbers and note.

    Args:
        data: ``status``, ``measured``, ``tolerance``, ``what``, ``note`` and ``means`` by ``check``.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: one row a check; the hover says what was measured and what a failure means.

    Raises:
        ValueError: There are no checks.

    Example:
        >>> check_dots(result.data)  # doctest: +SKIP
    """
    n = data.sizes.get("check", 0)
    if not n:
        raise ValueError("the data has no checks: give one row a check.")
    names = [str(name) for name in data["check"].values]
    status = [str(state) for state in data["status"].values]
    places = [_place(data.isel(check=i)) for i in range(n)]
    fig = figure()
    for state, (color, symbol) in _LOOKS.items():
        rows = [i for i in range(n) if status[i] == state]
        # What has no bound is reported and not judged.
        bound = data["tolerance"].notnull().values
        line = 0 if state == "failed" else 2
        symbols = [symbol if bound[i] or state != "passed" else "circle-open" for i in rows]
        fig.add_scatter(
            x=[places[i] for i in rows] or [None], y=rows or [None], mode="markers", name=state,
            marker={"color": color, "symbol": symbols or symbol, "size": 11},
            marker_line={"color": color, "width": line},
            customdata=[_hover(data.isel(check=i)) for i in rows],
            hovertemplate="%{customdata}<extra></extra>", cliponaxis=False,
        )  # fmt: skip
    for i in range(n):
        _beside(fig, data.isel(check=i), i)
    _axes(fig, names, status)
    return headed(
        fig,
        data,
        title,
        "dots: share of the tolerance that was used; open: reported, not judged",
    )


def number(value: float) -> str:
    """Write a measured number: counts as they are, others with their exponent, a dash for NaN.

    Args:
        value: The number.

    Returns:
        A short text.

    Example:
        >>> number(3.0), number(1.23e-5), number(float("nan"))
        ('3', '1.2e-05', '–')
    """
    if value != value:
        return "–"
    if abs(value) < 1e5 and value == int(value):
        return f"{int(value)}"
    return f"{value:.1e}" if abs(value) < 1e-2 or abs(value) >= 1e5 else f"{value:.3g}"


def _place(one: xr.Dataset) -> float:
    """Where a check's dot stands: the share of its tolerance that it used, kept on the axis."""
    measured, tolerance = float(one["measured"]), float(one["tolerance"])
    if str(one["status"].values) == "skipped" or tolerance != tolerance:
        return _RIGHT if str(one["status"].values) == "failed" else _LEFT
    if tolerance == 0:
        return _LEFT if measured == 0 else _RIGHT
    share = measured / tolerance
    return float(np.clip(share, _LEFT, _RIGHT)) if np.isfinite(share) else _RIGHT


def _hover(one: xr.Dataset) -> str:
    words: dict[str, Any] = {name: str(one[name].values) for name in ("check", "what", "note")}
    numbers = _amounts(one)
    lines = [
        f"<b>{label(words['check'])}</b>: {label(one['status'].values)}",
        label(words["what"]),
        f"measured {numbers[0]}, tolerance {numbers[1]}",
        label(words["note"]),
        f"if it fails: {label(one['means'].values)}",
    ]
    return "<br>".join(line for line in lines if line)


def _amounts(one: xr.Dataset) -> tuple[str, str]:
    """What was measured and what is tolerated; bytes in gigabytes."""
    large = str(one["what"].values).startswith("bytes")
    measured, tolerance = (float(one[name]) for name in ("measured", "tolerance"))
    if large and measured == measured and tolerance == tolerance:
        return f"{measured / 1e9:.1f}", f"{tolerance / 1e9:.1f} GB"
    return number(measured), number(tolerance)


def _beside(fig: go.Figure, one: xr.Dataset, row: int) -> None:
    """The numbers and the note to the right of the axis."""
    measured, tolerance = _amounts(one)
    said = measured if tolerance == "–" else f"{measured} of {tolerance}"
    note = str(one["note"].values)
    note = note if len(note) <= _NOTE else f"{note[: _NOTE - 1]}…"
    for x, text, color in ((_NUMBERS, said, INK), (_NOTES, note, MUTED)):
        fig.add_annotation(
            x=x, xref="paper", y=row, xanchor="left", showarrow=False, text=label(text),
            font={"size": 12, "color": color},
        )  # fmt: skip


def _axes(fig: go.Figure, names: list[str], status: list[str]) -> None:
    n = len(names)
    ticks = [label(name.replace("_", " ")) for name in names]
    ticks = [f"<b>{t}</b>" if s == "failed" else t for t, s in zip(ticks, status, strict=True)]
    fig.update_yaxes(
        range=[n - 0.4, -0.6],
        tickvals=list(range(n)),
        ticktext=ticks,
        ticks="",
        ticklabelstandoff=6,
    )
    fig.update_xaxes(
        type="log", range=[np.log10(_LEFT) - 0.25, np.log10(_RIGHT) + 0.25], domain=[0, _AXIS],
        tickvals=[1e-6, 1e-4, 1e-2, 1, 1e2],
        ticktext=["none", "0.01%", "1%", "all", "× 100"], title_text="share of the tolerance that was used",
    )  # fmt: skip
    fig.add_vline(x=1, line={"color": INK, "width": 1.2, "dash": "dot"})
    fig.update_layout(
        height=_ROW * n + 120, legend={"y": -66 / (_ROW * n)}, meta={"min_width": 1000}
    )
