"""Ablation: what is a component good for? Take it away, and see what gets worse.

Taking away is a choice. Zeros are simple and often unlike anything the model ever sees. The mean over prompts
keeps what is common to them and removes what is particular. Another prompt's activation is the most natural
of all, and tells what of the component depends on the prompt.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.encoding import TokenBatch
from tvlens.metrics import Metric
from tvlens.models.runner import Runner, runner
from tvlens.patching.assemble import assemble, make_task, needed_first
from tvlens.patching.grid import Grid, make_grid
from tvlens.patching.pairs import Answers, Prompts, as_batch, differences, lengths_of
from tvlens.patching.results import Patching
from tvlens.patching.sweep import Observed, Source, observe, sweep_parts

KINDS = ("zero", "mean", "resample")


def ablate(
    model: Any,
    prompts: Prompts,
    *,
    kind: str = "zero",
    metric: str | Metric | Callable[..., Any] = "log_probability",
    answers: Answers | None = None,
    wrong: Answers | None = None,
    sites: str | Sequence[str] = "z",
    layers: int | Sequence[int] | None = None,
    by: str | Sequence[str] = ("layer", "head"),
    positions: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    reference: Prompts | None = None,
    per_position: bool = True,
    seed: int = 0,
    top: int = 0,
    plan: str = "auto",
    memory: int | None = None,
) -> Patching:
    """Take activations away, place by place, and measure each time.

    Args:
        model: A TransformerLens model.
        prompts: A text, a list of texts, token ids ``prompt position``, or a `TokenBatch`.
        kind: What comes in their place: ``"zero"``; ``"mean"`` over prompts; ``"resample"``, the activations
            of another prompt with equally many tokens.
        metric: As in `patch`; by default the log probability of the answer.
        answers: As in `patch`; by default what the untouched run predicts.
        wrong: As in `patch`; by default the untouched run's second choice.
        sites: As in `patch`; head outputs by default.
        layers: As in `patch`.
        by: As in `patch`; layer by head by default.
        positions: As in `patch`.
        heads: As in `patch`.
        reference: Prompts whose mean or whose activations are taken; the same prompts by default.
        per_position: Whether means are taken for each position, counted from the start, or over all.
        seed: Which other prompt is taken.
        top: As in `patch`.
        plan: As in `patch`.
        memory: As in `patch`.

    Returns:
        The metric in every cell for every prompt; there is no corrupted run, so look at ``effect``.

    Raises:
        ValueError: As in `patch`; or no other prompt has as many tokens; or no reference prompt is long
            enough for a mean at every position.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> result = tv.ablate(tiny_model(), ["a->A b->", "c->C d->"], kind="mean", answers=["B", "D"])
        >>> dict(result.effect.sizes)
        {'site': 1, 'layer': 2, 'head': 4, 'prompt': 2}

    References:
        Zhang, Nanda 2024, arXiv:2309.16042; Heimersheim, Nanda 2024, arXiv:2404.15255.
    """
    started = time.perf_counter()
    if kind not in KINDS:
        raise unknown("kind of ablation", kind, KINDS)
    batch = as_batch(model, prompts)
    other = batch if reference is None else as_batch(model, reference, name="reference")
    drive, lengths = runner(model), lengths_of(batch)
    grid = make_grid(
        drive, lengths, sites=sites, layers=layers, by=by, positions=positions, heads=heads
    )
    limits = {"plan": plan, "memory": memory}
    batches, differs = {"clean": batch}, np.arange(lengths.max()) < lengths[:, None]
    # The untouched run runs along with the cells, unless answers depend on what it says.
    known = batches if needed_first(metric, answers, wrong) else {}
    if kind == "mean" and reference is None and len(batch) == 1:
        raise ValueError(
            "the mean over one prompt is that prompt, so nothing would be ablated; give more prompts, or "
            "others as reference=."
        )
    if kind == "resample":
        chosen = _others(lengths, lengths_of(other), itself=reference is None, seed=seed)
        taken = _reordered(other, chosen)
        differs, reads = differences(batch, taken), {s: grid.layers for s in grid.sites}
        seen = observe(model, {**known, "other": taken}, "other", reads, **limits)
    else:
        values = _zeros(drive, grid, lengths)
        if kind == "mean":
            values = _means(model, other, grid, lengths, per_position=per_position, **limits)
        untouched = observe(model, known, "clean", {}, **limits)
        seen = Observed(untouched.logits, [(slice(0, len(batch)), lambda: values)])
    said = {run: logits for run, logits in seen.logits.items() if run == "clean"}
    task = make_task(model, batch, metric, said, answers=answers, wrong=wrong)
    found = sweep_parts(
        model, batch, grid, seen.parts, task.readout,
        differs=differs, top=top, logits=not said, **limits,
    )  # fmt: skip
    return assemble(
        model,
        grid,
        found,
        task.also("clean", found.logits),
        {"clean": batch},
        started=started,
        method="ablate",
        direction="ablate",
        ablation=kind,
        per_position=per_position,
        seed=seed,
        heading=f"{kind.capitalize()} ablation",
        verb={"zero": "Zeroing", "mean": "Mean-ablating", "resample": "Resampling"}[kind],
    )


def _zeros(drive: Runner, grid: Grid, lengths: np.ndarray) -> Source:
    """Zeros for every site; one prompt and one position stand for all."""
    found = {}
    for site in grid.sites:
        shape = drive.site_shape(site) + ((int(lengths.max()),) if site == "pattern" else ())
        zeros = torch.zeros(shape, device=drive.device, dtype=drive.dtype)
        found[site] = zeros.expand(1, len(grid.layers), 1, *shape)
    return Source(found, grid.layers, lengths)


def _means(
    model: Any,
    reference: TokenBatch,
    grid: Grid,
    lengths: np.ndarray,
    *,
    per_position: bool,
    **limits: Any,
) -> Source:
    """Means over reference prompts, and over their positions where asked for."""
    longest, needed = int(lengths_of(reference).max()), int(lengths.max())
    if per_position and longest < needed:
        raise ValueError(
            f"a mean at every position needs reference prompts of {needed} tokens; the longest has "
            f"{longest}. Give longer ones, or per_position=False."
        )
    if not per_position and "pattern" in grid.sites:
        raise ValueError(
            "attention weights of different positions have no common mean; use per_position."
        )
    seen = observe(
        model, {"clean": reference}, "clean", {s: grid.layers for s in grid.sites}, **limits
    )
    totals: dict[str, Tensor] = {}
    for _, source in seen.parts:
        for site, kept in source().activations.items():
            # Beyond a prompt's end there are zeros, which add nothing.
            total = kept.sum(dim=0, keepdim=True, dtype=torch.float32)
            wide = total.new_zeros(1, len(grid.layers), longest, *_wide(total, site, longest))
            wide[:, :, : total.shape[2], ..., : total.shape[-1]] = total
            totals[site] = totals.get(site, 0) + wide
    there = np.arange(longest) < lengths_of(reference)[:, None]
    if per_position:
        counts = torch.from_numpy(there.sum(axis=0)).clamp(min=1)
        means = {
            site: total[:, :, :needed]
            / counts[:needed].to(total).reshape(1, 1, needed, *[1] * (total.ndim - 3))
            for site, total in totals.items()
        }
    else:
        means = {s: total.sum(dim=2, keepdim=True) / there.sum() for s, total in totals.items()}
    return Source(means, grid.layers, lengths)


def _wide(total: Tensor, site: str, longest: int) -> tuple[int, ...]:
    """The site's own axes; attention weights have a key for every position of the longest prompt."""
    own = tuple(total.shape[3:])
    return (*own[:-1], longest) if site == "pattern" else own


def _others(
    lengths: Int[np.ndarray, " prompt"],
    available: Int[np.ndarray, " other"],
    *,
    itself: bool,
    seed: int,
) -> Int[np.ndarray, " prompt"]:
    """For each prompt another one of the same length; never itself, where they are the same prompts."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(lengths), dtype=np.int64)
    for length in np.unique(lengths):
        rows, found = np.flatnonzero(lengths == length), np.flatnonzero(available == length)
        if len(found) < 1 + itself:
            raise ValueError(
                f"resampling needs, for prompt {rows[0]} of {length} tokens, another with as many; "
                "there is none. Give prompts of equal length, or more as reference=."
            )
        if itself:
            # A cycle through a random order has no fixed point.
            order = rng.permutation(rows)
            chosen[order] = np.roll(order, 1)
        else:
            chosen[rows] = rng.choice(found, size=len(rows), replace=len(found) < len(rows))
    return chosen


def _reordered(batch: TokenBatch, rows: Int[np.ndarray, " prompt"]) -> TokenBatch:
    """Prompts in another order."""
    at = torch.from_numpy(rows)
    text = tuple(batch.text[i] for i in rows)
    return TokenBatch(text, batch.tokens[at], batch.mask[at], batch.roles[at])
