"""Checks of the notebook on lenses and attribution.

The reader takes a cache and weights and computes by hand; the truth comes from `tvlens.logit_lens` and
`tvlens.attribute`, which read the same run through the engine.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tvlens.exercises._patching import as_number
from tvlens.exercises._verdict import Verdict, not_yet, right

_CLOSE = 0.02  # logits are written with two digits


def check_lens_layer(answer: object, model: Any, prompt: str) -> Verdict:
    """Check from which layer on the logit lens says at the last position what the model says in the end.

    Args:
        answer: The layer, counted from 0.
        model: A TransformerLens model.
        prompt: What it reads.

    Returns:
        Right, or what was probably counted or left out.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> check_lens_layer("late", tiny_model(), "a->A b->")
        Not yet. Put the number of a layer there, from 0 to 1.
    """
    n_layers = int(model.cfg.n_layers)
    given = as_number(answer)
    if given is None or given != int(given) or not 0 <= given <= n_layers:
        return not_yet(f"Put the number of a layer there, from 0 to {n_layers - 1}.")
    from tvlens.lens import logit_lens

    truth = logit_lens(model, prompt, positions=-1).settled().item()
    if given == truth:
        return right(
            f"From layer {truth:.0f} on the stream reads as the answer. What was decided before, and "
            "where, the lens does not say."
        )
    normed, bare, chance = _by_hand(model, prompt)
    first = int(np.argmax(normed))
    if given == first and first < truth:
        return not_yet(
            "There the answer is on top for the first time, and falls back later. From which layer on does "
            "it stay?"
        )
    if given == truth + 1:
        return not_yet(
            "One too many. Is the first block called 1, or resid_pre read, which goes into the block? "
            "Layer 0 is the stream after the first block."
        )
    if given == int(np.argmax(chance)):
        return not_yet(
            "There its probability is highest. It is the likeliest token earlier than that."
        )
    if bare.any() and given in (int(np.argmax(bare)), _stays(bare)):
        return not_yet(
            "That is without the final norm, whose weights stretch some directions and shrink others. "
            "The unembedding never reads a stream that has not passed it."
        )
    if given > truth:
        return not_yet("The answer has been on top for some layers by then.")
    return not_yet(
        "At that layer, or above it, another token comes first. Send the stream after each block through "
        "the final norm and the unembedding, and look at the last position."
    )


def _by_hand(model: Any, prompt: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By layer: whether the final answer is on top, with and without the norm, and its probability."""
    import torch

    with torch.no_grad():
        logits, cache = model.run_with_cache(prompt)
        final = int(logits[0, -1].argmax())
        points = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
        stream = torch.stack([cache[point][0, -1] for point in points])
        normed, bare = (model.unembed(each[None])[0] for each in (model.ln_final(stream), stream))
    top, bare_top = (np.asarray((each.argmax(-1) == final).cpu()) for each in (normed, bare))
    return top, bare_top, np.asarray(normed.softmax(-1)[:, final].cpu())


def _stays(top: np.ndarray) -> int:
    """The first layer of the run that reaches the last one."""
    return len(top) - int(np.cumprod(top[::-1]).sum())


def check_share(
    answer: object, model: Any, prompt: str, *, answers: str, wrong: str, layer: int, head: int
) -> Verdict:
    """Check what one head adds directly to a logit difference at the last position.

    Args:
        answer: The share, in logits.
        model: A TransformerLens model.
        prompt: What it reads.
        answers: The right answer.
        wrong: The wrong one.
        layer: The layer of the head.
        head: The head.

    Returns:
        Right within 0.02, or what was probably left out.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> asked = {"answers": "B", "wrong": "b", "layer": 1, "head": 2}
        >>> check_share(None, tiny_model(), "a->A b->", **asked)
        Not yet. Put one number there: what the head adds to the logit difference.
    """
    given = as_number(answer)
    if given is None:
        return not_yet("Put one number there: what the head adds to the logit difference.")
    from tvlens.attribution import attribute

    found = attribute(model, prompt, answers=answers, wrong=wrong, by="head").data
    share = found["attention"].sel(layer=layer, head=head).item()
    if abs(given - share) <= _CLOSE:
        return right(
            f"The head writes {share:+.2f} of a difference of {found['total'].item():+.2f}. What it makes "
            "others write is not in it."
        )

    def mistakes() -> Iterator[tuple[float, str]]:
        yield -share, "The sign is turned around: right answer less wrong answer."
        alone = attribute(model, prompt, answers=answers, by="head").data["attention"]
        yield (
            alone.sel(layer=layer, head=head).item(),
            "That is its share of the right answer's logit alone. Which direction tells the two apart?",
        )
        yield (
            found["attention"].sel(layer=layer).sum().item(),
            "That is what all heads of the layer add. Each has rows of W_O of its own.",
        )
        yield share / found["total"].item(), "That is a fraction of the whole. Give it in logits."
        yield from _without_norm(model, prompt, answers, wrong, layer, head)

    for figure, says in mistakes():
        if abs(given - figure) <= _CLOSE:
            return not_yet(says)
    return not_yet(
        "Not one of the usual slips. z of the head at the last position, times its W_O, is what it writes; "
        "the final norm scales that as it scales the whole stream; the columns of W_U read it."
    )


def _without_norm(
    model: Any, prompt: str, answers: str, wrong: str, layer: int, head: int
) -> Iterator[tuple[float, str]]:
    """What comes out where the norm, its scale or its weight is forgotten, or taken at another layer."""
    import torch

    from tvlens.patching.pairs import answer_ids, as_batch

    batch = as_batch(model, prompt)
    right_id, wrong_id = (answer_ids(model, batch, each)[0][0] for each in (answers, wrong))
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt)
        written = cache[f"blocks.{layer}.attn.hook_z"][0, -1, head] @ model.W_O[layer, head]
        ends = [
            cache[f"blocks.{at}.hook_resid_post"][0, -1] for at in (model.cfg.n_layers - 1, layer)
        ]
        last, own = (end.pow(2).mean().add(model.cfg.eps).sqrt() for end in ends)
        weight = getattr(model.ln_final, "w", None)
        weight = torch.ones_like(written) if weight is None else weight
        read = model.W_U[:, right_id] - model.W_U[:, wrong_id]
        yield (
            float(written @ read),
            "That is without the final norm: neither its scale nor its weights are in it.",
        )
        yield (
            float((written * weight) @ read),
            "The weights of the final norm are in it, its scale is not: the stream is divided by its size.",
        )
        yield (
            float(written @ read / last),
            "The scale of the final norm is in it, its weights are not: ln_final.w.",
        )
        yield (
            float((written * weight) @ read / own),
            "That takes the scale of the stream at the head's own layer. The norm stands at the end, and "
            "divides by the size that the stream has there.",
        )
