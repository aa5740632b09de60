"""A sweep at a glance: one value by task and model, or by any other two axes, averaged over the rest."""

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens._errors import unknown
from tvlens.plots._axes import color_bar
from tvlens.plots._bars import headed
from tvlens.plots._cells import written_cells
from tvlens.plots.palette import EMPTY, SEQUENTIAL
from tvlens.plots.theme import ROLES, figure, label

_DONE = "done"


def grid(
    data: xr.Dataset,
    *,
    value: str | None = None,
    x: str | None = None,
    y: str | None = None,
    title: str | None = None,
) -> go.Figure:
    """Draw one value of a sweep's cells as a heat map.

    Args:
        data: What a `tvlens.sweeps.Sweep` holds.
        value: Which number of the cells; how many of them are done if there is none.
        x: Axis to the right; the model, or the first.
        y: Axis downwards; the task, or the next.
        title: Replaces the sentence that says what is drawn.

    Returns:
        The figure: means over all other axes. Cells that are not done are left out of a mean, and a place
        where none is done is left empty.

    Raises:
        ValueError: There is no such value or axis.

    Example:
        >>> grid(result.data, value="regular", x="seed", y="task")  # doctest: +SKIP
    """
    axes = [str(dim) for dim in data["state"].dims]
    numbers = [str(n) for n, v in data.data_vars.items() if v.dtype.kind in "biuf"]
    if value is not None and value not in numbers:
        raise unknown("value", value, numbers)
    for axis in (x, y):
        if axis is not None and axis not in axes:
            raise unknown("axis", axis, axes)
    x, y = _chosen(axes, x, y)
    drawn, done = _means(data, value, [axis for axis in (y, x) if axis])
    columns, rows = (_labels(data, axis) for axis in (x, y))
    said = "share of cells that are done" if value is None else _said(value)
    hover = [
        [
            f"<b>{label(row)}</b> {label(column)}<br>{label(said)}: {_short(drawn[i, j])}<br>"
            f"cells: {int(done[i, j])} of {data['state'].size // drawn.size}"
            for j, column in enumerate(columns)
        ]
        for i, row in enumerate(rows)
    ]
    words = [[_short(one) for one in row] for row in drawn]
    low, high = _limits(drawn)
    fig = figure()
    fig.add_trace(
        written_cells(
            # The numbers stand in the cells; a scale beside a few rows would be too small to read.
            drawn, words, hover, colorscale=SEQUENTIAL, zmin=low, zmax=high, showscale=len(rows) > 5,
            colorbar=color_bar(said, height=26 * len(rows)),
        )
    )  # fmt: skip
    _frame(fig, rows, columns, None if x == "model" else x)
    others = [axis for axis in axes if axis not in (x, y)]
    counted = int((data["state"].values == _DONE).sum())
    small = f"{counted} of {data['state'].size} cells are done"
    small += f" · mean over {', '.join(others)}" if others else ""
    return headed(
        fig, data, _sentence(said, drawn, rows, columns) if title is None else title, small
    )


def _said(value: str) -> str:
    """A value in words; a name of one of the three accuracies or their floors is one of an accuracy."""
    words = value.replace("_", " ")
    return f"{words} accuracy" if value in ROLES else words


def _sentence(said: str, drawn: np.ndarray, rows: list[str], columns: list[str]) -> str:
    """The mean, and where the least and the largest value stand."""
    subject = said[0].upper() + said[1:]
    if not np.isfinite(drawn).any():
        return f"{subject}: nothing is done yet"
    if np.isfinite(drawn).sum() == 1:
        return f"{subject} is {_short(float(np.nanmean(drawn)))}"

    def at(where: int) -> str:
        i, j = np.unravel_index(where, drawn.shape)
        names = [rows[i]] * (len(rows) > 1) + [columns[j]] * (len(columns) > 1)
        return f"{_short(drawn[i, j])} ({', '.join(names)})"

    ends = f"from {at(int(np.nanargmin(drawn)))} to {at(int(np.nanargmax(drawn)))}"
    return f"{subject} is {_short(float(np.nanmean(drawn)))} on average, {ends}"


def _frame(fig: go.Figure, rows: list[str], columns: list[str], across: str | None) -> None:
    ticks = {"tickvals": list(range(len(columns))), "ticktext": [label(name) for name in columns]}
    # Names that are wider than a cell of the least width are turned.
    tilted = len(columns) > 2 and max(map(len, columns)) > 8
    fig.update_xaxes(
        **ticks,
        side="top",
        tickangle=-30 if tilted else 0,
        showgrid=False,
        ticks="",
        title_text=across,
    )
    ticks = {"tickvals": list(range(len(rows))), "ticktext": [label(name) for name in rows]}
    fig.update_yaxes(**ticks, autorange="reversed", showgrid=False, ticks="")
    top = 110 if tilted else 64
    fig.update_layout(
        height=26 * len(rows) + top + 30, margin_b=30, margin_t=top, plot_bgcolor=EMPTY,
        meta={"min_width": 64 * len(columns) + 260},
    )  # fmt: skip


def _chosen(axes: list[str], x: str | None, y: str | None) -> tuple[str | None, str | None]:
    """Axes that were not named: the task goes downwards, the model to the right, else in order."""
    for wanted in ("task", "tasks"):
        y = y or (wanted if wanted in axes and wanted != x else None)
    x = x or ("model" if "model" in axes and y != "model" else None)
    free = [axis for axis in axes if axis not in (x, y)]
    x = x or (free.pop(0) if free else None)
    return x, y or (free.pop(0) if free else None)


def _means(data: xr.Dataset, value: str | None, kept: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Means by row and column, and how many cells each is of."""
    done = (data["state"] == _DONE).astype(float)
    number = done if value is None else data[value].astype(float).where(data["state"] == _DONE)
    rest = [dim for dim in data["state"].dims if dim not in kept]
    shape = (data.sizes[kept[0]] if len(kept) == 2 else 1, -1)
    both = [
        one.transpose(*kept).values.reshape(shape) for one in (number.mean(rest), done.sum(rest))
    ]
    return both[0], both[1]


def _labels(data: xr.Dataset, axis: str | None) -> list[str]:
    return [""] if axis is None else [str(name) for name in data[axis].values]


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Shares are drawn from 0 to 1, other numbers over their range."""
    there = values[np.isfinite(values)]
    if not there.size or (there.min() >= 0 and there.max() <= 1):
        return 0.0, 1.0
    return float(there.min()), float(there.max())


def _short(value: float) -> str:
    if not np.isfinite(value):
        return "–"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"
