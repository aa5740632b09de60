"""Does the circuit do it? Cut every other edge and measure; then cut the circuit's own.

Scores are estimates made at one point, edge by edge; circuits act together and far from that point. So a
circuit is not believed before it has been run: alone, it should keep the metric (faithfulness), and the model
without it should have lost it (completeness). Use other prompts than those that the circuit was chosen on.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from tvlens.circuits.cut import CutRun
from tvlens.circuits.graph import graph_of
from tvlens.circuits.pose import pose
from tvlens.circuits.results import Circuit, Faithfulness
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
        model: A TransformerLens model, the one whose circuits these are.
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
        ValueError: As in `tvlens.patch`; there is no circuit, or one of another model; or not even one
            prompt fits into memory.

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
    chosen = [circuits] if isinstance(circuits, Circuit) else list(circuits)
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


def _check(model: Any, circuits: Sequence[Circuit]) -> str:
    """Refuse circuits of another model, and give the kind of their nodes."""
    if not circuits:
        raise ValueError(
            "no circuit arrived; tvlens.circuits.circuit(scores, n_edges=...) makes one."
        )
    nodes = circuits[0].graph.nodes
    ours = graph_of(model, nodes=nodes)
    for one in circuits:
        if one.graph != ours:
            raise ValueError(
                f"a circuit of {one.provenance['model']} arrived, whose graph is {one.graph.to_dict()}; "
                f"the model's is {ours.to_dict()}."
            )
    return nodes


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
            **texts,
        },
        attrs={ATTRIBUTE: encode(note)},
    )
    return Faithfulness(data)
