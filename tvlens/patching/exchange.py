"""Activation patching: which activation carries what makes one prompt's answer differ from another's?

Two prompts differ in a detail and so in their answer. Write one activation of the clean run into the
corrupted run ("denoise") and see how much of the clean answer comes back: much, and what it holds is enough.
Or write a corrupted activation into the clean run ("noise") and see what breaks: much, and it is needed.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from tvlens.metrics import Metric
from tvlens.models.runner import runner
from tvlens.patching.assemble import assemble, make_task, needed_first
from tvlens.patching.grid import make_grid
from tvlens.patching.pairs import (
    Answers,
    Prompts,
    differences,
    lengths_of,
    paired,
)
from tvlens.patching.results import Patching
from tvlens.patching.sweep import Beside, observe, sweep_parts


def patch(
    model: Any,
    clean: Prompts,
    corrupted: Prompts,
    *,
    metric: str | Metric | Callable[..., Any] = "logit_difference",
    answers: Answers | None = None,
    wrong: Answers | None = None,
    sites: str | Sequence[str] = "resid_pre",
    layers: int | Sequence[int] | None = None,
    by: str | Sequence[str] = ("layer", "position"),
    positions: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    direction: str = "denoise",
    top: int = 0,
    plan: str = "auto",
    memory: int | None = None,
) -> Patching:
    """Exchange activations between clean and corrupted runs, place by place, and measure each time.

    Args:
        model: A TransformerLens model.
        clean: Prompts whose answer is to be explained: a text, a list of texts, token ids
            ``prompt position`` (taken as they are), or a `TokenBatch`.
        corrupted: For each, one that differs in a detail and has equally many tokens.
        metric: A name from `tvlens.metrics.METRICS`, a metric, or a function of logits ``row d_vocab`` and
            the prompt of each ``row`` that gives one number a row.
        answers: The right answer, a text or token id for all prompts or a list with one for each (a list
            within the list for several); the first token counts. By default what the clean run predicts.
        wrong: The wrong answer, likewise; by default what the corrupted run predicts.
        sites: Names from `tvlens.sites.SITES`, one or several.
        layers: Layers, negative ones from the end; all by default.
        by: What varies from cell to cell besides the layer: ``"position"``, ``"head"``, both or neither.
            Without a name, all positions (heads) are exchanged at once, or those in ``positions``
            (``heads``). Heads of ``k`` and ``v`` are key-value heads.
        positions: Token positions, negative ones from each prompt's end; all by default.
        heads: Heads; all by default.
        direction: ``"denoise"`` runs the corrupted prompts and writes clean activations, ``"noise"`` the
            other way round.
        top: How many of the likeliest tokens to keep for every cell; needs whole logits, which is slower.
        plan: How the engine runs the cells, see `tvlens.engine.run`.
        memory: Bytes that the engine's activations may take.

    Returns:
        The metric in every cell for every prompt, as a result that draws itself. Positions that a shorter
        prompt does not have are NaN for it. Cells that cannot change anything, as before the first
        differing token, are not run.

    Raises:
        ValueError: A pair has unequal lengths; a site, layer, position or head does not exist; right and
            wrong answer are the same token; an unknown name.
        TypeError: Prompts or metric are of another type.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> result = tv.patch(tiny_model(), "a->A b->", "a->a b->", answers="B", wrong="b")
        >>> dict(result.data["value"].sizes)
        {'site': 1, 'layer': 2, 'position': 8, 'prompt': 1}

    References:
        Zhang, Nanda 2024, arXiv:2309.16042; Heimersheim, Nanda 2024, arXiv:2404.15255.
    """
    started = time.perf_counter()
    batches, changed, written = paired(model, clean, corrupted, direction=direction)
    batch, lengths = batches[changed], lengths_of(batches[changed])
    grid = make_grid(
        runner(model), lengths, sites=sites, layers=layers, by=by, positions=positions, heads=heads
    )
    differs = differences(batches["clean"], batches["corrupted"])
    # Runs that must be known first, because answers or reference depend on what they say.
    first = needed_first(metric, answers, wrong)
    settings = {"top": top, "plan": plan, "memory": memory}
    if not first and "pattern" not in grid.sites:
        # Both runs go up the stack side by side, and nothing is kept.
        task = make_task(model, batches["clean"], metric, {}, answers=answers, wrong=wrong)
        parts, settings["beside"] = [(slice(None), Beside)], batches[written]
    else:
        reads = {site: grid.layers for site in grid.sites}
        # The run that is changed runs along with its cells, unless it is among them.
        known = {run: batches[run] for run in batches if run in {written} | first}
        seen = observe(model, known, written, reads, plan=plan, memory=memory)
        task = make_task(model, batches["clean"], metric, seen.logits, answers=answers, wrong=wrong)
        parts = seen.parts
    logits = changed not in task.logits
    found = sweep_parts(
        model, batch, grid, parts, task.readout, differs=differs, logits=logits, **settings
    )
    return assemble(
        model,
        grid,
        found,
        task.also(written, found.beside).also(changed, found.logits),
        batches,
        started=started,
        method="patch",
        direction=direction,
        heading="Denoising" if direction == "denoise" else "Noising",
        verb=f"Writing the {written}",
    )
