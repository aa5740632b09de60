"""Rotary positions: turning pairs of a head's numbers by angles that grow with the position."""

import torch
from jaxtyping import Float
from torch import Tensor


def turn(
    x: Float[Tensor, "token head d_head"],
    cos: Float[Tensor, "token 1 width"],
    sin: Float[Tensor, "token 1 width"],
    *,
    adjacent: bool,
) -> Float[Tensor, "token head d_head"]:
    """Turn the first numbers of each head, as many as there are angles, and leave the others.

    Args:
        x: Queries or keys.
        cos: Cosine of each number's angle.
        sin: Sine of each number's angle.
        adjacent: Whether neighbours make a pair, rather than a number and the one half a width on.

    Returns:
        The turned queries or keys.
    """
    width = cos.shape[-1]
    turned = x[..., :width]
    if adjacent:
        first, second = turned[..., ::2], turned[..., 1::2]
        flipped = torch.stack([-second, first], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        flipped = torch.cat([-second, first], dim=-1)
    turned = turned * cos + flipped * sin
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)
