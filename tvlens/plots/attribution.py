"""How a logit adds up, and which tokens it owes: a waterfall, highlighted tokens, and a map of origins.

Blue adds and vermilion takes away, here as in every map. In greyscale both are dark, so what takes away is
drawn hollow in the waterfall and marked with a minus sign in cells. What the parts miss is a bar like others:
it is seen to be nothing, or seen.
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.colors import sample_colorscale

from tvlens.plots._axes import color_bar
from tvlens.plots._cells import number
from tvlens.plots._notes import metric_of, notes
from tvlens.plots.palette import DIVERGING, EMPTY, INK, LINE, MUTED, PAPER
from tvlens.plots.theme import MONO, ROLES, figure, label, titled, visible

_ADDS, _TAKES = ROLES["hypothesis"].color, ROLES["query_blind"].color
_LONGEST = 18  # characters of a token
_LINE = 64  # characters of highlighted text in a row
_MOST_PROMPTS = 40
_MARKED = 0.2  # share of the scale from which on a negative value is marked
_ROLES = {"other": "words around", "last": "last token"}
_KINDS = {
    "embedding": "embedding",
    "positional_embedding": "positions",
    "final_norm_bias": "norm bias",
    "unembedding_bias": "unembed bias",
}


def waterfall(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw how the parts add up, layer by layer, from nothing to the total.

    Args:
        data: What `tvlens.attribution.Attribution.drawn` gives for ``"waterfall"``: ``mean``, ``low`` and
            ``high`` by part, with ``kind`` and ``layer``; ``total`` and ``residual`` by prompt.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure. Hover for each part's share, its interval and the sum so far.

    Raises:
        ValueError: The data has no parts.

    Example:
        >>> waterfall(result.drawn("waterfall"))  # doctest: +SKIP

    References:
        Elhage et al. 2021, elhage2021mathematical.
    """
    if "mean" not in data or "part" not in data.dims:
        raise ValueError(f"the data has no parts; it has: {', '.join(map(str, data))}")
    shares = data["mean"].values.astype(float)
    total, missed = (float(data[name].mean()) for name in ("total", "residual"))
    steps = np.append(shares, missed)
    ends = steps.cumsum()
    names = [*map(str, data["part"].values), "residual (what the parts miss)"]
    fig = figure()
    hover = [_step(data, i, names[i], ends) for i in range(len(shares))]
    hover.append(f"<b>{label(names[-1])}</b><br>{missed:.0e}".replace("-", "−"))
    up = steps >= 0
    _bars(fig, np.flatnonzero(up), steps, ends, hover, adds=True)
    _bars(fig, np.flatnonzero(~up), steps, ends, hover, adds=False)
    _stairs(fig, ends)
    fig.add_trace(
        go.Bar(
            x=[len(steps)], y=[total], width=0.8, marker_color=INK, name="total",
            hovertemplate=f"<b>total</b><br>{number(total)}<extra></extra>", showlegend=False,
        )
    )  # fmt: skip
    ticks, texts = _part_ticks(data)
    fig.update_xaxes(tickvals=ticks, ticktext=texts, showgrid=False, tickangle=-55, ticks="")
    fig.update_yaxes(title_text=_metric(data), zeroline=True, zerolinecolor=MUTED)
    fig.update_layout(
        height=430, barmode="overlay", bargap=0.1, margin={"b": 90, "r": 20},
        meta={"min_width": max(12 * len(steps), 520)},
        legend={"y": 1.0, "yanchor": "bottom", "x": 0},
    )  # fmt: skip
    return _entitled(fig, data, title, "each layer: attention, then MLP")


