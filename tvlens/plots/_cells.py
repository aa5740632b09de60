"""What stands in a cell of a heat map, and what hovering over it tells."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens._words import fixed
from tvlens.plots._notes import metric_of
from tvlens.plots.palette import LINE, PAPER
from tvlens.plots.theme import MONO, label, token_label, visible

# From this share of the scale on, a negative cell is marked: in greyscale both ends look alike.
_MARKED = 0.2


@dataclass(frozen=True)
class CellText:
    """How cells of one figure are written.

    Attributes:
        x: Dimension to the right.
        y: Dimension upwards.
        centre: The value that is drawn white.
        half: How far from it the colours go.
        values: Whether numbers stand in the cells.
        note: Provenance, and the name of the variable.
    """

    x: str
    y: str
    centre: float
    half: float
    values: bool
    note: dict[str, Any] = field(default_factory=dict)


def written_cells(
    z: np.ndarray,
    words: list[list[str]],
    hover: list[list[str]],
    *,
    size: int = 11,
    **trace: Any,
) -> go.Heatmap:
    """Draw a heat map whose cells hold words.

    Args:
        z: Values, y by x; cells without one are left empty.
        words: What is written into each cell.
        hover: What hovering over it tells.
        size: Size of the letters.
        **trace: More settings of the trace.

    Returns:
        The trace; its axes count from 0.

    Example:
        >>> written_cells(np.eye(1), [["a"]], [["b"]], coloraxis="coloraxis").text[0][0]
        'a'
    """
    return go.Heatmap(
        z=z,
        x=np.arange(z.shape[1]),
        y=np.arange(z.shape[0]),
        text=words,
        texttemplate="%{text}",
        textfont={"family": MONO, "size": size},
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        xgap=1,
        ygap=1,
        **trace,
    )


def button_row(
    buttons: list[dict[str, Any]],
    active: int,
    *,
    x: float = 0.0,
    xanchor: str = "left",
    pad: int = 14,
) -> dict[str, Any]:
    """Make a row of buttons above a figure.

    Args:
        buttons: Label, method and arguments of each, as Plotly takes them.
        active: The one that is pressed at first.
        x: Where the row stands, as a share of the width.
        xanchor: Which of its ends stands there.
        pad: Space between the row and the figure, in pixels.

    Returns:
        The menu, for ``layout.updatemenus``.

    Example:
        >>> button_row([{"label": "a", "method": "restyle", "args": [{}]}], 0)["direction"]
        'right'
    """
    return {
        "type": "buttons",
        "direction": "right",
        "buttons": buttons,
        "active": active,
        "x": x,
        "xanchor": xanchor,
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": pad, "t": 0, "l": 0},
        "font": {"size": 12},
        "bgcolor": PAPER,
        "bordercolor": LINE,
        "showactive": True,
    }


def cell_texts(
    data: xr.Dataset, how: CellText
) -> tuple[np.ndarray, list[list[str]], list[list[str]]]:
    """Give the values of one plane, what is written into its cells, and what hovering tells.

    Args:
        data: One plane: ``mean`` over y and x.
        how: How cells are written.

    Returns:
        Values, texts and hover texts, each y by x.
    """
    data = data.transpose(how.y, how.x, ...)
    z = data["mean"].values.astype(float)
    words = [[_word(value, how) for value in row] for row in z]
    common = _untouched(data)
    hover = [
        [_hover(data, how, i, j) + common for j in range(z.shape[1])] for i in range(z.shape[0])
    ]
    return z, words, hover


def _word(value: float, how: CellText) -> str:
    if value != value:
        return ""
    if how.values:
        return number(value, 2 if how.half < 100 else 0)
    return "−" if value < how.centre - _MARKED * how.half else ""


def number(value: float, digits: int = 3) -> str:
    """Write a number with a real minus sign; a dash where there is none.

    Args:
        value: The number.
        digits: Digits after the point.

    Returns:
        The text.

    Example:
        >>> number(-1.5, 2)
        '−1.50'
    """
    if value != value:
        return "–"
    return fixed(value, digits).replace("-", "−")


def _hover(data: xr.Dataset, how: CellText, i: int, j: int) -> str:
    """All that is known of one cell."""
    at = {how.y: i, how.x: j}
    cell = data.isel(at)
    place = [str(cell["site"].values)] if "site" in cell.coords else []
    place += [f"{d} {cell[d].values}" for d in ("layer", "head", "position") if d in cell.coords]
    lines = [f"<b>{label(', '.join(place))}</b>{_tokens(cell)}"]
    metric = metric_of(how.note)
    mean = float(cell["mean"])
    if mean != mean:
        return "<br>".join([*lines, "no prompt has this position"])
    interval = ""
    if "low" in cell and float(cell["low"]) == float(cell["low"]):
        interval = f"  ({number(float(cell['low']))} to {number(float(cell['high']))})"
    variable = str(how.note.get("variable", "mean"))
    if variable != "value":
        named = {"normalized": "normalised", "effect": "change"}.get(variable, variable)
        lines.append(f"{named}: {number(mean)}{interval}")
        interval = ""
    if "value" in cell:
        lines.append(f"{label(metric)}: {number(float(cell['value']))}{interval}")
    if "top_token" in cell and cell.sizes.get("prompt", 1) == 1:
        lines.append("after: " + _likely(cell["top_token"], cell["top_probability"]))
    return "<br>".join(lines)


def _tokens(cell: xr.Dataset) -> str:
    """The token at a cell's position, in both prompts where they differ."""
    if "token" not in cell.coords:
        return ""
    first = str(cell["token"].values).partition(": ")[2]
    if cell.sizes.get("prompt", 1) == 1 and "clean_token" in cell.coords:
        first = str(cell["clean_token"].values.ravel()[0])
        if "corrupted_token" in cell.coords:
            other = str(cell["corrupted_token"].values.ravel()[0])
            if other != first:
                return f"  {token_label(first)} (corrupted {token_label(other)})"
    return f"  {token_label(first)}"


def _untouched(data: xr.Dataset) -> str:
    """The untouched runs: their metric, and their likeliest tokens where there is one prompt."""
    lines = []
    for run in ("clean", "corrupted"):
        if run in data:
            line = f"{run}: {number(float(data[run].mean()))}"
            if f"{run}_top_token" in data and data.sizes.get("prompt", 1) == 1:
                line += "  " + _likely(data[f"{run}_top_token"], data[f"{run}_top_probability"], 3)
            lines.append(line)
    return "".join(f"<br>{line}" for line in lines)


def _likely(tokens: xr.DataArray, shares: xr.DataArray, most: int = 5) -> str:
    pairs = zip(tokens.values.ravel()[:most], shares.values.ravel()[:most], strict=True)
    return ", ".join(f"{label(visible(str(t), limit=14))} {float(p):.2f}" for t, p in pairs)
