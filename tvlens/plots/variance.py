"""What makes theta vary, by layer: one curve for each number of shots.

Above, the share of the variance that demonstrations make, the rest being dummy queries; below, how like theta
is to that of the most shots. The curve of 0 shots is the control: it has no demonstrations.
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from tvlens.plots._notes import notes
from tvlens.plots.palette import MUTED, faint
from tvlens.plots.theme import ROLES, figure, titled

_PANELS = {
    "share": "share of variance from demonstrations",
    "likeness": "cosine with theta of the most shots",
}
_DASHES = ("dot", "dashdot", "dash", "longdash", "longdashdot", "solid")


def variance_by_layer(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw the share of demonstrations in theta's variance, and theta's likeness to that of many shots.

    Args:
        data: What `tvlens.experiments.variance.Variance.parts` gives, with ``finding`` among its attributes.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: two panels by layer; bands are 95 % intervals, lighter curves have fewer shots.

    Raises:
        ValueError: The data has no such variables.

    Example:
        >>> variance_by_layer(result.parts())  # doctest: +SKIP

    References:
        Hendel et al. 2023, arXiv 2310.15916.
    """
    missing = set(_PANELS) - set(map(str, data.data_vars))
    if missing:
        raise ValueError(
            f"the data lacks {', '.join(sorted(missing))}; it has: {', '.join(map(str, data))}"
        )
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, figure=figure())
    shots = [int(k) for k in data["shots"].values]
    for i, k in enumerate(shots):
        # From light to dark with the shots; none at all has a colour of its own.
        strength = 0.3 + 0.7 * (i + 1) / len(shots)
        color = ROLES["hypothesis"].faint(strength) if k else ROLES["control"].color
        for row, name in enumerate(_PANELS):
            _curve(fig, data.sel(shots=k), name, row + 1, k, color, _DASHES[i % len(_DASHES)])
    layer = notes(data).get("layer")
    for row, words in enumerate(_PANELS.values()):
        fig.update_yaxes(title_text=words.replace(" from ", "<br>from ").replace(" with ", "<br>with "),
                         row=row + 1, col=1)  # fmt: skip
        if layer is not None:
            line: Any = {"color": MUTED, "dash": "dot", "width": 1}
            place: Any = {"row": row + 1, "col": 1}
            fig.add_vline(x=layer, line=line, **place)
    fig.update_yaxes(range=[-0.02, 1.02], row=1, col=1)
    fig.update_xaxes(title_text="layer", row=2, col=1)
    fig.update_layout(height=560, meta={"min_width": 480}, legend={"y": -0.13})
    sentence = data.attrs.get("finding", "") if title is None else title
    note = notes(data)
    small = [note.get("task"), note.get("model"), "control: 0 shots" if 0 in shots else None]
    return titled(fig, sentence, subtitle=" · ".join(map(str, filter(None, small))))


def _curve(
    fig: go.Figure, one: xr.Dataset, name: str, row: int, shots: int, color: str, dash: str
) -> None:
    x, y = one["layer"].values, one[name].values
    told = f"{shots} {'shot' if shots == 1 else 'shots'}"
    low, high = one[f"{name}_low"].values, one[f"{name}_high"].values
    fig.add_scatter(
        x=np.concatenate([x, x[::-1]]), y=np.concatenate([low, high[::-1]]), fill="toself",
        fillcolor=faint(MUTED, 0.1), line_width=0, mode="lines", hoverinfo="skip",
        showlegend=False, legendgroup=str(shots), row=row, col=1,
    )  # fmt: skip
    fig.add_scatter(
        x=x, y=y, mode="lines", line={"color": color, "dash": dash, "width": 2.2},
        name=told, legendgroup=str(shots),
        showlegend=row == 1, customdata=np.stack([low, high], axis=1),
        hovertemplate=f"{told}, layer %{{x}}<br>{_PANELS[name]} %{{y:.3f}} "
        "(%{customdata[0]:.3f} to %{customdata[1]:.3f})<extra></extra>",
        row=row, col=1,
    )  # fmt: skip
