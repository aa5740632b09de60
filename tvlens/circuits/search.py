"""Choosing a circuit: which of many scored edges belong to it?

The strongest edges may hang in the air: an edge whose sender nobody has told anything, or whose receiver
nobody listens to, changes nothing. "greedy" grows the circuit from the logits, so that somebody always
listens; "top" takes the strongest wherever they are. "random" grows like "greedy" but draws its edges, scores
or not: what a circuit of that size keeps by luck. In all, edges on no path from the embedding to the logits
are marked: they are not live.
"""

import heapq
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float

from tvlens._errors import unknown, whole
from tvlens.circuits.graph import Graph
from tvlens.circuits.results import Circuit, EdgeScores, node_coords

CHOICES = ("top", "greedy", "random")


def circuit(scores: EdgeScores, *, n_edges: int, method: str = "greedy", seed: int = 0) -> Circuit:
    """Choose the edges of a circuit by their scores.

    Args:
        scores: Scored edges.
        n_edges: How many edges to choose.
        method: ``"greedy"``, from the logits downwards, always the strongest edge that ends in what is
            chosen already; ``"top"``, the strongest of all; or ``"random"``, which grows as greedy does, but
            by any edges: the control for the other two.
        seed: Decides which edges ``"random"`` draws.

    Returns:
        The circuit, strongest edges first.

    Raises:
        ValueError: There are fewer edges, or no such method.
        TypeError: ``n_edges`` or ``seed`` is no whole number, or these are no scores.

    Example:
        >>> from tvlens.circuits.edges import edge_scores
        >>> from tvlens.testing import tiny_model
        >>> scores = edge_scores(tiny_model(), "a->A b->", "a->a b->", answers="B", wrong="b")
        >>> circuit(scores, n_edges=10).n_edges
        10

    References:
        Hanna, Pezzelle, Belinkov 2024, arXiv:2403.17806.
    """
    from tvlens.provenance import ATTRIBUTE, collect, encode

    if not isinstance(scores, EdgeScores):
        raise TypeError(
            f"scores must be edge scores, as tv.edge_scores(...) gives; {type(scores).__name__} arrived."
        )
    graph, values = scores.graph, scores.score.values
    if method not in CHOICES:
        raise unknown("method", method, CHOICES)
    n_edges = whole("n_edges", n_edges)
    if not 0 <= n_edges <= graph.n_edges:
        raise ValueError(
            f"{n_edges:,} edges asked for, but this graph has {graph.n_edges:,}: 0 to {graph.n_edges:,}."
        )
    sizes, drawn = np.abs(np.nan_to_num(values)), {}
    if method == "random":
        drawn = {"seed": whole("seed", seed)}
        sizes = np.random.default_rng(drawn["seed"]).random(values.shape)
    chosen = _top(graph, sizes, n_edges) if method == "top" else _grown(graph, sizes, n_edges)
    alive = live(graph, chosen)
    sent, read = np.nonzero(chosen)
    order = np.argsort(-np.abs(values[sent, read]), kind="stable")
    sent, read = sent[order], read[order]
    table: dict[str, Any] = {}
    for dim, nodes, at in (
        ("sender", graph.senders, sent),
        ("receiver", graph.receivers, read),
    ):
        for name, (_, column) in node_coords(dim, nodes).items():
            table[name] = ("edge", column[at])
    table["score"] = ("edge", values[sent, read])
    table["live"] = ("edge", alive[sent, read])
    made = scores.provenance
    kept = {
        k: made[k]
        for k in ("metric", "method", "steps", "graph", "model", "n_layers", "model_facts")
    }
    note = collect(kind=Circuit.kind, choice=method, all_edges=graph.n_edges, **drawn, **kept)
    return Circuit(xr.Dataset(table, attrs={ATTRIBUTE: encode(note)}))


def _top(
    graph: Graph, sizes: Float[np.ndarray, "sender receiver"], n_edges: int
) -> Bool[np.ndarray, "sender receiver"]:
    there = np.where(graph.edges, sizes, -1.0)
    best = np.argsort(-there.ravel(), kind="stable")[:n_edges]
    chosen = np.zeros(there.size, dtype=bool)
    chosen[best] = True
    return chosen.reshape(there.shape)


def _grown(
    graph: Graph, sizes: Float[np.ndarray, "sender receiver"], n_edges: int
) -> Bool[np.ndarray, "sender receiver"]:
    chosen = np.zeros(sizes.shape, dtype=bool)
    listens = _listens(graph)
    ahead: list[tuple[float, int, int]] = []
    known: set[int] = set()

    def listen(receiver: int) -> None:
        if receiver not in known:
            known.add(receiver)
            for sender in np.flatnonzero(graph.edges[:, receiver]).tolist():
                heapq.heappush(ahead, (-float(sizes[sender, receiver]), sender, receiver))

    listen(len(graph.receivers) - 1)
    for _ in range(n_edges):
        _, sender, receiver = heapq.heappop(ahead)
        chosen[sender, receiver] = True
        for other in listens[sender]:
            listen(other)
    return chosen


def _listens(graph: Graph) -> list[list[int]]:
    """For each sender the receivers through which it hears."""
    found: list[list[int]] = [[] for _ in graph.senders]
    for receiver in range(len(graph.receivers)):
        for sender in graph.speaks(receiver):
            found[sender].append(receiver)
    return found


def live(
    graph: Graph, chosen: Bool[np.ndarray, "sender receiver"]
) -> Bool[np.ndarray, "sender receiver"]:
    """Say which edges lie on a path of chosen edges from the embedding to the logits.

    Args:
        graph: The graph.
        chosen: Which edges are in the circuit.

    Returns:
        The same without those that change nothing.

    Example:
        >>> graph = Graph(n_layers=1, n_heads=1, n_kv_heads=1, parallel=False)
        >>> chosen = np.zeros(graph.edges.shape, dtype=bool)
        >>> chosen[1, -1] = True  # the head to the logits, but nothing to the head
        >>> int(live(graph, chosen).sum())
        0
    """
    # In the order of writing, who is told something; then against it, who is listened to.
    told = np.zeros(len(graph.senders), dtype=bool)
    told[0] = True
    for receiver in range(len(graph.receivers)):
        if (chosen[:, receiver] & told).any():
            told[list(graph.changes(receiver))] = True
    used = np.zeros(len(graph.senders), dtype=bool)
    kept = np.zeros(chosen.shape, dtype=bool)
    for receiver in reversed(range(len(graph.receivers))):
        speakers = graph.changes(receiver)
        if not speakers or used[list(speakers)].any():
            kept[:, receiver] = chosen[:, receiver] & told
            used |= kept[:, receiver]
    return kept
