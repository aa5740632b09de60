"""One look for all figures, and labels that cannot lie about a token.

Colours are Okabe and Ito's, which colour-blind people can tell apart, ordered so that the three
accuracies go from light to dark in greyscale; every role has its own dash and marker as well. The
Plotly template ``"tvlens"`` is registered but never made the default: other figures in a notebook
stay as they are.
"""

import html
import textwrap
import unicodedata
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

INK = "#1f2933"
MUTED = "#5f6b7a"
GRID = "#e6e9ee"
MARGIN_TOP = 34
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
# Light for most of the range, so that dark text in a cell stays legible.
SEQUENTIAL = [
    [0.0, "#ffffff"],
    [0.2, "#dcebf7"],
    [0.45, "#b3d3ec"],
    [0.65, "#86b9df"],
    [0.85, "#0072b2"],
    [1.0, "#00395a"],
]
# White in the middle: nothing. Blue and vermilion are told apart by colour-blind people.
DIVERGING = [
    [0.0, "#7a3300"],
    [0.14, "#d55e00"],
    [0.32, "#f3b48a"],
    [0.5, "#ffffff"],
    [0.68, "#9cc7e6"],
    [0.86, "#0072b2"],
    [1.0, "#00395a"],
]


@dataclass(frozen=True)
class Role:
    """How one kind of run looks everywhere: its name, colour, dash and marker."""

    name: str
    color: str
    dash: str
    symbol: str

    def faint(self, alpha: float) -> str:
        """Give the colour as ``rgba(...)`` with this opacity."""
        red, green, blue = (int(self.color[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red}, {green}, {blue}, {alpha})"


ROLES = {
    "regular": Role("regular (demonstrations)", "#1f2933", "dash", "square"),
    "hypothesis": Role("hypothesis (task vector)", "#0072B2", "solid", "circle"),
    "baseline": Role("baseline (query only)", "#E69F00", "dashdot", "triangle-up"),
    "control": Role("control (random vector)", "#9A4C7D", "dot", "x-thin-open"),
    "majority": Role("majority answer", "#007A5A", "longdash", "diamond-tall"),
    "query_blind": Role("query-blind (last layer)", "#D55E00", "dot", "diamond-open"),
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


def titled(figure: go.Figure, title: str, *, subtitle: str = "", width: int = 62) -> go.Figure:
    """Put a left-aligned title above the figure, wrapped, since Plotly cuts long lines.

    The plain texts stay in ``layout.meta``, so that a page can set them as its own headings, which
    wrap by themselves.

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
    lines = [f"<b>{label(line)}</b>" for line in textwrap.wrap(title, width)]
    small = [
        f'<span style="font-size:13px;color:{MUTED}">{label(line)}</span>'
        for line in textwrap.wrap(subtitle, int(width * 1.25))
    ]
    layout: Any = figure.layout
    space = 22 * len(lines) + 19 * len(small)
    figure.update_layout(
        title={"text": "<br>".join(lines + small), "yref": "container", "y": 1, "yanchor": "top"},
        title_pad_t=16,
        margin_t=space + (layout.margin.t or MARGIN_TOP),
        meta={**(layout.meta or {}), "title": title, "subtitle": subtitle, "space": space},
    )
    if layout.height:
        figure.update_layout(height=layout.height + space)
    return figure


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
        "linecolor": "#c5ccd6",
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 4,
        "tickcolor": "#c5ccd6",
        "automargin": True,
        "title": {"standoff": 10, "font": {"size": 13, "color": MUTED}},
    }
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.18, "yanchor": "top"}
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 13, "color": INK},
            "title": {"x": 0, "xanchor": "left", "xref": "container", "font": {"size": 17}},
            "title_pad": {"l": 16, "r": 16},
            "colorway": [role.color for role in ROLES.values()],
            "colorscale": {"sequential": SEQUENTIAL},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "margin": {"l": 60, "r": 24, "t": MARGIN_TOP, "b": 56},
            "hoverlabel": {"font": {"family": MONO, "size": 12}, "align": "left"},
            "legend": legend | {"font": {"size": 12}, "itemsizing": "trace"},
            "xaxis": axis,
            "yaxis": axis,
        }
    )


pio.templates["tvlens"] = _template()
