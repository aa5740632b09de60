"""Does a vector say what it does? Steering against decoding, task by task.

To the right stand tasks whose unseen answers can be read off theta, above those whose answers theta makes the
model give. Above and to the left is what the vocabulary projection misses.
"""

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from tvlens._errors import unknown
from tvlens.plots._labels import named, rows
from tvlens.plots._notes import notes
from tvlens.plots.palette import BLUE, EMPTY, GREEN, GREY, GRID, MUTED, ORANGE, PAPER, VERMILION
from tvlens.plots.theme import FONT, MONO, ROLES, Role, figure, label, percent, titled

_KINDS = {
    (True, False): Role("steerable, not decodable", VERMILION, "solid", "diamond"),
    (True, True): Role("steerable and decodable", BLUE, "solid", "circle"),
    (False, True): Role("decodable, not steerable", GREEN, "solid", "square"),
    (False, False): Role("neither", GREY, "solid", "x"),
}
_X = {
    "auc": "decodable: AUC of unseen answers, at the layer that steers best",
    "auc_best": "decodable: AUC of unseen answers, at the layer best for reading",
    "share": "decodable: share of top tokens that are the task's",
}
_OTHER = Role("other tasks' thetas (mean)", MUTED, "dot", "line-ns-open")
_AUC = Role("decodable (AUC)", ORANGE, "dash", "square")
_LETTER = 0.0125  # of the axis: how wide a letter of a name is
_HIGH = 0.7  # names of points from here on stand below them


def steer_and_decode(table: pd.DataFrame, *, x: str = "auc", title: str | None = None) -> go.Figure:
    """Draw how steerable tasks are against how decodable.

    Args:
        table: One row for each task, as ``Decodability.rates()`` gives them: ``task, steer, steer_low,
            steer_high, steer_random, steerable, decodable`` and what stands on the axis; where there are,
            its intervals and other tasks' thetas, and ``words`` for the hover.
        x: ``"auc"`` (of the vector that steers best), ``"auc_best"`` (of the layer best for reading), or
            ``"share"``.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: bars are 95 % intervals, ticks the mean of other tasks' thetas.

    Raises:
        ValueError: A column is missing, or there is no such axis.

    Example:
        >>> steer_and_decode(result.rates().reset_index())  # doctest: +SKIP

    References:
        Nadaf 2026, arXiv 2604.02608.
    """
    if x not in _X:
        raise unknown("x axis", x, _X)
    read = "decodable_best" if x == "auc_best" else "decodable"
    needed = {"task", "steer", "steer_low", "steer_high", "steerable", "steer_random", read, x}
    missing = needed - set(table.columns)
    if missing:
        raise ValueError(
            f"the table lacks {', '.join(sorted(missing))}; it has: {', '.join(table.columns)}"
        )
    fig = figure()
    for (steers, decodes), role in _KINDS.items():
        some: Any = table[(table["steerable"] == steers) & (table[read] == decodes)]
        if len(some):
            _points(fig, some, role, x)
    _names(fig, table, read, x)
    if f"{x}_other" in table:
        _ticks(fig, table, f"{x}_other")
    if x != "share":
        fig.add_vline(x=0.5, line={"color": MUTED, "width": 1, "dash": "dot"}, layer="below")
    level = float(np.mean(table["steer_random"]))
    line: Any = {"color": ROLES["control"].color, "width": 1, "dash": "dot"}
    fig.add_hline(y=level, line=line, layer="below")
    _corners(fig, table, x)
    fig.update_yaxes(
        title_text="steerable: accuracy on bare queries",
        range=[-0.14, 1.16],
        tickvals=[0, 0.25, 0.5, 0.75, 1],
    )
    fig.update_layout(height=600, legend={"y": -0.13}, hovermode="closest", meta={"min_width": 620})
    small = (
        "Answers that theta has not seen · 95% intervals · dotted: chance, and the random vector"
    )
    if title is None:
        steers, reads = (table[name].to_numpy(bool) for name in ("steerable", read))
        title = (
            f"{steers.sum()} of {len(table)} tasks are steerable; the vector of {(steers & reads).sum()} of "
            "them says their answers"
        )
    return titled(fig, title, subtitle=small)


def _points(fig: go.Figure, some: pd.DataFrame, role: Role, x: str) -> None:
    bars = {}
    if f"{x}_low" in some:
        bars["error_x"] = _ends(some, x) | {"color": role.faint(0.45)}
    texts = [_hover(one) for one in some.to_dict("records")]
    fig.add_scatter(
        x=some[x], y=some["steer"], mode="markers", name=role.name, cliponaxis=False,
        marker={"color": role.color, "symbol": role.symbol, "size": 9}, customdata=texts,
        error_y=_ends(some, "steer") | {"color": role.faint(0.45)},
        hovertemplate="%{customdata}<extra></extra>", **bars,
    )  # fmt: skip


