"""Who writes theta? The parts of the model that make a task vector, and the demonstrations they read.

A task vector is a residual stream, and so a sum. Projected on theta's own direction the parts add up to its
length, so that each head and MLP has its share of the task; and since a head's output is a sum over the
tokens that it looks at, its share can be traced to inputs, separators and outputs of each demonstration.
"""

import time
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import whole
from tvlens.attribution.direct import label, with_residual
from tvlens.attribution.parts import Named, Split, contributions, joined, streams
from tvlens.attribution.results import Attribution
from tvlens.encoding import TokenBatch
from tvlens.extraction import extract
from tvlens.models.runner import Runner, runner
from tvlens.prompts import Prompts
from tvlens.sites import check_layer
from tvlens.templates import Role
from tvlens.vectors import TaskVector

ROLES = {
    Role.BOS: "bos",
    Role.OTHER: "other",
    Role.DEMO_INPUT: "input",
    Role.SEPARATOR: "separator",
    Role.DEMO_OUTPUT: "output",
    Role.QUERY: "query",
    Role.LAST: "last",
}
"""What a token is for, in the order of a prompt."""


def writers(
    model: Any,
    prompts: Prompts,
    *,
    layer: int,
    direction: Float[Tensor, "*prompt d_model"] | TaskVector | None = None,
    plan: str = "auto",
    memory: int | None = None,
) -> Attribution:
    """Split a task vector into what every head and MLP wrote, by demonstration and role of the tokens read.

    Args:
        model: A TransformerLens model.
        prompts: Prompts with at least one dummy query each; what is written there is averaged over them.
        layer: Theta is the residual stream after this layer at the last token; negative from the end.
        direction: What the parts are projected on, one vector or one for each prompt, as a tensor or as a
            `TaskVector`, of which this layer is taken; its length does not matter. By default each
            prompt's own theta.
        plan: How the engine runs the prompts, see `tvlens.engine.run`.
        memory: Bytes that the engine's activations may take.

    Returns:
        The parts' projections on the unit direction, as in `attribute`: ``attention`` by layer, head,
        demonstration (the last is the query) and role. They add up to ``total``: theta's length, or its
        projection on the direction that was given.

    Raises:
        ValueError: The layer is outside the model, there are no dummy queries, or the direction has
            another width, site or model, or no length.
        TypeError: The prompts are no `Prompts`, or the layer is no whole number.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> prompts = tv.build_prompts(tv.load_task("to_upper"), tiny_model(), shots=2, n=4)
        >>> found = writers(tiny_model(), prompts, layer=1)
        >>> found.data["attention"].sizes["demonstration"]
        3

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916; Elhage et al. 2021, elhage2021mathematical.
    """
    started = time.perf_counter()
    if not isinstance(prompts, Prompts):
        raise TypeError(
            "writers needs prompts with demonstrations, as tv.build_prompts(task, model) makes; "
            f"{type(prompts).__name__} arrived. For a text, tv.attribute splits the answer's logit."
        )
    drive = runner(model)
    layer = check_layer(whole("layer", layer), drive.n_layers)
    theta = extract(model, prompts, layers=[layer], plan=plan, memory=memory).values[:, 0]
    if isinstance(direction, TaskVector):
        direction = _at(model, direction, layer)
    along = _unit(theta, direction)
    roles = [role for role in ROLES if any(bool((b.roles == role).any()) for b in prompts.dummies)]
    shots, split = int(prompts.facts["shots"]), Split(heads=True, origins=True)
    limits = {"position": -1, "n_layers": layer + 1, "plan": plan, "memory": memory}
    each = [
        _written(model, drive, dummy, along, split, roles, shots, **limits)
        for dummy in prompts.dummies
    ]
    mean: Named = {
        name: (dims, torch.stack([one[name][1] for one in each]).mean(dim=0))
        for name, (dims, _) in each[0].items()
    }
    found = mean | with_residual(mean, (theta.to(along) * along).sum(dim=-1))
    coords = {
        "demonstration": [*map(str, range(1, shots + 1)), "query"],
        "role": [ROLES[role] for role in roles],
    }
    return label(
        model, prompts.dummies[0], found, split, coords=coords, started=started, method="writers",
        metric="theta", layer=layer, position=-1, task=prompts.facts["task"], shots=shots,
        direction="theta" if direction is None else "given", heading="Writers",
    )  # fmt: skip


