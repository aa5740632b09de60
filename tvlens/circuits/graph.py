"""A model as a graph: who writes into the residual stream, who reads it, and in which order.

The residual stream is a sum, so whoever reads it hears the embedding, every head and every MLP before it,
each by itself. Every such pair is an edge. A head reads three times, as queries, keys and values; where
several heads share keys and values, so they do here: a key-value head reads once, for its whole group.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import einops
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens._errors import unknown
from tvlens.models.runner import Block, Runner, runner

NODES = ("head", "layer")
"""What a node of attention is: one head, or all heads of a layer, which then read once."""


@dataclass(frozen=True)
class Node:
    """Someone who writes or reads.

    Attributes:
        kind: ``"embed"``, ``"head"``, ``"attn"`` or ``"mlp"`` of those who write; ``"q"``, ``"k"``, ``"v"``,
            ``"attn"``, ``"mlp"`` or ``"logits"`` of those who read.
        layer: Layer, from 0; -1 for the embedding, the number of layers for the logits.
        head: Head, of ``"k"`` and ``"v"`` the key-value head; -1 where there is none.
        shared: Whether the head is a key-value head of several heads.
    """

    kind: str
    layer: int
    head: int = -1
    shared: bool = False

    @property
    def name(self) -> str:
        """What it is called: ``h3.7`` is head 7 of layer 3, ``kv3.1.k`` the keys of key-value head 1."""
        if self.kind in ("embed", "logits"):
            return self.kind
        if self.head < 0:
            return f"{self.kind}{self.layer}"
        if self.kind == "head":
            return f"h{self.layer}.{self.head}"
        return f"{'kv' if self.shared else 'h'}{self.layer}.{self.head}.{self.kind}"


@dataclass(frozen=True)
class Graph:
    """The shape of a model, and all its edges.

    Attributes:
        n_layers: Number of blocks.
        n_heads: Heads of a layer.
        n_kv_heads: Key-value heads of a layer.
        parallel: Whether an MLP reads what its layer's attention reads, and not what it says.
        nodes: ``"head"``, or ``"layer"`` for the coarser graph.
        normed: Whether a norm stands between a layer's heads and the residual stream: its scale depends on
            all of them, so none of them speaks wholly for itself.

    Example:
        >>> graph = Graph(n_layers=2, n_heads=4, n_kv_heads=2, parallel=False)
        >>> len(graph.senders), len(graph.receivers), graph.n_edges
        (11, 19, 82)
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool
    nodes: str = "head"
    normed: bool = False

    def __post_init__(self) -> None:
        if self.nodes not in NODES:
            raise unknown("choice of nodes", self.nodes, NODES)

    @cached_property
    def senders(self) -> tuple[Node, ...]:
        """Those who write, in order."""
        return tuple(self._senders())

    def _senders(self) -> Iterator[Node]:
        yield Node("embed", -1)
        for layer in range(self.n_layers):
            if self.nodes == "layer":
                yield Node("attn", layer)
            else:
                yield from (Node("head", layer, head) for head in range(self.n_heads))
            yield Node("mlp", layer)

    @cached_property
    def receivers(self) -> tuple[Node, ...]:
        """Those who read, in order."""
        return tuple(self._receivers())

    def _receivers(self) -> Iterator[Node]:
        shared = self.n_kv_heads != self.n_heads
        for layer in range(self.n_layers):
            if self.nodes == "layer":
                yield Node("attn", layer)
            else:
                yield from (Node("q", layer, head) for head in range(self.n_heads))
                for kind in ("k", "v"):
                    yield from (Node(kind, layer, h, shared) for h in range(self.n_kv_heads))
            yield Node("mlp", layer)
        yield Node("logits", self.n_layers)

    @property
    def writers(self) -> int:
        """How many nodes of attention write in a layer; the MLP comes after them."""
        return self.n_heads if self.nodes == "head" else 1

    @property
    def readers(self) -> int:
        """How many nodes of attention read in a layer; the MLP comes after them."""
        return self.n_heads + 2 * self.n_kv_heads if self.nodes == "head" else 1

    def heard(self, receiver: Node) -> int:
        """How many senders, from the first, a receiver hears."""
        before = 1 + min(receiver.layer, self.n_layers) * (self.writers + 1)
        if receiver.kind == "mlp" and not self.parallel:
            return before + self.writers
        return before

    @cached_property
    def edges(self) -> Bool[np.ndarray, "sender receiver"]:
        """Which sender is heard by which receiver."""
        heard = np.array([self.heard(node) for node in self.receivers])
        return np.arange(len(self.senders))[:, None] < heard

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return int(self.edges.sum())

    def speaks(self, receiver: int) -> tuple[int, ...]:
        """Senders that say something else when a receiver hears something else; none for the logits."""
        node = self.receivers[receiver]
        begin = 1 + node.layer * (self.writers + 1)
        if node.kind == "logits":
            return ()
        if node.kind == "mlp":
            return (begin + self.writers,)
        if node.kind == "attn":
            return (begin,)
        if node.kind == "q":
            return (begin + node.head,)
        group = self.n_heads // self.n_kv_heads
        return tuple(range(begin + node.head * group, begin + (node.head + 1) * group))

    def changes(self, receiver: int) -> tuple[int, ...]:
        """Senders that `speaks` names, and those whose words change in size because these do."""
        node = self.receivers[receiver]
        if not self.normed or node.kind not in ("q", "k", "v"):
            return self.speaks(receiver)
        begin = 1 + node.layer * (self.writers + 1)
        return tuple(range(begin, begin + self.writers))

    def rows(self, layer: int, kind: str = "attn") -> slice:
        """Numbers of the receivers of a layer: its attention, or its MLP; of the logits with any kind."""
        if layer == self.n_layers:
            return slice(len(self.receivers) - 1, len(self.receivers))
        begin = layer * (self.readers + 1)
        if kind == "mlp":
            return slice(begin + self.readers, begin + self.readers + 1)
        return slice(begin, begin + self.readers)

    def to_dict(self) -> dict[str, Any]:
        """Give the shape, JSON-ready; ``Graph(**shape)`` makes the graph again."""
        return asdict(self)


