"""Vectors made of the query's own state: a closed-form map says what demonstrations would do to it."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, Read, Request, run
from tvlens.learning import split_by_query
from tvlens.linear_maps import fit_map
from tvlens.methods.work import Fitted, Work, states
from tvlens.prompts import Prompts

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
DIRECTIONS = (1, 4, 16, 64)
_HOLDOUT = 0.2

States = Float[Tensor, "row d_model"]
Setting = int | float
Fit = Callable[[States, States, Setting], Callable[[States], States]]


def ridge(work: Work) -> Fitted:
    """A ridge regression from what a query leaves without demonstrations to what it leaves with them."""
    return _mapped(
        work, lambda x, y, strength: fit_map(x, y, strength=strength), STRENGTHS, "strength"
    )


def principal(work: Work) -> Fitted:
    """Theta along the directions in which demonstrations move queries most; the rest stays the query's."""
    return _mapped(work, _along_principal, DIRECTIONS, "directions")


def _along_principal(x: States, y: States, n: Setting) -> Callable[[States], States]:
    _, _, directions = torch.linalg.svd(y - x, full_matrices=False)
    span, centre = directions[: int(n)], y.mean(dim=0)
    return lambda rows: rows + (centre - rows.to(centre)) @ span.T @ span


def _mapped(work: Work, fit: Fit, settings: Sequence[Setting], name: str) -> Fitted:
    """Choose layer and setting on dev queries that the map was not fitted to; then fit it to all."""
    bare, shown = states(work)
    to_fit, held = split_by_query(work.dev.queries, _HOLDOUT, seed=work.seed)
    tried = [(layer, setting) for layer in range(work.n_layers) for setting in settings]
    cells = [
        (Edit("resid_post", i, fit(bare[to_fit, i], shown[to_fit, i], setting)(bare[:, i])),)
        for i, setting in tried
    ]
    layer, setting = tried[int(work.right(cells)[:, held].float().mean(dim=1).argmax())]
    final = fit(bare[:, layer], shown[:, layer], setting)

    def write(prompts: Prompts, view: TokenBatch) -> tuple[Edit, ...]:
        (seen,) = run(work.model, [Request(view, reads=(Read("resid_post", (layer,)),))])
        return (Edit("resid_post", layer, final(seen.activations[0][0, :, 0].cpu())),)

    return Fitted(write, layer, len(work.dev) * (2 + len(tried)), note={name: setting})
