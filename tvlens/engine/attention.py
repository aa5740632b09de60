"""Attention of packed rows: each token sees the tokens that stand before it in its own row.

Rows with equally many queries are computed together. Their keys are gathered from the list of all tokens
by each row's table of sources, so the keys that rows have in common are computed and rotated only once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tvlens.models.runner import Block, Runner

Touch = Callable[[Float[Tensor, "row query head key"], Int[Tensor, "row query"]], Tensor]


@dataclass
class Bucket:
    """Rows whose queries are computed together.

    Attributes:
        queries: Tokens that ask; a row with fewer repeats its last, which changes nothing.
        keys: For each row and position, the token that stands there.
        position: Positions of the queries.
    """

    queries: Int[Tensor, "row query"]
    keys: Int[Tensor, "row key"]
    position: Int[Tensor, "row query"]
    _seen: dict[int | None, Bool[Tensor, "row 1 query key"]] = field(
        default_factory=dict, init=False, repr=False
    )

    def seen(self, window: int | None) -> Bool[Tensor, "row 1 query key"]:
        """Which keys a query may look at: those up to its own position, within the window."""
        if window not in self._seen:
            key = torch.arange(self.keys.shape[1], device=self.keys.device)
            position = self.position[:, None, :, None]
            seen = key <= position
            self._seen[window] = seen if window is None else seen & (key > position - window)
        return self._seen[window]


def attend(
    block: Block,
    q: Float[Tensor, "asking head d_head"],
    k: Float[Tensor, "token kv_head d_head"],
    v: Float[Tensor, "token kv_head d_head"],
    buckets: list[Bucket],
    *,
    touch: Touch | None = None,
) -> Float[Tensor, "asking head d_head"]:
    """Let every query look at its row.

    Args:
        block: Scale, soft cap and window of the block.
        q: Queries, rotated.
        k: Keys, rotated.
        v: Values.
        buckets: Which tokens ask, and what they see.
        touch: Function that may change the attention weights.

    Returns:
        Head outputs, at the places of the queries; other places are undefined.
    """
    z = torch.empty_like(q)
    for bucket in buckets:
        asked, keys, values = q[bucket.queries], k[bucket.keys], v[bucket.keys]
        seen = bucket.seen(block.window)
        if touch is None and not block.soft_cap:
            out = _fused(asked, keys, values, seen, block.scale)
        else:
            out = _in_steps(block, asked, keys, values, seen, bucket, touch)
        z[bucket.queries] = out.to(z.dtype)
    return z


def _fused(
    asked: Float[Tensor, "row query head d_head"],
    keys: Float[Tensor, "row key kv_head d_head"],
    values: Float[Tensor, "row key kv_head d_head"],
    seen: Bool[Tensor, "row 1 query key"],
    scale: float,
) -> Float[Tensor, "row query head d_head"]:
    """Attention in one call."""
    grouped = asked.shape[2] != keys.shape[2]
    attention = partial(F.scaled_dot_product_attention, attn_mask=seen, scale=1 / scale)
    asked, keys, values = (each.transpose(1, 2) for each in (asked, keys, values))
    if asked.device.type != "cuda":
        return attention(asked, keys, values, enable_gqa=grouped).transpose(1, 2)
    if grouped:
        # The kernel that takes a mask wants a key head for every head.
        groups = asked.shape[1] // keys.shape[1]
        keys, values = (each.repeat_interleave(groups, dim=1) for each in (keys, values))
    if asked.dtype == torch.float32:
        return attention(asked, keys, values).transpose(1, 2)
    # For half precision cuDNN would compile a kernel for every new shape, which takes longer than a sweep.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return attention(asked, keys, values).transpose(1, 2)


def _in_steps(
    block: Block,
    asked: Float[Tensor, "row query head d_head"],
    keys: Float[Tensor, "row key kv_head d_head"],
    values: Float[Tensor, "row key kv_head d_head"],
    seen: Bool[Tensor, "row 1 query key"],
    bucket: Bucket,
    touch: Touch | None,
) -> Float[Tensor, "row query head d_head"]:
    """Attention with its weights in hand, where they are capped, edited or read."""
    groups = asked.shape[2] // keys.shape[2]
    asked = rearrange(asked, "row query (kv group) d -> row kv group query d", group=groups)
    scores = asked @ rearrange(keys, "row key kv d -> row kv 1 d key") / block.scale
    if block.soft_cap:
        scores = block.soft_cap * torch.tanh(scores / block.soft_cap)
    pattern = scores.masked_fill(~seen[:, None], float("-inf")).softmax(dim=-1)
    if touch is not None:
        by_query = rearrange(pattern, "row kv group query key -> row query (kv group) key")
        pattern = rearrange(
            touch(by_query, bucket.queries),
            "row query (kv group) key -> row kv group query key",
            group=groups,
        )
    out = pattern.to(values.dtype) @ rearrange(values, "row key kv d -> row kv 1 key d")
    return rearrange(out, "row kv group query d -> row query (kv group) d")


def numbers_held(runner: Runner, width: int) -> tuple[int, int]:
    """Say how many numbers attention holds at once.

    Args:
        runner: The model.
        width: Length of the longest prompt.

    Returns:
        Numbers for each row (its keys and values), and for each query (its weights, and copies of them).
    """
    kv_heads, d_head = runner.site_shape("v")
    return 2 * kv_heads * d_head * width, 3 * runner.site_shape("z")[0] * width


def group_rows(
    counts: np.ndarray, *, overhead: int, fixed: int, each: int, most: int
) -> Iterator[np.ndarray]:
    """Group rows by their number of queries.

    Args:
        counts: Number of queries of each row.
        overhead: What one more group costs, counted in queries of padding.
        fixed: Numbers held for each row.
        each: Numbers held for each query, padding included.
        most: Largest number of numbers that a group may hold, unless it is one row.

    Yields:
        The rows of one group, the one with the most queries first.
    """
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    begin = 0
    while begin < len(order):
        width = counts[order[begin]]
        waste = np.cumsum(width - counts[order[begin:]])
        # Rows with as many queries as the first cost no padding.
        joined = int(np.searchsorted(waste, overhead if waste[-1] else 0, side="right"))
        end = begin + max(min(joined, most // (fixed + int(width) * each)), 1)
        yield order[begin:end]
        begin = end
