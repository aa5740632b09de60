"""Attribution patching: what would patching say, to first order, for every cell at once?

Writing an activation a' where a stands changes the metric by about (a' - a) times the metric's gradient
there. Gradients at all places come out of one backward pass, so a whole map costs two forwards and one
backward however many cells it has. The estimate is exact where the metric depends linearly on the activation,
and misleads where it does not: where attention is saturated, and where a whole residual is exchanged early
on. `tvlens.patching.agreement` compares it with true patching.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.encoding import TokenBatch
from tvlens.engine import Plan
from tvlens.engine.backward import Backward, Scalar, backward
from tvlens.metrics import VALUE, Accuracy, Metric, Rank, metric_of
from tvlens.models.runner import Runner, runner
from tvlens.patching.assemble import Task, assemble, make_task, needed_first
from tvlens.patching.grid import Effects, Grid, effects, make_grid
from tvlens.patching.pairs import Answers, Prompts, differences, lengths_of, paired
from tvlens.patching.results import Patching
from tvlens.patching.sweep import Source, Swept, forget_missing, joined, observe

_PLAN = Plan("backward", "a first-order estimate: one forward and one backward for all cells")


def attribution_patch(
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
    memory: int | None = None,
) -> Patching:
    """Estimate what `patch` would find in every cell, from one backward pass through the changed run.

    The estimate of a cell is its written activation less the one that stands there, times the gradient of
    the metric; the value is that of the untouched run plus the estimate.

    Args:
        model: A TransformerLens model.
        clean: As in `patch`.
        corrupted: As in `patch`.
        metric: As in `patch`; it must have a gradient, which rank and accuracy have not.
        answers: As in `patch`.
        wrong: As in `patch`.
        sites: As in `patch`.
        layers: As in `patch`.
        by: As in `patch`.
        positions: As in `patch`.
        heads: As in `patch`.
        direction: As in `patch`: the gradient is taken in the corrupted run for ``"denoise"``, in the clean
            run for ``"noise"``.
        memory: Bytes that a pass may hold; prompts are run in chunks.

    Returns:
        The estimated metric in every cell for every prompt, as `patch` gives the true one.

    Raises:
        ValueError: As in `patch`; or the metric has no gradient.
        TypeError: As in `patch`.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> from tvlens.patching.gradients import attribution_patch
        >>> result = attribution_patch(tiny_model(), "a->A b->", "a->a b->", answers="B", wrong="b")
        >>> dict(result.data["value"].sizes)
        {'site': 1, 'layer': 2, 'position': 8, 'prompt': 1}

    References:
        Nanda 2023, nanda2023attribution; Syed, Rager, Conmy 2023, arXiv:2310.10348.
    """
    started = time.perf_counter()
    check_smooth(metric)
    batches, changed, written = paired(model, clean, corrupted, direction=direction)
    drive, batch = runner(model), batches[changed]
    lengths = lengths_of(batch)
    grid = make_grid(
        drive, lengths, sites=sites, layers=layers, by=by, positions=positions, heads=heads
    )
    needed = {written} | needed_first(metric, answers, wrong)
    known = {run: batches[run] for run in batches if run in needed}
    seen = observe(model, known, written, {site: grid.layers for site in grid.sites}, memory=memory)
    task = make_task(model, batches["clean"], metric, seen.logits, answers=answers, wrong=wrong)
    if direction == "noise" and "reference" in task.metric.needs:
        raise ValueError(
            f"{task.metric.name} is least, and so flat, at the clean run: its gradient there is zero. "
            "Use direction='denoise', or another metric."
        )
    differs = differences(batches["clean"], batches["corrupted"])
    swept, finals = [], []
    for rows, source in seen.parts:
        can = effects(drive, lengths[rows], differs[rows, : lengths[rows].max()])
        scalar = MetricOf(drive, task, start=rows.start or 0)
        part = _estimate(model, batch.rows(rows), grid, can, source(), scalar, memory)
        swept.append(part)
        finals += [scalar.final[row] for row in sorted(scalar.final)]
    if changed not in task.logits:
        # The backward pass went through this run already.
        with torch.no_grad():
            task = task.also(changed, drive.logits(torch.stack(finals)))
    return assemble(
        model,
        grid,
        joined(swept),
        task,
        batches,
        started=started,
        method="attribution_patch",
        direction=direction,
        heading=f"Attribution patching ({direction})",
        verb=f"By gradient, writing the {written}",
    )


def check_smooth(metric: str | Metric | Callable[..., Any]) -> None:
    """Refuse a metric that jumps, before anything is run.

    Args:
        metric: A metric; whether a function of one's own has a gradient is seen only when it is called.

    Raises:
        ValueError: It has no gradient.

    Example:
        >>> check_smooth("logit_difference")
    """
    found = metric_of(metric)
    if isinstance(found, Rank | Accuracy):
        raise _jumps(found)


def _jumps(metric: Metric) -> ValueError:
    return ValueError(
        f"metric {metric.name!r} has no gradient: it jumps. Choose logit_difference, log_probability, "
        "probability or kl."
    )


@dataclass(frozen=True)
class MetricOf:
    """A metric as `backward` wants it: of final residuals; it keeps those that it has seen.

    Attributes:
        drive: The model.
        task: What is measured. Its prompts may be there several times over, one after another.
        start: Number of the first prompt that `backward` gets.
        final: By prompt, its final residual.
    """

    drive: Runner
    task: Task
    start: int = 0
    final: dict[int, Tensor] = field(default_factory=dict)

    def __call__(
        self, resid: Float[Tensor, "prompt d_model"], rows: slice
    ) -> Float[Tensor, " prompt"]:
        """Read the metric out."""
        begin = self.start + rows.start
        self.final.update({begin + i: row for i, row in enumerate(resid.detach())})
        prompt = torch.arange(begin, begin + len(resid)) % self.task.targets.n_prompts
        readout = self.task.readout(slice(None))
        columns = readout.columns
        columns = None if columns is None else columns[prompt].to(self.drive.device)
        logits = self.drive.logits(resid, columns)
        values = readout(logits, prompt.to(logits.device))[VALUE]
        if not values.requires_grad:
            raise _jumps(self.task.metric)
        return values


def _estimate(
    model: Any,
    batch: TokenBatch,
    grid: Grid,
    can: Effects,
    source: Source,
    scalar: Scalar,
    memory: int | None,
) -> Swept:
    """Estimate all cells over some prompts."""
    places = [(site, layer) for site in grid.sites for layer in grid.layers]
    found = backward(model, batch, scalar, places=places, memory=memory)
    base = found.values.float().cpu().numpy()
    moved = np.stack(
        [_cells(_products(found, source, can, *at), at[0], grid, can) for at in places]
    )
    values = base + moved.reshape(-1, len(batch))
    forget_missing(values, grid, can.lengths)
    return Swept(values, base, None, None, None, _PLAN, len(values))


def _products(
    found: Backward, source: Source, can: Effects, site: str, layer: int
) -> Float[np.ndarray, "prompt position *head"]:
    """Change times gradient at one place, summed over the numbers of an activation."""
    stands = found.activations[site, layer]
    change = source.at(site, layer, None, None).to(stands.device) - stands
    moved = (change.float() * found.gradients[site, layer].float()).sum(dim=-1).cpu().numpy()
    if can.causal:
        # Before the first token that differs both runs say the same, up to rounding.
        moved[np.arange(moved.shape[1]) < can.first[:, None]] = 0
    return moved


def _cells(
    moved: Float[np.ndarray, "prompt position *head"], site: str, grid: Grid, can: Effects
) -> np.ndarray:
    """Choose or sum positions and heads as the grid has them: (position, head, prompt) flattened."""
    if grid.positions is not None:
        moved = np.stack([_at(moved, position, can.lengths) for position in grid.positions], axis=1)
    else:
        if grid.together is not None:
            # A position may be meant twice, from the start and from the end.
            number = np.arange(moved.shape[1])
            at = [np.where(p < 0, can.lengths + p, p) for p in grid.together]
            meant = np.any([number == each[:, None] for each in at], axis=0)
            moved = moved * meant.reshape(*meant.shape, *[1] * (moved.ndim - 2))
        moved = moved.sum(axis=1, keepdims=True)
    if grid.heads is not None:
        there = [min(head, grid.n_heads[site] - 1) for head in grid.heads]
        moved = moved[:, :, there]
    elif grid.n_heads[site]:
        heads = slice(None) if grid.heads_together is None else list(grid.heads_together)
        moved = moved[:, :, heads].sum(axis=2)
    return moved.reshape(len(moved), -1).T


def _at(moved: np.ndarray, position: int, lengths: np.ndarray) -> np.ndarray:
    """One position of each prompt, zero where a prompt has none."""
    at = lengths + position if position < 0 else np.full_like(lengths, position)
    there = (at >= 0) & (at < lengths)
    found = moved[np.arange(len(moved)), np.clip(at, 0, lengths - 1)]
    return np.where(there.reshape(-1, *[1] * (found.ndim - 1)), found, 0)
