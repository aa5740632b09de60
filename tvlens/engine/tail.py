"""The tail of a run: what becomes of the last token from one layer on, ready to be differentiated.

Whatever is written at a prompt's last token changes nothing that stands before it. So the keys and values of
all earlier tokens are taken from one clean run, and what a vector does is computed, and differentiated, with
one token a prompt and only the blocks above it. Training a vector costs a small part of training a prompt.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.encoding import TokenBatch
from tvlens.engine import Read, Request, run
from tvlens.engine.attention import Bucket, attend
from tvlens.models.runner import runner
from tvlens.sites import check_layer


class Tail:
    """The blocks above a layer, at prompts' last tokens, as a function of what stands there.

    Args:
        model: A TransformerLens model.
        batch: The prompts.
        layer: The function's argument stands after this layer; negative from the end.
        memory: Bytes that the engine's activations may take.

    Attributes:
        clean: What stands there in the untouched run.

    Raises:
        ValueError: The model cannot be run in parts, someone's hooks sit on it, or there is no such layer.

    Example:
        >>> from tvlens.patching.pairs import as_batch
        >>> from tvlens.testing import tiny_model
        >>> model = tiny_model()
        >>> tail = Tail(model, as_batch(model, ["a->A b->", "q->"]), layer=0)
        >>> tuple(tail(tail.clean).shape) == (2, model.cfg.d_model)
        True
    """

    clean: Float[Tensor, "prompt d_model"]

    def __init__(
        self, model: Any, batch: TokenBatch, *, layer: int, memory: int | None = None
    ) -> None:
        self.drive = drive = runner(model)
        if not drive.steppable or drive.has_user_hooks():
            why = "hooks sit on it" if drive.steppable else "it cannot be run in parts"
            raise ValueError(
                f"the blocks above a layer cannot be run by themselves on this model: {why}. "
                "Take hooks off with model.reset_hooks()."
            )
        self.layer = check_layer(layer, drive.n_layers)
        above = tuple(range(self.layer + 1, drive.n_layers))
        reads = (Read("resid_post", (self.layer,)), Read("k", above, None), Read("v", above, None))
        (output,) = run(model, [Request(batch, reads=reads if above else reads[:1])], memory=memory)
        self.clean = output.activations[0][0, :, 0]
        lengths = batch.lengths.to(drive.device)
        self._last = lengths - 1
        step = torch.arange(int(lengths.max()), device=drive.device)
        before = step < self._last[:, None]
        # The number of each earlier token in a list of them all; -1 stands for the row's own last token.
        self._table = torch.where(before, before.flatten().cumsum(0).view_as(before) - 1, -1)
        self._kept = [self._earlier(i, output.activations, before) for i in range(len(above))]

    def _earlier(self, i: int, seen: tuple[Tensor, ...], before: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of all earlier tokens, in one layer."""
        block = self.drive.block(self.layer + 1 + i)
        k, v = (each[0, :, i][before].to(block.device) for each in seen[1:])
        position = before.nonzero()[:, 1].to(block.device)
        asked = k.new_zeros(len(k), *self.drive.site_shape("q"))
        with torch.no_grad():
            return block.rotate(asked, k, position)[1], v

    def __call__(
        self, resid: Float[Tensor, "row d_model"], prompt: Int[Tensor, " row"] | None = None
    ) -> Float[Tensor, "row d_model"]:
        """Run the blocks above.

        Args:
            resid: What stands after the layer.
            prompt: Which prompt each row belongs to; by default one row for each prompt, in order.

        Returns:
            The residual stream after the last block.
        """
        table, last = self._table, self._last
        if prompt is not None:
            table, last = table[prompt.to(table.device)], last[prompt.to(last.device)]
        n = len(self._kept[0][0]) if self._kept else 0
        own = torch.arange(len(last), device=last.device)[:, None]
        keys = torch.where(table < 0, n + own, table)
        for i, (k, v) in enumerate(self._kept):
            block = self.drive.block(self.layer + 1 + i)
            resid, to = resid.to(block.device), block.device
            rows = Bucket(own.to(to), keys.to(to), last[:, None].to(to))
            asked, key, value = block.project(resid)
            asked, key = block.rotate(asked, key, last.to(to))
            z = attend(block, asked, torch.cat([k, key]), torch.cat([v, value]), [rows])
            between = resid + block.attn_out(z)
            resid = between + block.mlp_out(resid if block.parallel else between)
        return resid
