"""Error over the size of the dataset: from the context, or from the weights?"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tvlens._errors import unknown
from tvlens.plots._axes import doublings
from tvlens.plots.palette import BLUE, MUTED, VERMILION
from tvlens.plots.theme import Role, figure, titled

_GROUPS = {
    "high": Role("common classes", BLUE, "solid", "circle"),
    "low": Role("rare classes", VERMILION, "solid", "diamond"),
}
_TRAINED = {"transformer": "solid", "in-weight": "dot", "in-context": "dash"}
_ROWS = {
    "relevant {} flipped": "context alone is right",
    "irrelevant {} base": "weights alone are right",
}
_DIALS = {
    "noise": "input noise",
    "p_high": "share of common classes",
    "p_relevant": "share of relevant sequences",
    "label_noise": "label noise",
    "length": "pairs in the context",
    "n_relevant": "relevant pairs",
    "n_low": "rare classes",
}
_WORDS = {
    "error": "error",
    "loss": "loss (nats)",
    "alpha": "alpha: share of the weights",
    "copying": "copying (nats)",
}


def sweep_curves(
    curves: pd.DataFrame,
    *,
    dial: str,
    measure: str = "error",
    chance: Sequence[float] | None = None,
    title: str | None = None,
) -> go.Figure:
    """Draw a measure over dataset size, a column for each value of the dial, in-context above in-weight.

    Args:
        curves: ``value, trained, probe, n_sequences, mean, sem`` and, where known, ``authors``.
        dial: What the values are called; fields of `tvlens.icl.Setting` are put into words.
        measure: What the means are of.
        chance: Where to draw the line of guessing, value by value; no line where None.
        title: The heading.

    Returns:
        The figure: bands are standard errors over seeds, open markers what the authors' figures show.

    Raises:
        ValueError: A column is missing, there is no such measure, or ``chance`` is not one number a value.

    Example:
        >>> sweep_curves(result.curves(), dial="noise")  # doctest: +SKIP

    References:
        Chan et al. 2025, arXiv 2410.23042, figure 2.
    """
    missing = {"value", "trained", "probe", "n_sequences", "mean", "sem"} - set(curves.columns)
    if missing:
        raise ValueError(
            f"the curves lack {', '.join(sorted(missing))}; they have: {', '.join(curves.columns)}"
        )
    if measure not in _WORDS:
        raise unknown("measure", measure, _WORDS)
    values = list(dict.fromkeys(curves["value"]))
    if chance is not None and len(chance) != len(values):
        raise ValueError(f"chance needs one number for each of {values}; {len(chance)} arrived.")
    known = set(curves["probe"][curves["mean"].notna()])
    rows = {k: v for k, v in _ROWS.items() if known & {k.format(group) for group in _GROUPS}}
    heads = [f"<b>{_DIALS.get(dial, dial)}: {value:g}</b>" for value in values]
    fig = make_subplots(
        len(rows), len(values), shared_xaxes=True, shared_yaxes=True, figure=figure(), vertical_spacing=0.09,
        horizontal_spacing=0.03, column_titles=heads,
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    shown: set[str] = set()
    for row, pattern in enumerate(rows, 1):
        for column, value in enumerate(values, 1):
            for group, role in _GROUPS.items():
                some: Any = curves[
                    (curves["value"] == value) & (curves["probe"] == pattern.format(group))
                ]
                for trained, dash in _TRAINED.items():
                    one = some[some["trained"] == trained].sort_values("n_sequences")
                    if len(one):
                        _line(fig, one, role, trained, dash, (row, column), shown)
                _authors(fig, some, role, (row, column), shown)
        fig.update_yaxes(
            title_text=f"{_ROWS[pattern]}<br>{_WORDS[measure]}", title_font_size=11, row=row, col=1
        )
    dotted: Any = {"line": {"color": MUTED, "width": 1, "dash": "dot"}, "layer": "below"}
    for column, guess in enumerate(chance or (), 1):
        fig.add_hline(y=guess, **(dotted | {"col": column}))
    # Many panels leave each few ticks' room.
    fig.update_xaxes(**doublings(curves["n_sequences"], every=1 + (len(values) > 3)))
    fig.update_xaxes(
        title_text="sequences in the dataset, N", row=len(rows), col=(len(values) + 1) // 2
    )
    if measure in ("error", "alpha"):
        fig.update_yaxes(range=[-0.04, 1.04])
    fig.update_layout(
        height=180 + 190 * len(rows),
        margin_t=64,
        legend={"y": -0.32 / len(rows)},
        meta={"min_width": 260 + 230 * len(values)},
    )
    small = (
        "Context alone is right: it is relevant, labels are moved; weights alone: it is irrelevant, labels "
        "are true · means over seeds, bands ± standard error · dotted line: guessing"
    )
    if "authors" in curves.columns and bool(curves["authors"].notna().any()):
        small += " · open: the authors, read off their figures"
    return titled(fig, title or "In-context or in-weight", subtitle=small)


def _line(
    fig: go.Figure,
    one: pd.DataFrame,
    role: Role,
    trained: str,
    dash: str,
    cell: tuple[int, int],
    shown: set[str],
) -> None:
    name = role.name if trained == "transformer" else f"{role.name}, {trained} predictor"
    where: dict[str, Any] = {"row": cell[0], "col": cell[1]}
    main = trained == "transformer"
    x, mean, sem = one["n_sequences"], one["mean"], one["sem"].fillna(0)
    if main:
        fig.add_scatter(
            x=[*x, *x[::-1]], y=[*(mean + sem), *(mean - sem)[::-1]], fill="toself", hoverinfo="skip",
            line_width=0, mode="lines", fillcolor=role.faint(0.18), showlegend=False, legendgroup=name,
            **where,
        )  # fmt: skip
    fig.add_scatter(
        x=x, y=mean, mode="lines+markers", name=name, legendgroup=name,
        showlegend=name not in shown, customdata=sem,
        line={"color": role.color if main else role.faint(0.6), "dash": dash, "width": 2 if main else 1.3},
        marker={"symbol": role.symbol, "size": 7 if main else 4},
        hovertemplate=f"{name}<br>N = %{{x:,}}: %{{y:.3f}} ± %{{customdata:.3f}}<extra></extra>", **where,
    )  # fmt: skip
    shown.add(name)


def _authors(
    fig: go.Figure, some: pd.DataFrame, role: Role, cell: tuple[int, int], shown: set[str]
) -> None:
    known: Any = some[some["authors"].notna()] if "authors" in some.columns else None
    if known is None or known.empty:
        return
    name = f"{role.name}, the authors'"
    fig.add_scatter(
        x=known["n_sequences"], y=known["authors"], mode="markers", name=name, legendgroup=name,
        showlegend=name not in shown, row=cell[0], col=cell[1],
        marker={"symbol": f"{role.symbol}-open", "size": 11, "color": role.color, "line": {"width": 1.5}},
        hovertemplate=f"{name}<br>N = %{{x:,}}: about %{{y:.2f}}<extra></extra>",
    )  # fmt: skip
    shown.add(name)
