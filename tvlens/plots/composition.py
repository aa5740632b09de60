"""Composed vectors: does v_AD + v_BC - v_AC do what no demonstration showed?

Bars from left to right: the composed vector, the vector that demonstrations of the task itself give, the
three parts, random vectors. A composition says something only where it passes its parts.
"""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from tvlens.plots._notes import notes
from tvlens.plots.palette import BLUE, GREEN, GREY, INK, ORANGE, PURPLE
from tvlens.plots.theme import ROLES, Role, figure, label, percent, titled

_RUNS = {
    "composed": "composed<br>AD + BC − AC",
    "direct": "direct<br>BD",
    "ad": "part AD<br>other place, rule",
    "bc": "part BC<br>place",
    "ac": "part AC<br>other place",
    "random": "random<br>vector",
}
_VECTORS = {
    "theta": Role("theta, in place of the stream", BLUE, "solid", "circle"),
    "function_vector": Role("function vector, added", ORANGE, "dash", "square"),
}
_CURVES = {
    "composed": (BLUE, "solid", 2.4),
    "direct": (INK, "dash", 2.4),
    "ad": (ORANGE, "dashdot", 1.4),
    "bc": (GREEN, "longdash", 1.4),
    "ac": (PURPLE, "longdashdot", 1.4),
    "random": (GREY, "dot", 1.4),
}
_STEP = 0.38


