"""Edge attribution patching: what does each part of the model tell each other part that the metric hears?

An edge is a sender's contribution to what one receiver reads. Replacing it by what the sender says in the
corrupted run changes the receiver's input by the difference, and the metric by about that times its gradient:
all edges at once, from two forwards and one backward. With integrated gradients ("eap-ig") the gradient is
averaged along the way from the corrupted to the clean embedding, which sees what a single slope misses where
the metric has levelled off. A positive score: the clean message over this edge raises the metric.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import unknown
from tvlens.circuits.graph import Graph, head_writes
from tvlens.circuits.pose import Posed, pose
from tvlens.circuits.results import EdgeScores, node_coords
from tvlens.engine import Edit, Read, Request, run
from tvlens.engine.backward import Backward, backward
from tvlens.metrics import Metric
from tvlens.models.runner import Block
from tvlens.patching.gradients import MetricOf, check_smooth
from tvlens.patching.pairs import Answers, Prompts

METHODS = ("eap", "eap-ig")
_KEPT = 2**28  # bytes up to which scores are kept prompt by prompt


def edge_scores(
    model: Any,
    clean: Prompts,
    corrupted: Prompts,
    *,
    metric: str | Metric | Callable[..., Any] = "logit_difference",
    answers: Answers | None = None,
    wrong: Answers | None = None,
    method: str = "eap",
    steps: int = 5,
    nodes: str = "head",
    memory: int | None = None,
) -> EdgeScores:
    """Estimate for every edge how far its clean message, in place of the corrupted one, raises the metric.

    Args:
        model: A TransformerLens model of either kind.
        clean: As in `tvlens.patch`.
        corrupted: As in `tvlens.patch`.
        metric: As in `tvlens.patch`; it must have a gradient.
        answers: As in `tvlens.patch`.
        wrong: As in `tvlens.patch`.
        method: ``"eap"`` takes the gradient at the clean run; ``"eap-ig"`` averages it over ``steps`` runs
            whose embeddings lie between the corrupted and the clean ones.
        steps: How many runs, for ``"eap-ig"``.
        nodes: ``"head"`` for edges into queries, keys and values of every head; ``"layer"`` for a coarser
            graph in which attention of a layer is one node.
        memory: Bytes that activations may take; prompts are run in chunks.

    Returns:
        A score for every edge, summed over positions: the mean over prompts, and where there is room every
        prompt's own.

    Raises:
        ValueError: As in `tvlens.patch`; the metric has no gradient; or not even one prompt fits into
            memory.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> scores = edge_scores(tiny_model(), "a->A b->", "a->a b->", answers="B", wrong="b")
        >>> dict(scores.data["score"].sizes)
        {'sender': 11, 'receiver': 19}

    References:
        Syed, Rager, Conmy 2023, arXiv:2310.10348; Hanna, Pezzelle, Belinkov 2024, arXiv:2403.17806.
    """
    started = time.perf_counter()
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if steps < 1:
        raise ValueError(f"steps must be at least 1; {steps} arrived.")
    check_smooth(metric)
    asked = {"metric": metric, "answers": answers, "wrong": wrong}
    posed = pose(model, clean, corrupted, nodes=nodes, memory=memory, **asked)
    if method == "eap" and "reference" in posed.task.metric.needs:
        raise ValueError(
            f"{posed.task.metric.name} is least, and so flat, at the clean run: its gradient there is "
            "zero. Use method='eap-ig', or another metric."
        )
    # Midpoints: the best places for few steps.
    along = [1.0] if method == "eap" else [(step + 0.5) / steps for step in range(steps)]
    shape = posed.graph.edges.shape
    keep = len(posed) * int(np.prod(shape)) * 4 <= _KEPT
    each = np.zeros((*shape, len(posed) if keep else 0), dtype=np.float32)
    total = np.zeros(shape)
    for rows in posed.chunks(memory):
        found = _Scoring(posed, rows, memory).scores(along)
        total += found.sum(axis=0)
        if keep:
            each[..., rows] = rearrange(found, "prompt sender receiver -> sender receiver prompt")
    return _result(posed, total / len(posed), each if keep else None, started, method, len(along))


def _result(
    posed: Posed,
    mean: Float[np.ndarray, "sender receiver"],
    each: Float[np.ndarray, "sender receiver prompt"] | None,
    started: float,
    method: str,
    steps: int,
) -> EdgeScores:
    from tvlens.models import facts
    from tvlens.provenance import ATTRIBUTE, collect, encode

    graph, known = posed.graph, facts(posed.model)
    there = graph.edges
    table: dict[str, Any] = {
        run: ("prompt", posed.task.untouched(run)) for run in ("clean", "corrupted")
    }
    table["score"] = (("sender", "receiver"), np.where(there, mean, np.nan))
    if each is not None:
        each[~there] = np.nan
        table["score_by_prompt"] = (("sender", "receiver", "prompt"), each)
    coords = node_coords("sender", graph.senders) | node_coords("receiver", graph.receivers)
    for name, batch in posed.batches.items():
        coords[f"{name}_text"] = ("prompt", np.array(batch.text, dtype=object))
    note = collect(
        kind=EdgeScores.kind, metric=posed.task.metric.name, method=method, steps=steps,
        graph=graph.to_dict(), n_prompts=len(posed), model=known.name, n_layers=known.n_layers,
        model_facts=known.to_dict(), seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return EdgeScores(xr.Dataset(table, coords=coords, attrs={ATTRIBUTE: encode(note)}))


class _Scoring:
    """Some prompts: what senders say differently in the two runs, times what receivers' gradients are."""

    def __init__(self, posed: Posed, rows: slice, memory: int | None) -> None:
        self.posed, self.graph, self.drive = posed, posed.graph, posed.drive
        self.memory = memory
        self.scalar = MetricOf(posed.drive, posed.task, start=rows.start)
        self.batch = posed.batches["clean"].rows(rows)
        self.where = torch.from_numpy(posed.where(rows)).to(posed.drive.device)
        both = [posed.batches[run].rows(rows) for run in ("clean", "corrupted")]
        site = "z" if self.graph.nodes == "head" else "attn_out"
        layers = tuple(range(self.drive.n_layers))
        reads = (Read("resid_pre", (0,), None), *(Read(s, layers, None) for s in (site, "mlp_out")))
        outputs = run(posed.model, [Request(batch, reads=reads) for batch in both], memory=memory)
        seen = [[kept[0] for kept in output.activations] for output in outputs]
        self.embedded = [run_seen[0][:, 0] for run_seen in seen]
        self.said = self._said(*zip(*seen, strict=True))

    def _tokens(self, activation: Tensor) -> Tensor:
        """Tokens at which the two runs can differ, one after the other."""
        return activation[self.where.to(activation.device)]

    def _said(self, *pairs: tuple[Tensor, ...]) -> Float[Tensor, "sender token d_model"]:
        """What every sender says in the clean run less what it says in the corrupted one."""
        (embed, attn, mlp), n = pairs, int(self.where.sum())
        d_model = embed[0].shape[-1]
        said = torch.zeros(len(self.graph.senders), n, d_model, device=self.drive.device)
        said[0] = self._tokens(embed[0][:, 0]) - self._tokens(embed[1][:, 0])
        for layer in range(self.drive.n_layers):
            begin = 1 + layer * (self.graph.writers + 1)
            end = begin + self.graph.writers
            one, other = (self._tokens(each[:, layer]) for each in attn)
            if self.graph.nodes == "head":
                block = self.drive.block(layer)
                with torch.no_grad():
                    parts = head_writes(block, torch.cat([one, other]).to(block.device))
                one, other = parts[:, :n], parts[:, n:]
            said[begin:end] = (one - other).to(said)
            said[end] = self._tokens(mlp[0][:, layer]) - self._tokens(mlp[1][:, layer])
        return said

    def scores(self, along: list[float]) -> Float[np.ndarray, "prompt sender receiver"]:
        """Score all edges for each prompt, with gradients averaged over runs along the way."""
        shape = (len(self.batch), *self.graph.edges.shape)
        scores = torch.zeros(shape, device=self.drive.device)
        ends = self.where.sum(dim=1).cumsum(dim=0).tolist()
        for share in along:
            found = self._backward(share)
            for at, heard, gradient in self._heard(found):
                for p, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                    scores[p, :heard, at] += einsum(
                        self.said[:heard, begin:end], gradient[:, begin:end],
                        "sender token d_model, receiver token d_model -> sender receiver",
                    )  # fmt: skip
        return (scores / len(along)).cpu().numpy()

    def _backward(self, share: float) -> Backward:
        """Gradients in a run whose embedding lies between the corrupted (0) and the clean one (1)."""
        clean, corrupted = self.embedded
        edits = ()
        if share < 1:
            edits = (Edit("resid_pre", 0, corrupted + share * (clean - corrupted), None),)
        last = self.drive.n_layers - 1
        read = ("resid_pre",) if self.graph.parallel else ("resid_pre", "resid_mid")
        sites = (*read, "q", "k", "v", "mlp_out")
        places = [(site, layer) for site in sites for layer in range(self.drive.n_layers)]
        return backward(
            self.posed.model, self.batch, self.scalar, places=[*places, ("resid_post", last)],
            edits=edits, memory=self.memory,
        )  # fmt: skip

    def _heard(
        self, found: Backward
    ) -> Iterator[tuple[slice, int, Float[Tensor, "receiver token d_model"]]]:
        """Receivers of each place, how many senders they hear, and gradients by what they read."""
        graph, last = self.graph, self.drive.n_layers
        for layer in range(last):
            block = self.drive.block(layer)
            found_at = partial(self._at, found, layer, block)
            read, _ = found_at("resid_pre")
            at = graph.rows(layer)
            pulled = pull_attention(block, read, [found_at(s)[1] for s in "qkv"], graph)
            yield at, graph.heard(graph.receivers[at.start]), pulled.to(self.said)
            if not graph.parallel:
                read, _ = found_at("resid_mid")
            pulled = _pull(
                lambda resid, b=block: [b.mlp_out(resid)], read, [found_at("mlp_out")[1:]]
            )
            at = graph.rows(layer, "mlp")
            yield at, graph.heard(graph.receivers[at.start]), pulled.to(self.said)
        final = self._tokens(found.gradients["resid_post", last - 1])
        yield graph.rows(last), len(graph.senders), final[None].to(self.said)

    def _at(self, found: Backward, layer: int, block: Block, site: str) -> tuple[Tensor, Tensor]:
        """Activation and gradient at one place, where the block is."""
        kept = (found.activations[site, layer], found.gradients[site, layer])
        return self._tokens(kept[0]).to(block.device), self._tokens(kept[1]).to(block.device)


