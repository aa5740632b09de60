"""The theory of in-context against in-weight learning: two losses that cross, and gates that obey them.

Of losses, blue is the context's and orange the weights'; of classes, blue are the common ones and vermilion
the rare ones, as in all figures of the laboratory.
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from tvlens.plots._axes import powers
from tvlens.plots.palette import BLUE, BROWN, GREEN, INK, MUTED, ORANGE, PURPLE, SKY, VERMILION
from tvlens.plots.theme import Role, figure, titled

IN_CONTEXT = Role("in context", BLUE, "solid", "circle")
IN_WEIGHT = Role("in weights", ORANGE, "dash", "square")
FREQUENCIES = {
    "C_H": Role("common classes (C_H)", BLUE, "solid", "circle"),
    "C_L": Role("rare classes (C_L)", VERMILION, "dash", "square"),
}
_PREDICTED = {
    "predicted": ("closed form", "-open"),
    "predicted_exact": ("exact regret", ""),
}
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_CROSSING = "where they cross: N<sub>x</sub>*"


def bounds(data: xr.Dataset, *, title: str | None = None, subtitle: str = "") -> go.Figure:
    """Draw both losses over samples of one query, for one setting of the theory.

    Args:
        data: By ``n``: ``in_weight`` and ``in_weight_next``; by ``end`` (low, high): ``in_context`` and
            ``crossover``, of ends of the same name; and the number ``risk``.
        title: The sentence above the figure.
        subtitle: A smaller one.

    Returns:
        The figure, with traces in the order of `TRACES`.

    Example:
        >>> bounds(tvlens.icl.bounds_explorer().data)  # doctest: +SKIP

    References:
        Chan et al. 2025, arXiv:2410.23042, Figure 1.
    """
    n, ends = data["n"].values, data["in_context"].sel(end=["low", "high"]).values
    risk, fig = float(data["risk"]), figure(height=400)
    across: Any = {"x": n[[0, -1]], "mode": "lines", "hoverinfo": "skip"}
    fig.add_scatter(y=ends[[0, 0]], line=_line(IN_CONTEXT, 1.5), showlegend=False, **across)
    fig.add_scatter(
        y=ends[[1, 1]], line=_line(IN_CONTEXT, 1.5), fill="tonexty", fillcolor=IN_CONTEXT.faint(0.2),
        name="in context: between its bounds", **across,
    )  # fmt: skip
    fig.add_scatter(
        y=[risk, risk],
        line={"color": MUTED, "dash": "dot", "width": 1.5},
        name="Bayes risk",
        **across,
    )
    curves = {"in_weight": ("in weights, mean over the first N", 2.6, "solid"),
              "in_weight_next": ("in weights, after N", 1.8, "dash")}  # fmt: skip
    for key, (name, width, dash) in curves.items():
        fig.add_scatter(
            x=n, y=data[key].values, mode="lines", name=name,
            line={"color": IN_WEIGHT.color, "width": width, "dash": dash},
            hovertemplate=f"{name}<br>%{{y:.3f}} nats at N<sub>x</sub> = %{{x:,.0f}}<extra></extra>",
        )  # fmt: skip
    meet = data["crossover"].sel(end=["low", "high"]).values
    fig.add_scatter(
        x=np.where(np.isfinite(meet), meet, np.nan), y=ends, mode="markers", name=_CROSSING,
        marker={"color": INK, "size": 9, "symbol": "diamond"},
        hovertemplate="N<sub>x</sub>* = %{x:,.0f}<extra></extra>",
    )  # fmt: skip
    decades = [np.log10(n[0]), np.log10(n[-1])]
    fig.update_xaxes(
        **powers(n[0], n[-1]), range=decades, title_text="samples of the query, N<sub>x</sub>"
    )
    fig.update_yaxes(title_text="loss (nats)", range=[0, 1.15 * max(ends[1], risk) + 0.3])
    fig.update_layout(legend_y=-0.22)
    return titled(fig, title, subtitle=subtitle) if title else fig


TRACES = ("in_context_low", "in_context_high", "risk", "in_weight", "in_weight_next", "crossover")
"""What the traces of `bounds` are."""


def bound_panels(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw the paper's Figure 1: bands of both losses over samples, a panel for each number of wrong items.

    Args:
        data: ``in_weight`` with ``_low``, ``_high`` and ``_exact`` by ``n``; ``in_context_low`` and ``_high``
            by ``irrelevant``; ``crossover`` by ``irrelevant`` and ``end``.
        title: Replaces the sentence that says what is seen.

    Returns:
        The figure.

    Example:
        >>> bound_panels(result.data)  # doctest: +SKIP

    References:
        Chan et al. 2025, arXiv:2410.23042, Figure 1.
    """
    counts = data["irrelevant"].values
    columns = min(4, len(counts))
    lines = int(np.ceil(len(counts) / columns))
    fig = make_subplots(
        lines, columns, shared_xaxes=True, shared_yaxes=True, figure=figure(), vertical_spacing=0.1,
        horizontal_spacing=0.025, subplot_titles=[f"<b>k = {k}</b>" for k in counts],
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    n = data["n"].values
    for i in range(len(counts)):
        at: Any = {"row": i // columns + 1, "col": i % columns + 1}
        low, high = (float(data[f"in_context_{end}"][i]) for end in ("low", "high"))
        _band(fig, n[[0, -1]], [low, low], [high, high], IN_CONTEXT, at, legend=i == 0)
        low_curve, high_curve = (data[f"in_weight{end}"].values for end in ("_low", "_high"))
        _band(fig, n, low_curve, high_curve, IN_WEIGHT, at, legend=i == 0)
        for key, dash, name in (
            ("in_weight", "solid", "in weights without the open term"),
            ("in_weight_exact", "dot", "in weights, after N, exact"),
        ):
            line = {"color": BROWN, "width": 1.6, "dash": dash}
            fig.add_scatter(
                x=n, y=data[key].values, mode="lines", line=line, name=name, legendgroup=key,
                showlegend=i == 0, **at,
                hovertemplate=f"{name}<br>%{{y:.3f}} nats at N<sub>x</sub> = %{{x:,.0f}}<extra></extra>",
            )  # fmt: skip
        meet = data["crossover"].sel(end=["last", "first"]).values[i]
        fig.add_scatter(
            x=np.where(np.isfinite(meet), meet, np.nan), y=[low, high], mode="markers", name=_CROSSING,
            marker={"color": INK, "size": 7, "symbol": "diamond"}, legendgroup="meet", showlegend=i == 0,
            hovertemplate="N<sub>x</sub>* = %{x:,.0f}<extra></extra>", **at,
        )  # fmt: skip
    fig.update_xaxes(**powers(n[0], n[-1], most=4), range=np.log10(n[[0, -1]]).tolist())
    fig.update_yaxes(range=[-0.05, 2.4])
    fig.update_xaxes(title_text="samples of the query, N<sub>x</sub>", row=lines)
    fig.update_yaxes(title_text="loss (nats)", col=1)
    fig.update_layout(
        height=190 * lines + 130, margin_t=40, legend_y=-0.16, meta={"min_width": 760}
    )
    said = "The more items with other labels, the earlier the weights overtake the context"
    small = "k: items of the context with another label than the query. Band in weights: ± constant / N."
    return titled(fig, said if title is None else title, subtitle=small)


def gate_curves(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw the gates of Algorithm 1 over rounds, with the predicted switching times.

    Args:
        data: ``alpha`` by ``label_noise, seed, time, frequency, context``; ``predicted`` and
            ``predicted_exact`` by ``label_noise, frequency``. One panel for each label noise; thin lines are
            seeds.
        title: The sentence that says what came out.

    Returns:
        The figure.

    Example:
        >>> gate_curves(result.data)  # doctest: +SKIP

    References:
        Chan et al. 2025, arXiv:2410.23042, Algorithm 1.
    """
    noises = data["label_noise"].values
    columns = min(4, len(noises))
    lines = int(np.ceil(len(noises) / columns))
    fig = make_subplots(
        lines, columns, shared_xaxes=True, shared_yaxes=True, figure=figure(), horizontal_spacing=0.025,
        vertical_spacing=0.12, subplot_titles=[f"<b>label noise {rho:g}</b>" for rho in noises],
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    times, alpha = data["time"].values, data["alpha"].transpose("label_noise", "seed", "time", ...)
    named = set()
    for i in range(len(noises)):
        at: Any = {"row": i // columns + 1, "col": i % columns + 1}
        for key, role in FREQUENCIES.items():
            one = alpha[i].sel(frequency=key)
            _gates(fig, times, one.sel(context="relevant").values, role, at, legend=i == 0)
            beside = one.sel(context="irrelevant").mean("seed").values
            fig.add_scatter(
                x=times, y=beside, mode="lines", name=f"{role.name}, irrelevant context",
                legendgroup=key + "i", showlegend=i == 0, **at,
                line={"color": role.faint(0.5), "width": 1.5, "dash": "dot" if key == "C_H" else "dashdot"},
                hovertemplate=f"{role.name}, irrelevant context<br>gate %{{y:.2f}} after %{{x:,.0f}} rounds"
                "<extra></extra>",
            )  # fmt: skip
            for kind, (how, open_) in _PREDICTED.items():
                when = float(data[kind].sel(frequency=key)[i])
                if not times[0] <= when <= times[-1]:
                    continue
                name = f"{role.name}, predicted by {how}"
                fig.add_scatter(
                    x=[when], y=[0.5], mode="markers", name=name, legendgroup=name, **at,
                    showlegend=name not in named,
                    marker={"color": role.color, "size": 9, "symbol": role.symbol + open_, "line_width": 2},
                    hovertemplate=f"{name}: %{{x:,.0f}} rounds<extra></extra>",
                )  # fmt: skip
                named.add(name)
    fig.update_xaxes(**powers(times[0], times[-1], most=4), range=np.log10(times[[0, -1]]).tolist())
    fig.update_yaxes(range=[0, 1.02])
    fig.update_xaxes(title_text="rounds", row=lines)
    fig.update_yaxes(title_text="gate (1: weights)", col=1)
    fig.update_layout(
        height=270 * lines + 150, margin_t=40, legend_y=-0.28, meta={"min_width": 220 * columns}
    )
    small = (
        "Thin lines: seeds. Marks: predicted switch, N_x* over the class's share of queries; open: by the "
        "closed form, filled: with KT's exact regret."
    )
    return titled(fig, title or "Gates of Algorithm 1", subtitle=small)


def ratio_lines(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw how much later rare classes switch, over how much rarer they are.

    Args:
        data: ``p_switch`` by ``p_high, seed, frequency, level``, ``p_switch_of_mean`` by the same without
            seeds, and ``frequency_ratio`` by ``p_high``.
        title: Replaces the sentence that says what is seen.

    Returns:
        The figure, both axes logarithmic; marks are for the mean gate over seeds, bars the range over seeds.

    Example:
        >>> ratio_lines(result.data)  # doctest: +SKIP

    References:
        Chan et al. 2025, arXiv:2410.23042.
    """
    rarer = data["frequency_ratio"].values
    fig = figure(height=380)
    ends = np.array([rarer.min() / 1.3, rarer.max() * 1.3])
    fig.add_scatter(
        x=ends, y=ends, mode="lines", name="predicted: the same", hoverinfo="skip",
        line={"color": MUTED, "dash": "dot", "width": 1.5},
    )  # fmt: skip
    styles = zip((BLUE, PURPLE), ("circle", "square"), strict=True)
    switch = data["p_switch"].transpose("p_high", "seed", "frequency", "level")
    for level, (color, symbol) in zip(data["level"].values, styles, strict=False):
        times = switch.sel(level=level)
        ratio = times.sel(frequency="C_L") / times.sel(frequency="C_H")
        low, high = ratio.min("seed").values, ratio.max("seed").values
        of_mean = data["p_switch_of_mean"].sel(level=level)
        mean = (of_mean.sel(frequency="C_L") / of_mean.sel(frequency="C_H")).values
        error = {"type": "data", "array": np.maximum(high - mean, 0), "arrayminus": np.maximum(mean - low, 0),
                 "thickness": 1.2, "width": 3}  # fmt: skip
        fig.add_scatter(
            x=rarer, y=mean, error_y=error, mode="lines+markers", name=f"gates pass {level:g}",
            marker={"symbol": symbol, "size": 8}, line={"color": color, "width": 2},
            hovertemplate="%{x:.3g} times rarer: %{y:.3g} times later<extra></extra>",
        )  # fmt: skip
    log = powers(*ends)
    fig.update_xaxes(title_text="frequency of a common class over that of a rare one", **log)
    fig.update_yaxes(title_text="rounds until rare over common", **log)
    most = int(np.argmax(rarer))
    half = data["p_switch_of_mean"].isel(level=0, p_high=most)
    later = float(half.sel(frequency="C_L") / half.sel(frequency="C_H"))
    said = (
        f"Classes that are {rarer[most]:.3g} times rarer switch {later:.3g} times later"
        if np.isfinite(later)
        else f"Classes that are {rarer[most]:.3g} times rarer do not switch within these rounds"
    )
    return titled(
        fig,
        said if title is None else title,
        subtitle="Marks: mean gate over seeds. Bars: range over seeds.",
    )


def regret_curves(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw the regret of Algorithm 1 over rounds, under what it can be at most.

    Args:
        data: ``regret``, ``bound`` and ``bound_known`` by ``label_noise, seed, time``.
        title: Replaces the sentence that says what is seen.

    Returns:
        The figure, both axes logarithmic.

    Example:
        >>> regret_curves(result.data)  # doctest: +SKIP

    References:
        Cesa-Bianchi and Lugosi 2006, Prediction, learning, and games [cesabianchi2006prediction].
    """
    times, fig = data["time"].values, figure(height=400)
    shades = (SKY, BLUE, GREEN, PURPLE, VERMILION, ORANGE)
    for i, rho in enumerate(data["label_noise"].values):
        mean = data["regret"].sel(label_noise=rho).mean("seed").values
        fig.add_scatter(
            x=times, y=np.where(mean > 0, mean, np.nan), mode="lines", name=f"label noise {rho:g}",
            line={"color": shades[i % len(shades)], "dash": _DASHES[i % len(_DASHES)], "width": 2},
            hovertemplate=f"label noise {rho:g}<br>%{{y:,.1f}} nats after %{{x:,.0f}} rounds<extra></extra>",
        )  # fmt: skip
    limits = {
        "bound": ("guaranteed, any horizon", "solid"),
        "bound_known": ("known horizon, losses under log(1/ε)", "dash"),
    }
    for key, (name, dash) in limits.items():
        fig.add_scatter(
            x=times, y=data[key].mean(["label_noise", "seed"]).values, mode="lines", name=name,
            line={"color": INK, "width": 1.5, "dash": dash},
            hovertemplate=f"{name}<br>%{{y:,.0f}} nats after %{{x:,.0f}} rounds<extra></extra>",
        )  # fmt: skip
    last = data.isel(time=-1)
    paid, limit = float(last["regret"].mean("seed").max()), float(last["bound"].mean())
    fig.update_xaxes(title_text="rounds", **powers(times[0], times[-1]))
    fig.update_yaxes(title_text="regret in sum (nats)", **powers(0.1, limit))
    said = (
        f"After {times[-1]:,.0f} rounds the gate has cost {paid:,.0f} nats against the best choice for each "
        f"input, of at most {limit:,.0f}"
    )
    return titled(
        fig,
        said if title is None else title,
        subtitle="Means over seeds. A line breaks off where the mixture did better than any fixed choice.",
    )


def _gates(fig: go.Figure, times: Any, curves: Any, role: Role, at: Any, *, legend: bool) -> None:
    gap = np.full((len(curves), 1), np.nan)
    fig.add_scatter(
        x=np.tile(np.append(times, np.nan), len(curves)), y=np.hstack([curves, gap]).ravel(), mode="lines",
        line={"color": role.faint(0.3), "width": 1}, showlegend=False, hoverinfo="skip", **at,
    )  # fmt: skip
    fig.add_scatter(
        x=times, y=curves.mean(axis=0), mode="lines", name=f"{role.name}, relevant context",
        legendgroup=role.name, showlegend=legend, line=_line(role, 2.6) | {"dash": role.dash}, **at,
        hovertemplate=f"{role.name}, relevant context<br>gate %{{y:.2f}} after %{{x:,.0f}} rounds"
        "<extra></extra>",
    )  # fmt: skip


def _band(
    fig: go.Figure, x: Any, low: Any, high: Any, role: Role, at: Any, *, legend: bool
) -> None:
    line = _line(role, 1.0) | {"dash": role.dash}
    fig.add_scatter(x=x, y=low, mode="lines", line=line, showlegend=False, hoverinfo="skip", **at)
    fig.add_scatter(
        x=x, y=high, mode="lines", line=line, fill="tonexty", fillcolor=role.faint(0.22), hoverinfo="skip",
        name=f"{role.name}: between its bounds", legendgroup=role.name, showlegend=legend, **at,
    )  # fmt: skip


def _line(role: Role, width: float) -> dict[str, Any]:
    return {"color": role.color, "width": width}
