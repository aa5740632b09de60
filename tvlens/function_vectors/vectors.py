"""The function vector: what the chosen heads write on average, summed, as a vector that can be added.

A head's mean output goes through its part of W_O. Where a norm stands between attention and the residual
stream, a head does not speak for itself: its part is then taken with the scale that the norm has for the
mean outputs of all heads of the layer together.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import needs
from tvlens.circuits.graph import head_writes
from tvlens.models import facts
from tvlens.models.runner import runner
from tvlens.vectors import TaskVector

Head = tuple[int, int]
"""Layer and head."""


@torch.no_grad()
def head_parts(
    model: Any, outputs: Float[Tensor, "layer head d_head"], layer: int
) -> Float[Tensor, "head d_model"]:
    """Give what each head of a layer writes into the residual stream, for given outputs, without W_O's bias.

    Args:
        model: A TransformerLens model.
        outputs: Head outputs, before W_O.
        layer: Which layer.

    Returns:
        One vector for each head, in float32.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> model, outputs = tiny_model(), torch.randn(2, 4, 8)
        >>> expected = outputs[1, 2] @ model.W_O[1, 2]
        >>> torch.allclose(head_parts(model, outputs, 1)[2], expected, atol=1e-5)
        True
    """
    drive = runner(model)
    block = drive.block(layer)
    z = outputs[layer][None].to(block.device, drive.dtype)
    # No head owns the bias. Nothing passes a norm as nothing, so there it changes nothing.
    parts = head_writes(block, z) - head_writes(block, torch.zeros_like(z))
    return rearrange(parts, "head 1 d_model -> head d_model").float().cpu()


def function_vector(
    model: Any,
    outputs: Float[Tensor, "layer head d_head"],
    heads: Sequence[Head],
    *,
    made: Mapping[str, Any] | None = None,
) -> TaskVector:
    """Sum what some heads write on average into one vector, to be added at the last token.

    Args:
        model: The model that the outputs are from.
        outputs: Mean outputs, from `head_outputs` or ``HeadEffects.outputs``.
        heads: Layer and head of each.
        made: More about its origin: task, template, shots.

    Returns:
        The vector. It is the same at every layer, so that it can be added at any of them:
        ``tvlens.score(model, prompts, view="zero_shot", vector=v, layer=9, mode="add")``.

    Raises:
        ValueError: No head, a head named twice, or one that the model does not have.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> from tvlens.function_vectors.effects import head_outputs
        >>> model = tiny_model()
        >>> prompts = tv.build_prompts("to_upper", model, shots=3, n=4, n_dummy=0)
        >>> vector = function_vector(model, head_outputs(model, prompts), [(0, 1), (1, 3)])
        >>> vector.values.shape == (1, 2, model.cfg.d_model)
        True

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.3.
    """
    drive = runner(model)
    for pair in heads:
        needs("a head", pair, (tuple, list), "a pair (layer, head)")
    chosen = [(int(layer), int(head)) for layer, head in heads]
    _check_heads(chosen, drive.n_layers, drive.site_shape("z"), tuple(outputs.shape))
    written = {layer: head_parts(model, outputs, layer) for layer in {i for i, _ in sorted(chosen)}}
    summed = torch.stack([written[layer][head] for layer, head in chosen]).sum(dim=0)
    normed = _normed(drive, chosen)
    return TaskVector(
        values=repeat(summed, "d_model -> 1 layer d_model", layer=drive.n_layers),
        layers=tuple(range(drive.n_layers)),
        made={
            **(made or {}),
            "method": "function vector",
            "heads": [list(head) for head in chosen],
            **({"normed": "with the scale for all heads' means together"} if normed else {}),
            **facts(model).origin,
            "position": -1,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def random_heads(
    chosen: Sequence[Head], shape: tuple[int, int], *, n_draws: int, seed: int
) -> list[list[Head]]:
    """Draw as many heads as were chosen, none of them among these: the control for the choice.

    Args:
        chosen: The heads that were chosen.
        shape: Layers, and heads of a layer.
        n_draws: How many times.
        seed: Seed of the draws.

    Returns:
        The heads of each draw.

    Raises:
        ValueError: There are too few others.

    Example:
        >>> [len(set(draw)) for draw in random_heads([(0, 1)], (2, 4), n_draws=2, seed=0)]
        [1, 1]
    """
    taken = set(chosen)
    others = [(i, h) for i in range(shape[0]) for h in range(shape[1]) if (i, h) not in taken]
    if len(others) < len(chosen):
        raise ValueError(
            f"{len(chosen)} random heads besides the chosen ones asked for, but the model has only "
            f"{len(others)} others; take at most {shape[0] * shape[1] // 2} as n_heads."
        )
    rng = np.random.default_rng([seed, 5])
    return [
        [others[i] for i in rng.choice(len(others), size=len(chosen), replace=False)]
        for _ in range(n_draws)
    ]


def _check_heads(
    heads: list[Head], n_layers: int, shape: tuple[int, ...], found: tuple[int, ...]
) -> None:
    if found != (n_layers, *shape):
        raise ValueError(
            f"this model has head outputs of shape {(n_layers, *shape)} (layer, head, d_head); "
            f"{found} arrived. Make them with head_outputs(model, prompts)."
        )
    if not heads:
        raise ValueError("a function vector needs at least one head, as (layer, head).")
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < shape[0]):
            raise ValueError(
                f"head {head} of layer {layer} asked for; this model has layers 0 to {n_layers - 1} of "
                f"heads 0 to {shape[0] - 1}."
            )
    if len(set(heads)) < len(heads):
        twice = next(head for head in heads if heads.count(head) > 1)
        raise ValueError(f"head {twice[1]} of layer {twice[0]} is named twice; a sum has it once.")


def _normed(drive: Any, heads: Sequence[Head]) -> bool:
    """Whether a norm stands between any of these heads and the residual stream."""
    from tvlens.circuits.graph import _normed as normed

    return any(normed(drive, layer) for layer in dict.fromkeys(layer for layer, _ in heads))
