"""Running a HookedTransformer block by block."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.sites import hook_name


@dataclass(frozen=True)
class KeysValues:
    """One layer's keys (before rotation) and values of a shared prefix.

    Attributes:
        keys: Keys as the model's own cache keeps them.
        values: Values.
    """

    keys: Float[Tensor, "prompt position head d_head"]
    values: Float[Tensor, "prompt position head d_head"]


class _Past:
    """Stands in for TransformerLens' cache entry: one prefix serves many rows, and is never changed."""

    def __init__(self, past: KeysValues | None, rows: Int[Tensor, " row"] | None) -> None:
        self.past, self.rows = past, rows
        self.own: KeysValues  # set when the block appends to what it takes for its cache

    @property
    def past_keys(self) -> Tensor:
        # TransformerLens reads the length of the past from this tensor's shape, and nothing else.
        return self.past.keys if self.past is not None else torch.empty(0, 0)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.own = KeysValues(keys, values)
        if self.past is None:
            return keys, values
        return (
            torch.cat([self.past.keys[self.rows], keys], dim=1),
            torch.cat([self.past.values[self.rows], values], dim=1),
        )


class HookedRunner:
    """Drives a HookedTransformer one block at a time, through its own modules and hook points."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cfg = model.cfg
        self.n_layers: int = model.cfg.n_layers

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens."""
        return self.model.embed.W_E.device

    def site_shape(self, site: str) -> tuple[int, ...]:
        """Shape of a site's activation after batch and position."""
        cfg = self.cfg
        kv_heads = cfg.n_key_value_heads or cfg.n_heads
        if cfg.ungroup_grouped_query_attention:
            kv_heads = cfg.n_heads
        heads = {"z": cfg.n_heads, "q": cfg.n_heads, "k": kv_heads, "v": kv_heads}
        return (heads[site], cfg.d_head) if site in heads else (cfg.d_model,)

    def bytes_of_rows(self, rows: int, positions: int, width: int) -> int:
        """Estimate the activations inside a block of rows that run some positions of longer prompts."""
        cfg = self.cfg
        a_token = 10 * cfg.d_model + 4 * (cfg.d_mlp or 0) + 6 * cfg.n_heads * cfg.d_head
        scores = 4 * cfg.n_heads * width
        # Each row gathers its own keys and values, and TransformerLens repeats them for every head.
        prefix = 4 * cfg.n_heads * cfg.d_head * (width - positions)
        numbers = rows * (positions * (a_token + scores) + prefix)
        return numbers * self.model.embed.W_E.element_size()

    def hooked(self, hooks: list[tuple[str, Any]]) -> Any:
        """Context in which functions sit on hook points; the user's own stay where they are."""
        # Entering TransformerLens' context costs milliseconds even where there is nothing to hook.
        return self.model.hooks(fwd_hooks=hooks) if hooks else nullcontext()

    @property
    def steppable(self) -> bool:
        """Whether blocks can be run one by one: not with positions that live outside the residual."""
        return self.cfg.positional_embedding_type in ("standard", "rotary")

    def has_user_hooks(self) -> bool:
        """Whether someone has put hooks on the model, which may rely on seeing whole prompts."""
        modules = self.model.modules()
        return any(module._forward_hooks or module._forward_pre_hooks for module in modules)

    def has(self, site: str, layer: int) -> bool:
        """Whether the model has this site: models with parallel attention have no resid_mid."""
        return hook_name(site, layer) in self.model.hook_dict

    def embed(
        self, tokens: Int[Tensor, "row position"], mask: Int[Tensor, "row whole"]
    ) -> Float[Tensor, "row position d_model"]:
        """Embed the last tokens of rows whose whole mask, prefix included, is given."""
        resid = self.model.hook_embed(self.model.embed(tokens))
        if self.cfg.positional_embedding_type == "standard":
            offset = mask.shape[1] - tokens.shape[1]
            resid = resid + self.model.hook_pos_embed(self.model.pos_embed(tokens, offset, mask))
        return resid

    def block(
        self,
        layer: int,
        resid: Float[Tensor, "row position d_model"],
        mask: Int[Tensor, "row whole"],
        *,
        past: KeysValues | None = None,
        rows: Int[Tensor, " row"] | None = None,
    ) -> tuple[Float[Tensor, "row position d_model"], KeysValues]:
        """Run one block, on top of a prefix's keys and values if there is one.

        Args:
            layer: The block.
            resid: The residual stream of the positions to run.
            mask: 1 where a token is real, over prefix and positions.
            past: Keys and values of the prefix.
            rows: For each row, which prefix it continues.

        Returns:
            The residual stream after the block, and this block's keys and values.
        """
        entry = _Past(past, rows)
        resid = self.model.blocks[layer](resid, past_kv_cache_entry=entry, attention_mask=mask)
        return resid, entry.own

    def whole(
        self,
        tokens: Int[Tensor, "row position"],
        mask: Int[Tensor, "row position"],
        hooks: list[tuple[str, Any]],
    ) -> Float[Tensor, "row position d_model"]:
        """Run every block over whole prompts through the model's own forward, with hooks."""
        return self.model.run_with_hooks(
            tokens,
            attention_mask=mask,
            stop_at_layer=self.n_layers,
            fwd_hooks=hooks,
        )

    def logits(self, resid: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        """Read final residuals out through the model's own final norm, unembedding and soft cap."""
        resid = resid[:, None]
        if self.cfg.normalization_type is not None:
            resid = self.model.ln_final(resid)
        logits = self.model.unembed(resid)[:, 0]
        cap = self.cfg.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits
