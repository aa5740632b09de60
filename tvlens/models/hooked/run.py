"""Running a HookedTransformer, whole or in parts."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.models.hooked.parts import HookedBlock, norm
from tvlens.sites import hook_name

# Settings of attention that `HookedBlock` does not know.
_UNKNOWN = ("use_attention_sinks", "use_logn_attn", "use_dynamic_ntk_rope", "load_in_4bit")


class HookedRunner:
    """Drives a HookedTransformer through its own hook points, or through its own weights in parts."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cfg = model.cfg
        self.n_layers: int = model.cfg.n_layers

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens."""
        return self.model.embed.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the residual stream."""
        return self.model.embed.W_E.dtype

    @property
    def steppable(self) -> bool:
        """Whether the model can be run in parts: causal, with positions the engine knows."""
        from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

        cfg = self.cfg
        return (
            cfg.positional_embedding_type in ("standard", "rotary")
            and cfg.attention_dir == "causal"
            and cfg.original_architecture not in POST_NORM_ARCHITECTURES
            and cfg.clip_qkv is None
            and not cfg.attn_only
            and not any(getattr(cfg, name, False) for name in _UNKNOWN)
        )

    def has_user_hooks(self) -> bool:
        """Whether someone has put hooks on the model, which may rely on seeing whole prompts."""
        # By hand: torch's own walk over the modules costs a millisecond, on every run.
        modules = [self.model]
        while modules:
            module = modules.pop()
            if module._forward_hooks or module._forward_pre_hooks:
                return True
            modules.extend(child for child in module._modules.values() if child is not None)
        return False

    def site_shape(self, site: str) -> tuple[int, ...]:
        """Shape of a site's activation after batch and position; of ``pattern``, without its keys."""
        cfg = self.cfg
        kv_heads = cfg.n_key_value_heads or cfg.n_heads
        if cfg.ungroup_grouped_query_attention:
            kv_heads = cfg.n_heads
        heads = {"z": cfg.n_heads, "q": cfg.n_heads, "k": kv_heads, "v": kv_heads}
        if site == "pattern":
            return (cfg.n_heads,)
        return (heads[site], cfg.d_head) if site in heads else (cfg.d_model,)

    def has(self, site: str, layer: int) -> bool:
        """Whether the model has this site: models with parallel attention have no resid_mid."""
        return self.hook_name(site, layer) in self.model.hook_dict

    def hook_name(self, site: str, layer: int) -> str:
        """Name of the hook point where the model keeps a site."""
        return hook_name(site, layer)

    def hooked(self, hooks: list[tuple[str, Any]]) -> AbstractContextManager[Any]:
        """Context in which functions sit on hook points, beside the user's own."""
        return self.model.hooks(fwd_hooks=hooks)

    def whole(
        self,
        tokens: Int[Tensor, "row position"],
        mask: Int[Tensor, "row position"],
        hooks: list[tuple[str, Any]],
    ) -> Float[Tensor, "row position d_model"]:
        """Run every block over left-padded prompts through the model's own forward, with hooks."""
        return self.model.run_with_hooks(
            tokens,
            attention_mask=mask,
            stop_at_layer=self.n_layers,
            fwd_hooks=hooks,
        )

    def prepare(self, width: int) -> None:
        """Let the tables of rotary positions grow to prompts of this many tokens, as the model would."""
        if self.cfg.positional_embedding_type != "rotary":
            return
        for block in self.model.blocks:
            if width > len(block.attn.rotary_cos):
                block.attn._extend_rotary_embeddings(width)

    def embed(
        self, tokens: Int[Tensor, " token"], position: Int[Tensor, " token"]
    ) -> Float[Tensor, "token d_model"]:
        """Embed tokens that stand at these positions of their prompts."""
        resid = self.model.embed(tokens[None])[0]
        if self.cfg.positional_embedding_type == "standard":
            resid = resid + self.model.pos_embed.W_pos[position]
        return resid

    def embed_position(
        self, tokens: Int[Tensor, " token"], position: Int[Tensor, " token"]
    ) -> Float[Tensor, "token d_model"]:
        """Give that part of `embed` which is an embedding of the position; zeros where there is none."""
        if self.cfg.positional_embedding_type == "standard":
            return self.model.pos_embed.W_pos[position]
        return torch.zeros(len(tokens), self.cfg.d_model, device=self.device, dtype=self.dtype)

    def block(self, layer: int) -> HookedBlock:
        """Give one block in parts."""
        return HookedBlock(self.model.blocks[layer], self.cfg)

    def logits(
        self,
        resid: Float[Tensor, "row d_model"],
        columns: Int[Tensor, "row column"] | None = None,
    ) -> Float[Tensor, "row column"]:
        """Read final residuals out through final norm, unembedding and soft cap."""
        logits = self.unembed(self.last_norm(resid), columns)
        cap = self.soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    @property
    def soft_cap(self) -> float:
        """Bound of the logits; 0 where there is none."""
        return max(float(self.cfg.output_logits_soft_cap or 0.0), 0.0)

    def last_norm(self, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Give final residuals as the unembedding reads them."""
        resid = resid.to(self.model.unembed.W_U.device)
        return resid if self.cfg.normalization_type is None else norm(self.model.ln_final)(resid)

    def unembed(
        self,
        normed: Float[Tensor, "row d_model"],
        columns: Int[Tensor, "row column"] | None = None,
    ) -> Float[Tensor, "row column"]:
        """Unembed what `last_norm` gives, up to the soft cap."""
        unembed = self.model.unembed
        if columns is None:
            # The model's own unembedding copies its whole matrix first.
            return torch.addmm(unembed.b_U, normed, unembed.W_U)
        weights = unembed.W_U[:, columns]
        return torch.einsum("rd,drc->rc", normed, weights) + unembed.b_U[columns]
