"""Where does it matter? A heat map of what exchanging activations did, cell by cell.

Colours diverge from what the untouched run does, so white is "no effect". Tokens stand along the axis, each
at its own position, so a token that occurs twice has two columns. Where there are more axes than a plane
has, a slider goes through the others.
"""

import itertools
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens._errors import unknown
from tvlens.plots._axes import color_bar
from tvlens.plots._cells import CellText, cell_texts, written_cells
from tvlens.plots._notes import metric_of, notes
from tvlens.plots.palette import BLUE, DIVERGING, EMPTY, GRID, LINE, MUTED, PAPER
from tvlens.plots.theme import MONO, ROLES, figure, label, titled, visible

AXES = ("position", "head", "layer", "site")
_MOST_PROMPTS = 40
_CHANGED = ROLES["query_blind"].color


def patching_heatmap(
    data: xr.Dataset,
    *,
    x: str | None = None,
    y: str | None = None,
    text: bool | None = None,
    title: str | None = None,
) -> go.Figure:
    """Draw means over prompts by cell, with tokens on the axis and a slider over what is left.

    Args:
        data: What `tvlens.Patching.drawn` gives: ``mean`` over some of the dimensions site, layer, position
            and head; if there, ``low``, ``high``, tokens, and ``each`` with every prompt's own values.
        x: Dimension to the right; by default position, or else head.
        y: Dimension upwards; by default layer.
        text: Whether values stand in the cells; by default where there is room.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure. Hover for the cell's token, value, interval, and the likeliest tokens before and after.
        With ``each``, a menu chooses a prompt.

    Raises:
        ValueError: The data has no means, or no such dimension.

    Example:
        >>> patching_heatmap(result.drawn("effect"), x="head")  # doctest: +SKIP

    References:
        Zhang, Nanda 2024, arXiv 2309.16042.
    """
    if "mean" not in data:
        raise ValueError(f"the data has no 'mean'; it has: {', '.join(map(str, data))}")
    x, y = _axes_of(data, x, y)
    rest = [
        d
        for d in ("site", "head", "layer", "position")
        if d in data["mean"].dims and d not in (x, y)
    ]
    steps = list(itertools.product(*(data[d].values.tolist() for d in rest)))
    centre, half = _scale(data)
    shown = _most_moved(data, rest, steps, centre)
    small = data.sizes[x] <= 12 and data.sizes[y] <= 16
    texts = CellText(x, y, centre, half, small if text is None else text, _note(data))
    fig = figure()
    for number, step in enumerate(steps):
        cell = data.sel(dict(zip(rest, step, strict=True)))
        fig.add_trace(_trace(cell, texts, visible=number == shown))
    _colors(fig, data, centre, half, tall=_tall(data, y))
    _axes(fig, data, x, y)
    _room(fig, data, x, y, controls=len(steps) > 1 or "each" in data)
    if len(steps) > 1:
        fig.update_layout(sliders=[_slider(rest, steps, shown)])
    if "each" in data:
        fig.update_layout(updatemenus=[_menu(data, rest, steps, texts)])
    note = _note(data)
    small_print = " · ".join(
        part for part in (str(note.get("model", "")), _subtitle(data, x)) if part
    )
    sentence = data.attrs.get("finding", "") if title is None else title
    return titled(fig, sentence, subtitle=small_print)


def _note(data: xr.Dataset) -> dict[str, Any]:
    return notes(data) | {k: v for k, v in data.attrs.items() if k in ("variable", "finding")}


def _axes_of(data: xr.Dataset, x: str | None, y: str | None) -> tuple[str, str]:
    """Choose the plane, where the caller has not."""
    dims = [str(dim) for dim in data["mean"].dims]
    for name in (x, y):
        if name is not None and name not in dims:
            raise unknown("dimension", name, dims)
    free = [d for d in AXES if d in dims and d not in (x, y)]
    if y is None:
        several = [d for d in ("layer", "head") if d in free and data.sizes[d] > 1 and d != x]
        y = several[0] if several else next(d for d in ("layer", *free) if d in free)
        free = [d for d in free if d != y]
    if x is None:
        x = next((d for d in free if d != "layer"), None) or free[0]
    if x == y:
        raise ValueError(f"x and y are both {x!r}; choose two of: {', '.join(dims)}.")
    return x, y


