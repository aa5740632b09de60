"""Circuits: a graph of who tells whom, from the embedding at the bottom to the logits at the top.

Heads stand side by side, the MLPs in a column of their own to the right of them, each above its layer's heads
(beside them where both are parallel). Blue edges raise the metric, vermilion ones lower it; the wider, the
more. Edges on no path from the embedding to the logits are left out, for they do nothing. The curves say what
circuits of growing size do alone.
"""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens.plots._axes import powers
from tvlens.plots._cells import number
from tvlens.plots._notes import metric_of, notes
from tvlens.plots.palette import BLUE, INK, MUTED, PAPER, VERMILION
from tvlens.plots.theme import ROLES, figure, label, titled

_RAISES, _LOWERS = BLUE, VERMILION
_WIDTHS = (0.6, 1.3, 2.4, 4.0, 6.0)
_MOST_NAMED = 80
_MOST_TICKS = 12
_BEND = 17  # points of an edge
_BIG = 8  # listed in a node's hover
# Names stand on edges.
_HALO = ", ".join(f"{x}px {y}px 1px {PAPER}" for x in (-1, 1) for y in (-1, 1))


def circuit_graph(
    data: xr.Dataset, *, dead: bool = False, names: bool | None = None, title: str | None = None
) -> go.Figure:
    """Draw the edges of a circuit as a graph, layers from bottom to top.

    Args:
        data: What `tvlens.circuits.Circuit` holds: by ``edge``, sender and receiver with kind, layer and
            head, ``score``, and ``live``.
        dead: Whether edges on no path from the embedding to the logits are drawn, too.
        names: Whether nodes are named; by default where there are few.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure. Hover over a node for its strongest edges, over the middle of an edge for its score.

    Raises:
        ValueError: The data holds no edges.

    Example:
        >>> circuit_graph(circuit.data)  # doctest: +SKIP

    References:
        Hanna, Pezzelle, Belinkov 2024, arXiv:2403.17806.
    """
    for name in ("sender", "receiver", "score", "live"):
        if name not in data:
            raise ValueError(f"the data has no {name!r}; it has: {', '.join(map(str, data))}")
    drawn = data if dead else data.isel(edge=np.flatnonzero(data["live"].values))
    note = notes(data)
    graph = note.get("graph", {})
    edges = [_Edge(drawn.isel(edge=i), graph) for i in range(drawn.sizes["edge"])]
    places = dict(item for edge in edges for item in edge.places.items())
    places |= {"embed": (0.0, -1.0), "logits": (0.0, _top(graph, places))}
    fig = figure()
    _lines(fig, edges)
    _middles(fig, edges)
    _nodes(fig, edges, places, names=len(places) <= _MOST_NAMED if names is None else names)
    _frame(fig, graph, places)
    left_out = data.sizes["edge"] - drawn.sizes["edge"]
    small = [str(note.get("model", "")), "blue raises the metric, dashed vermilion lowers it"]
    small += [f"{left_out} edges that change nothing are left out"] if left_out else []
    sentence = data.attrs.get("finding", "") if title is None else title
    return titled(fig, sentence, subtitle=" · ".join(filter(None, small)))


class _Edge:
    """One edge: whom it joins, where, and how it looks."""

    def __init__(self, one: xr.Dataset, graph: dict[str, Any]) -> None:
        self.score = float(one["score"])
        self.sender, self.receiver = str(one["sender"].values), str(one["receiver"].values)
        ends = []
        for dim in ("sender", "receiver"):
            kind, layer, head = (
                one[f"{dim}_{part}"].values.item() for part in ("kind", "layer", "head")
            )
            ends.append(_place(str(kind), int(layer), int(head), graph))
        self.start, self.end = ends
        self.places = {self.start[0]: self.start[1], self.end[0]: self.end[1]}

    def path(self) -> list[tuple[float, float]]:
        """Points from the sender to the receiver: a straight line, or an arc where one would hide others."""
        (x, y), (to_x, to_y) = self.start[1], self.end[1]
        bulge = min(0.12 * (to_y - y), 1.8) if abs(to_x - x) < 0.5 else 0.0
        ways = (
            [i / (_BEND - 1) for i in range(_BEND)] if bulge else [0.0, *[0.5] * (_BEND - 2), 1.0]
        )
        return [(x + t * (to_x - x) + 4 * t * (1 - t) * bulge, y + t * (to_y - y)) for t in ways]

    def hover(self) -> str:
        return f"<b>{label(self.sender)} → {label(self.receiver)}</b><br>score {number(self.score)}"


