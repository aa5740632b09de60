"""A run in which some edges carry what their senders say in the corrupted run: no estimate, true ablation.

Every receiver reads the corrupted residual stream, plus what the senders of its uncut edges say differently
in this very run. With all edges that is the clean run, with none the corrupted one. The model goes block by
block, all positions at once.
"""

from dataclasses import dataclass, field

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.circuits.graph import Graph, head_writes
from tvlens.encoding import TokenBatch
from tvlens.engine.attention import Bucket, attend
from tvlens.models.runner import Runner


@dataclass
class _Seen:
    """The corrupted run: what stands where, by layer."""

    before: list[Tensor] = field(default_factory=list)
    between: list[Tensor] = field(default_factory=list)
    z: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)


class CutRun:
    """Runs some pairs of prompts with any choice of edges left whole.

    Args:
        drive: The model.
        graph: Its graph.
        clean: Clean prompts.
        corrupted: Corrupted prompts of the same lengths.
    """

    def __init__(
        self, drive: Runner, graph: Graph, clean: TokenBatch, corrupted: TokenBatch
    ) -> None:
        self.drive, self.graph = drive, graph
        lengths = corrupted.lengths.to(drive.device)
        drive.prepare(int(lengths.max()))
        step = torch.arange(int(lengths.max()), device=drive.device)
        # Where a prompt is over its last token stands once more, which changes nothing.
        position = torch.minimum(step, lengths[:, None] - 1)
        numbers = (lengths.cumsum(0) - lengths)[:, None] + position
        self.bucket = Bucket(numbers, numbers, position)
        self.position = position[step < lengths[:, None]]
        self.last = lengths.cumsum(0) - 1
        self.embedded, resid = (self._embed(batch) for batch in (clean, corrupted))
        with torch.no_grad():
            self.final = self._corrupted(resid)

    def _embed(self, batch: TokenBatch) -> Float[Tensor, "token d_model"]:
        tokens = batch.tokens[batch.mask].to(self.drive.device)
        with torch.no_grad():
            return self.drive.embed(tokens, self.position)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        block = self.drive.block(layer)
        to = block.device
        rows = self.bucket
        if rows.position.device != to:
            rows = Bucket(rows.queries.to(to), rows.keys.to(to), rows.position.to(to))
        q, k = block.rotate(q, k, self.position.to(to))
        return attend(block, q, k, v, [rows])

    def _corrupted(self, resid: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Run the corrupted prompts and keep what stands where."""
        self.seen = _Seen()
        for layer in range(self.drive.n_layers):
            block = self.drive.block(layer)
            resid = resid.to(block.device)
            z = self._attend(layer, *block.project(resid))
            between = resid + block.attn_out(z)
            mlp = block.mlp_out(resid if block.parallel else between)
            for kept, value in zip(
                (self.seen.before, self.seen.between, self.seen.z, self.seen.mlp),
                (resid, resid if block.parallel else between, z, mlp),
                strict=True,
            ):
                kept.append(value)
            resid = between + mlp
        return resid

    @torch.no_grad()
    def logits(self, whole: Bool[Tensor, "sender receiver"]) -> Float[Tensor, "prompt d_vocab"]:
        """Run with these edges whole and all others cut.

        Args:
            whole: Which edges carry what is said in this run.

        Returns:
            Logits at each prompt's last token.
        """
        graph, drive = self.graph, self.drive
        base = self.seen.before[0].to(drive.device)
        # Sums of many small differences: in half precision they would drown.
        kind = torch.promote_types(base.dtype, torch.float32)
        said = torch.zeros(len(graph.senders), *base.shape, device=drive.device, dtype=kind)
        said[0] = self.embedded - base
        for layer in range(drive.n_layers):
            begin = 1 + layer * (graph.writers + 1)
            end = begin + graph.writers
            said[begin:end] = self._attention(layer, said, whole)
            block, at = drive.block(layer), graph.rows(layer, "mlp")
            ((_, read),) = self._read(self.seen.between[layer], said, whole, at)
            said[end] = (block.mlp_out(read) - self.seen.mlp[layer]).to(said)
        at = graph.rows(drive.n_layers)
        final = self.final[self.last.to(self.final.device)]
        ((_, read),) = self._read(final, said[:, self.last], whole, at)
        return drive.logits(read)

    def _attention(
        self, layer: int, said: Tensor, whole: Tensor
    ) -> Float[Tensor, "sender token d_model"]:
        """What attention of a layer says differently, by head where heads are nodes."""
        graph, block = self.graph, self.drive.block(layer)
        base, known = self.seen.before[layer], self.seen.z[layer]
        read = self._read(base, said, whole, graph.rows(layer))
        if graph.nodes == "layer":
            z = self._attend(layer, *block.project(read[0][1]))
            return (block.attn_out(z) - block.attn_out(known)).to(said)[None]
        inputs = [torch.empty(0)] * 3
        ends = [graph.n_heads, graph.n_heads + graph.n_kv_heads, graph.readers]
        for receivers, resid in read:
            for site, projected in enumerate(block.project(resid)):
                if not inputs[site].numel():
                    inputs[site] = torch.empty_like(projected)
                heads = receivers - (0, *ends)[site]
                heads = heads[(heads >= 0) & (receivers < ends[site])]
                inputs[site][:, heads] = projected[:, heads]
        z = self._attend(layer, *inputs)
        parts = head_writes(block, torch.cat([z, known]))
        return (parts[:, : len(z)] - parts[:, len(z) :]).to(said)

    def _read(
        self, base: Tensor, said: Tensor, whole: Tensor, at: slice
    ) -> list[tuple[Tensor, Float[Tensor, "token d_model"]]]:
        """What receivers read; those who read the same are taken together, by number within the place."""
        heard = self.graph.heard(self.graph.receivers[at.start])
        open_edges = whole[:heard, at].T
        distinct, which = open_edges.unique(dim=0, return_inverse=True)
        read = einsum(
            distinct.to(said),
            said[:heard],
            "input sender, sender token d_model -> input token d_model",
        )
        read = (read.to(base.device) + base).to(base.dtype)
        return [
            ((which == i).nonzero()[:, 0].to(base.device), resid) for i, resid in enumerate(read)
        ]
