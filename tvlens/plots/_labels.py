"""Names beside points: rows that keep them off each other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

_ROW, _NEAR = 13, 9  # pixels from row to row, and from a point to the first


def rows(
    x: Sequence[float],
    y: Sequence[float],
    widths: Sequence[float],
    *,
    tall: float,
) -> list[int]:
    """Give each name the nearest row in which it meets no other.

    Args:
        x: Middles of the names.
        y: Their points' heights.
        widths: How wide the names are, in the units of ``x``.
        tall: How high a row is, in the units of ``y``.

    Returns:
        Rows, 0 nearest to the point.

    Example:
        >>> rows([0.0, 0.1, 2.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], tall=0.1)
        [0, 1, 0]
    """
    found = [0] * len(x)
    done: list[int] = []
    for i in np.argsort(x, kind="stable").tolist():
        taken = {
            found[j] + round((y[j] - y[i]) / tall)
            for j in done
            if abs(x[i] - x[j]) < (widths[i] + widths[j]) / 2
        }
        found[i] = next(row for row in range(len(x)) if row not in taken)
        done.append(i)
    return found


def named(
    fig: go.Figure, x: float, y: float, text: str, *, row: int, above: bool, **font: Any
) -> None:
    """Write a name above or below a point.

    Args:
        fig: The figure; it is changed.
        x: Where the point stands.
        y: Its height.
        text: The name, escaped.
        row: How far from the point, in rows.
        above: Which way.
        **font: Size and colour.
    """
    shift = _NEAR + _ROW * row
    fig.add_annotation(
        x=x, y=y, text=text, showarrow=False, font=font, yshift=shift if above else -shift,
        yanchor="bottom" if above else "top",
    )  # fmt: skip
