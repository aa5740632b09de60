"""At which layer does one vector replace the demonstrations?

The curve to look at is *hypothesis*: the task vector patched in at each layer. It means something
only between its floors and its ceiling, so they are always drawn: the ceiling is regular in-context
accuracy, the floors are the bare query, a random vector of the same norm, the most frequent answer,
and the last layer, where a patch overwrites everything the model knows about the query.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from tvlens._errors import unknown
from tvlens.intervals import accuracy
from tvlens.plots._notes import chosen_layer, notes
from tvlens.plots.palette import MUTED, PAPER
from tvlens.plots.theme import ROLES, Role, figure, label, percent, titled

_LINES = ("regular", "baseline", "majority")
_HOVER = "<b>%{meta}</b><br>%{customdata[0]}<br>accuracy %{y:.2f} [%{customdata[1]}]<extra></extra>"


@dataclass(frozen=True)
class _Panel:
    """What one panel shows: the data with its notes, and where it stands."""

    name: str
    data: xr.Dataset
    note: Mapping[str, Any]
    split: str
    level: float
    x: np.ndarray
    best: int | None
    place: Mapping[str, Any]

    def share(self, variable: str) -> xr.Dataset:
        return accuracy(self.data, variable, split=self.split, level=self.level)

    @property
    def index(self) -> int:
        """Where the chosen layer stands along ``x``."""
        return int(np.flatnonzero(self.data["layer"].values == self.best)[0])

    @property
    def gutter(self) -> float:
        """Width of one step to the right of the last layer, where the lines' intervals stand."""
        return 0.035 * float(self.x[-1] - self.x[0] or 1)


def accuracy_by_layer(
    data: xr.Dataset | Iterable[xr.Dataset] | Mapping[str, xr.Dataset],
    *,
    split: str = "test",
    x: str = "layer",
    level: float = 0.95,
    columns: int = 3,
    title: str | None = None,
) -> go.Figure:
    """Draw hypothesis accuracy by layer between its floors and regular accuracy.

    Args:
        data: A layer sweep's data: ``hypothesis(prompt, layer)``, ``regular(prompt)`` and, where
            there are, ``baseline``, ``majority`` and ``control``. Several, in a list or by name,
            make one small panel each.
        split: Which prompts: ``"test"``, ``"dev"`` or ``"all"``.
        x: ``"layer"``, or ``"depth"`` (0 first layer, 1 last) to compare models of different depth.
        level: Confidence level of the Wilson bands.
        columns: Panels in a row.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure.

    Raises:
        ValueError: There is no data, or an unknown split, ``x`` or variable was asked for.

    Example:
        >>> accuracy_by_layer(sweep.data, x="depth")  # doctest: +SKIP

    References:
        Hendel et al. 2023, arXiv 2310.15916.
    """
    if x not in ("layer", "depth"):
        raise unknown("x axis", x, ["layer", "depth"])
    named = _named(data)
    if not named:
        raise ValueError("there is no data to draw: give one dataset or more")
    columns = min(columns, len(named))
    panels = [
        _panel(name, one, split=split, x=x, level=level, place=_place(i, columns))
        for i, (name, one) in enumerate(named.items())
    ]
    fig = _canvas(panels, columns=columns, x=x)
    for i, panel in enumerate(panels):
        _draw(fig, panel, legend=i == 0)
    if len(panels) == 1:
        _name_best(fig, panels[0])
    sentence, small = _words(panels)
    return titled(fig, title or sentence, subtitle=small)


def _named(data: Any) -> dict[str, xr.Dataset]:
    """Give every dataset a name that tells it from the others."""
    if isinstance(data, xr.Dataset):
        data = [data]
    if isinstance(data, Mapping):
        return {str(name): one for name, one in data.items()}
    data = list(data)
    all_notes = [notes(one) for one in data]
    keys = ["task"] + (["model"] if len({note.get("model") for note in all_notes}) > 1 else [])
    named: dict[str, xr.Dataset] = {}
    for i, (note, one) in enumerate(zip(all_notes, data, strict=True)):
        name = " · ".join(str(note[key]) for key in keys if key in note) or f"task {i + 1}"
        named[name if name not in named else f"{name} ({i + 1})"] = one
    return named


