"""What scoring edges and cutting them have in common: pairs of prompts, a metric, and what fits at once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from tvlens.circuits.graph import NODES, Graph, graph_of
from tvlens.encoding import TokenBatch
from tvlens.engine.planner import default_memory
from tvlens.metrics import Metric
from tvlens.models.runner import Runner, runner
from tvlens.patching.assemble import Task, make_task
from tvlens.patching.pairs import Answers, Prompts, differences, lengths_of, paired
from tvlens.patching.sweep import observe


@dataclass(frozen=True)
class Posed:
    """A task in pairs of prompts, for a model as a graph.

    Attributes:
        model: The model.
        drive: Its runner.
        graph: Its graph.
        batches: Clean and corrupted prompts.
        task: What is measured, with the logits of both runs.
        differs: Where the two prompts of a pair differ, by prompt and position.
    """

    model: Any
    drive: Runner
    graph: Graph
    batches: dict[str, TokenBatch]
    task: Task
    differs: Bool[np.ndarray, "prompt position"]

    def __len__(self) -> int:
        return len(self.batches["clean"])

    @property
    def lengths(self) -> Int[np.ndarray, " prompt"]:
        """Number of tokens of each prompt."""
        return lengths_of(self.batches["clean"])

    def chunks(self, memory: int | None) -> Iterator[slice]:
        """Cut the prompts into ranges that fit.

        Args:
            memory: Bytes that activations may take; by default as in `tvlens.engine.run`.

        Yields:
            Ranges of prompts.

        Raises:
            ValueError: Not even one prompt fits; it says how large the graph is, and which is smaller.
        """
        memory = memory if memory is not None else default_memory(self.drive.device)
        width = int(self.lengths.max())
        each = _bytes(self.drive, self.graph, width)
        if each > memory:
            raise ValueError(_too_large(self.drive, self.graph, width, memory))
        n = max(memory // each, 1)
        for begin in range(0, len(self), n):
            yield slice(begin, min(begin + n, len(self)))

    def where(self, rows: slice) -> Bool[np.ndarray, "prompt position"]:
        """Say which positions of some prompts can differ between the runs: those from the first token on."""
        lengths = self.lengths[rows]
        since = np.maximum.accumulate(self.differs[rows, : lengths.max()], axis=1)
        return since & (np.arange(since.shape[1]) < lengths[:, None])


def pose(
    model: Any,
    clean: Prompts,
    corrupted: Prompts,
    *,
    metric: str | Metric | Callable[..., Any],
    answers: Answers | None,
    wrong: Answers | None,
    nodes: str,
    memory: int | None,
) -> Posed:
    """Encode pairs, run both prompts of each untouched, and settle what is measured.

    Args:
        model: A TransformerLens model.
        clean: As in `tvlens.patch`.
        corrupted: As in `tvlens.patch`.
        metric: As in `tvlens.patch`.
        answers: As in `tvlens.patch`.
        wrong: As in `tvlens.patch`.
        nodes: As in `graph_of`.
        memory: Bytes that the engine's activations may take.

    Returns:
        The task.

    Raises:
        ValueError: As in `tvlens.patch` and `graph_of`.
    """
    graph = graph_of(model, nodes=nodes)
    batches, _, _ = paired(model, clean, corrupted, direction="noise")
    logits = observe(model, batches, "clean", {}, memory=memory).logits
    task = make_task(model, batches["clean"], metric, logits, answers=answers, wrong=wrong)
    differs = differences(batches["clean"], batches["corrupted"])
    return Posed(model, runner(model), graph, batches, task, differs)


def _bytes(drive: Runner, graph: Graph, width: int) -> int:
    """What one prompt holds: what everyone says, what a layer reads, and activations with gradients."""
    d_model = drive.site_shape("resid_pre")[0]
    (heads, d_head), (kv_heads, _) = drive.site_shape("q"), drive.site_shape("v")
    parts = 2 * heads if graph.nodes == "layer" else 0  # of one layer, before they are summed
    said = (len(graph.senders) + graph.readers + 2 + parts) * d_model
    seen = 2 * graph.n_layers * ((2 * heads + 2 * kv_heads) * d_head + 3 * d_model)
    return width * (said + seen) * 4 + 4 * graph.edges.size


def _too_large(drive: Runner, graph: Graph, width: int, memory: int) -> str:
    size = _bytes(drive, graph, width)
    said = (
        f"this graph has {len(graph.senders):,} senders, {len(graph.receivers):,} receivers and "
        f"{graph.n_edges:,} edges; for one prompt of {width} tokens it holds {_gb(size)}, and memory is "
        f"{_gb(memory)}. "
    )
    if graph.nodes == NODES[0]:
        coarse = replace(graph, nodes=NODES[1])
        less = _bytes(drive, coarse, width)
        said += f"nodes='layer' ({coarse.n_edges:,} edges) holds {_gb(less)}. "
    return said + f"Or give memory={size} and more, or shorter prompts."


def _gb(size: int) -> str:
    return f"{size / 2**30:.2g} GB" if size >= 2**28 else f"{size / 2**20:.2g} MB"