def _names(fig: go.Figure, table: pd.DataFrame, read: str, x: str) -> None:
    """The tasks' names: below the points high up, above the others."""
    wide = _LETTER * (max(float(np.nanmax(table[x], initial=0)), 0.1) if x == "share" else 1)
    for above in (True, False):
        some: Any = table[((table["steer"] < _HIGH) == above) & table[x].notna()]
        widths = [wide * len(str(name)) for name in some["task"]]
        heights = [v if above else -v for v in some["steer"].tolist()]
        places = rows(some[x].tolist(), heights, widths, tall=0.035)
        for one, row in zip(some.to_dict("records"), places, strict=True):
            role = _KINDS[bool(one["steerable"]), bool(one[read])]
            text = label(one["task"])
            named(fig, one[x], one["steer"], text, row=row, above=above, size=11, color=role.color)


def _ends(some: pd.DataFrame, name: str) -> dict[str, Any]:
    above, below = some[f"{name}_high"] - some[name], some[name] - some[f"{name}_low"]
    return {"type": "data", "array": above, "arrayminus": below, "thickness": 1, "width": 2}


def _ticks(fig: go.Figure, table: pd.DataFrame, other: str) -> None:
    """Mark for each task what other tasks' thetas say of its answers."""
    texts = [
        f"<b>{label(t)}</b><br>other tasks' thetas {percent(v)}"
        for t, v in zip(table["task"], table[other], strict=True)
    ]
    marker = {"symbol": _OTHER.symbol, "size": 10, "color": _OTHER.color, "line": {"width": 1.5}}
    fig.add_scatter(
        x=table[other], y=table["steer"], mode="markers", name=_OTHER.name, marker=marker, opacity=0.7,
        customdata=texts, hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip


def _corners(fig: go.Figure, table: pd.DataFrame, x: str) -> None:
    """Name the corners."""
    if x == "share":
        top = max(float(np.nanmax(table[x], initial=0)) * 1.15, 0.1)
        low, high = -0.03 * top, top
    else:
        low, high = 0.0, 1.02
    fig.update_xaxes(title_text=_X[x], range=[low, high])
    for (steers, decodes), role in _KINDS.items():
        fig.add_annotation(
            x=1 if decodes else 0, y=1 if steers else 0, xref="paper", yref="paper", showarrow=False,
            xanchor="right" if decodes else "left", yanchor="top" if steers else "bottom",
            text=f"<i>{role.name}</i>", font={"size": 12, "color": role.color}, opacity=0.8,
        )  # fmt: skip


def _hover(one: dict[Any, Any]) -> str:
    def said(name: str) -> str:
        ends = (
            f" [{percent(one[f'{name}_low'])}, {percent(one[f'{name}_high'])}]"
            if f"{name}_low" in one
            else ""
        )
        return f"{percent(one[name])}{ends}"

    lines = [
        f"<b>{label(one['task'])}</b>",
        f"accuracy {said('steer')}, random {percent(one['steer_random'])}",
    ]
    if "steer_layer" in one:
        lines[-1] += f", layer {one['steer_layer']}"
    known = {
        "auc": "AUC",
        "auc_other": "other thetas",
        "auc_random": "random directions",
        "auc_best": "best AUC",
        "share": "of top tokens",
    }
    lines += [f"{words} {said(key)}" for key, words in known.items() if key in one]
    if "words" in one:
        lines.append(label(str(one["words"])[:90]))
    return "<br>".join(lines)


def decode_by_layer(curves: xr.Dataset, *, columns: int = 3, title: str | None = None) -> go.Figure:
    """Draw steering and decoding by layer, one panel for each task.

    Args:
        curves: What ``Decodability.curves()`` gives.
        columns: Panels in a row.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: bands are 95 % intervals; the dotted curve is the mean of other tasks' thetas.

    Raises:
        ValueError: The data lacks a variable.

    Example:
        >>> decode_by_layer(result.curves())  # doctest: +SKIP

    References:
        Nadaf 2026, arXiv 2604.02608.
    """
    needed = (
        "auc",
        "auc_low",
        "auc_high",
        "auc_other",
        "steer",
        "steer_low",
        "steer_high",
        "steer_random",
    )
    missing = [name for name in needed if name not in curves]
    if missing:
        raise ValueError(
            f"the data lacks {', '.join(missing)}; it has: {', '.join(map(str, curves))}"
        )
    names = [str(name) for name in curves["task"].values]
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    plot_height = 160 * rows + 54 * (rows - 1)
    fig = make_subplots(
        rows, columns, shared_yaxes=True, horizontal_spacing=0.04, figure=figure(),
        subplot_titles=[f"<b>{label(name)}</b>" for name in names],
        vertical_spacing=54 / plot_height if rows > 1 else None,
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    for i, name in enumerate(names):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        _panel(fig, curves.sel(task=name), place, legend=i == 0)
    fig.update_xaxes(showgrid=False)
    fig.update_xaxes(title_text="layer", row=rows)
    fig.update_yaxes(range=[-0.03, 1.05], tickvals=[0, 0.5, 1])
    fig.update_yaxes(title_text="accuracy, AUC", col=1)
    fig.update_layout(
        height=plot_height + 150, margin_t=54, legend={"y": -62 / plot_height},
        meta={"min_width": 260 * columns},
    )  # fmt: skip
    said = str(curves.attrs.get("finding", "")) if title is None else title
    note = notes(curves)
    lens = f"{note['lens']} lens" if "lens" in note else ""
    small = " · ".join(
        filter(None, [str(note.get("model", "")), lens, "95% bands", "chance AUC 0.5"])
    )
    return titled(fig, said, subtitle=small)


def _panel(fig: go.Figure, one: xr.Dataset, place: dict[str, int], *, legend: bool) -> None:
    at: Any = one["layer"].values
    steer = Role("steerable (accuracy)", ROLES["hypothesis"].color, "solid", "circle")
    for name, role in (("steer", steer), ("auc", _AUC)):
        low, high = one[f"{name}_low"].values, one[f"{name}_high"].values
        fig.add_scatter(
            x=np.concatenate([at, at[::-1]]), y=np.concatenate([high, low[::-1]]), fill="toself",
            fillcolor=role.faint(0.15), line_width=0, mode="lines", hoverinfo="skip", showlegend=False,
            legendgroup=name, **place,
        )  # fmt: skip
    random = Role("random vector (accuracy)", ROLES["control"].color, "dot", "x")
    other = Role("other tasks' thetas (AUC)", _OTHER.color, "dashdot", "x")
    drawn = {"steer": steer, "auc": _AUC, "auc_other": other, "steer_random": random}
    for name, role in drawn.items():
        fig.add_scatter(
            x=at, y=one[name].values, mode="lines", name=role.name, legendgroup=name, showlegend=legend,
            line={"color": role.color, "dash": role.dash, "width": 2 if name in ("steer", "auc") else 1.4},
            hovertemplate=f"{role.name}<br>layer %{{x}}: %{{y:.2f}}<extra></extra>", **place,
        )  # fmt: skip


def word_table(table: pd.DataFrame, *, title: str = "Words that theta promotes") -> go.Figure:
    """Draw the paper's table of top words.

    Args:
        table: ``task, layer, words``, as ``Decodability.words()`` gives them.
        title: The figure's title.

    Returns:
        The figure, a table.

    Raises:
        ValueError: A column is missing.

    Example:
        >>> word_table(pd.DataFrame([{"task": "to_upper", "layer": 3, "words": "A, B"}])).data[0].type
        'table'

    References:
        Hendel et al. 2023, arXiv 2310.15916, table 4.
    """
    missing = {"task", "layer", "words"} - set(table.columns)
    if missing:
        raise ValueError(
            f"the table lacks {', '.join(sorted(missing))}; it has: {', '.join(table.columns)}"
        )
    fig = figure()
    columns = [[label(v) for v in table[name]] for name in ("task", "layer", "words")]
    plain: dict[str, Any] = {"align": "left", "line": {"color": GRID}}
    fig.add_trace(
        go.Table(
            columnwidth=[0.2, 0.08, 1],
            header={"values": ["task", "layer", "words"], "fill": {"color": EMPTY}, **plain},
            cells={
                "values": columns, "fill": {"color": PAPER}, "height": 24,
                "font": {"family": [FONT, FONT, MONO], "size": 12}, **plain,
            },
        )
    )  # fmt: skip
    lines = sum(1 + len(str(words)) // 90 for words in table["words"])
    fig.update_layout(height=25 * lines + 84, margin={"l": 16, "b": 10}, meta={"min_width": 760})
    small = "plain letters among the top 100 tokens, each once, some layers after the one that steers best"
    return titled(fig, title, subtitle=small)
