"""Who is obeyed when demonstrations and an injected theta disagree?

Two maps over the same pairs of tasks: how often the prompt follows theta, and how often its demonstrations.
What is missing from their sum is damage. Buttons change what was injected, so that the controls stand in the
same cells.
"""

from typing import Any

import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from tvlens._errors import unknown
from tvlens.plots._axes import color_bar
from tvlens.plots._cells import button_row, written_cells
from tvlens.plots._notes import notes
from tvlens.plots.palette import EMPTY, INK, LINE, PAPER, SEQUENTIAL
from tvlens.plots.theme import ROLES, figure, label, percent, titled

_SIDES = {"vector": "obeys the vector", "demonstrations": "obeys the demonstrations"}
_INJECTIONS = {
    "other": "theta of the other task",
    "none": "nothing",
    "own": "theta of the same task",
    "random": "random vector",
}
_COLORS = {
    "vector": ROLES["hypothesis"].color,
    "demonstrations": ROLES["regular"].color,
    "neither": LINE,
}
_WIDE = 8  # tasks from which on the maps stand one above the other


def conflict_matrix(
    data: xr.Dataset, *, injection: str = "other", title: str | None = None
) -> go.Figure:
    """Draw how often theta and how often the demonstrations are obeyed, for all pairs of tasks.

    Args:
        data: What `tvlens.experiments.conflict.Conflict.drawn` gives.
        injection: What is shown first: ``"other"``, ``"none"``, ``"own"`` or ``"random"``.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: demonstrations downwards, vectors to the right, buttons for what was injected. Hover
        for intervals and the number of prompts.

    Raises:
        ValueError: There is no such injection.

    Example:
        >>> conflict_matrix(result.drawn(), injection="none")  # doctest: +SKIP

    References:
        Hendel et al. 2023, arXiv 2310.15916.
    """
    kinds = [name for name in _INJECTIONS if name in data["injection"].values]
    if injection not in kinds:
        raise unknown("injection", injection, kinds)
    n = data.sizes["vector"]
    stacked = n > _WIDE
    rows, columns = (2, 1) if stacked else (1, 2)
    fig = make_subplots(
        rows=rows, cols=columns, shared_yaxes=not stacked, vertical_spacing=0.3 / max(n, 1) + 0.07,
        horizontal_spacing=0.03, subplot_titles=[f"<b>{side}</b>" for side in _SIDES.values()],
        figure=figure(),
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    for kind in kinds:
        one = data.sel(injection=kind)
        for i, side in enumerate(_SIDES):
            trace = _cells(one, side, kind, visible=kind == injection)
            fig.add_trace(trace, row=1 + i * stacked, col=1 + i * (not stacked))
    _axes(fig, data, stacked=stacked)
    fig.update_layout(updatemenus=[_switch(kinds, injection)])
    note = notes(data)
    small = [note.get("model"), _said(data), "grey: no queries in common"]
    sentence = data.attrs.get("finding", "") if title is None else title
    return titled(fig, sentence, subtitle=" · ".join(map(str, filter(None, small))))


def _said(data: xr.Dataset) -> str:
    """Means of both sides under the controls, so that they stand in the figure."""
    if "mean_rate" not in data:
        return ""
    parts = []
    for kind, words in _INJECTIONS.items():
        if kind in data["injection"].values and kind != "other":
            mean = data["mean_rate"].sel(injection=kind)
            first, second = (percent(float(mean.sel(outcome=side))) for side in _SIDES)
            parts.append(f"{words} {first} / {second}")
    return "vector / demonstrations obeyed with " + ", ".join(parts)


def _cells(data: xr.Dataset, side: str, kind: str, *, visible: bool) -> go.Heatmap:
    data = data.transpose("demonstrations", "vector", ...)
    z = data[f"{side}_rate"].values.astype(float)
    n = data.sizes["vector"]
    words = [["" if v != v else percent(v) for v in row] for row in z]
    hover = [[_hover(data, i, j, kind) for j in range(n)] for i in range(z.shape[0])]
    name = f"{_SIDES[side]}, {_INJECTIONS[kind]}"
    return written_cells(z, words, hover, coloraxis="coloraxis", name=name, visible=visible)


def _hover(data: xr.Dataset, i: int, j: int, kind: str) -> str:
    """All that is known of one pair under one injection."""
    cell = data.isel(demonstrations=i, vector=j)
    if not float(cell["n"]) > 0:
        return ""
    shown, carried = (label(cell[name].values) for name in ("demonstrations", "vector"))
    lines = [
        f"<b>{shown}</b> in the prompt, theta of <b>{carried}</b>",
        f"injected at layer {int(cell['layer'])}: {_INJECTIONS[kind]}",
    ]
    for side in ("vector", "demonstrations", "neither"):
        rate, low, high = (float(cell[f"{side}_rate{end}"]) for end in ("", "_low", "_high"))
        lines.append(f"{side}: {percent(rate)}  ({percent(low)} to {percent(high)})")
    lines.append(f"{int(cell['n'])} prompts, {int(cell['n_queries'])} queries")
    if float(cell["dev_accuracy"]) == float(cell["dev_accuracy"]):
        lines.append(f"theta alone, on its own dev queries: {percent(float(cell['dev_accuracy']))}")
    return "<br>".join(lines)


def _axes(fig: go.Figure, data: xr.Dataset, *, stacked: bool) -> None:
    names = [label(name) for name in data["vector"].values]
    n = len(names)
    ticks = {"tickvals": list(range(n)), "ticktext": names, "showgrid": False, "ticks": ""}
    fig.update_xaxes(**ticks, range=[-0.5, n - 0.5], title_text="theta of", tickangle=-35)
    fig.update_yaxes(**ticks, range=[n - 0.5, -0.5])
    for i in range(2 if stacked else 1):
        fig.update_yaxes(title_text="demonstrations of", row=1 + i, col=1)
    tall = max(34 * n, 120)
    fig.update_layout(
        coloraxis={
            "colorscale": SEQUENTIAL, "cmin": 0, "cmax": 1,
            "colorbar": color_bar("share of prompts", height=tall),
        },
        plot_bgcolor=EMPTY,
        height=(2 if stacked else 1) * (tall + 110) + 50,
        margin={"t": 90, "b": 70, "r": 20},
        meta={"min_width": max(46 * n * (1 if stacked else 2) + 240, 560)},
    )  # fmt: skip


def _switch(kinds: list[str], shown: str) -> dict[str, Any]:
    """A button for each injection; every one has a map for both sides."""
    buttons = [
        {
            "label": label(_INJECTIONS[kind]),
            "method": "restyle",
            "args": [{"visible": [other == kind for other in kinds for _ in _SIDES]}],
        }
        for kind in kinds
    ]
    return button_row(buttons, kinds.index(shown), pad=34)


def conflict_controls(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw, averaged over the pairs, who is obeyed under each injection.

    Args:
        data: What `tvlens.experiments.conflict.Conflict.drawn` gives.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: a bar for each injection, cut into vector, demonstrations and neither. Hover for
        intervals over the pairs.

    Example:
        >>> conflict_controls(result.drawn())  # doctest: +SKIP

    References:
        Hendel et al. 2023, arXiv 2310.15916.
    """
    kinds = [name for name in _INJECTIONS if name in data["injection"].values]
    fig = figure(barmode="stack", bargap=0.35)
    for outcome, color in _COLORS.items():
        here = data.sel(injection=kinds, outcome=outcome)
        rate, low, high = (here[f"mean_{name}"].values for name in ("rate", "low", "high"))
        ends = zip(low, high, strict=True)
        fig.add_bar(
            x=rate,
            y=[label(_INJECTIONS[kind]) for kind in kinds],
            orientation="h",
            name=_SIDES.get(outcome, "neither"),
            marker={"color": color, "line": {"color": PAPER, "width": 1}},
            text=[percent(v) if v >= 0.05 else "" for v in rate],
            textposition="inside",
            insidetextanchor="middle",
            textfont={"color": PAPER if outcome != "neither" else INK},
            customdata=[f"{percent(a)} to {percent(b)} over pairs" for a, b in ends],
            hovertemplate="%{fullData.name}: %{x:.3f}<br>%{customdata}<extra></extra>",
        )
    fig.update_xaxes(range=[0, 1], title_text="share of prompts, mean over pairs of tasks")
    fig.update_yaxes(autorange="reversed", showgrid=False, ticks="", title_text="injected")
    fig.update_layout(
        height=70 * len(kinds) + 110, legend_traceorder="normal", meta={"min_width": 480}
    )
    sentence = data.attrs.get("finding", "") if title is None else title
    return titled(fig, sentence, subtitle=str(notes(data).get("model", "")))