def _bars(
    fig: go.Figure,
    at: np.ndarray,
    steps: np.ndarray,
    ends: np.ndarray,
    hover: list[str],
    *,
    adds: bool,
) -> None:
    """The steps one way: filled where they add, hollow where they take away."""
    color = _ADDS if adds else _TAKES
    fig.add_trace(
        go.Bar(
            x=at,
            y=steps[at],
            base=(ends - steps)[at],
            width=0.8,
            marker={"color": color if adds else PAPER, "line": {"color": color, "width": 1.5}},
            name="adds" if adds else "takes away",
            customdata=[hover[i] for i in at],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )


def _stairs(fig: go.Figure, ends: np.ndarray) -> None:
    """A thin line from each step to the next."""
    x = np.stack([np.arange(len(ends)) - 0.4, np.arange(len(ends)) + 1.4], axis=1)
    y = np.stack([ends, ends], axis=1)
    fig.add_trace(
        go.Scatter(
            x=[value for pair in x.tolist() for value in (*pair, None)],
            y=[value for pair in y.tolist() for value in (*pair, None)],
            mode="lines", line={"color": MUTED, "width": 0.6}, hoverinfo="skip", showlegend=False,
        )
    )  # fmt: skip


def _step(data: xr.Dataset, i: int, name: str, ends: np.ndarray) -> str:
    cell = data.isel(part=i)
    line = number(float(cell["mean"]))
    if "low" in cell and float(cell["low"]) == float(cell["low"]):
        line += f"  ({number(float(cell['low']))} to {number(float(cell['high']))})"
    return f"<b>{label(name)}</b><br>{line}<br>sum so far: {number(float(ends[i]))}"


def _part_ticks(data: xr.Dataset) -> tuple[list[float], list[str]]:
    """A tick for each layer (or every few), and for what stands outside the layers."""
    layers, kinds = data["layer"].values, data["kind"].values
    count = len(set(layers[layers >= 0].tolist()))
    every = max(1, round(count / 16))
    ticks: list[float] = []
    texts: list[str] = []
    for i, (layer, kind) in enumerate(zip(layers.tolist(), kinds.tolist(), strict=True)):
        if layer < 0:
            ticks.append(float(i))
            texts.append(_KINDS.get(str(kind), str(kind)))
        elif kind == "attention" and layer % every == 0:
            ticks.append(i + 0.5)
            texts.append(f"layer {layer}" if layer == 0 else str(layer))
    return [*ticks, float(len(layers)), len(layers) + 1.0], [*texts, "residual", "<b>total</b>"]


def token_highlights(
    data: xr.Dataset, *, prompt: int = 0, width: int = _LINE, title: str | None = None
) -> go.Figure:
    """Colour the tokens of a prompt by what the answer owes to each.

    Args:
        data: ``value`` by prompt and position, and the coordinate ``prompt_token``; NaN where a prompt has no
            token.
        prompt: The prompt that is shown first; a menu chooses others.
        width: Characters in a row, about.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure. Hover for each token's value and position.

    Raises:
        ValueError: The data has no values by token, or no such prompt.

    Example:
        >>> token_highlights(result.drawn("tokens"), prompt=3)  # doctest: +SKIP
    """
    if "value" not in data or "prompt_token" not in data.coords:
        raise ValueError(f"the data has no values by token; it has: {', '.join(map(str, data))}")
    n = data.sizes["prompt"]
    if not 0 <= prompt < n:
        raise ValueError(f"prompt {prompt} asked for, but there are {n}: 0 to {n - 1}.")
    shown = list(range(min(n, _MOST_PROMPTS)))
    shown = shown if prompt in shown else [*shown, prompt]
    half = float(np.nanmax(np.abs(data["value"].isel(prompt=shown).values))) or 1.0
    rows = {i: _rows(data, i, width) for i in shown}
    most = max(map(len, rows.values()))
    fig = figure()
    for i in shown:
        fig.add_trace(_tokens(data, i, rows[i], half, first=i == prompt))
    # The bars have their colours already; this is what the colour bar belongs to.
    scale = {"color": [0.0], "coloraxis": "coloraxis", "size": 0.1}
    fig.add_trace(
        go.Scatter(x=[0], y=[0], mode="markers", marker=scale, hoverinfo="skip", showlegend=False)
    )
    if len(shown) > 1:
        fig.update_layout(updatemenus=[_choose(shown, prompt)])
    fig.update_xaxes(visible=False, range=[-0.5, width + 0.5])
    fig.update_yaxes(visible=False, range=[most - 0.4, -0.6])
    fig.update_layout(
        height=40 * most + 84 + 46 * (len(shown) > 1),
        margin={"l": 16, "r": 20, "b": 64, "t": 20 + 46 * (len(shown) > 1)},
        meta={"min_width": 9 * width + 40},
        coloraxis={
            "colorscale": DIVERGING, "cmin": -half, "cmax": half, "colorbar": _lying(_metric(data)),
        },
    )  # fmt: skip
    return _entitled(fig, data, title, "␣ space")


def _lying(said: str) -> dict[str, Any]:
    """A colour bar below the text, which may be one line."""
    bar = color_bar(
        said, height=400, orientation="h", len=0.4, lenmode="fraction", x=0, xanchor="left"
    )
    return bar | {"y": 0, "yanchor": "top", "thickness": 8, "ypad": 6, "xpad": 2,
                  "title": {"text": label(said), "side": "bottom", "font": {"size": 12}}}  # fmt: skip


def _rows(data: xr.Dataset, prompt: int, width: int) -> list[list[tuple[int, str]]]:
    """Positions and their tokens, line by line."""
    rows: list[list[tuple[int, str]]] = [[]]
    used = 0
    for position, token in enumerate(data["prompt_token"].values[prompt].tolist()):
        if np.isnan(data["value"].values[prompt, position]):
            continue
        shown = visible(token, limit=_LONGEST)
        if used + len(shown) + 1 > width and rows[-1]:
            rows.append([])
            used = 0
        rows[-1].append((position, shown))
        used += len(shown) + 1
    return rows


def _tokens(
    data: xr.Dataset, prompt: int, rows: list[list[tuple[int, str]]], half: float, *, first: bool
) -> go.Bar:
    """One box for each token, as wide as its text."""
    values, positions = data["value"].values[prompt].astype(float), data["position"].values
    placed = [(line, i, token) for line, row in enumerate(rows) for i, token in row]
    sizes = [len(token) + 1 for _, _, token in placed]
    ends = [np.cumsum([len(token) + 1 for _, token in row]) for row in rows]
    base = np.concatenate(ends) - sizes
    taken = [values[i] for _, i, _ in placed]
    shown = [
        ("−" if value < -_MARKED * half else "") + label(token)
        for value, (_, _, token) in zip(taken, placed, strict=True)
    ]
    # Colours by name, not by number: text on dark ones is then light.
    colors = sample_colorscale(DIVERGING, [0.5 + value / (2 * half) for value in taken])
    hover = [
        f"<b>{label(token)}</b> position {positions[i]}<br>{number(values[i])}"
        for _, i, token in placed
    ]
    return go.Bar(
        x=[size - 0.15 for size in sizes], y=[line for line, _, _ in placed], base=base, orientation="h",
        width=0.8, text=shown, textposition="inside", insidetextanchor="middle", textangle=0,
        textfont={"family": MONO, "size": 13}, constraintext="none", cliponaxis=False,
        marker={"color": colors, "line": {"color": EMPTY, "width": 1}},
        customdata=hover, hovertemplate="%{customdata}<extra></extra>", visible=first, showlegend=False,
    )  # fmt: skip


def _choose(shown: list[int], prompt: int) -> dict[str, Any]:
    """A menu of prompts."""
    buttons = [
        {
            "label": f"prompt {i}",
            "method": "restyle",
            "args": [{"visible": [*(k == i for k in shown), True]}],
        }
        for i in shown
    ]
    look = {"font": {"size": 12}, "bgcolor": PAPER, "bordercolor": LINE, "pad": {"b": 18}}
    place = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"}
    return {"buttons": buttons, "active": shown.index(prompt), "type": "dropdown", **place, **look}


def origins(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw from which demonstration and which kind of token attention wrote a task vector.

    Args:
        data: What `tvlens.attribution.Attribution.drawn` gives for ``"origins"``: ``mean``, ``low`` and
            ``high`` by demonstration and role.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure. Hover for each share and its interval.

    Raises:
        ValueError: The data has no demonstrations.

    Example:
        >>> origins(result.drawn("origins"))  # doctest: +SKIP
    """
    if "mean" not in data or not {"demonstration", "role"} <= set(map(str, data.dims)):
        raise ValueError(
            f"the data has no demonstrations and roles; it has: {', '.join(map(str, data))}"
        )
    data = data.transpose("role", "demonstration", ...)
    z = data["mean"].values.astype(float)
    half = float(np.nanmax(np.abs(z))) or 1.0
    hover = [
        [_origin(data.isel(role=i, demonstration=j)) for j in range(z.shape[1])]
        for i in range(len(z))
    ]
    names = [
        f"demonstration {d}" if d.isdecimal() else d for d in map(str, data["demonstration"].values)
    ]
    fig = figure(height=36 * len(z) + 90, plot_bgcolor=EMPTY)
    fig.add_trace(
        go.Heatmap(
            z=z, x=names, y=[_role(role) for role in data["role"].values], customdata=hover,
            text=[[number(value, 2) for value in row] for row in z], texttemplate="%{text}",
            textfont={"family": MONO, "size": 11}, hovertemplate="%{customdata}<extra></extra>",
            coloraxis="coloraxis", xgap=1, ygap=1,
        )
    )  # fmt: skip
    fig.update_yaxes(autorange="reversed", showgrid=False, ticks="", title_text="tokens of")
    fig.update_xaxes(showgrid=False, ticks="", title_text="what attention reads")
    fig.update_layout(
        coloraxis={
            "colorscale": DIVERGING, "cmin": -half, "cmax": half,
            "colorbar": color_bar(_metric(data), height=36 * len(z)),
        },
        meta={"min_width": 110 * z.shape[1] + 160},
    )  # fmt: skip
    return _entitled(fig, data, title, "by the demonstration and the kind of token")


def _origin(cell: xr.Dataset) -> str:
    line = number(float(cell["mean"]))
    if "low" in cell and float(cell["low"]) == float(cell["low"]):
        line += f"  ({number(float(cell['low']))} to {number(float(cell['high']))})"
    where = str(cell["demonstration"].values)
    where = f"demonstration {where}" if where.isdecimal() else where
    return f"<b>{_role(cell['role'].values)}, {label(where)}</b><br>{line}"


def _role(role: object) -> str:
    return label(_ROLES.get(str(role), role))


def _metric(data: xr.Dataset) -> str:
    note = notes(data)
    name = metric_of({"metric": "value"} | note)
    return f"{name} before the soft cap" if note.get("soft_cap") else name


def _entitled(fig: go.Figure, data: xr.Dataset, title: str | None, also: str) -> go.Figure:
    note, n = notes(data), data.sizes.get("prompt", 1)
    several = f"mean of {n} prompts" if n > 1 and "value" not in data else ""
    parts = [str(note.get("model", "")), also, several]
    sentence = str(data.attrs.get("finding", "")) if title is None else title
    return titled(fig, sentence, subtitle=" · ".join(p for p in parts if p))
