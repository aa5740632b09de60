"""Fair prompts: how fairness goes with accuracy, what choosing by it gains, and every prompt as a point."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from tvlens.plots.palette import BLUE, GREEN, GREY, MUTED, ORANGE, VERMILION
from tvlens.plots.theme import ROLES, Role, figure, label, titled

_MEASURES = {"regular_labels": ROLES["regular"], "theta_labels": ROLES["hypothesis"]}
_ARMS = {
    "random": Role("random", GREY, "solid", "circle"),
    "G-fair": Role("G-fair", BLUE, "solid", "diamond"),
    "G-fair, all shots": Role("G-fair, all shots", BLUE, "solid", "diamond-open"),
    "T-fair": Role("T-fair", GREEN, "solid", "square"),
    "fairest of random": Role("fairest of random", ORANGE, "solid", "triangle-up"),
    "least fair of random": Role("least fair of random (control)", VERMILION, "solid", "x"),
}
_ROW, _SHIFT = 34, 0.14  # pixels of a row; how far a row's two measures stand from its middle
_MEAN = "mean, few labels"


def fairness_effects(
    correlations: pd.DataFrame,
    gains: pd.DataFrame,
    *,
    means: Mapping[str, tuple[float, float, float]],
    title: str | None = None,
) -> go.Figure:
    """Draw rank correlations of fairness and accuracy by task, and gains over random prompts by choice.

    Args:
        correlations: By task: ``labels``, and ``regular_labels`` and ``theta_labels`` with ``_low`` and
            ``_high``, as ``Fairness.correlations()`` gives them.
        gains: By choice, the same, as ``Fairness.gains()`` gives them.
        means: By measure: a mean correlation and the ends of its interval.
        title: The sentence that says what came out.

    Returns:
        The figure: correlations to the left, gains to the right.

    Raises:
        ValueError: A column is missing.

    Example:
        >>> fairness_effects(  # doctest: +SKIP
        ...     result.correlations(), result.gains(), means={"theta_labels": (0.1, 0.0, 0.2)}
        ... )

    References:
        Ma et al. 2023, arXiv 2303.13217.
    """
    needed = {f"{name}{end}" for name in _MEASURES for end in ("", "_low", "_high")}
    for table in (correlations, gains):
        if missing := needed - set(table.columns):
            raise ValueError(
                f"the table lacks {', '.join(sorted(missing))}; it has: {', '.join(table.columns)}"
            )
    left = correlations.sort_values("labels", kind="stable")
    tasks = [f"{task} ({n} labels)" for task, n in zip(left.index, left["labels"], strict=True)]
    right = gains.drop(index="random", errors="ignore")
    arms = [_ARMS[arm].name if arm in _ARMS else str(arm) for arm in right.index]
    heads = ["<b>Rank correlation with fairness</b>", "<b>Gain in accuracy over random prompts</b>"]
    fig = make_subplots(1, 2, subplot_titles=heads, figure=figure(), horizontal_spacing=0.27)
    fig.update_annotations(font_size=13)
    zero: Any = {"line": {"color": MUTED, "width": 1}, "row": 1, "col": "all"}
    fig.add_vline(x=0, **zero)
    for k, (name, role) in enumerate(_MEASURES.items()):
        own = pd.DataFrame([means[name]] if name in means else [], columns=list("vlh"))
        values, low, high = (
            np.append(left[f"{name}{end}"].to_numpy(float), own[part].to_numpy(float))
            for end, part in (("", "v"), ("_low", "l"), ("_high", "h"))
        )
        _points(fig, role, [*tasks, _MEAN][: len(values)], (values, low, high), k, 1)
        ends = tuple(right[f"{name}{end}"].to_numpy(float) for end in ("", "_low", "_high"))
        _points(fig, role, arms, ends, k, 2)
    for col, rows in ((1, [*tasks, *([_MEAN] if means else [])]), (2, arms)):
        fig.update_yaxes(
            tickvals=list(range(len(rows))), ticktext=[label(row) for row in rows], showgrid=False,
            range=[len(rows) - 0.5, -0.5], col=col,
        )  # fmt: skip
    fig.update_xaxes(range=[-1.05, 1.05], title_text="Spearman's rho over random prompts", col=1)
    fig.update_xaxes(title_text="accuracy among labels, difference", col=2)
    height = 110 + _ROW * max(len(tasks) + 1, len(arms))
    fig.update_layout(height=height, margin_t=46, legend_y=-0.3, meta={"min_width": 820})
    small = "Marked among the labels, as the authors do. Bars: 95 % intervals."
    return titled(fig, title or "Fairness of prompts, their accuracy and theta's", subtitle=small)


def _points(
    fig: go.Figure, role: Role, rows: list[str], ends: tuple[np.ndarray, ...], k: int, col: int
) -> None:
    """Draw one measure: a point and an interval a row, a little above or below the row's middle."""
    values, low, high = ends
    texts = [
        f"<b>{label(row)}</b><br>{role.name}: {value:.2f} [{lo:.2f}, {hi:.2f}]"
        for row, value, lo, hi in zip(rows, values, low, high, strict=True)
    ]
    fig.add_scatter(
        x=values, y=np.arange(len(rows)) + (2 * k - 1) * _SHIFT, mode="markers", name=role.name,
        legendgroup=role.name, showlegend=col == 1,
        marker={"color": role.color, "symbol": role.symbol, "size": 8},
        error_x={"type": "data", "array": high - values, "arrayminus": values - low,
                 "color": role.faint(0.6), "thickness": 1.6, "width": 3},
        customdata=texts, hovertemplate="%{customdata}<extra></extra>", row=1, col=col,
    )  # fmt: skip


