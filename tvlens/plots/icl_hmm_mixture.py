"""A transformer against exact predictors on a mixture of hidden Markov models."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from tvlens.plots._axes import steps_on_log
from tvlens.plots.palette import BLUE, INK, ORANGE, PURPLE
from tvlens.plots.theme import Role, figure, percent, titled

_PREDICTORS = {
    "concept known": Role("concept known (ceiling)", INK, "dash", "square"),
    "exact": Role("exact Bayesian inference", BLUE, "solid", "circle"),
    "transformer": Role("transformer", ORANGE, "dashdot", "triangle-up"),
    "no inference": Role("no inference (prior for ever)", PURPLE, "dot", "x-thin-open"),
}
_ROWS = {"accuracy": "accuracy", "divergence": "nats from exact"}


def hmm_accuracy(rates: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """Draw accuracies and divergences by number of examples, one column of panels for each length.

    Args:
        rates: ``predictor, length, examples, accuracy, low, high, divergence, divergence_low,
            divergence_high`` as ``HMMMixture.rates()`` gives them.
        title: The sentence that says what came out.

    Returns:
        The figure; bars are 95 % intervals.

    Raises:
        ValueError: A column is missing.

    Example:
        >>> hmm_accuracy(result.rates())  # doctest: +SKIP

    References:
        Xie et al. 2022, arXiv 2111.02080.
    """
    needed = {"predictor", "length", "examples", "accuracy", "low", "high", "divergence"}
    needed |= {"divergence_low", "divergence_high"}
    if missing := needed - set(rates.columns):
        raise ValueError(
            f"the table lacks {', '.join(sorted(missing))}; it has: {', '.join(rates.columns)}"
        )
    lengths, counts = (sorted(set(rates[name])) for name in ("length", "examples"))
    heads = [f"<b>examples of {length} tokens</b>" for length in lengths]
    shared: Any = {"shared_xaxes": True, "shared_yaxes": "rows"}
    fig = make_subplots(
        2, len(lengths), subplot_titles=heads, figure=figure(), vertical_spacing=0.08,
        horizontal_spacing=0.04, **shared,
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    for col, length in enumerate(lengths, 1):
        for j, (name, role) in enumerate(_PREDICTORS.items()):
            some: Any = rates[(rates["length"] == length) & (rates["predictor"] == name)]
            # Side by side, so that equal accuracies do not hide each other.
            at = [counts.index(n) + 0.06 * (j - 1.5) for n in some["examples"]]
            for row, (what, ends) in enumerate(
                {
                    "accuracy": ("low", "high"),
                    "divergence": ("divergence_low", "divergence_high"),
                }.items(),
                1,
            ):
                if what == "divergence" and name == "exact":
                    continue
                _points(fig, at, some, what, ends, role, row, col)
    ticks = {"tickvals": list(range(len(counts))), "ticktext": [str(n) for n in counts]}
    fig.update_xaxes(showgrid=False, range=[-0.35, len(counts) - 0.65], **ticks)
    fig.update_xaxes(title_text="whole examples in the prompt", row=2)
    for row, words in enumerate(_ROWS.values(), 1):
        fig.update_yaxes(title_text=words, row=row, col=1)
    fig.update_yaxes(range=[0, 1.03], row=1)
    fig.update_yaxes(range=[0, 1.1 * rates["divergence_high"].max()], row=2)
    fig.update_layout(
        height=520, margin_t=46, meta={"min_width": 300 * len(lengths)}, legend={"y": -0.14}
    )
    return titled(fig, title or "A mixture of hidden Markov models")


def _points(
    fig: go.Figure,
    at: Any,
    some: Any,
    what: str,
    ends: tuple[str, str],
    role: Role,
    row: int,
    col: int,
) -> None:
    texts = [
        f"{role.name}<br>{one['examples']} examples: {percent(one[what])} "
        f"[{percent(one[ends[0]])}, {percent(one[ends[1]])}]"
        for one in some.to_dict("records")
    ]
    fig.add_scatter(
        x=at, y=some[what], mode="lines+markers", name=role.name, legendgroup=role.name,
        showlegend=row == col == 1, customdata=texts, hovertemplate="%{customdata}<extra></extra>",
        line={"color": role.color, "dash": role.dash, "width": 2},
        marker={"symbol": role.symbol, "size": 7, "line": {"width": 1.5, "color": role.color}},
        error_y={"type": "data", "array": some[ends[1]] - some[what], "width": 0, "thickness": 1,
                 "arrayminus": some[what] - some[ends[0]], "color": role.faint(0.6)},
        row=row, col=col,
    )  # fmt: skip


def hmm_training(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw the transformer's loss on held-out documents over training, above that of exact inference.

    Args:
        data: ``training`` by step and measure, as a `HMMMixture` holds it.
        title: The sentence that says what came out.

    Returns:
        The figure.

    Raises:
        ValueError: There is no such variable.

    Example:
        >>> hmm_training(result.data)  # doctest: +SKIP

    References:
        Xie et al. 2022, arXiv 2111.02080.
    """
    if "training" not in data:
        raise ValueError(f"the data lacks training; it has: {', '.join(map(str, data))}")
    fig, (at, axis) = figure(), steps_on_log(data["step"].values)
    for name, key in (("loss", "transformer"), ("exact_loss", "exact")):
        role = _PREDICTORS[key]
        fig.add_scatter(
            x=at, y=data["training"].sel(measure=name).values, mode="lines+markers", name=role.name,
            line={"color": role.color, "dash": role.dash, "width": 2}, marker={"symbol": role.symbol},
            customdata=data["step"].values,
            hovertemplate=f"{role.name}<br>step %{{customdata:,}}: %{{y:.3f}} nats<extra></extra>",
        )  # fmt: skip
    fig.update_xaxes(**axis, title_text="training step")
    fig.update_yaxes(title_text="nats a token, held-out documents")
    fig.update_layout(height=340, meta={"min_width": 420})
    gap = float(data["training"].isel(step=-1).sel(measure="divergence"))
    return titled(
        fig,
        title or f"On held-out documents the transformer ends {gap:.3f} nats above exact inference",
    )
