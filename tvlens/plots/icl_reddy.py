"""Abrupt in-context learning: tests and progress measures over steps, and what settings end with."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from tvlens.plots.palette import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION
from tvlens.plots.theme import Role, figure, label, percent, titled

_TESTS = {
    "new_classes": Role("new classes (in context)", BLUE, "solid", "circle"),
    "moved_labels": Role("moved labels (in context)", SKY, "dash", "square"),
    "in_weights": Role("target absent (in weights)", ORANGE, "dashdot", "triangle-up"),
    "train": Role("as in training", INK, "dot", "x"),
}
_MEASURES = {
    "previous_token": Role(
        "labels attend to the item before (layer 1)", PURPLE, "longdash", "square"
    ),
    "target_label": Role("target attends to right labels (layer 2)", GREEN, "10px 2px", "circle"),
    "same_label": Role("right less wrong label (layer 2)", VERMILION, "longdashdot", "diamond"),
}
_LOGIT = Role("logit of labels in the context", GREY, "2px 4px", "x")


def reddy_curves(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw accuracies above, progress measures below: thin lines are seeds, thick ones their means.

    Args:
        data: ``accuracy`` by seed, test and step, ``progress`` by seed, measure and step, of one setting.
        title: The sentence that says what came out.

    Returns:
        The figure.

    Raises:
        ValueError: A variable is missing, or there are several settings.

    Example:
        >>> reddy_curves(result.data.isel(setting=0))  # doctest: +SKIP

    References:
        Reddy 2023, arXiv 2312.03002.
    """
    missing = {"accuracy", "progress"} - set(map(str, data.data_vars))
    if missing or "setting" in data.dims:
        lacks = (
            f"lacks {', '.join(sorted(missing))}" if missing else "has several settings: choose one"
        )
        raise ValueError(f"the data {lacks}; it has: {', '.join(map(str, data))}")
    heads = ["<b>tests</b>", "<b>measures on new classes</b>", "<b>logit: context less others</b>"]
    fig = make_subplots(
        3, 1, shared_xaxes=True, vertical_spacing=0.07, subplot_titles=heads, figure=figure(),
        row_heights=[0.4, 0.36, 0.24],
    )  # fmt: skip
    fig.update_annotations(font_size=13, x=0, xanchor="left")
    for name, role in _TESTS.items():
        _lines(fig, data["accuracy"].sel(test=name), role, 1)
    for name, role in _MEASURES.items():
        _lines(fig, data["progress"].sel(measure=name), role, 2)
    _lines(fig, data["progress"].sel(measure="context_label"), _LOGIT, 3)
    for row in (1, 2):
        low = min(0.0, float(data["progress"].sel(measure="same_label").min())) if row == 2 else 0.0
        fig.update_yaxes(range=[low - 0.03, 1.03], row=row, col=1)
    for row, words in enumerate(("accuracy", "attention", "logit"), 1):
        fig.update_yaxes(title_text=words, row=row, col=1)
    fig.update_xaxes(title_text="step", row=3, col=1)
    fig.update_layout(height=640, margin_t=46, meta={"min_width": 520}, legend={"y": -0.1})
    known = {"n_classes": "classes", "copies": "copies", "noise": "noise", "zipf": "Zipf exponent"}
    small = [
        f"{words} {float(data[name]):g}" for name, words in known.items() if name in data.coords
    ]
    return titled(fig, title or "Abrupt in-context learning", subtitle=", ".join(small))


def _lines(fig: go.Figure, curves: xr.DataArray, role: Role, row: int) -> None:
    step, each = curves["step"].values, curves.transpose("seed", "step").values
    gap = np.full((len(each), 1), np.nan)
    fig.add_scatter(
        x=np.tile(np.append(step, np.nan), len(each)), y=np.hstack([each, gap]).ravel(), mode="lines",
        line={"color": role.faint(0.35), "width": 1}, legendgroup=role.name, showlegend=False,
        hoverinfo="skip", row=row, col=1,
    )  # fmt: skip
    fig.add_scatter(
        x=step, y=each.mean(axis=0), mode="lines", name=role.name, legendgroup=role.name,
        line={"color": role.color, "width": 2.4, "dash": role.dash},
        hovertemplate=f"{role.name}<br>step %{{x:,}}: %{{y:.2f}}<extra></extra>", row=row, col=1,
    )  # fmt: skip


def reddy_settings(table: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """Draw what each setting ends with in context and in weights: points are seeds, lines their means.

    Args:
        table: Dials, ``seed``, ``new_classes`` and ``in_weights`` as ``Reddy.emergence()`` gives them.
        title: The sentence that says what came out.

    Returns:
        The figure.

    Raises:
        ValueError: A column is missing.

    Example:
        >>> reddy_settings(result.emergence())  # doctest: +SKIP

    References:
        Reddy 2023, arXiv 2312.03002.
    """
    dials = {"n_classes": "classes", "copies": "copies", "noise": "noise", "zipf": "Zipf exponent"}
    if missing := {*dials, "seed", "new_classes", "in_weights"} - set(table.columns):
        raise ValueError(
            f"the table lacks {', '.join(sorted(missing))}; it has: {', '.join(table.columns)}"
        )
    varied = [name for name in dials if len(set(table[name])) > 1] or ["n_classes"]
    names = [
        ", ".join(f"{dials[d]} {row[d]:,g}" for d in varied) for row in table.to_dict("records")
    ]
    places = list(dict.fromkeys(names))
    fig = figure()
    for shift, test in ((-0.12, "new_classes"), (0.12, "in_weights")):
        role, at = _TESTS[test], [places.index(name) + shift for name in names]
        texts = [
            f"{label(n)}<br>{role.name} {percent(v)}"
            for n, v in zip(names, table[test], strict=True)
        ]
        fig.add_scatter(
            x=at, y=table[test], mode="markers", name=role.name, customdata=texts,
            marker={"color": role.faint(0.75), "symbol": role.symbol, "size": 8},
            hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
        means: Any = table.assign(place=names).groupby("place", sort=False)[test].mean()
        fig.add_scatter(
            x=[i + shift for i in range(len(places))], y=means.loc[places], mode="lines", showlegend=False,
            line={"color": role.color, "width": 1.2, "dash": role.dash}, hoverinfo="skip",
        )  # fmt: skip
    lines = [place.replace(", ", "<br>") for place in places]
    ends = [-0.5, len(places) - 0.5]
    fig.update_xaxes(tickvals=list(range(len(places))), ticktext=lines, showgrid=False, range=ends)
    fig.update_yaxes(range=[-0.03, 1.03], title_text="accuracy at the end")
    below = 0.1 + 0.065 * len(varied)
    fig.update_layout(height=400, meta={"min_width": 90 * len(places)}, legend={"y": -below})
    return titled(fig, _extremes(table, names) if title is None else title)


def _extremes(table: pd.DataFrame, names: list[str]) -> str:
    """The settings with the best and the worst accuracy on new classes."""
    mean: Any = table.assign(place=names).groupby("place", sort=False)["new_classes"].mean()
    said = [f"{percent(mean[place])} ({place})" for place in (mean.idxmax(), mean.idxmin())]
    return f"On new classes settings end with {said[0]} to {said[1]}"