def _place(i: int, columns: int) -> dict[str, Any]:
    return {"row": i // columns + 1, "col": i % columns + 1}


def _panel(name: str, data: xr.Dataset, *, x: str, split: str, **rest: Any) -> _Panel:
    for needed in ("hypothesis", "regular"):
        if needed not in data:
            raise ValueError(
                f"{name!r} has no variable {needed!r}; it has: {', '.join(map(str, data))}"
            )
    positions = data[x].values.astype(float)
    return _Panel(name, data, notes(data), split, x=positions, best=chosen_layer(data), **rest)


def _canvas(panels: list[_Panel], *, columns: int, x: str) -> go.Figure:
    """Lay out the panels: axes, gaps, height, and a legend below everything."""
    rows = math.ceil(len(panels) / columns)
    single = len(panels) == 1
    plot_height = 340 if single else 172 * rows + 62 * (rows - 1)
    gap: dict[str, Any] = {} if rows == 1 else {"vertical_spacing": 62 / plot_height}
    fig = make_subplots(
        rows,
        columns,
        shared_yaxes=True,
        horizontal_spacing=0.035,
        subplot_titles=None if single else [_heading(panel) for panel in panels],
        figure=figure(),
        **gap,
    )
    fig.update_annotations(font_size=13, xanchor="left", align="left")
    layout: Any = fig.layout
    for note, panel in zip(layout.annotations, panels, strict=False):
        cell: Any = fig.get_subplot(**panel.place)
        note.update(x=cell.xaxis.domain[0])
    for panel in panels:
        span = panel.gutter
        low, high = panel.x[0] - 0.6 * span, panel.x[-1] + span * (len(_LINES) + 0.6)
        last = int(panel.data["layer"].values[-1])
        ticks = (
            {"tickvals": _ticks(last)} if x == "layer" else {"tickvals": [0, 0.25, 0.5, 0.75, 1]}
        )
        fig.update_xaxes(range=[low, high], showgrid=False, **ticks, **panel.place)
        if panel.place["row"] == rows or single:
            fig.update_xaxes(title_text=x, **panel.place)
    fig.update_yaxes(range=[-0.02, 1.04], tickvals=[0, 0.25, 0.5, 0.75, 1])
    fig.update_yaxes(title_text="accuracy", col=1)
    fig.update_layout(
        height=plot_height + 150,
        margin_t=34 if single else 54,
        legend={"y": -58 / plot_height},
        hovermode="closest",
        meta={"min_width": 0 if single else 310 * columns},
    )
    return fig


def _ticks(last: int) -> list[int]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if last / step <= 8)
    return list(range(0, last + 1, step))


def _heading(panel: _Panel) -> str:
    scored = _at(panel, "hypothesis", panel.best)
    where = "" if panel.best is None else f"  {percent(scored)} at {panel.best}"
    name = panel.name if len(panel.name) <= 24 else panel.name[:23] + "…"
    return f'<b>{label(name)}</b><span style="color:{MUTED}">{where}</span>'


def _at(panel: _Panel, variable: str, layer: int | None = None) -> float:
    share = panel.share(variable)["accuracy"]
    if "layer" in share.dims:
        share = share.sel(layer=layer) if layer is not None else share.max("layer")
    return float(share)


def _draw(fig: go.Figure, panel: _Panel, *, legend: bool) -> None:
    for step, name in enumerate(_LINES, start=1):
        if name in panel.data:
            _level(fig, panel, name, step=step, legend=legend)
    if "control" in panel.data:
        _curve(fig, panel, "control", width=1.2, marker=0, legend=legend)
    _band(fig, panel)
    _curve(fig, panel, "hypothesis", width=2.4, marker=5, legend=legend)
    _marks(fig, panel, legend=legend)


def _trace(
    panel: _Panel, role: Role, share: xr.Dataset, where: list[str], x: Any
) -> dict[str, Any]:
    """Give what every drawn run has in common: position, hover, name."""
    ends = zip(np.atleast_1d(share["low"]), np.atleast_1d(share["high"]), strict=True)
    interval = [f"{percent(low)}, {percent(high)}" for low, high in ends]
    return {
        "x": x,
        "y": np.atleast_1d(share["accuracy"]),
        "customdata": list(zip(where, interval, strict=True)),
        "name": role.name,
        "legendgroup": role.name,
        "meta": role.name,
        "hovertemplate": _HOVER,
    }


def _layers(panel: _Panel) -> list[str]:
    places = zip(panel.data["layer"].values, panel.x, strict=True)
    return [f"layer {k}" + (f", depth {d:.2f}" if d != k else "") for k, d in places]


def _curve(
    fig: go.Figure, panel: _Panel, name: str, *, width: float, marker: int, legend: bool
) -> None:
    role = ROLES[name]
    line = {"color": role.color, "width": width, "dash": role.dash}
    mode = {"mode": "lines+markers", "marker": {"size": marker}} if marker else {"mode": "lines"}
    trace = _trace(panel, role, panel.share(name), _layers(panel), panel.x)
    fig.add_scatter(**trace, **mode, line=line, showlegend=legend, **panel.place)


