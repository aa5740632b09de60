"""Every colour that a figure may use, and its partner on dark paper.

The colours of data are Okabe and Ito's, with purple and green darkened so that thin lines of them
are seen on white: any two of them can be told apart by people who lack red or green cones. None of
them ever carries a meaning alone: a dash, a marker, a place or a word goes with it.
"""

PAPER = "#ffffff"
INK = "#1f2933"
MUTED = "#5f6b7a"
LINE = "#c5ccd6"  # axes, borders
GRID = "#e6e9ee"
EMPTY = "#eceff4"  # cells without a value
GREY = "#8d98a6"  # what is drawn for comparison; error bars

BLUE = "#0072b2"
ORANGE = "#e69f00"
GREEN = "#008a65"
PURPLE = "#8f3f72"
VERMILION = "#d55e00"
SKY = "#56b4e9"
BROWN = "#8a5f00"  # a line on an orange band

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

# Where a page is dark, `report.js` exchanges these; it turns the scales round by itself.
DARK = {
    PAPER: "#1d232a",
    INK: "#eef1f5",
    MUTED: "#a3adba",
    LINE: "#4a5563",
    GRID: "#333d48",
    EMPTY: "#2a323c",
    GREY: "#b0bac6",
    BLUE: "#4a9fe0",
    ORANGE: "#f5c04a",
    GREEN: "#1fae84",
    PURPLE: "#b85c94",
    VERMILION: "#ec7020",
    SKY: "#8ccdf7",
    BROWN: "#ffdd8f",
}


def faint(color: str, alpha: float) -> str:
    """Give a colour with this opacity.

    Args:
        color: Six hexadecimal digits after ``#``.
        alpha: From 0, unseen, to 1.

    Returns:
        ``"rgba(...)"``.

    Example:
        >>> faint(BLUE, 0.5)
        'rgba(0, 114, 178, 0.5)'
    """
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha})"
