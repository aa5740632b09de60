"""Cities by heart: shares that follow the context, the matrix of log odds, patches and grafts."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from tvlens._words import fixed
from tvlens.plots._axes import color_bar
from tvlens.plots.palette import (
    BLUE,
    DIVERGING,
    EMPTY,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
)
from tvlens.plots.theme import Role, figure, label, percent, titled

_NAMES = {
    "real": Role("real names", BLUE, "solid", "circle"),
    "invented": Role("invented names", ORANGE, "dash", "square"),
    "untouched": Role("untouched names", GREY, "dot", "diamond"),
}
_BARE = Role("bare question: memorised city", INK, "dashdot", "x")
_ARMS = {
    "adamw": "AdamW, full batch",
    "sgd": "SGD, one question a step",
    "rehearsed": "AdamW, rehearsed",
}
_WORDINGS = {"same": "told in the question's words", "other": "told in other words"}
_PLACES = {
    "all tokens": Role("residual, all tokens", INK, "solid", "circle"),
    "stated name": Role("residual, stated name", SKY, "dash", "square"),
    "stated city": Role("residual, stated city", ORANGE, "solid", "diamond"),
    "asked name": Role("residual, asked name", BLUE, "solid", "triangle-up"),
    "question": Role("residual, rest of the question", PURPLE, "dot", "x"),
    "last token": Role("residual, last token", VERMILION, "dash", "star"),
    "attention": Role("what attention adds", GREEN, "solid", "circle-open"),
    "MLP": Role("what the MLP adds", GREY, "dash", "square-open"),
}
_DIRECTIONS = {
    "tuned_into_base": "fine-tuned values written into the base model",
    "base_into_tuned": "base values written into the fine-tuned model",
}
_HOWS = {
    "up_to": Role("base, fine-tuned up to here", INK, "solid", "circle"),
    "only": Role("base, only this fine-tuned", BLUE, "dash", "square"),
    "without": Role("fine-tuned, only this of base", ORANGE, "dot", "diamond"),
}


def cities_curves(rates: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """Draw the share of conflicts that follows the context, and mean log odds, over steps.

    Args:
        rates: ``arm, wording, step, names``, ``follows`` and ``delta`` with ``_low`` and ``_high``, and
            ``bare_written``, as ``Cities.rates()`` gives them.
        title: The sentence that says what came out.

    Returns:
        The figure: shares above, log odds below, for each arm a pair of rows; wordings to the right.

    Raises:
        ValueError: A column is missing.

    Example:
        >>> cities_curves(result.rates())  # doctest: +SKIP

    References:
        Chan et al. 2025, arXiv 2410.23042.
    """
    needed = {"arm", "wording", "step", "names", "bare_written"}
    needed |= {f"{name}{end}" for name in ("follows", "delta") for end in ("", "_low", "_high")}
    if missing := needed - set(rates.columns):
        raise ValueError(
            f"the table lacks {', '.join(sorted(missing))}; it has: {', '.join(rates.columns)}"
        )
    arms, wordings = (list(dict.fromkeys(rates[x])) for x in ("arm", "wording"))
    heads = [f"<b>{_ARMS.get(a, a)}</b>, {_WORDINGS.get(w, w)}" for a in arms for w in wordings]
    blank = [""] * len(wordings)
    n = len(wordings)
    heads = [x for k in range(len(arms)) for x in (*heads[k * n : k * n + n], *blank)]
    fig = make_subplots(
        2 * len(arms),
        n,
        shared_xaxes="columns",  # pyright: ignore[reportArgumentType]
        shared_yaxes="rows",  # pyright: ignore[reportArgumentType]
        subplot_titles=heads,
        figure=figure(),
        vertical_spacing=0.14 / len(arms),
        horizontal_spacing=0.05,
    )
    fig.update_annotations(font_size=13)
    seen: set[str] = set()
    for i, arm in enumerate(arms):
        for j, wording in enumerate(wordings):
            some: Any = rates[(rates["arm"] == arm) & (rates["wording"] == wording)]
            for which, role in _NAMES.items():
                one = some[some["names"] == which]
                for row, measure in enumerate(("follows", "delta"), 2 * i + 1):
                    _band(fig, one, measure, role, (row, j + 1), legend=role.name not in seen)
                    seen |= {role.name} if len(one) else set()
            one = some[some["names"] == "trained"]
            fig.add_scatter(
                x=one["step"],
                y=one["bare_written"],
                name=_BARE.name,
                legendgroup="bare",
                mode="lines+markers",
                showlegend=i + j == 0,
                line={"color": _BARE.color, "dash": _BARE.dash, "width": 1.4},
                marker={"symbol": _BARE.symbol, "size": 6},
                hovertemplate="bare questions answered by heart<br>step %{x:,}: %{y:.2f}<extra></extra>",
                row=2 * i + 1,
                col=j + 1,
            )
            fig.add_hline(y=0, line={"color": GREY, "width": 1}, row=2 * i + 2, col=j + 1)  # pyright: ignore[reportArgumentType]
    low = min(0.0, float(rates["delta_low"].to_numpy().min()))
    high = float(rates["delta_high"].to_numpy().max())
    for i in range(len(arms)):
        fig.update_yaxes(range=[-0.04, 1.06], tickvals=[0, 0.5, 1], row=2 * i + 1)
        fig.update_yaxes(title_text="share of conflicts", row=2 * i + 1, col=1)
        fig.update_yaxes(title_text="log odds (nats)", row=2 * i + 2, col=1)
        fig.update_yaxes(
            range=[low - 0.05 * (high - low), high + 0.05 * (high - low)], row=2 * i + 2
        )
    fig.update_xaxes(showgrid=False)
    fig.update_xaxes(title_text="step of training", row=2 * len(arms))
    height = 330 * len(arms)
    fig.update_layout(
        height=height + 90, margin_t=46, meta={"min_width": 340 * n}, legend={"y": -62 / height}
    )
    small = (
        "Above: share of conflicts in which the stated city is the likeliest of eight. Below: log p(stated) "
        "- log p(memorised) of whole answers. Bands: 95% over names."
    )
    return titled(fig, title or "Context against memory", subtitle=small)


def _band(
    fig: go.Figure, one: Any, measure: str, role: Role, at: tuple[int, int], *, legend: bool
) -> None:
    if one.empty:
        return
    x, low, high = one["step"], one[f"{measure}_low"], one[f"{measure}_high"]
    fig.add_scatter(
        x=[*x, *x[::-1]],
        y=[*high, *low[::-1]],
        fill="toself",
        fillcolor=role.faint(0.15),
        mode="none",
        hoverinfo="skip",
        legendgroup=role.name,
        showlegend=False,
        row=at[0],
        col=at[1],
    )
    texts = [
        f"{percent(a)} [{percent(b)}, {percent(c)}]"
        for a, b, c in zip(one[measure], low, high, strict=True)
    ]
    fig.add_scatter(
        x=x,
        y=one[measure],
        name=role.name,
        legendgroup=role.name,
        showlegend=legend,
        mode="lines+markers",
        line={"color": role.color, "dash": role.dash, "width": 2},
        marker={"symbol": role.symbol, "size": 6},
        customdata=texts,
        hovertemplate=f"{role.name}<br>step %{{x:,}}: %{{customdata}}<extra></extra>",
        row=at[0],
        col=at[1],
    )


def cities_matrix(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw one group's matrix of log odds at some steps, names downwards, stated cities to the right.

    Args:
        data: ``delta`` by step, name and context of one group of names, as ``Cities.conflicts()`` gives it,
            with the coordinate ``city``.
        title: The sentence that says what came out.

    Returns:
        The figure, one panel for each step.

    Raises:
        ValueError: There are no log odds, or names and contexts do not belong together.

    Example:
        >>> cities_matrix(result.conflicts("adamw").isel(step=[0, -1], name=slice(0, 8)))  # doctest: +SKIP

    References:
        Chan et al. 2025, arXiv 2410.23042.
    """
    if "delta" not in data or data.sizes.get("name") != data.sizes.get("context"):
        raise ValueError(
            f"a matrix needs delta with as many names as contexts; the data has {dict(data.sizes)}. Take "
            "one group: .isel(name=slice(0, 8))."
        )
    delta = data["delta"].transpose("step", "name", "context")
    names = [
        label(f"{a} ({b})") for a, b in zip(data["name"].values, data["city"].values, strict=True)
    ]
    cities, steps = [label(x) for x in data["city"].values], data["step"].values.tolist()
    fig = make_subplots(
        1,
        len(steps),
        shared_yaxes=True,
        subplot_titles=[f"<b>step {step}</b>" for step in steps],
        figure=figure(),
        horizontal_spacing=0.04,
    )
    fig.update_annotations(font_size=13)
    for k in range(len(steps)):
        values = delta.values[k]
        texts = [
            ["" if np.isnan(v) else fixed(v, 0, sign=True) for v in row] for row in values.tolist()
        ]
        fig.add_heatmap(
            z=values,
            x=cities,
            y=names,
            coloraxis="coloraxis",
            text=texts,
            texttemplate="%{text}",
            xgap=1,
            ygap=1,
            hovertemplate="%{y}, told %{x}<br>log odds %{z:+.2f}<extra></extra>",
            row=1,
            col=k + 1,
        )
    most = float(np.nanmax(np.abs(delta.values))) or 1.0
    bar = color_bar("log odds, stated against memorised (nats)", height=230)
    fig.update_layout(
        coloraxis={"colorscale": DIVERGING, "cmin": -most, "cmax": most, "colorbar": bar},
        height=380,
        margin_t=46,
        meta={"min_width": 330 * len(steps)}, plot_bgcolor=EMPTY,
    )  # fmt: skip
    fig.update_xaxes(showgrid=False, tickangle=-40, title_text="stated city")
    fig.update_yaxes(showgrid=False, autorange="reversed")
    won = [float((part[np.isfinite(part)] > 0).mean()) for part in delta.values]
    said = ", ".join(f"{v:.0%} of conflicts at step {s}" for v, s in zip(won, steps, strict=True))
    small = "Names with the city they learn; columns: the city that is stated. Blue: context wins."
    return titled(fig, title or f"The stated city wins in {said}", subtitle=small)


