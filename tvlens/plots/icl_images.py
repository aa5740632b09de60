"""Pictures in context: errors over the size of the dataset, and a sheet of the pictures."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from einops import rearrange
from plotly.subplots import make_subplots

from tvlens._errors import unknown
from tvlens.plots._axes import powers
from tvlens.plots.palette import BLUE, GREEN, INK, LINE, PAPER, VERMILION
from tvlens.plots.theme import Role, figure, label, titled

_GROUPS = {
    "high": Role("common classes", BLUE, "solid", "circle"),
    "low": Role("rare classes", VERMILION, "solid", "diamond"),
    "novel": Role("novel classes", GREEN, "solid", "square"),
}
_TRAINED = {"transformer": "solid", "in-weight": "dot", "in-context": "dash"}
_PANELS = {
    "relevant context, moved labels:<br>right only from the context": (
        "relevant low flipped",
        "relevant high flipped",
    ),
    "irrelevant context, true labels:<br>right only from the weights": (
        "irrelevant low base",
        "irrelevant high base",
    ),
    "novel classes:<br>right only from the context": ("relevant novel base",),
}
_WORDS = {
    "error": "error",
    "loss": "loss (nats)",
    "alpha": "alpha: share of the weights",
    "copying": "copying (nats)",
}


def image_errors(
    curves: pd.DataFrame,
    *,
    authors: pd.DataFrame | None = None,
    measure: str = "error",
    title: str | None = None,
) -> go.Figure:
    """Draw a measure over how often a dataset asks for a rare class, one panel for each question.

    Args:
        curves: ``trained, probe, n_sequences, seen, mean, sem``.
        authors: The authors' errors, the same columns without ``sem``; drawn as open markers.
        measure: What the means are of.
        title: The sentence that says what came out.

    Returns:
        The figure; bands are standard errors over seeds.

    Raises:
        ValueError: A column is missing, or there is no such measure.

    Example:
        >>> image_errors(result.curves(), authors=result.authors())  # doctest: +SKIP

    References:
        Chan et al. 2025, arXiv 2410.23042, section 5.
    """
    if missing := {"trained", "probe", "n_sequences", "seen", "mean", "sem"} - set(curves.columns):
        raise ValueError(
            f"the curves lack {', '.join(sorted(missing))}; they have: {', '.join(curves.columns)}"
        )
    if measure not in _WORDS:
        raise unknown("measure", measure, _WORDS)
    there = set(curves["probe"])
    panels = {
        head: [p for p in probes if p in there]
        for head, probes in _PANELS.items()
        if there & set(probes)
    }
    fig = make_subplots(
        1,
        len(panels),
        shared_yaxes=True,
        subplot_titles=list(panels),
        figure=figure(),
        horizontal_spacing=0.03,
    )
    fig.update_annotations(font_size=12)
    shown: set[str] = set()
    for column, probes in enumerate(panels.values(), 1):
        for probe in probes:
            role = _GROUPS[probe.split()[1]]
            # Of the predictors for comparison only rare and novel classes: more lines tell less.
            for trained in _TRAINED:
                one = curves.query("probe == @probe and trained == @trained").sort_values("seen")
                if not len(one) or (trained != "transformer" and role is _GROUPS["high"]):
                    continue
                _line(fig, one, role, trained, column, shown)
                # The authors' in-weight predictors always err here, as ours do.
                if authors is not None and trained != "in-weight":
                    known = authors.query("probe == @probe and trained == @trained")
                    _authors(fig, known, role, trained, column, shown)
    seen = curves["seen"].to_numpy(float)
    fig.update_xaxes(
        **powers(seen.min(), seen.max(), most=5),
        title_text="times the dataset asks for a rare class", title_font_size=12,
    )  # fmt: skip
    fig.update_yaxes(title_text=_WORDS[measure], col=1)
    if measure in ("error", "alpha"):
        fig.update_yaxes(range=[-0.04, 1.06])
    fig.update_layout(
        height=430, margin_t=60, legend={"y": -0.24}, meta={"min_width": 240 * len(panels)}
    )
    small = "Means over seeds, bands ± standard error"
    if authors is not None and len(authors):
        small += " · open, +: the authors on Omniglot (1,603 rare classes, L = 2), read off figures (± .05)"
    return titled(fig, title or "Pictures: from the context or from the weights", subtitle=small)


def image_steps(errors: xr.DataArray, *, title: str | None = None) -> go.Figure:
    """Draw errors over training steps, one panel for each size of the dataset.

    Args:
        errors: By ``n_sequences``, ``step`` and ``probe``.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure.

    Raises:
        ValueError: The dimensions are others.

    Example:
        >>> image_steps(result.data["error"].mean("seed").isel(trained=0))  # doctest: +SKIP
    """
    if set(errors.dims) != {"n_sequences", "step", "probe"}:
        raise ValueError(f"errors need n_sequences, step and probe, got {errors.dims}")
    sizes = [int(n) for n in errors["n_sequences"].values]
    fig = make_subplots(
        1, len(sizes), shared_yaxes=True, figure=figure(), horizontal_spacing=0.03,
        subplot_titles=[f"<b>N = {n:,}</b>" for n in sizes],
    )  # fmt: skip
    fig.update_annotations(font_size=13)
    asked = [p for probes in _PANELS.values() for p in probes if p in errors["probe"].values]
    for column, n in enumerate(sizes, 1):
        for probe in asked:
            role = _GROUPS[probe.split()[1]]
            dash = "dash" if probe.startswith("irrelevant") else "solid"
            name = _named(probe)
            fig.add_scatter(
                x=errors["step"].values, y=errors.sel(n_sequences=n, probe=probe).values,
                mode="lines+markers", name=name, legendgroup=name, showlegend=column == 1,
                line={"color": role.color, "dash": dash, "width": 1.8},
                marker={"symbol": role.symbol, "size": 5},
                hovertemplate=f"{name}<br>step %{{x:,}}: %{{y:.3f}}<extra></extra>", row=1, col=column,
            )  # fmt: skip
    step = errors["step"].values
    fig.update_xaxes(**powers(step.min(), step.max(), most=5), title_text="training step")
    fig.update_yaxes(range=[-0.04, 1.06])
    fig.update_yaxes(title_text="error", col=1)
    fig.update_layout(
        height=360, margin_t=50, legend={"y": -0.26}, meta={"min_width": 240 * len(sizes)}
    )
    return titled(fig, _best(errors, asked[0]) if title is None and asked else title or "")


def _best(errors: xr.DataArray, probe: str) -> str:
    """When copying is best on the largest dataset, and what becomes of it."""
    one = errors.sel(probe=probe).isel(n_sequences=int(np.argmax(errors["n_sequences"].values)))
    best = one.isel(step=int(one.argmin("step")))
    classes, labels = _named(probe).split()[1:]
    return (
        f"At N = {int(one['n_sequences']):,} the error on {classes} classes with {labels} labels is "
        f"{float(best):.2f} at best, at step {int(best['step']):,}, and {float(one[-1]):.2f} in the end"
    )


def picture_sheet(
    pictures: xr.DataArray, *, columns: int = 10, title: str | None = None
) -> go.Figure:
    """Draw examples of classes: what training shows on the left, what is held out beside it.

    Args:
        pictures: By ``class``, ``exemplar``, ``height`` and ``width``; ink is bright.
        columns: Classes in a row.
        title: The sentence that says what is seen.

    Returns:
        The figure; hovering names the class.

    Raises:
        ValueError: The dimensions are others.

    Example:
        >>> picture_sheet(result.data["sheet"])  # doctest: +SKIP
    """
    if set(pictures.dims) != {"class", "exemplar", "height", "width"}:
        raise ValueError(f"pictures need class, exemplar, height and width, got {pictures.dims}")
    pictures = pictures.transpose("class", "exemplar", "height", "width")
    n, exemplars, height, width = pictures.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    padded = pictures.pad({"class": (0, rows * columns - n)}, constant_values=0).values
    mosaic = rearrange(padded, "(row column) e h w -> (row h) (column e w)", column=columns)
    fig = figure()
    fig.add_heatmap(
        z=mosaic.astype("uint8"), zmin=0, zmax=255, colorscale=[[0, PAPER], [1, INK]],
        showscale=False, hoverinfo="skip",
    )  # fmt: skip
    places = [(i // columns, i % columns, e) for i in range(n) for e in range(exemplars)]
    texts = [
        f"{label(c)}<br>{label(e)}"
        for c in pictures["class"].values
        for e in pictures["exemplar"].values
    ]
    fig.add_scatter(
        x=[((c * exemplars) + e + 0.5) * width for _, c, e in places],
        y=[(r + 0.5) * height for r, _, _ in places],
        mode="markers", marker={"size": 24, "opacity": 0}, customdata=texts, showlegend=False,
        hovertemplate="%{customdata}<extra></extra>",
    )  # fmt: skip
    line: Any = {"color": LINE, "width": 1}
    for c in range(1, columns):
        fig.add_vline(x=c * exemplars * width - 0.5, line=line)
    for r in range(1, rows):
        fig.add_hline(y=r * height - 0.5, line=line)
    fig.update_xaxes(
        visible=False, constrain="domain", range=[-0.5, columns * exemplars * width - 0.5]
    )
    fig.update_yaxes(
        visible=False, range=[rows * height - 0.5, -0.5], scaleanchor="x", constrain="domain"
    )
    fig.update_layout(
        height=max(120, round(900 * rows * height / (columns * exemplars * width)) + 30),
        margin_b=16,
    )
    small = "Each cell one class: " + ", ".join(map(str, pictures["exemplar"].values))
    return titled(fig, f"{n} of the classes" if title is None else title, subtitle=small)


def _named(probe: str) -> str:
    """Say a probe in the words of the figure."""
    for short, long in (
        ("low", "rare"),
        ("high", "common"),
        ("flipped", "moved"),
        ("base", "true"),
    ):
        probe = probe.replace(short, long)
    return probe


def _line(
    fig: go.Figure, one: pd.DataFrame, role: Role, trained: str, column: int, shown: set[str]
) -> None:
    main = trained == "transformer"
    name = role.name if main else f"{trained} predictor"
    where: dict[str, Any] = {"row": 1, "col": column}
    x, mean, sem = one["seen"], one["mean"], one["sem"].fillna(0)
    if main:
        fig.add_scatter(
            x=[*x, *x[::-1]], y=[*(mean + sem), *(mean - sem)[::-1]], fill="toself", mode="lines",
            fillcolor=role.faint(0.18), line_width=0, hoverinfo="skip", showlegend=False, legendgroup=name,
            **where,
        )  # fmt: skip
    texts = [
        f"{role.name}, {trained}<br>N = {int(n):,}: {m:.3f} ± {s:.3f}"
        for n, m, s in zip(one["n_sequences"], mean, sem, strict=True)
    ]
    fig.add_scatter(
        x=x, y=mean, mode="lines+markers" if main else "lines", name=name, legendgroup=name,
        showlegend=name not in shown, customdata=texts,
        line={
            "color": role.color if main else role.faint(0.7), "dash": _TRAINED[trained],
            "width": 2 if main else 1.5,
        },
        marker={"symbol": role.symbol, "size": 7}, hovertemplate="%{customdata}<extra></extra>", **where,
    )  # fmt: skip
    shown.add(name)


def _authors(
    fig: go.Figure, known: pd.DataFrame, role: Role, trained: str, column: int, shown: set[str]
) -> None:
    if not len(known):
        return
    main = trained == "transformer"
    name = f"the authors: {role.name if main else f'{trained} predictor'}"
    texts = [
        f"the authors: {role.name}, {trained}<br>N = {n:,}: about {v:.2f}"
        for n, v in zip(known["n_sequences"], known["mean"], strict=True)
    ]
    fig.add_scatter(
        x=known["seen"], y=known["mean"], mode="markers", name=name, legendgroup=name, customdata=texts,
        showlegend=name not in shown, hovertemplate="%{customdata}<extra></extra>", row=1, col=column,
        marker={
            "symbol": f"{role.symbol}-open" if main else "cross-thin", "size": 11 if main else 9,
            "color": role.color, "line": {"width": 1.5, "color": role.color},
        },
    )  # fmt: skip
    shown.add(name)
