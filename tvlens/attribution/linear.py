"""From a direction in the logits back to a direction in each part: what makes a sum of contributions exact.

A norm divides by a scale that all of its input decides together. Held at the scale that it has in this very
run, it is a linear map and a bias, and so is everything else between a head and a logit. A direction is
pulled back through these maps once; then each part's contribution is one dot product. Nothing here knows
which norm, which model or which kind of model it is: a map is asked what it does.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Map = Callable[[Tensor], Tensor]
_CENTRED = 1e-2  # share of the usual size that a norm which subtracts the mean leaves of a constant


def pull(
    norm: Map,
    at: Float[Tensor, "row d_model"],
    direction: Float[Tensor, "row d_model"],
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"]]:
    """Pull a direction back through a norm whose scale is held where it stands.

    Args:
        norm: ``weight * (x - mean) / scale + bias``, with or without the mean and the bias, or no norm.
        at: The norm's input, which decides the scale.
        direction: A direction after the norm.

    Returns:
        The direction before the norm, and what the bias adds. The first's product with ``at`` and the
        second add up to the product of the direction with ``norm(at)``.

    Example:
        >>> x, direction = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
        >>> rms = lambda x: x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
        >>> before, bias = pull(rms, x, direction)
        >>> bool(torch.isclose((before * x).sum(), rms(x)[0, 0].double()))
        True
    """
    with torch.enable_grad():
        x = at.detach().requires_grad_()
        normed = norm(x)
        (slope,) = torch.autograd.grad((normed * direction).sum(), x)
    with torch.no_grad():
        offset = norm(torch.zeros_like(at[:1]))
        moved = normed.detach() - offset
        left = norm(torch.ones_like(at[:1])) - offset
        centred = left.norm() < _CENTRED * moved[:1].norm()
        at, slope, moved = at.double(), slope.double(), moved.double()
        # The slope lacks only how the scale follows its input: a multiple of that input.
        x = at - at.mean(dim=-1, keepdim=True) if centred else at
        missing = (moved * direction).sum(dim=-1) - (slope * at).sum(dim=-1)
        share = missing / (x * at).sum(dim=-1).clamp_min(torch.finfo(at.dtype).tiny)
        before = slope + share[:, None] * x
        return before, (offset.double() * direction).sum(dim=-1)


def transpose(
    linear: Map, like: Float[Tensor, " row *site"], direction: Float[Tensor, "row d_model"]
) -> tuple[Float[Tensor, " row *site"], Float[Tensor, " row"]]:
    """Pull a direction back through a linear map with a bias.

    Args:
        linear: The map.
        like: Something of the shape of its input.
        direction: A direction after the map.

    Returns:
        The direction before the map, and what the bias adds.

    Example:
        >>> before, bias = transpose(lambda x: 2 * x + 1, torch.zeros(1, 2), torch.ones(1, 2))
        >>> before.tolist(), bias.tolist()
        ([[2.0, 2.0]], [2.0])
    """
    with torch.enable_grad():
        zero = torch.zeros_like(like).requires_grad_()
        out = linear(zero)
        (before,) = torch.autograd.grad((out * direction.to(out)).sum(), zero)
    return before.double(), (out.detach().double() * direction).sum(dim=-1)