def graph_of(model: Any, *, nodes: str = "head") -> Graph:
    """Give the graph of a model.

    Args:
        model: A TransformerLens model.
        nodes: ``"head"``, or ``"layer"`` for the coarser graph without heads.

    Returns:
        The graph.

    Raises:
        ValueError: There is no such choice, or the model cannot be run in parts.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> [node.name for node in graph_of(tiny_model()).senders[:6]]
        ['embed', 'h0.0', 'h0.1', 'h0.2', 'h0.3', 'mlp0']
    """
    drive = runner(model)
    if not drive.steppable:
        raise ValueError(
            "the edges of this model cannot be told apart, for tvlens cannot run its blocks in parts; "
            "patch_paths works on whole runs."
        )
    if drive.has_user_hooks():
        raise ValueError(
            "hooks sit on this model that the parts of its blocks know nothing of; take them off "
            "(model.reset_hooks()) before edges are measured."
        )
    parallel = {drive.block(layer).parallel for layer in range(drive.n_layers)}
    if len(parallel) > 1:
        raise ValueError("some blocks of this model are parallel and some are not: no such graph.")
    return Graph(
        n_layers=drive.n_layers,
        n_heads=drive.site_shape("z")[0],
        n_kv_heads=drive.site_shape("v")[0],
        parallel=parallel.pop(),
        nodes=nodes,
        normed=any(_normed(drive, layer) for layer in range(drive.n_layers)),
    )


@torch.no_grad()
def _normed(drive: Runner, layer: int) -> bool:
    block, width = drive.block(layer), drive.site_shape("attn_out")[0]
    probe = torch.arange(width, device=block.device).to(drive.dtype)[None] + 1
    return not torch.equal(block.norm_attn_out(probe), probe)


def head_writes(
    block: Block, z: Float[Tensor, "token head d_head"]
) -> Float[Tensor, "head token d_model"]:
    """Split what attention adds to the residual stream into parts of its heads.

    Where a norm stands before the residual stream, it is taken with the scale it has for all heads together,
    so that the parts sum to the whole there, too. A bias is shared equally.

    Args:
        block: The block.
        z: Head outputs.

    Returns:
        The parts, whose sum is ``block.attn_out(z)``.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> block, z = runner(tiny_model()).block(0), torch.randn(5, 4, 8)
        >>> torch.allclose(head_writes(block, z).sum(0), block.attn_out(z), atol=1e-5)
        True
    """
    n_heads, d_head = z.shape[1:]
    each = torch.eye(n_heads * d_head, device=z.device, dtype=z.dtype).unflatten(1, (n_heads, -1))
    # The matrix as the model multiplies by it, whatever kind it is.
    bias = block.project_out(torch.zeros_like(each[:1]))
    weights = (block.project_out(each) - bias).unflatten(0, (n_heads, d_head))
    parts = einops.einsum(
        z, weights, "token head d_head, head d_head d_model -> head token d_model"
    )
    parts = parts + bias / n_heads
    before = block.project_out(z)
    after = block.norm_attn_out(before)
    if after is before or torch.equal(after, before):
        return parts
    return parts * torch.where(before == 0, 0.0, after / before)
