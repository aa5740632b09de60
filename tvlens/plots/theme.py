"""One look for all figures, and labels that cannot lie about a token.

Colours come from `tvlens.plots.palette`; those of the three accuracies go from light to dark in
greyscale, and every role has its own dash and marker as well. The Plotly template ``"tvlens"`` is
registered but never made the default: other figures in a notebook stay as they are.
"""

import html
import re
import textwrap
import unicodedata
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from tvlens.plots.palette import (
    BLUE,
    GREEN,
    GRID,
    INK,
    LINE,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    SEQUENTIAL,
    VERMILION,
    faint,
)

MARGIN_TOP = 34
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
_HEAD = 2  # lines of a title that are set large, where it has more
_MORE = 3  # lines of the rest
# Where a title may go on in small letters: after a sentence or a clause, outside brackets.
_CLAUSE = re.compile(r"(?<=[.;]) (?![^(]*\))(?![^\[]*\])")
# What a figure without selections has no use for, and what would send it elsewhere.
_BUTTONS = ("select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d", "sendChartToCloud")


@dataclass(frozen=True)
class Role:
    """How one kind of run looks everywhere: its name, colour, dash and marker."""

    name: str
    color: str
    dash: str
    symbol: str

    def faint(self, alpha: float) -> str:
        """Give the colour as ``rgba(...)`` with this opacity."""
        return faint(self.color, alpha)


ROLES = {
    "regular": Role("regular (demonstrations)", INK, "dash", "square"),
    "hypothesis": Role("hypothesis (task vector)", BLUE, "solid", "circle"),
    "baseline": Role("baseline (query only)", ORANGE, "dashdot", "triangle-up"),
    "control": Role("control (random vector)", PURPLE, "dot", "x-thin-open"),
    "majority": Role("majority answer", GREEN, "longdash", "diamond-tall"),
    "query_blind": Role("query-blind (last layer)", VERMILION, "dot", "diamond-open"),
}

# Plotly reads a little HTML in every label, and MathJax reads what stands between dollar signs.
_ENTITIES = {"$": "&#36;", "`": "&#96;"}
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\xa0": "⍽", "\x7f": "␡"}
_JOINERS = "\u200d\ufe0e\ufe0f"


def label(text: object) -> str:
    """Escape text for a Plotly title, legend, tick or hover, which all read HTML.

    Args:
        text: Anything; its ``str`` is shown as it is.

    Returns:
        The escaped text.

    Example:
        >>> label("<b> & $x$")
        '&lt;b&gt; &amp; &#36;x&#36;'
    """
    safe = html.escape(str(text), quote=False)
    safe = "".join(_ENTITIES.get(char, char) for char in safe)
    return safe.encode("utf-8", "backslashreplace").decode()


def token_label(token: str, *, limit: int | None = None) -> str:
    r"""Write a token so that every character of it is seen, escaped for Plotly.

    Args:
        token: The token's text.
        limit: Longer tokens are cut to this many characters, the last one being ``…``.

    Returns:
        The label: ``␣`` for a space, ``↵`` for a newline, ``⇥`` for a tab, ``\u200b`` for what has
        no shape, ``∅`` for the empty token.

    Example:
        >>> token_label(" <b>")
        '␣&lt;b&gt;'
    """
    return label(visible(token, limit=limit))


def visible(token: str, *, limit: int | None = None) -> str:
    r"""Write a token so that every character of it is seen, as plain text.

    Args:
        token: The token's text.
        limit: As in `token_label`.

    Returns:
        The text, not escaped.

    Example:
        >>> visible(" a\n")
        '␣a↵'
    """
    shown = [_visible(char) for char in token] or ["∅"]
    if limit is not None and len(shown) > limit:
        shown = [*shown[: limit - 1], "…"]
    return "".join(shown)


def _visible(char: str) -> str:
    if char in _VISIBLE:
        return _VISIBLE[char]
    if ord(char) < 32:
        return chr(0x2400 + ord(char))  # the block of control pictures
    formless = unicodedata.category(char) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs")
    if formless and char not in _JOINERS:
        return f"\\u{ord(char):04x}"
    return char