def cities_patches(effects: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw log odds of stated against memorised city under each patch, by layer.

    Args:
        effects: ``patched`` with ``_low`` and ``_high`` by direction, place and layer, ``clean`` by weights,
            and ``untouched_patched``, as ``Cities.effects()`` gives them.
        title: The sentence that says what came out.

    Returns:
        The figure, one panel for each direction.

    Raises:
        ValueError: A variable is missing.

    Example:
        >>> cities_patches(result.effects())  # doctest: +SKIP
    """
    _needs(effects, "clean", "patched", "patched_low", "patched_high", "untouched_patched")
    fig = make_subplots(
        2, 1, shared_xaxes=True, vertical_spacing=0.1, figure=figure(),
        subplot_titles=[f"<b>{_DIRECTIONS.get(str(d), d)}</b>" for d in effects["direction"].values],
    )  # fmt: skip
    fig.update_annotations(font_size=13, x=0, xanchor="left")
    x, shown = (
        effects["layer"].values,
        ("patched", "patched_low", "patched_high", "untouched_patched"),
    )
    for i, direction in enumerate(effects["direction"].values):
        _ends(fig, effects, i + 1)
        for place, role in _PLACES.items():
            one = effects.sel(direction=direction, place=place)
            texts = [
                f"layer {n}: {v:+.2f} [{low:+.2f}, {high:+.2f}]<br>untouched names {rest:+.2f}"
                for n, v, low, high, rest in zip(x, *(one[k].values for k in shown), strict=True)
            ]
            fig.add_scatter(
                x=x, y=one["patched"], name=role.name, legendgroup=place, showlegend=i == 0, customdata=texts,
                mode="lines+markers", line={"color": role.color, "dash": role.dash, "width": 1.8},
                marker={"symbol": role.symbol, "size": 5}, row=i + 1, col=1,
                hovertemplate=f"{role.name}<br>%{{customdata}}<extra></extra>",
            )  # fmt: skip
    fig.update_yaxes(title_text="log odds (nats)")
    fig.update_xaxes(showgrid=False)
    fig.update_xaxes(title_text="layer", row=2)
    fig.update_layout(
        height=600, margin_t=46, margin_r=84, meta={"min_width": 520}, legend={"y": -0.12}
    )
    small = (
        "Mean log odds of stated against memorised city, trained names, where the two first differ."
    )
    return titled(fig, title or _carried(effects), subtitle=small)


def _carried(effects: xr.Dataset) -> str:
    """From which layer on the last token's activations move the log odds more than half of the way."""
    base, tuned = (float(effects["clean"].sel(weights=name)) for name in ("base", "tuned"))
    one = effects["patched"].sel(direction="tuned_into_base", place="last token")
    far = one["layer"].values[((one.values - base) / (tuned - base)) > 0.5]
    whom = "The fine-tuned last token, written into the base model, changes the answer"
    return f"{whom} from layer {far[0]} on" if len(far) else f"{whom} at no layer by half"


def cities_grafts(effects: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw what models put together of base and fine-tuned weights do.

    Args:
        effects: ``grafted`` with ``_low`` and ``_high``, and ``recalled``, by how and part, ``clean`` by
            weights, as ``Cities.effects()`` gives them.
        title: The sentence that says what came out.

    Returns:
        The figure: log odds above, bare questions below.

    Raises:
        ValueError: A variable is missing.

    Example:
        >>> cities_grafts(result.effects())  # doctest: +SKIP
    """
    _needs(effects, "clean", "grafted", "grafted_low", "grafted_high", "recalled")
    fig = make_subplots(
        2, 1, shared_xaxes=True, vertical_spacing=0.1, figure=figure(), row_heights=[0.6, 0.4],
        subplot_titles=["<b>conflicts</b>", "<b>bare questions</b>"],
    )  # fmt: skip
    fig.update_annotations(font_size=13, x=0, xanchor="left")
    _ends(fig, effects, 1)
    named = [str(part) for part in effects["part"].values]
    places = [label("random change" if part == "noise" else part) for part in named]
    for k, (how, role) in enumerate(_HOWS.items()):
        one = effects.sel(how=how)
        x = [i + 0.12 * (k - 1) for i in range(len(named))]
        mean, low, high = (one[f"grafted{end}"].values for end in ("", "_low", "_high"))
        bars = {"array": high - mean, "arrayminus": mean - low, "color": role.faint(0.5)}
        for row, y in enumerate((mean, one["recalled"].values), 1):
            fig.add_scatter(
                x=x, y=y, name=role.name, legendgroup=how, showlegend=row == 1, mode="markers",
                marker={"color": role.color, "symbol": role.symbol, "size": 8}, customdata=places,
                error_y={"thickness": 1.2, "width": 2, **bars} if row == 1 else None, row=row, col=1,
                hovertemplate=f"{role.name}<br>%{{customdata}}: %{{y:.2f}}<extra></extra>",
            )  # fmt: skip
    fig.update_yaxes(title_text="log odds (nats)", row=1)
    fig.update_yaxes(title_text="share memorised", range=[-0.05, 1.05], row=2)
    fig.update_xaxes(tickvals=list(range(len(named))), ticktext=places, showgrid=False)
    meta = {"min_width": 80 * len(named)}
    fig.update_layout(height=520, margin_t=46, margin_r=84, meta=meta, legend={"y": -0.24})
    small = "Log odds of stated against memorised city, trained names. Error bars: 95% over names."
    return titled(fig, title or _made(effects), subtitle=small)


def _made(effects: xr.Dataset) -> str:
    """The part that alone moves the log odds most towards those of the fine-tuned model."""
    base, tuned = (float(effects["clean"].sel(weights=name)) for name in ("base", "tuned"))
    only = effects["grafted"].sel(how="only").dropna("part")
    best = only[int(np.argmax(((only - base) / (tuned - base)).values))]
    return (
        f"Of parts fine-tuned alone, the log odds move most with {best['part'].values}: from {base:+.1f} to "
        f"{float(best):+.1f}; all weights move them to {tuned:+.1f}"
    )


def _ends(fig: go.Figure, effects: xr.Dataset, row: int) -> None:
    """Draw what the two models do, unpatched."""
    levels = {name: float(effects["clean"].sel(weights=name)) for name in ("base", "tuned")}
    for name, level in levels.items():
        line = {"color": GREY, "width": 1.2, "dash": "solid" if name == "base" else "dash"}
        fig.add_shape(
            type="line", x0=0, x1=1, xref="x domain", y0=level, y1=level, line=line, row=row, col=1,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        fig.add_annotation(
            x=1.005, xref="x domain", xanchor="left", y=level, showarrow=False, row=row, col=1,  # pyright: ignore[reportArgumentType]
            yanchor="bottom" if level == max(levels.values()) else "top",
            text="base" if name == "base" else "fine-tuned", font={"size": 11, "color": MUTED},
        )  # fmt: skip


def _needs(data: xr.Dataset, *names: str) -> None:
    if missing := sorted(set(names) - set(map(str, data.data_vars))):
        has = ", ".join(map(str, data.data_vars))
        raise ValueError(f"the data lacks {', '.join(missing)}; it has: {has}")
