"""Checks of the notebook on patching.

The reader patches with hooks, in plain numbers or off a heat map of the residual stream; the truth comes from
the engine of `tvlens.patch`, or of another site.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tvlens.exercises._verdict import Verdict, not_yet, right

_CLOSE = 0.01  # shares are written with two digits


def as_number(answer: object) -> float | None:
    """Read one number, also out of a tensor or an array with one element.

    Args:
        answer: What the reader gave.

    Returns:
        The number, or nothing where it is none.

    Example:
        >>> as_number(np.array([0.5])), as_number("half")
        (0.5, None)
    """
    given: Any = answer.detach().cpu() if hasattr(answer, "detach") else answer  # type: ignore
    if isinstance(given, str | bytes | bool) or given is None:
        return None
    try:
        values = np.asarray(given, dtype=float).ravel()
    except (TypeError, ValueError):
        return None
    return float(values[0]) if values.size == 1 and np.isfinite(values[0]) else None


def check_patch(
    answer: object,
    model: Any,
    clean: str,
    corrupted: str,
    *,
    answers: str,
    wrong: str,
    layer: int,
    head: int,
) -> Verdict:
    """Check the share of the logit difference that one head brings back at the last position.

    Args:
        answer: The share: 0 is the corrupted run, 1 the clean one.
        model: A TransformerLens model.
        clean: The prompt that the activation comes from.
        corrupted: The prompt that is run, of equally many tokens.
        answers: What is right after the clean prompt.
        wrong: What is right after the corrupted one.
        layer: The layer of the head.
        head: The head whose ``z`` is exchanged at the last position.

    Returns:
        Right within 0.01, or what was probably exchanged or divided instead.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> asked = {"answers": "B", "wrong": "b", "layer": 1, "head": 2}
        >>> check_patch(None, tiny_model(), "a->A b->", "a->a b->", **asked)
        Not yet. Put one number there: the share that comes back.
    """
    given = as_number(answer)
    if given is None:
        return not_yet("Put one number there: the share that comes back.")
    from tvlens.patching import patch

    def run(way: str = "denoise", site: str = "z", at: int = layer, **where: Any) -> Any:
        by = ("layer",) if site != "z" or "heads" not in where else ("layer", "head")
        found = patch(
            model, clean, corrupted, answers=answers, wrong=wrong, sites=site, layers=at, by=by,
            direction=way, **where,
        )  # fmt: skip
        return found.normalized.item(), found.value.item(), found.base.item()

    share, value, base = run(heads=head, positions=-1)
    if abs(given - share) <= _CLOSE:
        return right(
            f"Head {head} of layer {layer} alone takes the corrupted run {share:.0%} of the way to the "
            "clean one."
        )

    def mistakes() -> Iterator[tuple[float, str]]:
        yield 1 - share, "That counts from the clean run. Where is 0, and where is 1?"
        yield value, "That is the logit difference itself. A share has the two runs as its ends."
        yield value - base, "That is how far the logit difference moved. Of how far a way?"
        noise = run("noise", heads=head, positions=-1)
        for wrong_way in (noise[0], 1 - noise[0], noise[1]):
            yield (
                wrong_way,
                "You ran the clean prompt and wrote the corrupted head into it, which says what "
                "is needed. The exercise asks what is enough: which prompt is run?",
            )
        yield (
            run(site="attn_out", positions=-1)[0],
            "That is what all heads of the layer bring back together. Which axis of z has the heads?",
        )
        yield (
            run(heads=head)[0],
            "That exchanges the head at every position. Only the last one is asked for.",
        )
        yield (
            run(heads=head, positions=-2)[0],
            "That is another position. Is there a token in front that moves all others by one? "
            "-1 is the last, whatever stands in front.",
        )
        for near in (layer - 1, layer + 1):
            if 0 <= near < model.cfg.n_layers:
                yield (
                    run(at=near, heads=head, positions=-1)[0],
                    "That is another layer. The name of the hook point counts blocks from 0.",
                )

    for figure, says in mistakes():
        if abs(given - figure) <= _CLOSE:
            return not_yet(says)
    if not -1 <= given <= 2:
        return not_yet("A share lies near 0 or 1. Subtract the corrupted run, then divide.")
    return not_yet(
        "Not one of the usual slips. Run the corrupted prompt with one hook, which exchanges z at "
        "[:, -1, head] and nothing else, and compare with the two untouched runs."
    )


def check_recovered(
    answer: object, *, clean: Sequence[float], corrupted: Sequence[float], patched: Sequence[float]
) -> Verdict:
    """Check the share that comes back on average over pairs: the mean way gone, of the mean way there is.

    Args:
        answer: The share.
        clean: The metric of each pair's clean run.
        corrupted: That of each corrupted run.
        patched: That of each corrupted run with the activation of the clean one.

    Returns:
        Right within 0.01, or what was probably divided by what.

    Example:
        >>> runs = {"clean": [8.0, 1.0], "corrupted": [-8.0, 0.0], "patched": [0.0, 2.0]}
        >>> check_recovered(1.25, **runs).right, check_recovered(10 / 17, **runs).right
        (False, True)
    """
    given = as_number(answer)
    if given is None:
        return not_yet("Put one number there: the share over all pairs.")
    up, down, at = (np.asarray(each, dtype=float) for each in (clean, corrupted, patched))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (at - down).sum() / (up - down).sum()
        ratios = (at - down) / (up - down)
        mistakes = (
            (
                ratios.mean(),
                "That is the mean of the shares of single pairs. Look at the one whose two runs hardly "
                "differ: it is divided by next to nothing, and decides alone.",
            ),
            (
                np.median(ratios),
                "That is the median of the shares: it looks at one or two pairs and drops the others. All "
                "of them should count, each by how much there is to recover.",
            ),
            (
                1 - share,
                "That is the share that is still missing. Count from the corrupted run.",
            ),
            (
                -share,
                "The sign is turned around: below the line the corrupted run is subtracted, too.",
            ),
            (
                1 / share,
                "Above and below the line are exchanged: it says how many times the way gone fits "
                "into the whole way, backwards.",
            ),
            (
                (at - down).mean(),
                "That is the way gone, in logits. Divide it by the way there is.",
            ),
            (
                at.sum() / up.sum(),
                "That divides by the clean run alone, as if the corrupted one stood at 0.",
            ),
            (
                (at - down).sum() / up.sum(),
                "That divides by the clean run alone. The way there is begins at the corrupted run.",
            ),
        )
    if abs(given - share) <= _CLOSE:
        return right(
            "First average the ways, then divide once: pairs count by how much there is to recover."
        )
    for figure, says in mistakes:
        if abs(given - figure) <= _CLOSE:
            return not_yet(says)
    return not_yet("How far did the runs move, all together? How far could they have moved?")


def check_mover(
    answer: object,
    model: Any,
    clean: str,
    corrupted: str,
    *,
    answers: str | None = None,
    wrong: str | None = None,
) -> Verdict:
    """Check which block's attention carries the answer to the last position.

    Args:
        answer: The number of the block.
        model: A TransformerLens model.
        clean: The clean prompt.
        corrupted: The corrupted one, of equally many tokens.
        answers: What is right after the clean prompt; by default what the model says there.
        wrong: What is right after the corrupted one, likewise.

    Returns:
        Right, or what stands at the block that was named.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> check_mover("the last", tiny_model(), "a->A b->", "a->a b->")
        Not yet. Put the number of a block there, from 0 to 1.
    """
    n_layers = int(model.cfg.n_layers)
    given = as_number(answer)
    if given is None or given != int(given) or not 0 <= given < n_layers:
        return not_yet(f"Put the number of a block there, from 0 to {n_layers - 1}.")
    from tvlens.patching import patch

    found = patch(
        model, clean, corrupted, answers=answers, wrong=wrong,
        sites=["attn_out", "mlp_out", "resid_pre"], positions=-1,
    )  # fmt: skip
    shares = found.normalized.squeeze("prompt").isel(position=-1)
    moved = shares.sel(site="attn_out")
    block, own = int(moved.argmax("layer")), float(moved.sel(layer=int(given)))
    if int(given) == block:
        return right(
            f"At the last position, the attention of block {block} alone brings back {own:.0%}: what was "
            "read before is carried there, and stays in the stream."
        )
    here = shares.sel(site="resid_pre", layer=int(given))
    if int(given) == block + 1 and here >= 0.5:
        return not_yet(
            "resid_pre of this block holds it already: that is what goes into the block, before it has "
            "done anything. Who wrote it?"
        )
    if int(given) == int(shares.sel(site="mlp_out").argmax("layer")):
        return not_yet(
            "Of all MLPs this block's does most at the last position. But an MLP does not see other "
            "positions: it works with what attention has brought."
        )
    if int(given) == 0:
        return not_yet(
            "In block 0 the word that differs is all there is to read. Look at the last position's column: "
            "where does its colour change?"
        )
    if here >= 0.5:
        return not_yet(
            "The last position has the answer here, and had it before. Which is the lowest such row?"
        )
    return not_yet(
        f"The attention of this block brings back {own:.0%} at the last position. The information is still "
        "at the word that differs; look where the two columns change places."
    )