def _scale(data: xr.Dataset) -> tuple[float, float]:
    """The value that is drawn white, and how far from it the colours go."""
    note = _note(data)
    centre = 0.0
    if note.get("variable") == "normalized" and note.get("direction") == "noise":
        centre = 1.0
    elif note.get("variable") == "value":
        base = "corrupted" if note.get("direction") == "denoise" else "clean"
        centre = float(data[base].mean()) if base in data else 0.0
    far = np.abs(data["mean"].values - centre)
    half = float(np.nanmax(far)) if np.isfinite(far).any() else 1.0
    if note.get("variable") == "normalized":
        # Small shares look small, and a ratio of small numbers does not hide the rest.
        half = min(max(half, 0.25), 1.25)
    return centre, half or 1.0


def _trace(cell: xr.Dataset, texts: CellText, *, visible: bool) -> go.Heatmap:
    z, words, hover = cell_texts(cell, texts)
    return written_cells(z, words, hover, coloraxis="coloraxis", visible=visible)


def _colors(fig: go.Figure, data: xr.Dataset, centre: float, half: float, *, tall: float) -> None:
    note = _note(data)
    metric = metric_of(note)
    name = {
        "normalized": f"share of {metric}: 0 corrupted, 1 clean",
        "effect": f"change of {metric}",
        "value": metric,
    }.get(str(note.get("variable")), metric)
    low, high = _ends(data, centre, half)
    fig.update_layout(
        coloraxis={
            "colorscale": _cropped((low - centre) / half, (high - centre) / half),
            "cmin": low,
            "cmax": high,
            "colorbar": color_bar(name, height=tall),
        }
    )


def _ends(data: xr.Dataset, centre: float, half: float) -> tuple[float, float]:
    """How far the colour bar goes either way: no further than there are values."""
    values = data["each" if "each" in data else "mean"].values
    values = values[np.isfinite(values)]
    least, most = (values.min(), values.max()) if values.size else (centre, centre)
    low = min(max(float(least), centre - half), centre - 0.1 * half)
    return low, max(min(float(most), centre + half), centre + 0.1 * half)


def _cropped(low: float, high: float) -> list[list[Any]]:
    """The part of the diverging scale from low to high, where the whole goes from -1 to 1.

    A colour means the same distance from the centre whichever part is shown.
    """
    places = np.array([place for place, _ in DIVERGING]) * 2 - 1
    channels = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for _, c in DIVERGING])
    shown = np.unique(np.concatenate([[low, high], places[(places > low) & (places < high)]]))
    mixed = np.stack([np.interp(shown, places, channel) for channel in channels.T], axis=1)
    return [
        [float((at - low) / (high - low)), "#" + "".join(f"{round(c):02x}" for c in color)]
        for at, color in zip(shown, mixed, strict=True)
    ]


def _axes(fig: go.Figure, data: xr.Dataset, x: str, y: str) -> None:
    across, up = _ticks(data, x), _ticks(data, y)
    tokens = x == "position" and "token" in data.coords
    turned = tokens and len(across) > 9
    fig.update_xaxes(
        tickvals=list(range(len(across))), ticktext=across, showgrid=False, ticks="",
        title_text="" if tokens else x, range=[-0.5, len(across) - 0.5],
        tickangle=-55 if turned else 0,
        tickfont={"family": MONO if tokens else None, "size": 11},
    )  # fmt: skip
    step = max(1, round(len(up) / 24)) if y != "position" else 1
    fig.update_yaxes(
        tickvals=list(range(0, len(up), step)), ticktext=up[::step], showgrid=False, ticks="",
        title_text=y, range=[-0.5, len(up) - 0.5], tickfont_size=11,
    )  # fmt: skip


def _ticks(data: xr.Dataset, dim: str) -> list[str]:
    if dim != "position" or "token" not in data.coords:
        return [label(value) for value in data[dim].values.tolist()]
    return [_token_tick(data, i) for i in range(data.sizes["position"])]


def _token_tick(data: xr.Dataset, i: int) -> str:
    """A position's token and number; where the two prompts differ, both tokens, in colour."""
    number, _, token = str(data["token"].values[i]).partition(": ")
    shown = label(visible(token, limit=12))
    if "clean_token" in data.coords and "corrupted_token" in data.coords:
        pairs = set(
            zip(data["clean_token"].values[:, i], data["corrupted_token"].values[:, i], strict=True)
        )
        if any(one != other for one, other in pairs):
            one, other = next(iter(pairs)) if len(pairs) == 1 else (token, None)
            shown = label(visible(one, limit=12))
            if other is not None:
                shown += f"/{label(visible(other, limit=12))}"
            shown = f'<b style="color:{_CHANGED}">{shown}</b>'
    if "subject" in data.coords and data["subject"].values[:, i].any():
        shown = f'<b style="color:{_CHANGED}">{shown}*</b>'
    return f'{shown} <span style="color:{MUTED};font-size:9px">{label(number)}</span>'


