"""A heat map of templates: where theta was made against where it is used, with what frames it."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens.plots._axes import color_bar
from tvlens.plots._cells import written_cells
from tvlens.plots._notes import notes
from tvlens.plots.palette import SEQUENTIAL
from tvlens.plots.theme import MONO, figure, label, percent, titled, visible

_FRAME = {
    "regular": "regular (demonstrations)",
    "control": "random vector",
    "baseline": "baseline (query only)",
}


def template_matrix(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw accuracy with theta by the template it was made in and the one it is used in.

    Args:
        data: What `tvlens.experiments.template_transfer.TemplateTransfer.drawn` gives, with ``finding``
            among its attributes.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: rows are where theta was made, columns where it is used, the diagonal in bold. Below
        stand regular, a random vector (mean over the rows) and baseline in the column's template. Hover for
        intervals and layers.

    Raises:
        ValueError: The data has no such variables.

    Example:
        >>> template_matrix(result.drawn())  # doctest: +SKIP
    """
    missing = [name for name in ("hypothesis", *_FRAME) if name not in data]
    if missing:
        raise ValueError(
            f"the data lacks {', '.join(missing)}; it has: {', '.join(map(str, data))}"
        )
    data = data.transpose("made", "used")
    names = [visible(str(name)) for name in data["used"].values]
    n = len(names)
    frame = [data[name] if name != "control" else data[name].mean("made") for name in _FRAME]
    gap = np.full((1, n), np.nan)
    z = np.concatenate([data["hypothesis"].values, gap, np.stack([row.values for row in frame])])
    words = [["" if v != v else percent(v) for v in row] for row in z]
    for i in range(n):
        words[i][i] = f"<b>{words[i][i]}</b>"
    hover = [[_hover(data, i, j) for j in range(n)] for i in range(n)]
    hover += [[""] * n, *([_framed(data, name, j) for j in range(n)] for name in _FRAME)]
    fig = figure()
    fig.add_trace(written_cells(z, words, hover, size=13, coloraxis="coloraxis"))
    ticks: dict[str, Any] = {"showgrid": False, "ticks": ""}
    spelled = [f'<span style="font-family:{MONO}">{label(name)}</span>' for name in names]
    frame_ticks = [label(word) for word in _FRAME.values()]
    fig.update_xaxes(
        **ticks, tickvals=list(range(n)), ticktext=spelled, title_text="used in bare queries written as",
        side="top", tickangle=-25 if n > 4 else 0, range=[-0.5, n - 0.5],
    )  # fmt: skip
    fig.update_yaxes(
        **ticks, tickvals=[*range(n), *range(n + 1, len(z))], ticktext=[*spelled, *frame_ticks],
        title_text="made in", range=[len(z) - 0.5, -0.5],
    )  # fmt: skip
    fig.update_layout(
        coloraxis={
            "colorscale": SEQUENTIAL, "cmin": 0, "cmax": 1,
            "colorbar": color_bar("accuracy", height=38 * len(z)),
        },
        height=38 * len(z) + 90 + 30 * (n > 4), margin={"t": 70 + 30 * (n > 4), "b": 20, "r": 20},
        meta={"min_width": 76 * n + 330},
    )  # fmt: skip
    note = notes(data)
    tasks = note.get("tasks", [])
    on = str(tasks[0]) if len(tasks) == 1 else f"mean of {len(tasks)} tasks" if tasks else ""
    small = [
        on,
        str(note.get("model", "")),
        "each cell at the layer that dev queries in its column choose",
    ]
    sentence = data.attrs.get("finding", "") if title is None else title
    return titled(fig, sentence, subtitle=" · ".join(filter(None, small)))


def _between(cell: xr.Dataset, name: str) -> str:
    value, low, high = (float(cell[name + end]) for end in ("", "_low", "_high"))
    return f"{percent(value)} ({percent(low)} to {percent(high)})"


def _hover(data: xr.Dataset, i: int, j: int) -> str:
    """All that is known of one pair."""
    cell = data.isel(made=i, used=j)
    made, used = (label(visible(str(cell[side].values))) for side in ("made", "used"))
    lines = [
        f"made in <b>{made}</b>, used in <b>{used}</b>",
        f"theta: {_between(cell, 'hypothesis')}",
        f"random vector: {_between(cell, 'control')}",
        f"regular: {_between(cell, 'regular')}",
    ]
    if "best_layer" in cell:
        lines.append(f"layer {float(cell['best_layer']):g} (median over tasks)")
    return "<br>".join(lines)


def _framed(data: xr.Dataset, name: str, j: int) -> str:
    cell = data.isel(used=j)
    used = label(visible(str(cell["used"].values)))
    said = percent(float(cell[name].mean())) if name == "control" else _between(cell, name)
    return f"{_FRAME[name]}, <b>{used}</b><br>{said}"
