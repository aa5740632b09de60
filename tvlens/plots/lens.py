"""What would the model say at each layer? A heat map with the likeliest token written in each cell.

Layers go upwards, so the prediction is read from the bottom to the top of each column. Bold tokens are those
the model says in the end. Buttons exchange what the colours mean and, where two lenses were used, the lens.
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens._errors import unknown
from tvlens.plots._axes import color_bar, powers
from tvlens.plots._cells import button_row, number, written_cells
from tvlens.plots._notes import notes
from tvlens.plots.palette import EMPTY, MUTED, SEQUENTIAL
from tvlens.plots.theme import MONO, ROLES, figure, titled, token_label, visible

_LOOK = {"tuned": ROLES["hypothesis"], "logit": ROLES["regular"]}
_UNITS = {
    "kl": "KL from the final prediction, nats",
    "entropy": "entropy, nats",
    "target_rank": "rank of the token",
}
_FEW = 12  # layers that all have a tick
_UNITS |= {"log_probability": "log probability, nats", "probability": "probability of the token"}
_UNITS |= {"target_rank": "rank of the token"}


def lens_heatmap(
    data: xr.Dataset,
    *,
    prompt: int = 0,
    value: str = "probability",
    lens: str | None = None,
    title: str | None = None,
) -> go.Figure:
    """Draw what a lens saw in one prompt, layer by position, with the likeliest token in each cell.

    Args:
        data: A `tvlens.Lens` result's data.
        prompt: Which prompt, from 0.
        value: What the colours show first: ``"probability"`` of the token written, ``"entropy"``, ``"kl"``,
            or ``"log_probability"`` of the first token that was followed.
        lens: Which lens is shown first; by default the tuned one, where there is one.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure. Buttons switch the value and the lens; hover for the likeliest tokens with probabilities.

    Raises:
        ValueError: The data has no likeliest tokens, or no such prompt, value or lens.

    Example:
        >>> lens_heatmap(result.data, prompt=2, value="kl")  # doctest: +SKIP

    References:
        nostalgebraist 2020, nostalgebraist2020interpreting; Belrose et al. 2023, arXiv 2303.08112.
    """
    if "top_token" not in data:
        raise ValueError(f"the data has no 'top_token'; it has: {', '.join(map(str, data))}")
    n = data.sizes["prompt"]
    if not -n <= prompt < n:
        raise ValueError(f"prompt {prompt} asked for; the data has {n}: 0 to {n - 1}.")
    lenses = [str(each) for each in data["lens"].values]
    if lens is not None and lens not in lenses:
        raise unknown("lens", lens, lenses)
    one = data.isel(prompt=prompt)
    one = one.isel(position=np.flatnonzero(one["kl"].notnull().any(["lens", "layer"]).values))
    one = one.sortby("layer")
    values = ["probability", "entropy", "kl"] + ["log_probability"] * ("target" in one.sizes)
    if value not in values:
        raise unknown("value", value, values)
    fig, first = figure(), lens or lenses[-1]
    for name in lenses:
        fig.add_trace(_trace(one.sel(lens=name), value, visible=name == first))
    fig.update_layout(coloraxis=_colors(one, value))
    _axes(fig, one)
    menus = [_values_menu(one, lenses, values, value)]
    if len(lenses) > 1:
        menus.append(_lens_menu(lenses, first))
    fig.update_layout(updatemenus=menus)
    note = notes(data)
    small = [str(note.get("model", "")), "␣ space", "bold: the final prediction"]
    small += [f"prompt {prompt % n} of {n}"] if n > 1 else []
    said = str(data.attrs.get("finding", "")) if title is None else title
    return titled(fig, said, subtitle=" · ".join(part for part in small if part))


def _z(data: xr.Dataset, value: str) -> np.ndarray:
    """What the colours show: layer by position."""
    if value == "probability":
        found = data["top_probability"].isel(rank=0)
    elif value == "log_probability":
        found = data["log_probability"].isel(target=0)
    else:
        found = data[value]
    return found.transpose(..., "layer", "position").values.astype(float)


def _trace(data: xr.Dataset, value: str, *, visible: bool) -> go.Heatmap:
    data = data.transpose("layer", "position", ...)
    many = data.sizes["position"] > 14
    tokens = data["top_token"].isel(rank=0).values
    final = data["final_top_token"].isel(rank=0).values
    words = [
        [
            _word(str(token), str(end), 7 if many else 10)
            for token, end in zip(row, final, strict=True)
        ]
        for row in tokens
    ]
    spots = [range(size) for size in tokens.shape]
    hover = [[_hover(data.isel(layer=i, position=j)) for j in spots[1]] for i in spots[0]]
    return written_cells(
        _z(data, value),
        words,
        hover,
        size=9 if many else 11,
        coloraxis="coloraxis",
        visible=visible,
    )


def _word(token: str, final: str, limit: int) -> str:
    shown = token_label(token, limit=limit)
    return f"<b>{shown}</b>" if token == final else shown


def _hover(cell: xr.Dataset) -> str:
    """All that is known of one cell."""
    place = f"layer {cell['layer'].values}, position {cell['position'].values}"
    lines = [f"<b>{place}</b>  {token_label(str(cell['prompt_token'].values))}"]
    pairs = zip(cell["top_token"].values, cell["top_probability"].values, strict=True)
    lines += [f"{p:.3f}  {token_label(str(t), limit=18)}" for t, p in pairs]
    lines.append(
        f"entropy {number(float(cell['entropy']), 2)}  KL {number(float(cell['kl']), 2)} nats"
    )
    if "target" in cell.sizes:
        for target in cell["target"].values:
            one = cell.sel(target=target)
            lines.append(
                f"{token_label(str(target), limit=18)}: rank {float(one['target_rank']):.0f}, "
                f"log p {number(float(one['log_probability']), 2)}"
            )
    ends = zip(
        cell["final_top_token"].values[:1], cell["final_top_probability"].values, strict=False
    )
    lines += [f"in the end: {token_label(str(t), limit=18)} {p:.3f}" for t, p in ends]
    return "<br>".join(lines)


def _colors(data: xr.Dataset, value: str) -> dict[str, Any]:
    """The colour axis of a value, the same for both lenses."""
    z = _z(data, value)
    low, high = (
        (0.0, 1.0) if value == "probability" else (0.0, float(np.nanmax(z, initial=0)) or 1.0)
    )
    if value == "log_probability":
        low, high = float(np.nanmin(z)), float(np.nanmax(z))
        low = low if low < high else high - 1
    name = _UNITS[value]
    if value == "log_probability":
        name = f"log probability of {visible(str(data['target'].values[0]), limit=12)}, nats"
    bar = color_bar(name, height=_tall(data))
    return {"colorscale": SEQUENTIAL, "cmin": low, "cmax": high, "colorbar": bar}


def _tall(data: xr.Dataset) -> float:
    """How tall the map is: rows become flatter where there are many."""
    return max(float(np.clip(560 / data.sizes["layer"], 17, 30)) * data.sizes["layer"], 120.0)


def _values_menu(
    data: xr.Dataset, lenses: list[str], values: list[str], first: str
) -> dict[str, Any]:
    """Buttons that change what the colours show, in all traces, so that the lens stays as it is."""
    names = {"kl": "KL to the end", "log_probability": "log p"}
    buttons = [
        {
            "label": names.get(value, value),
            "method": "update",
            "args": [
                {"z": [_z(data.sel(lens=lens), value) for lens in lenses]},
                {"coloraxis": _colors(data, value)},
            ],
        }
        for value in values
    ]
    return button_row(buttons, values.index(first))


def _lens_menu(lenses: list[str], first: str) -> dict[str, Any]:
    buttons = [
        {
            "label": f"{lens} lens",
            "method": "restyle",
            "args": [{"visible": [other == lens for other in lenses]}],
        }
        for lens in lenses
    ]
    return button_row(buttons, lenses.index(first), x=1.0, xanchor="right")


def _axes(fig: go.Figure, data: xr.Dataset) -> None:
    tokens = [str(token) for token in data["prompt_token"].values]
    small = f"color:{MUTED};font-size:9px"
    ticks = [
        f'{token_label(token, limit=12)} <span style="{small}">{position}</span>'
        for token, position in zip(tokens, data["position"].values, strict=True)
    ]
    turned = len(ticks) > 9
    fig.update_xaxes(
        tickvals=list(range(len(ticks))), ticktext=ticks, showgrid=False, ticks="",
        range=[-0.5, len(ticks) - 0.5], tickangle=-55 if turned else 0,
        tickfont={"family": MONO, "size": 11},
    )  # fmt: skip
    layers = [str(layer) for layer in data["layer"].values]
    step = max(1, round(len(layers) / 24))
    fig.update_yaxes(
        tickvals=list(range(0, len(layers), step)), ticktext=layers[::step], showgrid=False,
        ticks="", title_text="layer", range=[-0.5, len(layers) - 0.5], tickfont_size=11,
    )  # fmt: skip
    least = 420 + 140 * (data.sizes["lens"] > 1)  # for the buttons
    below, above = 130 if turned else 60, 34 + 50
    fig.update_layout(
        height=_tall(data) + below + above,
        plot_bgcolor=EMPTY,
        margin={"t": above, "b": below, "r": 20},
        meta={"min_width": max((48 if len(ticks) > 14 else 74) * len(ticks), least) + 160},
    )


def lens_by_layer(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw means over positions and prompts by layer, one line for each lens.

    Args:
        data: What `tvlens.Lens.by_layer` gives: ``mean, low, high`` by lens and layer, and target where a
            token was followed.
        title: Replaces the heading.

    Returns:
        The figure; bands are intervals over prompts, where there are several.

    Raises:
        ValueError: The data has no means.

    Example:
        >>> lens_by_layer(result.by_layer("kl"))  # doctest: +SKIP
    """
    if "mean" not in data:
        raise ValueError(f"the data has no 'mean'; it has: {', '.join(map(str, data))}")
    fig, variable = figure(height=340), str(data.attrs.get("variable", "kl"))
    data = data.sortby("layer")
    layers = data["layer"].values
    targets = list(data["target"].values) if "target" in data.sizes else [None]
    for lens in map(str, data["lens"].values):
        for number_, target in enumerate(targets):
            line = data.sel(lens=lens) if target is None else data.sel(lens=lens, target=target)
            look, dash = _LOOK[lens], ("solid", "dot", "dash", "longdash", "dashdot")[number_ % 5]
            dash = look.dash if target is None else dash
            named = f"{lens} lens" + (f" · {token_label(str(target), limit=12)}" if target else "")
            if np.isfinite(line["low"]).all():
                band = np.concatenate([line["low"].values, line["high"].values[::-1]])
                fig.add_trace(
                    go.Scatter(
                        x=np.concatenate([layers, layers[::-1]]), y=band, fill="toself",
                        fillcolor=look.faint(0.15), line={"width": 0}, mode="lines", hoverinfo="skip",
                        showlegend=False,
                    )
                )  # fmt: skip
            fig.add_trace(
                go.Scatter(
                    x=layers, y=line["mean"].values, name=named, mode="lines+markers",
                    line={"color": look.color, "dash": dash, "width": 2},
                    marker={"symbol": look.symbol, "size": 5, "color": look.color},
                    hovertemplate=f"{named}<br>layer %{{x}}: %{{y:{_digits(variable)}}}<extra></extra>",
                )
            )  # fmt: skip
    few = {"tickvals": layers.tolist()} if len(layers) <= _FEW else {}
    fig.update_xaxes(title_text="layer", **few)
    fig.update_yaxes(title_text=_UNITS.get(variable, variable))
    if variable == "target_rank":
        ranks = data["mean"].values[data["mean"].values > 0]
        fig.update_yaxes(**powers(float(ranks.min(initial=np.inf)), float(ranks.max(initial=1))))
    small = str(notes(data).get("model", ""))
    return titled(fig, _course(data, variable) if title is None else title, subtitle=small)


def _course(data: xr.Dataset, variable: str) -> str:
    """Where each lens' means begin and end, of the first token that was followed."""
    mean = data["mean"].isel({d: 0 for d in ("target",) if d in data.dims})
    name, _, unit = _UNITS.get(variable, variable).partition(",")
    said = []
    for lens in map(str, data["lens"].values):
        one = mean.sel(lens=lens).dropna("layer")
        if one.size:
            first, last = (f"{float(one[i]):{_digits(variable)}}" for i in (0, -1))
            ends = f"{first}{unit} at layer {int(one['layer'][0])} to {last} at layer {int(one['layer'][-1])}"
            said.append(f"{ends} through the {lens} lens")
    return f"{name[0].upper()}{name[1:]} goes from {', and from '.join(said)}"


def _digits(variable: str) -> str:
    return ",.0f" if variable == "target_rank" else ".2f"