def pull_attention(
    block: Block,
    read: Float[Tensor, "token d_model"],
    gradients: Sequence[Float[Tensor, "token _ d_head"]],
    graph: Graph,
) -> Float[Tensor, "receiver token d_model"]:
    """Turn gradients by queries, keys and values into gradients by what each of them alone has read.

    Args:
        block: The block.
        read: The residual stream that it reads.
        gradients: By queries, keys and values.
        graph: The graph.

    Returns:
        One for each receiver of the layer's attention.
    """
    if graph.nodes == "layer":
        return _pull(block.project, read, [list(gradients)])
    alone = []
    for site, gradient in enumerate(gradients):
        for head in range(gradient.shape[1]):
            own = torch.zeros_like(gradient)
            own[:, head] = gradient[:, head]
            alone.append([own if other == site else None for other in range(len(gradients))])
    return _pull(block.project, read, alone)


def _pull(
    function: Callable[[Tensor], Any], read: Tensor, by_output: list[Any]
) -> Float[Tensor, "receiver token d_model"]:
    """Pull gradients by a function's outputs back to its input, several times through one forward."""
    with torch.enable_grad():
        read = read.detach().requires_grad_(True)
        outputs = function(read)
        pulled = []
        for gradients in by_output:
            there = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
            ours, theirs = zip(*there, strict=True)
            pulled += torch.autograd.grad(ours, read, theirs, retain_graph=True)
    return torch.stack(pulled)