def composition_bars(rates: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """Draw how often each vector does the composed task, with intervals.

    Args:
        rates: ``target, vector, run, accuracy, low, high`` as ``Composition.rates()`` gives them, and where
            there are ``says_ac, says_bc, says_ad`` and ``layer`` for the hover; runs ``regular`` and
            ``baseline`` of vector ``none`` are drawn as lines.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: one panel for each target.

    Raises:
        ValueError: A column is missing.

    Example:
        >>> one = {"target": "last to_upper", "vector": "theta", "accuracy": 0.5, "low": 0.4, "high": 0.6}
        >>> rows = [one | {"run": run} for run in ("composed", "direct")]
        >>> len(composition_bars(pd.DataFrame(rows)).data)
        1

    References:
        Todd et al. 2024, arXiv 2310.15213, section 3.3.
    """
    missing = {"target", "vector", "run", "accuracy", "low", "high"} - set(rates.columns)
    if missing:
        raise ValueError(
            f"the table lacks {', '.join(sorted(missing))}; it has: {', '.join(rates.columns)}"
        )
    targets = list(dict.fromkeys(rates["target"]))
    heads = [f"<b>{label(target)} of a list</b>" for target in targets]
    fig = make_subplots(
        len(targets), 1, shared_xaxes=True, subplot_titles=heads, figure=figure(barmode="overlay", bargap=0),
        vertical_spacing=0.3 / len(targets),
    )  # fmt: skip
    fig.update_annotations(font_size=13, xanchor="left", x=0)
    for i, target in enumerate(targets):
        some: Any = rates[rates["target"] == target]
        for j, name in enumerate(name for name in _VECTORS if (some["vector"] == name).any()):
            _bars(
                fig, some[some["vector"] == name], _VECTORS[name], i + 1, offset=(j - 0.5) * _STEP
            )
        for name in ("regular", "baseline"):
            _line(fig, some[(some["vector"] == "none") & (some["run"] == name)], ROLES[name], i + 1)
    fig.update_xaxes(
        tickvals=list(range(len(_RUNS))), ticktext=list(_RUNS.values()), showticklabels=True, showgrid=False,
        range=[-0.6, len(_RUNS) - 0.4],
    )  # fmt: skip
    fig.update_yaxes(range=[-0.02, 1.06], tickvals=[0, 0.25, 0.5, 0.75, 1], title_text="does both")
    height = 250 * len(targets)
    fig.update_layout(
        height=height + 120, margin_t=48, legend={"y": -70 / height}, meta={"min_width": 620}
    )
    small = (
        "Error bars: 95% intervals. Every vector at the layer where it does best on dev queries."
    )
    return titled(fig, _sentence(rates) if title is None else title, subtitle=small)


def _sentence(rates: pd.DataFrame) -> str:
    """Means over targets and vectors; of the parts, the best one."""
    mean: Any = rates[rates["vector"] != "none"].groupby("run")["accuracy"].mean()
    parts = [float(mean[name]) for name in ("ad", "bc", "ac") if name in mean]
    said = {
        name: percent(float(mean[name]))
        for name in ("composed", "direct", "random")
        if name in mean
    }
    words = (
        [f"composed vectors do both in {said['composed']} of queries"] if "composed" in said else []
    )
    words += [f"direct ones in {said['direct']}"] if "direct" in said else []
    words += [f"the best part in {percent(max(parts))}"] if parts else []
    words += [f"random vectors in {said['random']}"] if "random" in said else []
    return ", ".join(words).capitalize()


def _bars(fig: go.Figure, some: Any, role: Role, row: int, *, offset: float) -> None:
    some = some[some["run"].isin(list(_RUNS))]
    at = [list(_RUNS).index(run) + offset for run in some["run"]]
    texts = [_hover(one, role) for one in some.to_dict("records")]
    error = {"array": some["high"] - some["accuracy"], "arrayminus": some["accuracy"] - some["low"]}
    fig.add_bar(
        x=at, y=some["accuracy"], width=_STEP * 0.92, name=role.name, legendgroup=role.name,
        showlegend=row == 1, marker={"color": role.color, "line": {"width": 0}}, customdata=texts,
        error_y={"type": "data", "color": GREY, "thickness": 1.2, "width": 2, **error},
        hovertemplate="%{customdata}<extra></extra>", row=row, col=1,
    )  # fmt: skip


def _hover(one: dict[Any, Any], role: Role) -> str:
    name = _RUNS[one["run"]].replace("<br>", ", ")
    lines = [
        f"<b>{name}</b> ({role.name})",
        f"does both {percent(one['accuracy'])} [{percent(one['low'])}, {percent(one['high'])}]",
    ]
    named = {
        "says_ad": "other place, rule",
        "says_bc": "place as it is",
        "says_ac": "other place as it is",
    }
    lines += [f"{words} {percent(one[key])}" for key, words in named.items() if key in one]
    return "<br>".join([*lines, f"layer {one['layer']:.0f}"] if "layer" in one else lines)


def _line(fig: go.Figure, some: pd.DataFrame, role: Role, row: int) -> None:
    if some.empty:
        return
    one: Any = some.iloc[0]
    text = f"{role.name} {percent(one['accuracy'])} [{percent(one['low'])}, {percent(one['high'])}]"
    ends = [-0.6, len(_RUNS) - 0.4]
    fig.add_scatter(
        x=ends, y=[one["accuracy"]] * 2, mode="lines", name=role.name, legendgroup=role.name,
        showlegend=row == 1, line={"color": role.color, "dash": role.dash, "width": 1.6},
        customdata=[text] * 2, hovertemplate="%{customdata}<extra></extra>", row=row, col=1,
    )  # fmt: skip


def composition_layers(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw how often each vector does the composed task on dev queries, by layer.

    Args:
        data: A `Composition`'s data: ``dev`` by target, vector, run and layer.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: targets downwards, kinds of vectors to the right.

    Raises:
        ValueError: There are no such shares.

    Example:
        >>> composition_layers(result.data)  # doctest: +SKIP
    """
    if "dev" not in data or "layer" not in data.dims:
        raise ValueError(f"the data has no shares by layer; it has: {', '.join(map(str, data))}")
    targets, kinds = ([str(v) for v in data[name].values] for name in ("target", "vector"))
    heads = [
        f"<b>{label(target)}</b>, {kind.replace('_', ' ')}" for target in targets for kind in kinds
    ]
    fig = make_subplots(
        len(targets), len(kinds), shared_xaxes=True, shared_yaxes=True, subplot_titles=heads, figure=figure(),
        vertical_spacing=0.25 / len(targets), horizontal_spacing=0.05,
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    x = data["layer"].values
    for place, (color, dash, width) in _CURVES.items():
        for i, target in enumerate(targets):
            for j, kind in enumerate(kinds):
                y = data["dev"].sel(target=target, vector=kind, run=place).values
                name = _RUNS[place].replace("<br>", " ")
                fig.add_scatter(
                    x=x, y=y, name=name, legendgroup=place, showlegend=i + j == 0, mode="lines",
                    line={"color": color, "width": width, "dash": dash},
                    hovertemplate=f"{name}<br>layer %{{x}}: %{{y:.2f}}<extra></extra>", row=i + 1, col=j + 1,
                )  # fmt: skip
    fig.update_yaxes(range=[-0.02, 1.04], tickvals=[0, 0.5, 1])
    fig.update_yaxes(title_text="does both (dev)", col=1)
    fig.update_xaxes(showgrid=False)
    fig.update_xaxes(title_text="layer", row=len(targets))
    height = 210 * len(targets)
    fig.update_layout(
        height=height + 130, margin_t=48, legend={"y": -66 / height},
        meta={"min_width": 360 * len(kinds)},
    )  # fmt: skip
    said = str(data.attrs.get("finding", "")) if title is None else title
    n = notes(data).get("n_dev", "")
    return titled(fig, said, subtitle=f"{n} dev queries, on which layers were chosen".strip())