def _subtitle(data: xr.Dataset, x: str) -> str:
    parts = []
    if x == "position" and "token" in data.coords:
        parts.append("␣ space")
        if "subject" in data.coords:
            parts.append("* blurred")
        elif "corrupted_token" in data.coords:
            parts.append("coloured: the two prompts differ (clean/corrupted)")
    n = data.sizes.get("prompt", 1)
    if n > 1:
        parts.append(f"mean of {n} prompts")
    return " · ".join(parts)


def _tall(data: xr.Dataset, y: str) -> float:
    """How tall the map is, in pixels: rows become flatter where there are many, down to a tick's size."""
    return max(float(np.clip(460 / data.sizes[y], 15, 30)) * data.sizes[y], 120.0)


def _room(fig: go.Figure, data: xr.Dataset, x: str, y: str, *, controls: bool) -> None:
    labels = 130 if x == "position" and data.sizes[x] > 9 else 60
    top = 34 + 66 * controls
    fig.update_layout(
        height=_tall(data, y) + labels + top,
        plot_bgcolor=EMPTY,
        margin={"t": top, "b": labels, "r": 20},
        meta={"min_width": max(26 * data.sizes[x], 420) + 160},
    )


def _most_moved(
    data: xr.Dataset, rest: list[str], steps: list[tuple[Any, ...]], centre: float
) -> int:
    """The step of the slider whose map holds the largest effect, which the heading speaks of."""
    moved = abs(data["mean"].fillna(centre) - centre)
    if "site" in rest:
        # Sites are alternatives, and the first is the one that was asked for first.
        moved = moved.where(data["site"] == data["site"].values[0], 0)
    sizes = [float(moved.sel(dict(zip(rest, step, strict=True))).max()) for step in steps]
    return int(np.argmax(sizes))


def _slider(rest: list[str], steps: list[tuple[Any, ...]], shown: int) -> dict[str, Any]:
    """A slider over the dimensions that have no axis; those with one value are not named."""
    several = [i for i in range(len(rest)) if len({step[i] for step in steps}) > 1]
    names = [
        " · ".join(str(step[i]) if rest[i] == "site" else f"{rest[i]} {step[i]}" for i in several)
        for step in steps
    ]
    return {
        "active": shown,
        "x": 0,
        "xanchor": "left",
        "len": 0.62,
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": 14, "t": 0, "l": 0},
        "currentvalue": {"visible": len(steps) > 8, "font": {"size": 12, "color": MUTED}},
        "font": {"size": 12},
        "ticklen": 4,
        "minorticklen": 0,
        "tickcolor": MUTED,
        "bgcolor": GRID,
        "activebgcolor": BLUE,
        "bordercolor": LINE,
        "steps": [
            {
                "label": label(name),
                "method": "restyle",
                "args": [{"visible": [other == number for other in range(len(steps))]}],
            }
            for number, name in enumerate(names)
        ],
    }


def _menu(
    data: xr.Dataset, rest: list[str], steps: list[tuple[Any, ...]], texts: CellText
) -> dict[str, Any]:
    """A menu with the mean and every prompt; it leaves the slider where it is."""
    chosen: list[tuple[str, xr.Dataset]] = [("mean", data)]
    for i in range(min(data.sizes["prompt"], _MOST_PROMPTS)):
        one = data.isel(prompt=[i])
        own = {"mean": one["each"].isel(prompt=0), "value": one["each_value"].isel(prompt=0)}
        chosen.append((f"prompt {i}", one.drop_vars(["low", "high"]).assign(own)))
    buttons = []
    for name, part in chosen:
        found = [cell_texts(part.sel(dict(zip(rest, s, strict=True))), texts) for s in steps]
        z, words, hover = ([each[i] for each in found] for i in range(3))
        buttons.append(
            {
                "label": label(name),
                "method": "restyle",
                "args": [{"z": z, "text": words, "customdata": hover}],
            }
        )
    return {
        "buttons": buttons,
        "type": "dropdown",
        "x": 1,
        "xanchor": "right",
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": 18},
        "font": {"size": 12},
        "bgcolor": PAPER,
        "bordercolor": LINE,
    }
