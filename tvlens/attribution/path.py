"""Integrating along a straight line, with the points where the line is rough.

On the way from a baseline to a prompt a language model does nothing for long stretches and then changes its
mind within a hundredth of the way. Points that are spread evenly miss that. Here each stretch is checked: the
slopes along it must add up to what the metric changed from its one end to the other. Where they do not, it is
halved, so that the same number of points says far more, and each prompt has its points where it needs them.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

_FIRST = 8  # stretches to begin with
_ENOUGH = 1e-3  # share of the whole change that all stretches together may miss
_EACH_ROUND = 4  # one in so many stretches is halved at a time

Look = Callable[
    [Float[Tensor, "point prompt"]],
    tuple[Float[Tensor, "point prompt"], Float[Tensor, "point prompt *place"]],
]
"""From how far along the line to the metric there, and its slope in parts that add up to it."""


def integrate(
    look: Look, n_prompts: int, *, steps: int
) -> tuple[Float[Tensor, " prompt *place"], int]:
    """Integrate slopes from 0 to 1 by Simpson's rule, halving the stretches that miss most.

    Args:
        look: Gives the metric and its slopes at some points.
        n_prompts: How many prompts there are.
        steps: At most how many points a prompt.

    Returns:
        The integral of each part of the slope, and how many points there were.

    Raises:
        ValueError: There are fewer than 3 points.

    Example:
        >>> jump = lambda x: (torch.tanh(50 * x - 20), 50 / torch.cosh(50 * x - 20)[..., None] ** 2)
        >>> found, points = integrate(jump, 1, steps=64)
        >>> bool((found - 2).abs() < 0.01), points <= 64
        (True, True)
    """
    if steps < 3:
        raise ValueError(f"steps must be at least 3; {steps} arrived.")
    n = 2 * min(_FIRST, (steps - 1) // 2) + 1
    at = torch.linspace(0, 1, n, dtype=torch.double)[:, None].expand(n, n_prompts)
    values, slopes = look(at)
    at, values, slopes = at.to(values.device), values.double(), slopes.double()
    # Never used, and where the baseline is zero a norm's slope there is anything.
    slopes[0] = 0
    while True:
        missed = _missed(at, values, slopes).nan_to_num(torch.inf)
        whole = (values[-1] - values[0]).abs()
        room = (steps - len(at)) // 2
        if room < 1 or bool((missed.sum(dim=0) <= _ENOUGH * whole).all()):
            break
        worst = missed.topk(min(room, -(-len(missed) // _EACH_ROUND)), dim=0).indices
        begin, end = (at.gather(0, 2 * worst + k) for k in (0, 2))
        new = torch.cat([begin + share * (end - begin) for share in (0.25, 0.75)])
        more = look(new)
        order = torch.cat([at, new]).argsort(dim=0)
        prompt = torch.arange(n_prompts, device=order.device)
        at, values, slopes = (
            torch.cat([old, found.to(old)])[order, prompt]
            for old, found in zip((at, values, slopes), (new, *more), strict=True)
        )
    return torch.einsum("kp,kp...->p...", _weights(at), slopes), len(at)


def _weights(at: Float[Tensor, "point prompt"]) -> Float[Tensor, "point prompt"]:
    """Simpson's: a sixth, two thirds and a sixth of each stretch's length; all of the first in its middle."""
    lengths = at[2::2] - at[:-2:2]
    weights = torch.zeros_like(at)
    weights[1::2] = 2 * lengths / 3
    weights[:-2:2] += lengths / 6
    weights[2::2] += lengths / 6
    weights[0], weights[1] = 0, lengths[0]
    weights[2] -= lengths[0] / 6
    return weights


def _missed(
    at: Float[Tensor, "point prompt"],
    values: Float[Tensor, "point prompt"],
    slopes: Float[Tensor, "point prompt *place"],
) -> Float[Tensor, "stretch prompt"]:
    """By how much each stretch's slopes miss the change from its begin to its end."""
    slope = slopes.flatten(2).sum(dim=-1)
    lengths = at[2::2] - at[:-2:2]
    said = lengths * (slope[:-2:2] + 4 * slope[1::2] + slope[2::2]) / 6
    said[0] = lengths[0] * slope[1]
    return (said - (values[2::2] - values[:-2:2])).abs()