def _at(model: Any, vector: TaskVector, layer: int) -> Float[Tensor, "prompt d_model"]:
    """A task vector's layer, where the parts write."""
    vector.check(model)
    if vector.site != "resid_post":
        raise ValueError(
            f"direction was read at {vector.site!r}; the parts are those of 'resid_post'. "
            "Extract it there: tv.extract(model, prompts)."
        )
    return vector.at(layer)


def _unit(theta: Tensor, direction: Tensor | None) -> Float[Tensor, "prompt d_model"]:
    """The direction of each prompt, of length one."""
    given = theta if direction is None else direction.to(theta.device)
    width = theta.shape[1:]
    if given.shape not in (theta.shape, (1, *width), width):
        raise ValueError(
            f"direction must be of shape {tuple(width)} or {tuple(theta.shape)} (prompt d_model); "
            f"{tuple(given.shape)} arrived."
        )
    lengths = given.double().norm(dim=-1, keepdim=True)
    if not bool((lengths > 0).all()) or not bool(lengths.isfinite().all()):
        raise ValueError("direction has no length, or is not finite.")
    return (given.double() / lengths).expand(theta.shape)


def _written(
    model: Any,
    drive: Runner,
    dummy: TokenBatch,
    along: Tensor,
    split: Split,
    roles: list[Role],
    shots: int,
    **limits: Any,
) -> Named:
    """What was written at the last token of prompts with one dummy query."""
    pieces = [
        contributions(
            drive,
            stream,
            along[stream.rows],
            split,
            membership=_membership(stream.batch, roles, shots),
        )
        for stream in streams(model, drive, dummy, split, **limits)
    ]
    found = joined(pieces)
    attention = rearrange(
        found["attention"][1],
        "layer head (demo role) prompt -> layer head demo role prompt",
        demo=shots + 1,
    )
    return found | {"attention": (("layer", "head", "demonstration", "role", "prompt"), attention)}


def _membership(
    batch: TokenBatch, roles: list[Role], shots: int
) -> Float[Tensor, "prompt key origin"]:
    """One where a token belongs to a demonstration and has a role; tokens from each prompt's first on."""
    width = batch.tokens.shape[1]
    found = torch.zeros(len(batch), width, shots + 1, len(roles))
    for prompt, (row, real) in enumerate(zip(batch.roles, batch.mask, strict=True)):
        own = row[real].numpy()
        where = demonstrations(own, shots)
        for key, (role, number) in enumerate(zip(own.tolist(), where.tolist(), strict=True)):
            found[prompt, key, number, roles.index(Role(role))] = 1
    return rearrange(found, "prompt key demo role -> prompt key (demo role)")


def demonstrations(roles: np.ndarray, shots: int) -> np.ndarray:
    """Number the demonstration of each token from 0; the query's number is ``shots``.

    What stands before an input belongs to its demonstration.

    Args:
        roles: Roles of one prompt's tokens.
        shots: How many demonstrations there are.

    Returns:
        The numbers.

    Example:
        >>> demonstrations(np.array([0, 2, 4, 3, 0, 5, 6]), 1).tolist()
        [0, 0, 0, 0, 1, 1, 1]
    """
    said = roles == Role.DEMO_OUTPUT
    # An output ends where the next token is none.
    ended = np.concatenate([[False], said[:-1] & ~said[1:]])
    asked = np.isin(roles, (Role.QUERY, Role.LAST))
    return np.where(asked, shots, np.minimum(ended.cumsum(), shots))