def _band(fig: go.Figure, panel: _Panel) -> None:
    share = panel.share("hypothesis")
    there = np.isfinite(share["accuracy"].values)
    x, low, high = panel.x[there], share["low"].values[there], share["high"].values[there]
    fig.add_scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([high, low[::-1]]),
        fill="toself",
        fillcolor=ROLES["hypothesis"].faint(0.16),
        line_width=0,
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=ROLES["hypothesis"].name,
        **panel.place,
    )


def _level(fig: go.Figure, panel: _Panel, name: str, *, step: int, legend: bool) -> None:
    """Draw a run that has no layer: a line, and its interval in the gutter at the right."""
    role, share = ROLES[name], panel.share(name)
    end = panel.x[-1] + step * panel.gutter
    n = int(share["n"])
    point = _trace(panel, role, share, [f"{n} prompts"], [end])
    height = float(share["accuracy"])
    above, below = float(share["high"]) - height, height - float(share["low"])
    # The line carries no interval; hovering over it would repeat the marker's text without one.
    line = {"color": role.color, "width": 1.5, "dash": role.dash}
    shared = {"legendgroup": role.name, "showlegend": False} | dict(panel.place)
    fig.add_scatter(
        x=[panel.x[0], end], y=[height] * 2, mode="lines", line=line, hoverinfo="skip", **shared
    )
    bars = {"type": "data", "array": [above], "arrayminus": [below], "width": 3, "thickness": 1.4}
    point |= {"marker": {"symbol": role.symbol, "size": 7, "color": role.color}, "line": line}
    fig.add_scatter(**point, mode="markers", error_y=bars, showlegend=False, **panel.place)
    key = {"x": [None], "y": [None], "name": role.name, "marker": point["marker"], "line": line}
    fig.add_scatter(
        **key, mode="lines+markers", **(shared | {"showlegend": legend}), hoverinfo="skip"
    )


def _marks(fig: go.Figure, panel: _Panel, *, legend: bool) -> None:
    """Mark the layer chosen on dev, and the last layer as the query-blind floor."""
    share, where = panel.share("hypothesis"), _layers(panel)
    blind, role = share.isel(layer=[-1]), ROLES["query_blind"]
    marker = {"symbol": role.symbol, "size": 11, "color": role.color, "line_width": 2}
    trace = _trace(panel, role, blind, where[-1:], panel.x[-1:])
    marks = {"mode": "markers", "showlegend": legend, "cliponaxis": False} | dict(panel.place)
    fig.add_scatter(**trace, marker=marker, **marks)
    if panel.best is None:
        return
    index = panel.index
    chosen = Role("layer chosen on dev", ROLES["hypothesis"].color, "dot", "star")
    marker = {"symbol": "star", "size": 13, "color": chosen.color}
    marker["line"] = {"color": PAPER, "width": 1}
    trace = _trace(
        panel, chosen, share.isel(layer=[index]), where[index : index + 1], panel.x[[index]]
    )
    line = {"color": chosen.color, "width": 1, "dash": "dot"}
    fig.add_vline(x=panel.x[index], line=line, opacity=0.6, layer="below", **panel.place)
    fig.add_scatter(**trace, marker=marker, **marks)


def _name_best(fig: go.Figure, panel: _Panel) -> None:
    """Write the chosen layer above the only panel; small panels say it in their headings."""
    if panel.best is None:
        return
    at = float(panel.x[panel.index])
    fig.add_annotation(
        x=at, y=1, yref="y domain", yanchor="bottom", showarrow=False,
        text=f"layer {panel.best}", font={"size": 12, "color": ROLES["hypothesis"].color},
    )  # fmt: skip


def _words(panels: list[_Panel]) -> tuple[str, str]:
    """Say what came out, and under which conditions."""
    first = panels[0]
    means = {
        name: float(np.nanmean([_at(panel, name, panel.best) for panel in panels]))
        for name in ("hypothesis", "regular", "baseline")
        if all(name in panel.data for panel in panels)
    }
    bare = f", the bare query {percent(means['baseline'])}" if "baseline" in means else ""
    scores = f"{percent(means['hypothesis'])}, demonstrations {percent(means['regular'])}{bare}"
    if len(panels) == 1:
        where = "at its best layer" if first.best is None else f"at layer {first.best}"
        sentence = f"{first.name}: the task vector {where} scores {scores}"
    else:
        sentence = f"Mean of {len(panels)} tasks: the task vector scores {scores}"
    models = {str(panel.note["model"]) for panel in panels if "model" in panel.note}
    n = int(first.share("regular")["n"])
    which = "" if first.split == "all" else f"{first.split} "
    shots = [f"{first.note['shots']} shots"] if "shots" in first.note else []
    interval = f"{first.level:.0%} Wilson intervals"
    return sentence, " · ".join([*sorted(models), *shots, f"{n} {which}prompts", interval])
