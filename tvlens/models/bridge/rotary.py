"""The angles by which a model turns queries and keys, for positions in any order.

Hugging Face computes them for the positions of a whole batch; the engine has tokens of many prompts in one
list. A table with a row for each position serves both.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.models._turn import turn

# Cosines and sines of the angles, a row for each position.
Angles = tuple[Float[Tensor, "token width"], Float[Tensor, "token width"]]
_FIRST_TABLE = 512  # positions
# Angles of these do not depend on how long the prompt is.
_FIXED = {"default", "linear", "llama3", "yarn", "proportional"}


class Rotary:
    """Turns queries and keys of tokens that stand at given positions."""

    def __init__(self, angles: Any, *, n_ctx: int, adjacent: bool) -> None:
        self._angles, self._adjacent = angles, adjacent
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._width = min(_FIRST_TABLE, n_ctx)

    def grow(self, width: int) -> None:
        """Have a table for this many positions."""
        if width > self._width:
            self._width, self._tables = width, {}

    def turn(
        self,
        queries: Float[Tensor, "token head d_head"],
        keys: Float[Tensor, "token kv_head d_head"],
        position: Int[Tensor, " token"],
    ) -> tuple[Float[Tensor, "token head d_head"], Float[Tensor, "token kv_head d_head"]]:
        """Turn queries and keys by their positions."""
        key = (position.device, queries.dtype)
        if key not in self._tables:
            whole = torch.arange(self._width, device=position.device)
            cos, sin = self._angles(whole, queries.dtype)
            # A model that is spread over devices has its angles on one of them.
            self._tables[key] = cos.to(position.device), sin.to(position.device)
        cos, sin = (table[position][:, None] for table in self._tables[key])
        adjacent = self._adjacent
        return turn(queries, cos, sin, adjacent=adjacent), turn(keys, cos, sin, adjacent=adjacent)


def rotary_of(model: Any, layer: int) -> tuple[str | None, str]:
    """Say which angles a layer uses, and what about them is unknown.

    Args:
        model: A TransformerBridge.
        layer: The layer.

    Returns:
        A name that layers with the same angles share, None without rotary positions; and why these cannot
        be computed for single positions, or an empty text.
    """
    if getattr(model.cfg, "positional_embedding_type", None) not in ("rotary", "standard"):
        return None, "its positions are neither rotary nor embedded"
    if model.cfg.positional_embedding_type == "standard":
        return None, ""
    inner = model.blocks[layer].attn.original_component
    if type(inner).__name__ == "GPTJAttention":
        return "adjacent", ""
    if not hasattr(model, "rotary_emb"):
        return None, "its rotary positions come from an unknown place"
    if getattr(model.cfg, "rotary_adjacent_pairs", False):
        return None, "it turns adjacent pairs"
    kinds = getattr(model.rotary_emb.original_component, "rope_type", "default")
    by_kind = isinstance(kinds, dict)
    config = model.original_model.config.get_text_config(decoder=True) if by_kind else None
    name = config.layer_types[layer] if config is not None else "all"
    rope = kinds[name] if by_kind else kinds
    return name, "" if rope in _FIXED else f"its rotary positions are of type {rope!r}"


def make_rotary(model: Any, name: str) -> Rotary:
    """Give what turns queries and keys of the layers that share these angles.

    Args:
        model: A TransformerBridge.
        name: What `rotary_of` said.

    Returns:
        The rotary positions.
    """
    if name == "adjacent":
        buffer = model.blocks[0].attn.original_component

        def looked_up(position: Int[Tensor, " token"], dtype: torch.dtype) -> Angles:
            sin, cos = buffer.embed_positions.to(position.device)[position].chunk(2, dim=-1)
            return cos.repeat_interleave(2, -1).to(dtype), sin.repeat_interleave(2, -1).to(dtype)

        return Rotary(looked_up, n_ctx=model.cfg.n_ctx, adjacent=True)
    module = model.rotary_emb.original_component
    kind = () if name == "all" else (name,)

    def computed(position: Int[Tensor, " token"], dtype: torch.dtype) -> Angles:
        like = torch.zeros(1, device=position.device, dtype=dtype)
        cos, sin = module(like, position[None], *kind)
        return cos[0], sin[0]

    return Rotary(computed, n_ctx=model.cfg.n_ctx, adjacent=False)
