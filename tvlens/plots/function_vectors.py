"""What a function vector does: accuracies with and without it, and at which layer it is added.

A bar for the vector means something only next to the bar without it, the mark of as many random heads and
that of random vectors of the same length; the line is what demonstrations would reach.
"""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from tvlens.intervals import accuracy
from tvlens.plots._notes import notes
from tvlens.plots.palette import GREY, PAPER
from tvlens.plots.theme import ROLES, Role, figure, label, percent, titled

_BARS = {
    "vector": Role("with function vector", ROLES["hypothesis"].color, "solid", "circle"),
    "without": Role("without", ROLES["baseline"].color, "dashdot", "triangle-up"),
}
_MARKS = {
    "random_heads": Role("as many random heads", ROLES["query_blind"].color, "dot", "diamond"),
    "random_vector": Role("random vectors of its norm", ROLES["control"].color, "dot", "square"),
}
_VIEWS = {"zero_shot": "bare query", "shuffled": "shuffled labels"}
_STEP = 0.36


def function_vector_bars(rates: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw accuracy with and without a function vector in every view, with its controls.

    Args:
        rates: ``view, run, accuracy, low, high, best`` as ``FunctionVectors.rates()`` gives them; runs are
            ``vector, without, random_heads, random_vector``, and ``regular`` for the line.
        title: The sentence that says what came out.

    Returns:
        The figure: two bars and two marks for each view. Hover for intervals and the best draw.

    Raises:
        ValueError: A column is missing.

    Example:
        >>> rows = [{"view": "zero_shot", "run": r, "accuracy": 0.5, "low": 0.4, "high": 0.6, "best": 0.5}
        ...         for r in ("vector", "without")]
        >>> len(function_vector_bars(pd.DataFrame(rows)).data)
        2

    References:
        Todd et al. 2024, arXiv 2310.15213.
    """
    missing = {"view", "run", "accuracy", "low", "high", "best"} - set(rates.columns)
    if missing:
        raise ValueError(
            f"the table lacks {', '.join(sorted(missing))}; it has: {', '.join(rates.columns)}"
        )
    views = list(dict.fromkeys(rates["view"][rates["run"] != "regular"]))
    fig = figure(barmode="overlay", bargap=0)
    for i, (name, role) in enumerate(_BARS.items()):
        some = _of(rates, name)
        at = [views.index(view) + (i - 0.5) * _STEP for view in some["view"]]
        error = {
            "array": some["high"] - some["accuracy"],
            "arrayminus": some["accuracy"] - some["low"],
        }
        fig.add_bar(
            x=some["accuracy"], y=at, width=_STEP * 0.92, orientation="h", name=role.name,
            marker={"color": role.color, "line": {"width": 0}}, customdata=_hover(some, role),
            error_x={"type": "data", **error, "color": GREY, "thickness": 1.2, "width": 2},
            hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    for name, role in _MARKS.items():
        some = _of(rates, name)
        if some.empty:
            continue
        fig.add_scatter(
            x=some["accuracy"], y=[views.index(view) - 0.5 * _STEP for view in some["view"]],
            mode="markers", name=role.name, cliponaxis=False, customdata=_hover(some, role),
            marker={"symbol": role.symbol, "size": 10 if role.symbol == "diamond" else 6,
                    "color": role.color, "line": {"color": PAPER, "width": 1.3}},
            hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    _ceiling(fig, rates, len(views))
    fig.update_yaxes(
        range=[len(views) - 0.4, -0.6], tickvals=list(range(len(views))), showgrid=False, ticks="",
        ticktext=[label(_view(view)) for view in views],
    )  # fmt: skip
    fig.update_xaxes(range=[-0.012, 1.02], tickvals=[0, 0.25, 0.5, 0.75, 1], title_text="accuracy")
    height = 62 * len(views)
    fig.update_layout(height=height + 190, legend={"y": -58 / height}, meta={"min_width": 460})
    small = "Bars: 95% intervals. Marks: mean over draws, each at its own best layer on dev."
    return titled(fig, title or _sentence(rates), subtitle=small)


def _sentence(rates: pd.DataFrame) -> str:
    said = [
        f"{_view(row['view'])} {percent(row['accuracy'])} (without {percent(bare['accuracy'])})"
        for row in _of(rates, "vector").to_dict(orient="records")
        for bare in _of(rates, "without").to_dict(orient="records")
        if bare["view"] == row["view"]
    ]
    return f"The function vector answers {', '.join(said)}"


def _view(name: str) -> str:
    return _VIEWS.get(name, f"bare query, {name}")


def _of(rates: pd.DataFrame, run: str) -> pd.DataFrame:
    return pd.DataFrame(rates[rates["run"] == run])


def _hover(some: pd.DataFrame, role: Role) -> list[str]:
    texts = []
    for row in some.to_dict(orient="records"):
        view = _view(row["view"])
        best = "" if row["best"] != row["best"] else f"<br>best draw {percent(row['best'])}"
        low, high = percent(row["low"]), percent(row["high"])
        texts.append(
            f"<b>{label(view)}</b><br>{role.name} {percent(row['accuracy'])} [{low}, {high}]{best}"
        )
    return texts


def _ceiling(fig: go.Figure, rates: pd.DataFrame, n: int) -> None:
    """What demonstrations reach, as a line with its interval."""
    for row in _of(rates, "regular").to_dict(orient="records"):
        role = ROLES["regular"]
        fig.add_vrect(
            x0=row["low"], x1=row["high"], fillcolor=role.faint(0.08), line_width=0, layer="below"
        )
        text = f"{role.name} {percent(row['accuracy'])} [{percent(row['low'])}, {percent(row['high'])}]"
        fig.add_scatter(
            x=[row["accuracy"]] * 2, y=[-0.6, n - 0.4], mode="lines", name=role.name,
            line={"color": role.color, "dash": role.dash, "width": 1.5},
            customdata=[text] * 2, hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip


def function_vector_layers(
    data: xr.Dataset, *, layer: int | None = None, title: str | None = None
) -> go.Figure:
    """Draw the accuracy of bare queries by the layer at which the vector is added.

    Args:
        data: ``hypothesis(prompt, layer)`` with ``split``, ``regular(prompt)`` and ``without(view, prompt)``.
        layer: The layer that was chosen, which is marked.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure: test accuracy with its band, dev accuracy, and both ends of the scale as lines.

    Example:
        >>> function_vector_layers(found.data, layer=found.best_layer)  # doctest: +SKIP

    References:
        Todd et al. 2024, arXiv 2310.15213.
    """
    x = data["layer"].values
    test, dev = (accuracy(data, "hypothesis", split=split) for split in ("test", "dev"))
    role, fig = ROLES["hypothesis"], figure(height=430)
    fig.add_scatter(
        x=np.concatenate([x, x[::-1]]), y=np.concatenate([test["high"], test["low"][::-1]]),
        fill="toself", fillcolor=role.faint(0.16), line_width=0, mode="lines", hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    ends = {"regular": accuracy(data, "regular")}
    ends["baseline"] = accuracy(data.sel(view="zero_shot"), "without")
    for name, rate in ends.items():
        fig.add_scatter(
            x=x[[0, -1]], y=[float(rate["accuracy"])] * 2, mode="lines", name=ROLES[name].name,
            line={"color": ROLES[name].color, "dash": ROLES[name].dash, "width": 1.5},
            hovertemplate=f"{ROLES[name].name} %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
    for name, rate, width in (("test", test, 2.4), ("dev, where it is chosen", dev, 1.0)):
        fig.add_scatter(
            x=x, y=rate["accuracy"], mode="lines+markers" if name == "test" else "lines",
            line={"color": role.color, "width": width, "dash": "solid" if name == "test" else "dot"},
            name=name, hovertemplate=f"{name.split(',')[0]}, layer %{{x}}: %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
    best = float(test["accuracy"].max())
    sentence = title or f"The function vector answers at most {best:.2f} of bare queries"
    if layer is not None:
        value = float(test["accuracy"].sel(layer=layer))
        fig.add_scatter(
            x=[layer], y=[value], mode="markers", name="layer chosen on dev",
            marker={"symbol": "star", "size": 13, "color": role.color,
                    "line": {"color": PAPER, "width": 1}},
            hovertemplate=f"layer {layer}, chosen on dev: {value:.2f}<extra></extra>",
        )  # fmt: skip
        sentence = (
            title
            or f"Added at layer {layer}, the function vector answers {value:.2f} of bare queries"
        )
    fig.update_xaxes(title_text="layer at which the vector is added", showgrid=False)
    fig.update_yaxes(title_text="accuracy", range=[-0.02, 1.04], tickvals=[0, 0.25, 0.5, 0.75, 1])
    note = notes(data)
    small = " · ".join(str(note[k]) for k in ("task", "model") if k in note)
    return titled(fig, sentence, subtitle=f"{small} · 95% Wilson band")