def _place(
    kind: str, layer: int, head: int, graph: dict[str, Any]
) -> tuple[str, tuple[float, float]]:
    """The node of a reader or writer, and where it stands."""
    if kind in ("embed", "logits"):
        return kind, (0.0, -1.0 if kind == "embed" else 2.0 * layer)
    heads, groups = int(graph.get("n_heads", 1)), int(graph.get("n_kv_heads", 1))
    parallel = bool(graph.get("parallel", False))
    if kind == "mlp":
        return f"mlp{layer}", (heads / 2 + 1, 2.0 * layer + (not parallel))
    if kind == "attn":
        return f"attn{layer}", (0.0, 2.0 * layer)
    middle = (heads - 1) / 2
    if kind in ("k", "v") and groups != heads:
        # A key-value head stands below the heads that share it.
        size = heads // groups
        return f"kv{layer}.{head}", (head * size + (size - 1) / 2 - middle, 2.0 * layer - 0.55)
    return f"h{layer}.{head}", (head - middle, 2.0 * layer)


def _top(graph: dict[str, Any], places: dict[str, tuple[float, float]]) -> float:
    layers = graph.get("n_layers")
    return 2.0 * layers if layers else max((y for _, y in places.values()), default=0.0) + 1


def _lines(fig: go.Figure, edges: list[_Edge]) -> None:
    """Edges, those of one sign and width in one trace."""
    largest = max((abs(edge.score) for edge in edges), default=1.0) or 1.0
    for raises in (True, False):
        for step, width in enumerate(_WIDTHS):
            some = [
                edge
                for edge in edges
                if (edge.score >= 0) == raises
                and min(int(abs(edge.score) / largest * len(_WIDTHS)), len(_WIDTHS) - 1) == step
            ]
            if not some:
                continue
            points = [point for edge in some for point in (*edge.path(), (None, None))]
            fig.add_trace(
                go.Scatter(
                    x=[x for x, _ in points], y=[y for _, y in points], mode="lines", hoverinfo="skip",
                    line={"color": _RAISES if raises else _LOWERS, "width": width,
                          "dash": "solid" if raises else "dash"},
                    opacity=0.5 + 0.1 * step, showlegend=False,
                )
            )  # fmt: skip


