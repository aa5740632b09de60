"""Affine maps between residual streams, in closed form.

With more dimensions than examples, least squares fits anything. Ridge regression pulls the map towards
something plain. Within one residual stream that is doing nothing but shifting by the mean difference, which
is the task vector of old: with infinite strength that is all that is left, and with less the map may turn and
scale what the queries have to say. Between two residual streams, whose axes have nothing to do with each
other, nothing plain is left but the mean of the outputs, whatever comes in.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import unknown

TOWARDS = ("identity", "mean")


@dataclass(frozen=True, eq=False)
class LinearMap:
    """``x -> mean + (x - centre) @ weight``.

    Attributes:
        centre: Mean of the inputs.
        mean: Mean of the outputs.
        weight: How the output depends on the input.
    """

    centre: Float[Tensor, " d_in"]
    mean: Float[Tensor, " d_out"]
    weight: Float[Tensor, "d_in d_out"]

    def __call__(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_out"]:
        """Map some rows."""
        x = x.to(self.weight)
        return self.mean + (x - self.centre) @ self.weight


def fit_map(
    x: Float[Tensor, "row d_in"],
    y: Float[Tensor, "row d_out"],
    *,
    strength: float,
    towards: str | None = None,
) -> LinearMap:
    """Fit by ridge regression the map that turns rows into others.

    Args:
        x: Inputs.
        y: Outputs, in the same order.
        strength: How strongly the map is pulled, as a share of the inputs' mean variance times their number.
        towards: What it is pulled towards: ``"identity"``, a mere shift by the mean difference, where both
            are of one residual stream; ``"mean"``, the mean of the outputs, where they are not. By default
            identity for equal widths, mean for others.

    Returns:
        The map, in double precision.

    Raises:
        ValueError: Fewer than two rows, a strength that is not positive, an unknown ``towards``, or the
            identity between streams of different widths.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> found = fit_map(x, 2 * x[:, :2] + 1, strength=1e-9)
        >>> torch.allclose(found(x), 2 * x[:, :2] + 1, atol=1e-6)
        True

    References:
        Hoerl, Kennard 1970, hoerl1970ridge.
    """
    widths = x.shape[1], y.shape[1]
    towards = towards or ("identity" if widths[0] == widths[1] else "mean")
    if towards not in TOWARDS:
        raise unknown("aim of a map", towards, TOWARDS)
    if towards == "identity" and widths[0] != widths[1]:
        raise ValueError(
            f"there is no identity between widths {widths[0]} and {widths[1]}: use towards='mean'."
        )
    if len(x) < 2:
        raise ValueError(f"a map is fitted to at least 2 rows; {len(x)} arrived.")
    if not strength > 0:
        raise ValueError(f"strength must be above 0; {strength} arrived.")
    x, y = x.double(), y.double()
    centre, mean = x.mean(dim=0), y.mean(dim=0)
    inputs, wanted = x - centre, y - mean
    plain = torch.eye(*widths).to(x) if towards == "identity" else x.new_zeros(widths)
    rest = wanted - inputs @ plain
    penalty = strength * inputs.square().sum(dim=1).mean()
    # The same solution in the space of rows or of dimensions, whichever is smaller.
    if len(x) < widths[0]:
        products = inputs @ inputs.T + penalty * torch.eye(len(x)).to(x)
        weight = inputs.T @ torch.linalg.solve(products, rest)
    else:
        products = inputs.T @ inputs + penalty * torch.eye(widths[0]).to(x)
        weight = torch.linalg.solve(products, inputs.T @ rest)
    return LinearMap(centre, mean, plain + weight)
