"""Known circuits: where heads look, what their ablation costs, and whether a model does a task.

A map has a cell for every head, and a button for each place that heads were scored on; all share one scale
from 0 to 1, so that a faint map says that nobody looks there.
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens._errors import unknown
from tvlens.plots._axes import color_bar
from tvlens.plots._cells import CellText, button_row, cell_texts, number
from tvlens.plots._notes import notes
from tvlens.plots.palette import EMPTY, PAPER, SEQUENTIAL
from tvlens.plots.theme import MONO, ROLES, figure, label, titled

_TOP, _OTHER = ROLES["query_blind"].color, ROLES["hypothesis"].color
_COSTS = {"top": "best heads", "random": "random heads"}


def head_map(
    data: xr.Dataset, *, kind: str | None = None, text: bool | None = None, title: str | None = None
) -> go.Figure:
    """Draw the scores of all heads, layer by head, with a button for each kind.

    Args:
        data: What `tvlens.circuits.HeadScores.drawn` gives: ``mean``, ``low``, ``high`` by kind, layer and
            head.
        kind: The kind that is shown first; the last one by default.
        text: Whether values stand in the cells; by default where there is room.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure. Hover for the score and its interval.

    Raises:
        ValueError: There is no such kind.

    Example:
        >>> head_map(scores.drawn(), kind="previous")  # doctest: +SKIP

    References:
        Olsson et al. 2022, arXiv 2209.11895.
    """
    kinds = [str(name) for name in data["kind"].values]
    kind = kinds[-1] if kind is None else kind
    if kind not in kinds:
        raise unknown("kind of head", kind, kinds)
    small = data.sizes["head"] <= 12 and data.sizes["layer"] <= 16
    note = notes(data) | {"variable": "attention"}
    how = CellText("head", "layer", 0.0, 1.0, small if text is None else text, note)
    fig = figure()
    for each in kinds:
        fig.add_trace(_cells(data.sel(kind=each, drop=True), how, each, visible=each == kind))
    _heads_axes(fig, data, controls=len(kinds) > 1)
    if len(kinds) > 1:
        fig.update_layout(updatemenus=[_switch(kinds, kinds.index(kind))])
    n = note.get("n_prompts")
    parts = [note.get("model"), f"mean of {n} sequences of random tokens said twice" if n else None]
    sentence = data.attrs.get("finding", "") if title is None else title
    return titled(fig, sentence, subtitle=" · ".join(map(str, filter(None, parts))))


def _cells(data: xr.Dataset, how: CellText, kind: str, *, visible: bool) -> go.Heatmap:
    z, words, hover = cell_texts(data, how)
    return go.Heatmap(
        z=z,
        x=np.arange(data.sizes["head"]),
        y=np.arange(data.sizes["layer"]),
        text=words,
        texttemplate="%{text}",
        textfont={"family": MONO, "size": 11},
        customdata=hover,
        hovertemplate=f"{label(kind)}<br>%{{customdata}}<extra></extra>",
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        name=kind,
        visible=visible,
    )


def _heads_axes(fig: go.Figure, data: xr.Dataset, *, controls: bool) -> None:
    # Rows become flatter where there are many, down to what a tick label needs.
    row, top = float(np.clip(460 / data.sizes["layer"], 15, 30)), 34 + 44 * controls
    tall = max(row * data.sizes["layer"], 120.0)
    fig.update_layout(
        coloraxis={
            "colorscale": SEQUENTIAL,
            "cmin": 0,
            "cmax": 1,
            "colorbar": color_bar("attention", height=tall),
        }
    )
    for axis, dim in ((fig.update_xaxes, "head"), (fig.update_yaxes, "layer")):
        names = [label(value) for value in data[dim].values.tolist()]
        step = max(1, round(len(names) / 24))
        axis(
            tickvals=list(range(0, len(names), step)), ticktext=names[::step], showgrid=False,
            ticks="", title_text=dim, range=[-0.5, len(names) - 0.5], tickfont_size=11,
        )  # fmt: skip
    fig.update_layout(
        height=tall + 60 + top,
        plot_bgcolor=EMPTY,
        margin={"t": top, "b": 60, "r": 20},
        meta={"min_width": max(26 * data.sizes["head"], 420) + 160},
    )


def _switch(kinds: list[str], active: int) -> dict[str, Any]:
    """A button for each kind."""
    buttons = [
        {
            "label": label(kind),
            "method": "restyle",
            "args": [{"visible": [other == kind for other in kinds]}],
        }
        for kind in kinds
    ]
    return button_row(buttons, active, pad=10)


def ablation_costs(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw what ablating the best heads costs, next to random ones.

    Args:
        data: The data of a `tvlens.circuits.InductionTest`, with ``means`` and ``finding`` among its
            attributes.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: a point for every sequence (best heads) or every draw of heads (random ones), and
        the mean with its interval. Hover for the heads.

    Example:
        >>> ablation_costs(test.data.assign_attrs(means=test.costs()))  # doctest: +SKIP

    References:
        Olsson et al. 2022, arXiv 2209.11895.
    """
    clean, note = data["clean"], notes(data)
    random = (data["random"] - clean).mean("prompt").values
    heads = [
        "<br>".join(
            f"layer {layer}, head {head}"
            for layer, head in zip(
                data["random_layer"].values[d], data["random_head"].values[d], strict=True
            )
        )
        for d in range(data.sizes["draw"])
    ]
    points = {
        "top": ((data["top"] - clean).values, [f"sequence {i}" for i in range(clean.size)]),
        "random": (random, heads),
    }
    fig = figure()
    for row, (name, (values, texts)) in enumerate(points.items()):
        color = _TOP if name == "top" else _OTHER
        mean = _mean(data, name, values)
        _strip(fig, row, values, texts, mean, color=color, name=_COSTS[name])
    rows = [f"{note.get('n_heads', '')} {words}".strip() for words in _COSTS.values()]
    _strip_axes(fig, rows, "rise of the loss on repeated tokens, nats a token")
    small = f"{note.get('model', '')} · a point is a sequence, or a draw of random heads"
    return titled(fig, data.attrs.get("finding", "") if title is None else title, subtitle=small)


