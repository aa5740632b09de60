"""In-context learning by number of classes: every seed a point, so that two modes are seen as two."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from tvlens.plots._axes import powers
from tvlens.plots.palette import BLUE, INK, MUTED, ORANGE
from tvlens.plots.theme import Role, figure, percent, titled

_ROLES = {
    "new_classes": Role("new classes (in context)", BLUE, "solid", "circle"),
    "in_weights": Role("class absent (in weights)", ORANGE, "dash", "triangle-up"),
}


def diversity_sweep(
    ends: pd.DataFrame, *, threshold: float | None = None, title: str | None = None
) -> go.Figure:
    """Draw accuracies at the end by number of classes, beside a histogram of those on new classes.

    Args:
        ends: ``n_classes, seed, new_classes, in_weights`` as ``Diversity.ends()`` gives them.
        threshold: K*, drawn as a line where it is finite and above 0.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure; points are networks, lines their means.

    Raises:
        ValueError: A column is missing.

    Example:
        >>> diversity_sweep(result.ends())  # doctest: +SKIP

    References:
        Nguyen and Reddy 2024, arXiv 2412.00104.
    """
    if missing := {"n_classes", "seed", *_ROLES} - set(ends.columns):
        raise ValueError(
            f"the table lacks {', '.join(sorted(missing))}; it has: {', '.join(ends.columns)}"
        )
    fig = make_subplots(
        1, 2, shared_yaxes=True, column_widths=[0.8, 0.2], horizontal_spacing=0.03, figure=figure()
    )
    order = ends["seed"].rank(method="dense") - (ends["seed"].nunique() + 1) / 2
    for sign, (name, role) in zip((-1, 1), _ROLES.items(), strict=True):
        # Seeds stand a little apart, and both tests on their own side.
        at = ends["n_classes"] * np.exp(0.06 * sign + 0.012 * order)
        texts = [
            f"{k:,.0f} classes, seed {seed}<br>{role.name} {percent(v)}"
            for k, seed, v in zip(ends["n_classes"], ends["seed"], ends[name], strict=True)
        ]
        fig.add_scatter(
            x=at, y=ends[name], mode="markers", name=role.name, legendgroup=role.name, customdata=texts,
            marker={"color": role.faint(0.7), "symbol": role.symbol, "size": 7},
            hovertemplate="%{customdata}<extra></extra>", row=1, col=1,
        )  # fmt: skip
        means: Any = ends.groupby("n_classes")[name].mean()
        fig.add_scatter(
            x=means.index * np.exp(0.06 * sign), y=means, mode="lines", legendgroup=role.name,
            showlegend=False, line={"color": role.color, "dash": role.dash, "width": 2}, hoverinfo="skip",
            row=1, col=1,
        )  # fmt: skip
    role = _ROLES["new_classes"]
    fig.add_histogram(
        y=ends["new_classes"], ybins={"start": 0.3, "end": 1.05, "size": 0.05}, showlegend=False,
        marker={"color": role.faint(0.6), "line": {"width": 0}},
        hovertemplate="%{x} networks end with %{y} on new classes<extra></extra>", row=1, col=2,
    )  # fmt: skip
    if threshold is not None and np.isfinite(threshold) and threshold > 0:
        line: Any = {"color": MUTED, "dash": "dot", "width": 1.2}
        place: Any = {"row": 1, "col": 1, "annotation_text": "K*"}
        fig.add_vline(x=threshold, line=line, **place)
    fig.update_xaxes(
        **_classes(ends["n_classes"]), title_text="classes in training, K", row=1, col=1
    )
    fig.update_xaxes(title_text="networks", row=1, col=2)
    fig.update_yaxes(range=[0.3, 1.03], title_text="accuracy at the end", row=1, col=1)
    fig.update_layout(height=400, meta={"min_width": 520}, bargap=0.05)
    return titled(fig, title or "In-context learning by number of classes")


def memorising_law(
    integrals: xr.DataArray,
    *,
    exponent: float | None = None,
    authors: float | None = None,
    title: str | None = None,
) -> go.Figure:
    """Draw how long networks without attention take to memorise, by number of classes, on log scales.

    Args:
        integrals: I_K by number of classes and seed; NaN where memorising did not end.
        exponent: The slope that was fitted.
        authors: The authors' slope, drawn through the middle of the data.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure.

    Raises:
        ValueError: The data has other dimensions.

    Example:
        >>> memorising_law(result.memorising())  # doctest: +SKIP

    References:
        Nguyen and Reddy 2024, arXiv 2412.00104.
    """
    if set(integrals.dims) != {"n_classes", "seed"}:
        raise ValueError(f"integrals need dimensions n_classes and seed, got {integrals.dims}")
    fig, table = figure(), integrals.rename("value").to_dataframe().reset_index().dropna()
    texts = [
        f"{k:,.0f} classes, seed {s:.0f}: {v:.3g}"
        for k, s, v in table[["n_classes", "seed", "value"]].values
    ]
    fig.add_scatter(
        x=table["n_classes"], y=table["value"], mode="markers", name="networks without attention",
        marker={"color": ORANGE, "symbol": "triangle-up", "size": 8}, customdata=texts,
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    if len(table):
        k = np.array(sorted(set(table["n_classes"])), dtype=float)
        middle = np.log(table[["n_classes", "value"]]).mean()
        for slope, name, dash in ((exponent, "fit", "solid"), (authors, "the authors", "dash")):
            if slope is None or slope != slope:
                continue
            fig.add_scatter(
                x=k, y=np.exp(middle["value"] + slope * (np.log(k) - middle["n_classes"])), mode="lines",
                name=f"{name}: K<sup>{slope:.2f}</sup>", hoverinfo="skip",
                line={"color": INK, "dash": dash, "width": 1.6},
            )  # fmt: skip
    fig.update_xaxes(**_classes(integrals["n_classes"].values), title_text="classes in training, K")
    fig.update_yaxes(title_text="error summed over training, I<sub>K</sub>")
    if len(table):
        values = table["value"].to_numpy(float)
        low, high = values.min() / 1.5, values.max() * 1.5
        fig.update_yaxes(**powers(low, high), range=[np.log10(low), np.log10(high)])
    fig.update_layout(height=360, meta={"min_width": 420})
    left = int(integrals.isnull().all("seed").sum())
    small = f"{left} numbers of classes are left out: not memorised by the end" if left else ""
    known = exponent is not None and exponent == exponent
    said = f"Without attention memorising takes longer as K^{exponent:.2f}" if known else (
        "Without attention too few numbers of classes were memorised for a law"
    )  # fmt: skip
    return titled(fig, said if title is None else title, subtitle=small)


def _classes(classes: Any) -> dict[str, Any]:
    """A logarithmic axis with a tick at every number of classes."""
    there = sorted({int(k) for k in classes})
    return {"type": "log", "tickvals": there, "ticktext": [f"{k:,}" for k in there]}


def diversity_curves(data: xr.DataArray, *, title: str | None = None) -> go.Figure:
    """Draw accuracy on new classes over steps: one panel a number of classes, one line a seed.

    Args:
        data: Values by number of classes, seed, measure and step, of networks with attention.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure.

    Raises:
        ValueError: The data has other dimensions.

    Example:
        >>> diversity_curves(result.data["value"].sel(attention="with"))  # doctest: +SKIP

    References:
        Nguyen and Reddy 2024, arXiv 2412.00104.
    """
    if set(data.dims) != {"n_classes", "seed", "measure", "step"}:
        raise ValueError(f"values need n_classes, seed, measure and step, got {data.dims}")
    sizes = data["n_classes"].values
    columns = min(3, len(sizes))
    rows = -(-len(sizes) // columns)
    heads = [f"<b>{k:,} classes</b>" for k in sizes]
    fig = make_subplots(
        rows, columns, shared_xaxes=True, shared_yaxes=True, subplot_titles=heads, figure=figure(),
        horizontal_spacing=0.04, vertical_spacing=0.24 / rows,
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    for i, k in enumerate(sizes):
        for j, seed in enumerate(data["seed"].values):
            for name, role in _ROLES.items():
                fig.add_scatter(
                    x=data["step"].values, y=data.sel(n_classes=k, seed=seed, measure=name).values,
                    mode="lines", name=role.name, legendgroup=role.name, showlegend=i == j == 0,
                    line={"color": role.faint(0.7), "width": 1.4, "dash": role.dash},
                    hovertemplate=f"{role.name}, seed {seed}<br>step %{{x:,}}: %{{y:.2f}}<extra></extra>",
                    row=i // columns + 1, col=i % columns + 1,
                )  # fmt: skip
    fig.update_yaxes(range=[0.3, 1.03])
    fig.update_yaxes(title_text="accuracy", col=1)
    fig.update_xaxes(title_text="step", row=rows)
    fig.update_layout(height=170 * rows + 120, margin_t=46, meta={"min_width": 200 * columns})
    end = data.sel(measure="new_classes").isel(step=-1).mean("seed").sortby("n_classes")
    few, many = (f"{float(end[i]):.2f} with {int(end['n_classes'][i]):,}" for i in (0, -1))
    said = f"In the end new classes are answered right in {few} classes in training, and in {many}"
    return titled(fig, said if title is None else title)