def _middles(fig: go.Figure, edges: list[_Edge]) -> None:
    """Unseen points in the middle of edges, to hover over."""
    fig.add_trace(
        go.Scatter(
            x=[edge.path()[_BEND // 2][0] for edge in edges],
            y=[edge.path()[_BEND // 2][1] for edge in edges],
            mode="markers", marker={"size": 14, "opacity": 0}, showlegend=False,
            customdata=[edge.hover() for edge in edges],
            hovertemplate="%{customdata}<extra></extra>", name="edges",
        )
    )  # fmt: skip


def _nodes(
    fig: go.Figure, edges: list[_Edge], places: dict[str, tuple[float, float]], *, names: bool
) -> None:
    order = sorted(places, key=lambda name: (places[name][1], places[name][0]))
    fig.add_trace(
        go.Scatter(
            x=[places[name][0] for name in order],
            y=[places[name][1] for name in order],
            mode="markers+text" if names else "markers",
            text=[label(name) for name in order],
            textposition=[
                f"middle {'left' if name.startswith('kv') else 'right'}" for name in order
            ],
            textfont={"size": 10, "color": INK, "shadow": _HALO},
            marker={
                "size": [7 if name.startswith("kv") else 11 for name in order],
                "symbol": ["square" if name.startswith("mlp") else "circle" for name in order],
                "color": PAPER,
                "line": {"color": INK, "width": 1.5},
            },
            customdata=[_node_hover(name, edges) for name in order],
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=False,
            name="nodes",
        )
    )


def _node_hover(name: str, edges: list[_Edge]) -> str:
    lines = [f"<b>{label(name)}</b>"]
    for said, some in (
        ("hears", [edge for edge in edges if edge.end[0] == name]),
        ("tells", [edge for edge in edges if edge.start[0] == name]),
    ):
        if not some:
            continue
        lines.append(f"{said} {len(some)}, together {number(sum(edge.score for edge in some))}")
        for edge in sorted(some, key=lambda edge: -abs(edge.score))[:_BIG]:
            other = edge.sender if said == "hears" else edge.receiver
            via = f" → {edge.receiver}" if said == "hears" else ""
            lines.append(f"  {label(other)}{label(via)}  {number(edge.score)}")
    return "<br>".join(lines)


def _frame(fig: go.Figure, graph: dict[str, Any], places: dict[str, tuple[float, float]]) -> None:
    n = int(graph.get("n_layers", 1))
    step = max(1, round(n / 15))
    ticks = [-1.0, *(2.0 * layer for layer in range(0, n, step)), 2.0 * n]
    texts = ["embedding", *(f"layer {layer}" for layer in range(0, n, step)), "logits"]
    fig.update_yaxes(tickvals=ticks, ticktext=texts, range=[-2, 2 * n + 1], ticks="")
    across = [x for x, _ in places.values()]
    fig.update_xaxes(visible=False, range=[min(across) - 1.5, max(across) + 2.2])
    fig.update_layout(
        height=int(np.clip(44 * n + 120, 380, 1100)), hovermode="closest", margin_b=24,
        meta={"min_width": 640},
    )  # fmt: skip


def faithfulness_curves(data: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Draw faithfulness and completeness over the size of the circuit.

    Args:
        data: What `tvlens.circuits.Faithfulness.drawn` gives: ``mean``, ``low``, ``high`` by share and
            circuit, with ``n_edges``.
        title: Replaces the sentence that says what came out.

    Returns:
        The figure; bands are intervals.

    Raises:
        ValueError: The data has no means.

    Example:
        >>> faithfulness_curves(result.drawn())  # doctest: +SKIP

    References:
        Wang et al. 2023, arXiv:2211.00593.
    """
    if "mean" not in data:
        raise ValueError(f"the data has no 'mean'; it has: {', '.join(map(str, data))}")
    order = np.argsort(data["n_edges"].values, kind="stable")
    ordered = data.isel(circuit=order)
    size = ordered["n_edges"].values
    fig = figure(height=420)
    roles = {"faithfulness": ROLES["hypothesis"], "completeness": ROLES["baseline"]}
    said = {
        "faithfulness": "faithfulness: kept by the circuit alone",
        "completeness": "completeness: lost without it",
    }
    for share in map(str, ordered["share"].values):
        one, role = ordered.sel(share=share), roles[share]
        if bool(np.isfinite(one["low"].values).all()):
            fig.add_trace(
                go.Scatter(
                    x=np.concatenate([size, size[::-1]]),
                    y=np.concatenate([one["high"].values, one["low"].values[::-1]]),
                    fill="toself", fillcolor=role.faint(0.15), line_width=0, mode="lines",
                    hoverinfo="skip", showlegend=False,
                )
            )  # fmt: skip
        fig.add_trace(
            go.Scatter(
                x=size, y=one["mean"].values, mode="lines+markers", name=said[share],
                line={"color": role.color, "dash": role.dash}, marker={"symbol": role.symbol, "size": 7},
                customdata=_ends(one), hovertemplate="%{x:,} edges<br>%{customdata}<extra></extra>",
            )
        )  # fmt: skip
    for level in (0, 1):
        fig.add_hline(y=level, line={"color": MUTED, "width": 1, "dash": "dot"})
    note = notes(data)
    fig.update_xaxes(title_text="edges in the circuit")
    if size.min() > 0:
        few = {"tickvals": size.tolist(), "ticktext": [f"{n:,}" for n in size.tolist()]}
        axis = powers(size.min(), size.max())
        fig.update_xaxes(**(axis | few if len(size) <= _MOST_TICKS else axis))
    fig.update_yaxes(title_text=f"share of the {label(metric_of(note))}")
    small = [str(note.get("model", "")), f"{note.get('all_edges', 0):,} edges in all"]
    sentence = data.attrs.get("finding", "") if title is None else title
    return titled(fig, sentence, subtitle=" · ".join(filter(None, small)))


def _ends(one: xr.Dataset) -> list[str]:
    rows = zip(*(one[end].values.tolist() for end in ("mean", "low", "high")), strict=True)
    return [
        number(mean) + (f" ({number(low)} to {number(high)})" if low == low else "")
        for mean, low, high in rows
    ]