def logit_differences(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw the logit difference of every clean and corrupted prompt.

    Args:
        data: The data of a `tvlens.circuits.Behaviour`, with ``means`` and ``finding`` among its attributes.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: a point for every prompt, and their mean. Hover for the prompt.

    Example:
        >>> logit_differences(found.data)  # doctest: +SKIP

    References:
        Wang et al. 2022, arXiv 2211.00593.
    """
    fig = figure()
    runs = [str(run) for run in data["run"].values]
    for row, run in enumerate(runs):
        values = data["difference"].sel(run=run).values
        texts = [label(text) for text in data[f"{run}_text"].values]
        mean = _mean(data, run, values)
        color = _TOP if run == "clean" else _OTHER
        _strip(fig, row, values, texts, mean, color=color, name=run)
    _strip_axes(fig, runs, "logit of the right answer less that of the wrong one")
    small = str(notes(data).get("model", ""))
    return titled(fig, data.attrs.get("finding", "") if title is None else title, subtitle=small)


def _mean(data: xr.Dataset, name: str, values: np.ndarray) -> Any:
    """The mean with its interval, where that is known."""
    return data.attrs.get("means", {}).get(name, (float(np.mean(values)), np.nan, np.nan))


def _strip(
    fig: go.Figure,
    row: int,
    values: np.ndarray,
    texts: list[str],
    mean: Any,
    *,
    color: str,
    name: str,
) -> None:
    """Points of one row, spread a little so that they do not hide each other, and their mean."""
    # A fixed pattern, not a draw: the same data gives the same figure.
    spread = 0.12 + 0.16 * ((np.arange(len(values)) * 0.618) % 1)
    fig.add_scatter(
        x=values,
        y=row + spread,
        mode="markers",
        marker={"color": color, "size": 7, "opacity": 0.55, "line": {"color": PAPER, "width": 1}},
        name=name,
        showlegend=False,
        customdata=texts,
        hovertemplate=f"{label(name)}: %{{x:.3f}}<br>%{{customdata}}<extra></extra>",
    )
    middle, low, high = mean
    known = low == low
    fig.add_scatter(
        x=[middle],
        y=[row],
        mode="markers",
        marker={"color": color, "size": 11, "symbol": "diamond"},
        error_x={
            "type": "data", "symmetric": False, "array": [high - middle if known else 0],
            "arrayminus": [middle - low if known else 0], "color": color, "thickness": 2,
        },
        name=f"{name}, mean",
        showlegend=False,
        hovertemplate=f"{label(name)}: mean {number(middle)}"
        + (f" ({number(low)} to {number(high)})" if known else "")
        + "<extra></extra>",
    )  # fmt: skip


def _strip_axes(fig: go.Figure, rows: list[str], quantity: str) -> None:
    fig.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=[label(r) for r in rows], ticks="",
        range=[len(rows) - 0.5, -0.3], showgrid=False,
    )  # fmt: skip
    fig.update_xaxes(title_text=quantity, zeroline=True)
    fig.update_layout(height=90 * len(rows) + 110, meta={"min_width": 460})
