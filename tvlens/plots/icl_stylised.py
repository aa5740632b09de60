"""The stylised model's gate and the transformer's index over dataset size."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tvlens.plots._axes import doublings
from tvlens.plots.palette import BLUE, VERMILION
from tvlens.plots.theme import Role, figure, titled

_LINES = {
    "gate": Role("stylised model: gate", BLUE, "solid", "circle"),
    "alpha": Role("transformer: alpha-hat", VERMILION, "dash", "diamond"),
}
_PANELS = {
    "relevant high": "relevant, common", "relevant low": "relevant, rare",
    "irrelevant high": "irrelevant, common", "irrelevant low": "irrelevant, rare",
}  # fmt: skip


def gate_and_index(curves: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """Draw how much the two models lean on their weights, one panel a probe.

    Args:
        curves: ``probe, n_sequences, gate, gate_sem, alpha, alpha_sem`` and, where known, ``authors``.
        title: The sentence that says what came out.

    Returns:
        The figure: bars are standard errors over seeds, open circles the authors' gates.

    Raises:
        ValueError: A column is missing.

    Example:
        >>> gate_and_index(result.curves())  # doctest: +SKIP

    References:
        Chan et al. 2025, arXiv 2410.23042.
    """
    missing = {"probe", "n_sequences", "gate", "alpha"} - set(curves.columns)
    if missing:
        raise ValueError(
            f"the curves lack {', '.join(sorted(missing))}; they have: {', '.join(curves.columns)}"
        )
    heads = [f"<b>{name}</b>" for name in _PANELS.values()]
    fig = make_subplots(
        2, 2, shared_xaxes=True, shared_yaxes=True, subplot_titles=heads, figure=figure(),
        vertical_spacing=0.12, horizontal_spacing=0.05,
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    for i, probe in enumerate(_PANELS):
        some: Any = curves[curves["probe"] == probe]
        one = some.sort_values("n_sequences")
        where = {"row": i // 2 + 1, "col": i % 2 + 1}
        for name, role in _LINES.items():
            bars = one[f"{name}_sem"] if f"{name}_sem" in one.columns else None
            fig.add_scatter(
                x=one["n_sequences"], y=one[name], mode="lines+markers", name=role.name, legendgroup=name,
                showlegend=i == 0, line={"color": role.color, "dash": role.dash, "width": 2},
                marker={"symbol": role.symbol, "size": 7},
                error_y={"type": "data", "array": bars, "color": role.faint(0.4), "thickness": 1},
                hovertemplate=f"{role.name}<br>N = %{{x:,}}: %{{y:.2f}}<extra></extra>", **where,
            )  # fmt: skip
        if "authors" in one.columns and bool(one["authors"].notna().any()):
            fig.add_scatter(
                x=one["n_sequences"], y=one["authors"], mode="markers", name="the authors' gate",
                legendgroup="authors", showlegend=i == 0,
                marker={"symbol": "circle-open", "size": 11, "color": _LINES["gate"].color},
                hovertemplate="the authors' gate<br>N = %{x:,}: about %{y:.2f}<extra></extra>", **where,
            )  # fmt: skip
    fig.update_xaxes(**doublings(curves["n_sequences"]))
    fig.update_xaxes(title_text="sequences in the dataset, N", row=2)
    fig.update_yaxes(range=[-0.04, 1.04])
    fig.update_yaxes(title_text="share of the weights", col=1)
    fig.update_layout(height=560, margin_t=60, legend={"y": -0.14}, meta={"min_width": 620})
    small = "0: all from the context, 1: all from the weights. Open: the authors, read off their figures."
    return titled(fig, title or "Gate and index", subtitle=small)
