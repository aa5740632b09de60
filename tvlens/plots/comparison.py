"""Methods against tasks: accuracies in a table that can be read from afar."""

from typing import Any, cast

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens.plots._axes import color_bar
from tvlens.plots._notes import notes
from tvlens.plots.palette import EMPTY, SEQUENTIAL
from tvlens.plots.theme import MONO, figure, label, titled


def comparison_heatmap(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw accuracy by task and run, with means at the bottom.

    Args:
        data: ``correct`` by task, seed, run and prompt.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: bold where a run is at least as good as demonstrations. Hover for the seeds.

    Raises:
        ValueError: The data holds no such outcomes.

    Example:
        >>> comparison_heatmap(result.data)  # doctest: +SKIP
    """
    if "correct" not in data or "run" not in data.dims:
        raise ValueError(f"the data is no comparison; it has: {', '.join(map(str, data))}")
    each = data["correct"].astype(float).mean("prompt").transpose("task", "run", "seed")
    runs, tasks = ([str(n) for n in data[name].values] for name in ("run", "task"))
    seeds = np.concatenate([each.values, each.values.mean(axis=0, keepdims=True)])
    z = seeds.mean(axis=-1)
    told = z[:, [runs.index("regular")]] if "regular" in runs else np.full((len(z), 1), np.inf)
    rows = [*tasks, "mean"]
    fig = figure()
    fig.add_trace(
        go.Heatmap(
            z=z, x=[label(run.replace("_", " ")) for run in runs],
            y=[f"<b>{label(row)}</b>" if row == "mean" else label(row) for row in rows],
            text=_texts(z, told), texttemplate="%{text}", textfont={"family": MONO, "size": 11},
            customdata=_hover(rows, runs, seeds, data), hovertemplate="%{customdata}<extra></extra>",
            colorscale=SEQUENTIAL, zmin=0, zmax=1, xgap=1, ygap=1,
            colorbar=color_bar("accuracy", height=24 * len(rows)),
        )
    )  # fmt: skip
    fig.update_xaxes(side="top", showgrid=False, ticks="", tickangle=-30, title_text="method")
    fig.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    fig.update_layout(
        height=24 * len(rows) + 130,
        meta={"min_width": 64 * len(runs) + 220},
        margin_b=16,
        plot_bgcolor=EMPTY,
    )
    said = str(data.attrs.get("finding", "")) if title is None else title
    model = notes(data).get("model", "")
    n = data.sizes["seed"]
    under = f"{model} · mean of {n} seeds" if n > 1 else str(model)
    under = f"{under} · bold: at least as good as demonstrations".lstrip(" ·")
    fig = titled(fig, said, subtitle=under)
    # Names stand above the cells, and turned.
    room, layout = 3 * max(map(len, runs)) + 24, cast(Any, fig.layout)
    return fig.update_layout(margin_t=layout.margin.t + room, height=layout.height + room)


def _texts(z: np.ndarray, told: np.ndarray) -> list[list[str]]:
    def short(value: float) -> str:
        return f"{value:.2f}".removeprefix("0") if value < 0.995 else f"{value:.2f}"

    return [
        [f"<b>{short(v)}</b>" if v >= t - 1e-9 else short(v) for v in row]
        for row, (t,) in zip(z, told, strict=True)
    ]


def _hover(
    rows: list[str], runs: list[str], seeds: np.ndarray, data: xr.Dataset
) -> list[list[Any]]:
    names = data["seed"].values.tolist()
    return [
        [
            f"<b>{label(run.replace('_', ' '))}</b>, {label(row)}<br>"
            + "<br>".join(f"seed {n}: {v:.3f}" for n, v in zip(names, seeds[i, j], strict=True))
            for j, run in enumerate(runs)
        ]
        for i, row in enumerate(rows)
    ]
