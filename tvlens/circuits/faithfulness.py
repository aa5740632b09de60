"""Does the circuit do it? Cut every other edge and measure; then cut the circuit's own.

Scores are estimates made at one point, edge by edge; circuits act together and far from that point. So a
circuit is not believed before it has been run: alone, it should keep the metric (faithfulness), and the model
without it should have lost it (completeness). Use other prompts than those that the circuit was chosen on.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from tvlens.circuits.cut import CutRun
from tvlens.circuits.graph import Graph, graph_of
from tvlens.circuits.pose import pose
from tvlens.circuits.results import Circuit, EdgeScores, Faithfulness
from tvlens.metrics import Metric, measure
from tvlens.patching.pairs import Answers, Prompts


def faithfulness(
    model: Any,
    circuits: Circuit | Sequence[Circuit],
    clean: Prompts,
    corrupted: Prompts,
    *,
    metric: str | Metric | Callable[..., Any] = "logit_difference",
    answers: Answers | None = None,
    wrong: Answers | None = None,
    memory: int | None = None,
) -> Faithfulness:
    """Run a model with nothing but a circuit, and with everything but the circuit, and measure both.

    An edge that is cut carries what its sender says in the corrupted run, at every position.

    Args:
        model: A TransformerLens model, the one whose circuits these are: of the same weights where their
            hash is known, else of the same name. Backend, dtype and weight processing may differ, since
            edges mean the same there.
        circuits: One circuit, or several of one graph, such as those of growing size.
        clean: As in `tvlens.patch`.
        corrupted: As in `tvlens.patch`.
        metric: As in `tvlens.patch`.
        answers: As in `tvlens.patch`.
        wrong: As in `tvlens.patch`.
        memory: Bytes that activations may take; prompts are run in chunks.

    Returns:
        The metric of every circuit and prompt, as a result that draws its curves.

    Raises:
        ValueError: As in `tvlens.patch`; there is no circuit, one of another model, or two of different
            graphs; or not even one prompt fits into memory.
        TypeError: Something else than circuits arrived.

    Example:
        >>> from tvlens.circuits.edges import edge_scores
        >>> from tvlens.circuits.search import circuit
        >>> from tvlens.testing import tiny_model
        >>> model, pair = tiny_model(), ("a->A b->", "a->a b->")
        >>> scores = edge_scores(model, *pair, answers="B", wrong="b")
        >>> circuits = [circuit(scores, n_edges=n) for n in (0, 82)]
        >>> found = faithfulness(model, circuits, *pair, answers="B", wrong="b")
        >>> found.mean()["faithfulness"]["mean"].values.round(3) + 0.0
        array([0., 1.])

    References:
        Wang, Variengien, Conmy, Shlegeris, Steinhardt 2023, arXiv:2211.00593; Hanna, Pezzelle, Belinkov
        2024, arXiv:2403.17806.
    """
    started = time.perf_counter()
    chosen = _circuits(circuits)
    nodes = _check(model, chosen)
    asked = {"metric": metric, "answers": answers, "wrong": wrong}
    posed = pose(model, clean, corrupted, nodes=nodes, memory=memory, **asked)
    edges = torch.from_numpy(posed.graph.edges).to(posed.drive.device)
    whole = [torch.from_numpy(one.chosen).to(edges.device) for one in chosen]
    found = np.zeros((2, len(chosen), len(posed)), dtype=np.float32)
    for rows in posed.chunks(memory):
        batches = (posed.batches[run].rows(rows) for run in ("clean", "corrupted"))
        cut, readout = CutRun(posed.drive, posed.graph, *batches), posed.task.readout(rows)
        for number, kept in enumerate(whole):
            for way, left in enumerate((kept, edges & ~kept)):
                found[way, number, rows] = measure(readout, cut.logits(left)).float().cpu().numpy()
    return _result(posed, chosen, found, started)


def _circuits(circuits: Any) -> list[Circuit]:
    """One circuit or several as a list."""
    several = isinstance(circuits, Iterable) and not isinstance(circuits, str)
    found: list[Any] = [*circuits] if several else [circuits]
    if not found:
        raise ValueError("no circuit arrived; tv.circuit(scores, n_edges=...) makes one.")
    for one in found:
        if isinstance(one, EdgeScores):
            raise TypeError(
                "edge scores arrived, which are no circuit yet; tv.circuit(scores, n_edges=...) makes one."
            )
        if not isinstance(one, Circuit):
            raise TypeError(
                f"circuits must be a Circuit or a list of them, as tv.circuit(scores, n_edges=...) makes; "
                f"{type(one).__name__} arrived."
            )
    return found


def _check(model: Any, circuits: Sequence[Circuit]) -> str:
    """Refuse circuits of another model, and give the kind of their nodes."""
    nodes = circuits[0].graph.nodes
    for number, one in enumerate(circuits[1:], start=1):
        if one.graph.nodes != nodes:
            raise ValueError(
                f"the circuits differ: circuit 0 has nodes={nodes!r}, circuit {number} has "
                f"nodes={one.graph.nodes!r}. Test those of each graph by themselves."
            )
    ours = graph_of(model, nodes=nodes)
    for one in circuits:
        said = _other_graph(one.graph, ours) or _other_weights(one, model)
        if said:
            name = one.provenance["model"]
            raise ValueError(f"this circuit was found in another model, {name!r}: {said}.")
    return nodes


def _other_graph(theirs: Graph, ours: Graph) -> str:
    """What another graph has that this one has not; nothing where they are the same."""
    sizes = {"n_layers": "layers", "n_heads": "heads", "n_kv_heads": "key-value heads"}
    for name, words in sizes.items():
        one, other = getattr(theirs, name), getattr(ours, name)
        if one != other:
            return f"{one} {words}, this model has {other}"
    ways = {
        "parallel": ("beside its attention", "after its attention", "MLPs that read"),
        "normed": ("with a norm after it", "without a norm after it", "attention"),
    }
    for name, (yes, no, what) in ways.items():
        if getattr(theirs, name) != getattr(ours, name):
            there, here = (yes if getattr(each, name) else no for each in (theirs, ours))
            return f"{what} {there}, in this model {here}"
    return ""


def _other_weights(one: Circuit, model: Any) -> str:
    """What tells that a circuit's model has other weights than this one; nothing where nothing does."""
    from tvlens.models import facts

    ours = facts(model).to_dict()
    theirs = {"name": one.provenance["model"], **one.provenance.get("model_facts", {})}
    mine, other = ours["weights_sha256"], theirs.get("weights_sha256")
    # The same weights may go by several names, and one name by several weights.
    if mine and other:
        return "" if mine == other else f"weights of SHA-256 {other[:12]}…, here {str(mine)[:12]}…"
    if theirs["name"] != ours["name"]:
        return f"this one is {ours['name']!r}"
    for name in ("revision", "d_model", "d_vocab"):
        there, here = theirs.get(name), ours[name]
        if there is not None and here is not None and there != here:
            return f"{name} {there}, here {here}"
    return ""


