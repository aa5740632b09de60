"""Affine maps between residual streams, in closed form.

With more dimensions than examples, least squares fits anything. Ridge regression pulls the map towards doing
nothing but shifting by the mean difference, which is the task vector of old: with infinite strength that is
all that is left, and with less the map may turn and scale what the queries have to say.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LinearMap:
    """``x -> x + shift + (x - centre) @ weight``.

    Attributes:
        centre: Mean of the inputs.
        shift: Mean of the outputs less that of the inputs.
        weight: How far the difference depends on the input.
    """

    centre: Float[Tensor, " d_in"]
    shift: Float[Tensor, " d_in"]
    weight: Float[Tensor, "d_in d_in"]

    def __call__(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row d_in"]:
        """Map some rows."""
        x = x.to(self.weight)
        return x + self.shift + (x - self.centre) @ self.weight


def fit_map(
    x: Float[Tensor, "row d_in"], y: Float[Tensor, "row d_in"], *, strength: float
) -> LinearMap:
    """Fit by ridge regression the map that turns rows into others.

    Args:
        x: Inputs.
        y: Outputs, in the same order.
        strength: How strongly the map is pulled towards a mere shift, as a share of the inputs' mean variance
            times their number.

    Returns:
        The map, in double precision.

    Raises:
        ValueError: Fewer than two rows, or a strength that is not positive.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
        >>> found = fit_map(x, 2 * x + 1, strength=1e-9)
        >>> torch.allclose(found(x), 2 * x + 1, atol=1e-6)
        True

    References:
        Hoerl, Kennard 1970, hoerl1970ridge.
    """
    if len(x) < 2:
        raise ValueError(f"a map is fitted to at least 2 rows; {len(x)} arrived.")
    if not strength > 0:
        raise ValueError(f"strength must be above 0; {strength} arrived.")
    x, y = x.double(), y.double()
    centre, shift = x.mean(dim=0), (y - x).mean(dim=0)
    inputs, wanted = x - centre, y - x - shift
    # In the space of rows, of which there are usually fewer than dimensions.
    products = inputs @ inputs.T
    penalty = strength * products.diagonal().mean() * torch.ones(len(x)).to(products)
    weight = inputs.T @ torch.linalg.solve(products + penalty.diag(), wanted)
    return LinearMap(centre, shift, weight)