def percent(value: float) -> str:
    """Write a share of 0..1 with two decimals, or a dash where it does not exist.

    Args:
        value: The share.

    Returns:
        Two decimals, e.g. ``"0.46"``.

    Example:
        >>> percent(0.456), percent(float("nan"))
        ('0.46', '–')
    """
    return "–" if value != value else f"{value:.2f}"


def titled(figure: go.Figure, title: str, *, subtitle: str = "", width: int = 80) -> go.Figure:
    """Put a left-aligned title above the figure, wrapped, since Plotly cuts long lines.

    A long title goes on in small letters after its first sentence or clause. The plain texts stay in
    ``layout.meta``, so that a page can set them as its own headings, which wrap by themselves.

    Args:
        figure: The figure; it is changed and returned.
        title: Plain text; it is escaped here.
        subtitle: Plain text in a smaller, lighter line.
        width: Characters in a line.

    Returns:
        The same figure.

    Example:
        >>> titled(go.Figure(), "A finding").layout.title.text
        '<b>A finding</b>'
    """
    head, rest = _split(title, width * _HEAD)
    narrow = int(width * 1.3)
    large = [f"<b>{label(line)}</b>" for line in textwrap.wrap(head, width)]
    lines = textwrap.wrap(rest, narrow, max_lines=_MORE, placeholder=" …")
    small = [
        f'<span style="font-size:13px;color:{color}">{label(line)}</span>'
        for color, found in ((INK, lines), (MUTED, textwrap.wrap(subtitle, narrow)))
        for line in found
    ]
    layout: Any = figure.layout
    space = 21 * len(large) + 19 * len(small)
    figure.update_layout(
        title={"text": "<br>".join(large + small), "yref": "container", "y": 1, "yanchor": "top"},
        title_pad_t=16,
        margin_t=space + (layout.margin.t or MARGIN_TOP),
        meta={**(layout.meta or {}), "title": title, "subtitle": subtitle, "space": space},
    )
    if layout.height:
        figure.update_layout(height=layout.height + space)
    return figure


def _split(title: str, most: int) -> tuple[str, str]:
    """Give as many whole clauses of a title as ``most`` characters hold, at least one, and the rest."""
    clauses = _CLAUSE.split(title)
    head = clauses.pop(0)
    while clauses and len(head) + len(clauses[0]) < most:
        head += f" {clauses.pop(0)}"
    return head, " ".join(clauses)


def figure(**layout: Any) -> go.Figure:
    """Make an empty figure in the tvlens template.

    Args:
        **layout: Further layout settings.

    Returns:
        The figure.

    Example:
        >>> figure(height=300).layout.height
        300
    """
    return go.Figure(layout=go.Layout(template="tvlens", **layout))


def _template() -> go.layout.Template:
    axis = {
        "gridcolor": GRID,
        "linecolor": LINE,
        "zeroline": False,
        "zerolinecolor": LINE,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": LINE,
        "automargin": True,
        "title": {"standoff": 10, "font": {"size": 13, "color": MUTED}},
    }
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.18, "yanchor": "top"}
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": INK},
            "title": {"x": 0, "xanchor": "left", "xref": "container", "font": {"size": 16}},
            "title_pad": {"l": 16, "r": 16},
            "colorway": [role.color for role in ROLES.values()],
            "colorscale": {"sequential": SEQUENTIAL},
            "paper_bgcolor": PAPER,
            "plot_bgcolor": PAPER,
            "margin": {"l": 60, "r": 24, "t": MARGIN_TOP, "b": 56},
            "hoverlabel": {"font": {"family": MONO, "size": 12}, "align": "left"},
            "legend": legend | {"font": {"size": 12}, "itemsizing": "trace"},
            "modebar": {
                "remove": list(_BUTTONS), "bgcolor": faint(PAPER, 0.0), "color": LINE, "activecolor": MUTED,
            },
            "xaxis": axis,
            "yaxis": axis,
        }
    )  # fmt: skip


pio.templates["tvlens"] = _template()