def _result(
    posed: Any, circuits: Sequence[Circuit], found: np.ndarray, started: float
) -> Faithfulness:
    from tvlens.models import facts
    from tvlens.provenance import ATTRIBUTE, collect, encode

    known = facts(posed.model)
    runs = {run: ("prompt", posed.task.untouched(run)) for run in ("clean", "corrupted")}
    texts = {
        f"{run}_text": ("prompt", np.array(batch.text, dtype=object))
        for run, batch in posed.batches.items()
    }
    note = collect(
        kind=Faithfulness.kind, metric=posed.task.metric.name, n_prompts=len(posed), model=known.name,
        all_edges=posed.graph.n_edges, graph=posed.graph.to_dict(), model_facts=known.to_dict(),
        choice=[str(one.provenance["choice"]) for one in circuits],
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    data = xr.Dataset(
        {
            "value": (("circuit", "prompt"), found[0]),
            "without": (("circuit", "prompt"), found[1]),
            **runs,
        },
        coords={
            "n_edges": ("circuit", [one.n_edges for one in circuits]),
            "n_nodes": ("circuit", [len(one.nodes) for one in circuits]),
            "chosen_by": ("circuit", np.array([one.chosen_by for one in circuits], dtype=object)),
            **texts,
        },
        attrs={ATTRIBUTE: encode(note)},
    )
    return Faithfulness(data)
