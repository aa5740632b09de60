"""Axes and colour bars: ticks of logarithmic axes, a place for step 0, titles that fit beside a bar."""

import math
import textwrap
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import ArrayLike

from tvlens.plots.theme import label

_LETTER = 6.6  # pixels of a letter of a colour bar's title
_STEP = 26  # pixels between its ticks


def color_bar(title: str, *, height: SupportsFloat, **more: Any) -> dict[str, Any]:
    """Make a colour bar with its title beside it, in as many lines as its height takes.

    Args:
        title: What the colours stand for, as plain text.
        height: How tall the plot is, in pixels.
        **more: What else Plotly is told.

    Returns:
        The bar, for ``colorbar`` of a trace or of a colour axis.

    Example:
        >>> color_bar("share of prompts", height=60)["title"]["text"]
        'share of<br>prompts'
    """
    lines = textwrap.wrap(title, max(int(float(height) / _LETTER), 8))
    said = "<br>".join(map(label, lines))
    bar = {
        "title": {"text": said, "side": "right", "font": {"size": 12}},
        "thickness": 10,
        "outlinewidth": 0,
        "len": 1,
        "ypad": 0,
        "tickfont": {"size": 11},
        "nticks": int(np.clip(float(height) / _STEP, 2, 6)),
    }
    return bar | more


def powers(low: SupportsFloat, high: SupportsFloat, *, most: int = 8) -> dict[str, Any]:
    """Give a logarithmic axis ticks in letters of one size: at powers of 10, and between where those are few.

    Args:
        low: The axis' lower end.
        high: Its upper end.
        most: How many ticks there is room for.

    Returns:
        What ``update_xaxes`` takes.

    Example:
        >>> powers(1, 2e5)["ticktext"]
        ['1', '10', '100', '1,000', '10,000', '10<sup>5</sup>']
        >>> powers(300, 4000)["ticktext"]
        ['500', '1,000', '2,000']
    """
    low, high = float(low), float(high)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = _between(low, high, [10.0**k for k in range(first, last + 1)])
    if len(ticks) < 3:
        finer = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
        ticks = _between(low, high, finer) or sorted({low, high})
    ticks = ticks[:: 1 + (len(ticks) - 1) // most]
    return {"type": "log", "tickvals": ticks, "ticktext": [_written(tick) for tick in ticks]}


def _between(low: float, high: float, ticks: list[float]) -> list[float]:
    return [tick for tick in ticks if 0.999 * low <= tick <= 1.001 * high]


def _written(tick: float) -> str:
    power = round(math.log10(tick))
    if math.isclose(tick, 10.0**power) and not -2 <= power <= 4:
        return f"10<sup>{power}</sup>".replace("-", "−")
    return f"{tick:,.3g}" if tick < 1000 else f"{tick:,.0f}"


def doublings(sizes: ArrayLike, *, every: int = 1) -> dict[str, Any]:
    """Give a logarithmic axis a tick at each size of a dataset, as a power of two where it is one.

    Args:
        sizes: The sizes.
        every: A tick at every so many of them.

    Returns:
        What ``update_xaxes`` takes.

    Example:
        >>> doublings([64, 256, 1000])["ticktext"]
        ['2<sup>6</sup>', '2<sup>8</sup>', '1,000']
    """
    shown = np.unique(np.asarray(sizes, float))[::every]
    exponents = np.log2(shown)
    texts = [
        f"2<sup>{power:.0f}</sup>" if power == round(power) else f"{size:,.0f}"
        for size, power in zip(shown.tolist(), exponents.tolist(), strict=True)
    ]
    return {"type": "log", "tickvals": shown.tolist(), "ticktext": texts, "tickangle": 0}


def steps_on_log(steps: ArrayLike) -> tuple[np.ndarray, dict[str, Any]]:
    """Place training steps on a logarithmic axis; 0, which has no place there, stands at its left end.

    Args:
        steps: Steps, 0 among them or not.

    Returns:
        Where each step stands; what ``update_xaxes`` takes.

    Example:
        >>> at, axis = steps_on_log([0, 10, 100, 1000])
        >>> at.tolist(), axis["ticktext"]
        ([5.0, 10.0, 100.0, 1000.0], ['0', '10', '100', '1,000'])
    """
    given = np.asarray(steps, float)
    least, most = float(given[given > 0].min(initial=np.inf)), float(given.max())
    if not math.isfinite(least):  # nothing but step 0
        return np.ones_like(given), {"tickvals": [1.0], "ticktext": ["0"]}
    at = np.where(given > 0, given, least / 2)
    axis = powers(least, most)
    if (given == 0).any():
        axis["tickvals"], axis["ticktext"] = (
            [least / 2, *axis["tickvals"]],
            ["0", *axis["ticktext"]],
        )
    low, high = math.log10(float(at.min())), math.log10(most)
    room = 0.03 * (high - low) or 0.1
    return at, axis | {"range": [low - room, high + room]}