def fairness_scatter(
    data: xr.Dataset, *, measure: str = "regular_labels", title: str | None = None
) -> go.Figure:
    """Draw every prompt by its fairness and its accuracy, a panel for each task.

    Args:
        data: ``fairness`` by task, pool and set, outcomes by task, pool, set and query, and ``arm`` by set.
        measure: Which outcomes.
        title: The sentence above the figure.

    Returns:
        The figure.

    Raises:
        ValueError: A variable is missing.

    Example:
        >>> fairness_scatter(result.data)  # doctest: +SKIP

    References:
        Ma et al. 2023, arXiv 2303.13217, Figure 2.
    """
    if missing := {"fairness", measure, "arm", "labels"} - set(map(str, data.variables)):
        raise ValueError(
            f"the data lacks {', '.join(sorted(missing))}; it has: {', '.join(map(str, data))}"
        )
    order = np.argsort(data["labels"].values, kind="stable").tolist()
    columns = min(3, len(order))
    lines = -(-len(order) // columns)
    heads = [
        f"<b>{label(data['task'].values[i])}</b>, {int(data['labels'][i])} labels" for i in order
    ]
    fig = make_subplots(
        lines, columns, subplot_titles=heads, figure=figure(), horizontal_spacing=0.06,
        vertical_spacing=0.26 / lines,
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    arms = data["arm"].values
    for place, i in enumerate(order):
        for name, role in _ARMS.items():
            some = data.isel(task=i, set=arms == name)
            if not some.sizes["set"]:
                continue
            size, faint = (6, 0.55) if name == "random" else (10, 1.0)
            fig.add_scatter(
                x=some["fairness"].values.ravel(),
                y=some[measure].transpose("pool", "set", "query").values.mean(axis=-1).ravel(),
                mode="markers", name=role.name, legendgroup=role.name, showlegend=place == 0,
                marker={"color": role.color, "symbol": role.symbol, "size": size, "opacity": faint},
                hovertemplate=f"{role.name}<br>fairness %{{x:.2f}}, accuracy %{{y:.2f}}<extra></extra>",
                row=place // columns + 1, col=place % columns + 1,
            )  # fmt: skip
    fig.update_xaxes(range=[-0.03, 1.03])
    fig.update_xaxes(title_text="fairness (entropy / log labels)", row=lines)
    fig.update_yaxes(range=[-0.05, 1.05])
    fig.update_yaxes(title_text="accuracy", col=1)
    fig.update_layout(height=110 + 230 * lines, margin_t=46, meta={"min_width": 270 * columns})
    fig.update_layout(legend={"y": -0.3 / lines, "font": {"color": MUTED}})
    return titled(fig, _halves(data, measure) if title is None else title)


def _halves(data: xr.Dataset, measure: str) -> str:
    """What the fairer and the less fair half of each task's prompts get right."""
    right = data[measure].mean("query")
    fairer = data["fairness"] > data["fairness"].median(("pool", "set"))
    upper, lower = (float(right.where(half).mean()) for half in (fairer, ~fairer))
    return f"Prompts fairer than their task's median get {upper:.2f} of queries right, the others {lower:.2f}"
