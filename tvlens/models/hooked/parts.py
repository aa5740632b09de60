"""A HookedTransformer's block in parts that act on tokens, each for itself.

The same weights and the same formulas as the block's own forward, without its hook points and without the
copies of whole weight matrices that it makes on each call. What the engine computes from these parts is
compared with the model's own forward before it is used.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.models._turn import turn

# Fewer tokens than this and a product for each head is cheaper than laying out the weights anew.
_FEW_TOKENS = 64


class HookedBlock:
    """One block of a HookedTransformer; see `tvlens.models.runner.Block`."""

    def __init__(self, block: Any, cfg: Any) -> None:
        attn = block.attn
        self.attn, self.mlp, self.cfg = attn, block.mlp, cfg
        self.device: torch.device = attn.W_Q.device
        self.scale = float(attn.attn_scale)
        self.soft_cap = max(float(cfg.attn_scores_soft_cap or 0.0), 0.0)
        self.window: int | None = cfg.window_size if attn.attn_type == "local" else None
        self.parallel: bool = cfg.parallel_attn_mlp
        both_sides = cfg.use_normalization_before_and_after
        self._ln1, self._ln2 = norm(block.ln1), norm(block.ln2)
        self._ln1_post = norm(block.ln1_post) if both_sides else _same
        self._ln2_post = norm(block.ln2_post) if both_sides else _same
        self._mlp = _mlp(block.mlp)
        self._joined: tuple[Tensor, Tensor] | None = None

    def project(
        self, resid: Float[Tensor, "token d_model"]
    ) -> tuple[
        Float[Tensor, "token head d_head"],
        Float[Tensor, "token kv_head d_head"],
        Float[Tensor, "token kv_head d_head"],
    ]:
        """Give queries, keys and values as they are at their hook sites."""
        normed, attn = self._ln1(resid), self.attn
        grouped = hasattr(attn, "_W_K") and not self.cfg.ungroup_grouped_query_attention
        keys = (attn._W_K, attn._b_K) if grouped else (attn.W_K, attn.b_K)
        values = (attn._W_V, attn._b_V) if grouped else (attn.W_V, attn.b_V)
        weights = ((attn.W_Q, attn.b_Q), keys, values)
        if len(resid) < _FEW_TOKENS:
            q, k, v = (_heads(normed, *each) for each in weights)
            return q, k, v
        if self._joined is None:
            # For many tokens, once: the block may be asked for further pieces of them.
            self._joined = (
                torch.cat([weight.transpose(0, 1).flatten(1) for weight, _ in weights], dim=1),
                torch.cat([bias.flatten() for _, bias in weights]),
            )
        out = torch.addmm(self._joined[1], normed, self._joined[0])
        q, k, v = out.split([bias.numel() for _, bias in weights], dim=1)
        shapes = [bias.shape for _, bias in weights]
        return q.unflatten(1, shapes[0]), k.unflatten(1, shapes[1]), v.unflatten(1, shapes[2])

    def rotate(
        self,
        queries: Float[Tensor, "token head d_head"],
        keys: Float[Tensor, "token kv_head d_head"],
        position: Int[Tensor, " token"],
    ) -> tuple[Float[Tensor, "token head d_head"], Float[Tensor, "token kv_head d_head"]]:
        """Norm queries and keys where the model does, and turn them by their positions."""
        if self.cfg.use_qk_norm:
            queries, keys = norm(self.attn.q_norm)(queries), norm(self.attn.k_norm)(keys)
        if self.cfg.positional_embedding_type == "rotary":
            cos, sin = (
                table[position][:, None] for table in (self.attn.rotary_cos, self.attn.rotary_sin)
            )
            adjacent = self.cfg.rotary_adjacent_pairs
            queries = turn(queries, cos, sin, adjacent=adjacent)
            keys = turn(keys, cos, sin, adjacent=adjacent)
        return queries, keys

    def attn_out(self, z: Float[Tensor, "token head d_head"]) -> Float[Tensor, "token d_model"]:
        """Turn head outputs into what attention adds to the residual stream."""
        return self._ln1_post(self.project_out(z))

    def project_out(self, z: Float[Tensor, "token head d_head"]) -> Float[Tensor, "token d_model"]:
        """Multiply head outputs by W_O and add its bias; what follows is `norm_attn_out`."""
        # Not einops: its checks cost as much as a launch, and this runs for every block of every pass.
        return torch.addmm(self.attn.b_O, z.flatten(1), self.attn.W_O.flatten(0, 1))

    def norm_attn_out(self, out: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Do what stands between W_O and the residual stream: a norm in some models, else nothing."""
        return self._ln1_post(out)

    def mlp_out(self, resid: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """Give what the MLP, which reads this residual, adds to it; its norms included."""
        return self._ln2_post(self._mlp(self._ln2(resid)))


def norm(
    module: Any,
) -> Callable[[Float[Tensor, "*token width"]], Float[Tensor, "*token width"]]:
    """Give the function of a TransformerLens norm as one fused call.

    Args:
        module: A LayerNorm, RMSNorm, their folded kinds, or anything else, which is then called itself.

    Returns:
        The function, over the last axis of its argument.
    """
    from transformer_lens.components.layer_norm import LayerNorm
    from transformer_lens.components.layer_norm_pre import LayerNormPre
    from transformer_lens.components.rms_norm import RMSNorm
    from transformer_lens.components.rms_norm_pre import RMSNormPre

    kind = type(module)
    if kind in (LayerNorm, LayerNormPre):
        weight, bias = getattr(module, "w", None), getattr(module, "b", None)
        return lambda x: F.layer_norm(x, x.shape[-1:], weight, bias, module.eps)
    if kind in (RMSNorm, RMSNormPre):
        weight = getattr(module, "w", None)
        return lambda x: F.rms_norm(x, x.shape[-1:], weight, module.eps)
    return lambda x: module(x[None])[0]


def _same(x: Tensor) -> Tensor:
    return x


def _heads(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Project a few tokens for each head: (token head d_head)."""
    side_by_side = weight.transpose(0, 1)
    if side_by_side.stride(1) == weight.shape[2] * side_by_side.stride(2):
        out = torch.addmm(bias.flatten(), x, side_by_side.flatten(1))
        return out.unflatten(1, bias.shape)
    # Laid out head by head: a product for each spares a copy of the weights.
    return torch.baddbmm(bias[:, None], x.expand(len(bias), *x.shape), weight).transpose(0, 1)


def _mlp(module: Any) -> Callable[[Tensor], Tensor]:
    from transformer_lens.components.mlps.gated_mlp import GatedMLP
    from transformer_lens.components.mlps.mlp import MLP

    kind, own_norm = type(module), getattr(module, "ln", None)
    if own_norm is None and kind is MLP:
        return partial(_plain_mlp, module, _activation(module))
    if own_norm is None and kind is GatedMLP:
        return partial(_gated_mlp, module, _activation(module))
    return lambda x: module(x[None])[0]


def _activation(module: Any) -> Callable[[Tensor], Tensor]:
    # TransformerLens writes this one out in eight passes over memory.
    if module.cfg.act_fn == "gelu_new":
        return partial(F.gelu, approximate="tanh")
    return module.act_fn


def _plain_mlp(module: Any, act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    hidden = act(torch.addmm(module.b_in, x, module.W_in))
    return torch.addmm(module.b_out, hidden, module.W_out)


def _gated_mlp(module: Any, act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    hidden = act(x @ module.W_gate) * (x @ module.W_in) + module.b_in
    return torch.addmm(module.b_out, hidden, module.W_out)
