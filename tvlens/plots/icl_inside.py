"""Inside one transformer: errors of its parts, what their mixture leaves, and where a label acts."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from tvlens._words import fixed
from tvlens.plots._axes import color_bar, steps_on_log
from tvlens.plots._cells import written_cells
from tvlens.plots.palette import BLUE, DIVERGING, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION
from tvlens.plots.theme import Role, figure, titled

GROUPS = {"high": "common classes", "low": "rare classes"}
RUNS = {
    "f": Role("f: the whole model", INK, "solid", "circle"),
    "g": Role("g: without the context", ORANGE, "dash", "square"),
    "h": Role("h: without the query", BLUE, "dashdot", "diamond"),
}
_ALPHA = {
    "mixture": Role("alpha by fit", GREEN, "solid", "circle"),
    "index": Role("alpha by f's own index", PURPLE, "dot", "x"),
}
_LEFT = {
    "mixture": Role("mixture of g and h", GREEN, "solid", "circle"),
    "log-linear": Role("log-linear mixture", SKY, "dash", "square"),
    "one of the two": Role("better of g and h alone", GREY, "dashdot", "diamond"),
    "shuffled": Role("mixture, shuffled", VERMILION, "dot", "x"),
}
_ROWS = ("error, moved labels", "alpha: weight of g", "left unexplained")
_PARTS = {
    "label token": (BLUE, "solid", "circle"),
    "context input": (SKY, "dash", "square"),
    "query token": (PURPLE, "dot", "x"),
    "MLP": (ORANGE, "solid", "diamond"),
    "query's embedding": (GREEN, "dashdot", "triangle-up"),
    "biases": (GREY, "dot", "cross"),
}
_PLACES = {"label token": "label", "query": "query"}


def inside_curves(
    errors: pd.DataFrame, mixtures: pd.DataFrame, *, title: str | None = None
) -> go.Figure:
    """Draw over steps how f, g and h err on moved labels, alpha, and what mixtures of g and h leave.

    Args:
        errors: ``seed, step, run, probe, error`` as ``Inside.errors()`` gives them.
        mixtures: ``seed, step, probe, fit, alpha, distance`` as ``Inside.mixtures()`` gives them.
        title: The sentence that says what came out.

    Returns:
        The figure: thin lines are seeds, thick ones their means; a column for each group of classes.

    Raises:
        ValueError: A column is missing.

    Example:
        >>> inside_curves(result.errors(), result.mixtures())  # doctest: +SKIP

    References:
        Chan et al. 2025, arXiv 2410.23042, section 4.
    """
    needed = (
        {"seed", "step", "run", "probe", "error"},
        {"seed", "step", "probe", "fit", "alpha", "distance"},
    )
    for frame, columns in zip((errors, mixtures), needed, strict=True):
        if missing := columns - set(frame.columns):
            raise ValueError(
                f"the table lacks {', '.join(sorted(missing))}; it has: {', '.join(frame)}"
            )
    fig = make_subplots(
        3, 2, shared_xaxes=True, shared_yaxes=True, figure=figure(), vertical_spacing=0.06,
        horizontal_spacing=0.04, column_titles=[f"<b>{name}</b>" for name in GROUPS.values()],
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    shown: set[str] = set()
    for col, group in enumerate(GROUPS, 1):
        probe = f"relevant {group} flipped"
        some = errors[errors["probe"] == probe]
        fitted = mixtures[mixtures["probe"] == probe]
        for run, role in RUNS.items():
            _lines(fig, _grid(some[some["run"] == run], "error"), role, 1, col, shown)
        for fit, role in _ALPHA.items():
            _lines(fig, _grid(fitted[fitted["fit"] == fit], "alpha"), role, 2, col, shown)
        for fit, role in _LEFT.items():
            _lines(fig, _grid(fitted[fitted["fit"] == fit], "distance"), role, 3, col, shown)
    for row, name in enumerate(_ROWS, 1):
        fig.update_yaxes(title_text=name, range=[-0.03, 1.03], row=row, col=1)
        fig.update_yaxes(range=[-0.03, 1.03], row=row, col=2)
        fig.update_layout({f"legend{row if row > 1 else ''}": _legend(row)})
    fig.update_xaxes(**steps_on_log(errors["step"])[1])
    fig.update_xaxes(title_text="training step", row=3)
    fig.update_layout(height=760, margin_t=46, margin_r=190, meta={"min_width": 760})
    small = (
        "Relevant contexts, labels moved within the group. Thin lines: seeds; thick: their mean."
    )
    return titled(fig, title or "f, g and h over steps", subtitle=small)


def _legend(row: int) -> dict[str, Any]:
    """A legend beside its own row."""
    top = 1 - (row - 1) * 0.353
    return {
        "orientation": "v",
        "x": 1.01,
        "xanchor": "left",
        "y": top,
        "yanchor": "top",
        "font_size": 12,
    }


def _grid(frame: Any, name: str) -> pd.DataFrame:
    return frame.pivot_table(
        index="step", columns="seed", values=name, aggfunc="mean", dropna=False
    )


def _lines(
    fig: go.Figure, grid: pd.DataFrame, role: Role, row: int, col: int, shown: set[str]
) -> None:
    values, (at, _) = grid.to_numpy().T, steps_on_log(grid.index.to_numpy())
    legend, key = f"legend{row if row > 1 else ''}", f"{row} {role.name}"
    gap = np.full((len(values), 1), np.nan)
    fig.add_scatter(
        x=np.tile(np.append(at, np.nan), len(values)), y=np.hstack([values, gap]).ravel(), mode="lines",
        line={"color": role.faint(0.3), "width": 1}, legendgroup=key, showlegend=False, hoverinfo="skip",
        row=row, col=col,
    )  # fmt: skip
    fig.add_scatter(
        x=at, y=values.mean(axis=0), mode="lines+markers", name=role.name, legendgroup=key, legend=legend,
        showlegend=key not in shown, marker={"symbol": role.symbol, "size": 6},
        line={"color": role.color, "width": 2.4, "dash": role.dash},
        customdata=grid.index.to_numpy(), row=row, col=col,
        hovertemplate=f"{role.name}<br>step %{{customdata:,}}: %{{y:.2f}}<extra></extra>",
    )  # fmt: skip
    shown.add(key)


def inside_effects(data: xr.Dataset, *, least: float = 0.05, title: str | None = None) -> go.Figure:
    """Draw where a moved label acts: patching effects by place and step, a panel for each group of classes.

    Args:
        data: ``effect`` by seed, step, group, site, layer, place and prompt; ``whole`` without places.
        least: Places whose mean effect is below this share of the largest one everywhere are left out.
        title: The heading.

    Returns:
        The figure: means over seeds and prompts, in logits towards the moved label.

    Raises:
        ValueError: A variable is missing.

    Example:
        >>> inside_effects(result.data)  # doctest: +SKIP

    References:
        Zhang, Nanda 2024, arXiv 2309.16042.
    """
    _needs(data, "effect", "whole")
    mean = data["effect"].mean(("seed", "prompt"))
    whole = data["whole"].mean(("seed", "prompt"))
    cells = mean.stack(cell=("place", "layer", "site")).transpose("group", "cell", "step")
    half = float(np.abs(whole).max()) or 1.0
    keep = abs(cells).max(("group", "step")).values >= least * half
    cells = cells.isel(cell=np.flatnonzero(keep))
    names = [
        f"{_PLACES[place]}: {site}, layer {layer}" for place, layer, site in cells["cell"].values
    ]
    rows = ["whole prompt", *names]
    fig = make_subplots(
        1, 2, shared_yaxes=True, figure=figure(), horizontal_spacing=0.03,
        subplot_titles=[f"<b>{name}</b>" for name in GROUPS.values()],
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    steps = [f"{step:,}" for step in data["step"].values]
    for col, group in enumerate(GROUPS, 1):
        z = np.vstack([whole.sel(group=group).values[None], cells.sel(group=group).values]).astype(
            float
        )
        words = [[fixed(v, 1) for v in row] for row in z]
        hover = [
            [
                f"{name}<br>step {step}: {fixed(v, sign=True)} logits"
                for step, v in zip(steps, row, strict=True)
            ]
            for name, row in zip(rows, z, strict=True)
        ]
        fig.add_trace(
            written_cells(z, words, hover, size=10, coloraxis="coloraxis"), row=1, col=col
        )
    fig.update_xaxes(
        tickvals=list(range(len(steps))), ticktext=steps, title_text="training step", showgrid=False
    )
    fig.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=rows, autorange="reversed", showgrid=False
    )
    fig.update_layout(
        height=150 + 26 * len(rows), margin_t=46, meta={"min_width": 860},
        coloraxis={"colorscale": DIVERGING, "cmin": -half, "cmax": half,
                   "colorbar": color_bar("logits towards the moved label", height=26 * len(rows))},
    )  # fmt: skip
    small = "Activations of the run with the moved label, written into that with the true one."
    return titled(fig, title or "Where a moved label acts", subtitle=small)


def inside_parts(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw what each part says directly for the context's label and against the query's own one.

    Args:
        data: ``direct`` by seed, step, group, part and prompt.
        title: The heading.

    Returns:
        The figure: means over prompts; thin lines are seeds, thick ones their means.

    Raises:
        ValueError: The variable is missing.

    Example:
        >>> inside_parts(result.data)  # doctest: +SKIP

    References:
        Elhage et al. 2021, A mathematical framework for transformer circuits.
    """
    _needs(data, "direct")
    fig = make_subplots(
        1, 2, shared_yaxes=True, figure=figure(), horizontal_spacing=0.04,
        subplot_titles=[f"<b>{name}</b>" for name in GROUPS.values()],
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    shown: set[str] = set()
    mean = data["direct"].mean("prompt")
    parts = [str(part) for part in data["part"].values]
    for col, group in enumerate(GROUPS, 1):
        for kind, (color, dash, symbol) in _PARTS.items():
            said = mean.sel(group=group, part=[p for p in parts if p.startswith(kind)]).sum("part")
            name = {"MLP": "MLPs at the query", "query token": "attention to the query itself"}.get(
                kind, f"attention to the {kind}" if kind.endswith(("token", "input")) else kind
            )
            grid: Any = said.transpose("step", "seed").to_pandas()
            _lines(fig, grid, Role(name, color, dash, symbol), 1, col, shown)
    line: Any = {"line": {"color": GREY, "width": 1}, "row": 1, "col": "all"}
    fig.add_hline(y=0, **line)
    fig.update_xaxes(**steps_on_log(data["step"].values)[1], title_text="training step")
    fig.update_yaxes(title_text="logits for the context's label", col=1)
    fig.update_layout(
        height=420, margin_t=46, margin_r=230, legend=_legend(1), meta={"min_width": 760}
    )
    small = (
        "Logit of the context's label less that of the own label; relevant contexts, moved labels."
    )
    return titled(fig, title or "Who says the context's label", subtitle=small)


def _needs(data: xr.Dataset, *names: str) -> None:
    missing = set(names) - set(map(str, data.variables))
    if missing:
        raise ValueError(
            f"the data lacks {', '.join(sorted(missing))}; it has: {', '.join(map(str, data))}"
        )
