"""Running the cells of a sweep: one request for the engine, its values views of what was read once.

Prompts are taken in parts, so that the activations that are kept to be written elsewhere stay within
bounds; within a part the engine decides how the cells are run.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, LastLogits, Output, Plan, Read, Request, Taken, run
from tvlens.engine.readout import Readout
from tvlens.metrics import VALUE, WithTop
from tvlens.models.runner import Runner, runner
from tvlens.patching.grid import Effects, Grid, effects
from tvlens.patching.pairs import lengths_of

_KEPT = 2**29  # bytes of activations that are kept at once
# Splitting an edit of all positions pays where this many tokens at the start need not be run.
_WORTH_SPLITTING = 4

Cell = tuple[Edit, ...]


@dataclass
class Source:
    """Activations to be written: for each site prompt, layer, position, then the site's own axes.

    Attributes:
        activations: By site; one prompt stands for all.
        layers: The layers that were read.
        lengths: Number of tokens of each prompt.
    """

    activations: dict[str, Float[Tensor, "prompt layer position *site"]]
    layers: tuple[int, ...]
    lengths: np.ndarray
    _views: dict[tuple[str, int, int | None], Tensor] = field(default_factory=dict)

    def at(
        self, site: str, layer: int, position: int | None, head: int | None
    ) -> Float[Tensor, "_ ..."]:
        """The values of one edit: a view, wherever there is one."""
        key = (site, layer, position)
        if key not in self._views:
            kept = self.activations[site][:, self.layers.index(layer)]
            self._views[key] = kept if position is None else self._position(kept, position)
        view = self._views[key]
        if head is None:
            return view
        return view[:, head] if position is not None else view[:, :, head]

    def _position(self, kept: Tensor, position: int) -> Tensor:
        if position >= 0:
            # A prompt that is too short for it is left out by the edit's own mask.
            return kept[:, min(position, kept.shape[1] - 1)]
        at = np.maximum(self.lengths + position, 0)
        if kept.shape[1] == 1 or (at == at[0]).all():
            return kept[:, min(int(at[0]), kept.shape[1] - 1)]
        return kept[0 if len(kept) == 1 else torch.arange(len(kept)), torch.from_numpy(at)]


class Beside:
    """Activations of a run that goes up the stack beside the sweep: nothing is kept to be written later."""

    def at(self, site: str, layer: int, position: int | None, head: int | None) -> Taken:
        """The values of one edit: what stands at the same place of the first request's run."""
        return Taken(0)


@dataclass(frozen=True)
class Swept:
    """What came back from a sweep.

    Attributes:
        values: The metric, by cell and prompt; NaN where a prompt has no such position.
        base: The metric of the run whose activations were exchanged.
        top: Likeliest tokens by cell, prompt and rank, and their probabilities; None where not kept.
        logits: Whole logits of the untouched run, where asked for.
        beside: Whole logits of the run beside it, where there was one.
        plan: How the engine ran the last part.
        n_run: How many cells were run; the others cannot change anything.
    """

    values: Float[np.ndarray, "cell prompt"]
    base: Float[np.ndarray, " prompt"]
    top: tuple[np.ndarray, np.ndarray] | None
    logits: Float[Tensor, "prompt d_vocab"] | None
    beside: Float[Tensor, "prompt d_vocab"] | None
    plan: Plan
    n_run: int


def parts(drive: Runner, batch: TokenBatch, sites: Sequence[str], n_layers: int) -> Iterator[slice]:
    """Cut prompts into ranges whose kept activations fit.

    Args:
        drive: The model.
        batch: The prompts.
        sites: Sites that are kept.
        n_layers: In how many layers.

    Yields:
        Ranges of prompts.
    """
    width = batch.tokens.shape[1]
    numbers = sum(
        math.prod(drive.site_shape(site)) * (width if site == "pattern" else 1) for site in sites
    )
    each = numbers * n_layers * width * drive.dtype.itemsize
    n = max(_KEPT // max(each, 1), 1)
    for begin in range(0, len(batch), n):
        yield slice(begin, min(begin + n, len(batch)))


def exchanges(
    grid: Grid,
    can: Effects,
    source: Source | Beside,
    *,
    layers_of: Callable[[int], Sequence[int]] = lambda layer: (layer,),
    split: bool = False,
) -> Iterator[tuple[int, Cell]]:
    """Write out the edits of all cells that can change anything.

    Args:
        grid: The cells.
        can: What can change anything.
        source: What is written.
        layers_of: For the layer of a cell, the layers that are written.
        split: Write position by position even where all are written, so that what comes before the first
            difference need not be run.

    Yields:
        The number of a cell and its edits.
    """
    together: Sequence[int | None] = grid.together or (None,)
    if split and grid.together is None and grid.positions is None:
        together = range(int(can.first.min()), int(can.lengths.max()))
    for number, site, layer, position, head in grid.cells():
        edits = []
        heads = grid.heads_of(site, head)
        for deep in layers_of(layer):
            for at in together if position is None else (position,):
                where = can.where(site, deep, at)
                if where is False:
                    continue
                mask = None if where is True else where
                edits += [
                    Edit(site, deep, source.at(site, deep, at, each), at, each, where=mask)
                    for each in heads
                ]
        if edits:
            yield number, tuple(edits)


def _worth_splitting(drive: Runner, can: Effects) -> bool:
    """Whether edits of all positions are better written position by position.

    On a CPU a token that need not be run is worth more than the bookkeeping of an edit; on a GPU it is not.
    """
    return drive.device.type == "cpu" and int(can.first.min()) >= _WORTH_SPLITTING


def sweep(
    model: Any,
    batch: TokenBatch,
    grid: Grid,
    cells: Sequence[tuple[int, Cell]],
    readout: Readout,
    *,
    base: Cell = (),
    top: int = 0,
    logits: bool = False,
    beside: TokenBatch | None = None,
    plan: str = "auto",
    memory: int | None = None,
) -> Swept:
    """Run the cells over some prompts.

    Args:
        model: The model.
        batch: The prompts.
        grid: The cells' axes.
        cells: Number and edits of each cell that can change anything.
        readout: The metric's readout for these prompts.
        base: Edits that every cell has, before its own.
        top: How many of the likeliest tokens to keep.
        logits: Whether to give whole logits of the untouched prompts as well.
        beside: Prompts that run beside these, for edits whose values come from `Beside`.
        plan: The engine's plan.
        memory: Bytes for the engine.

    Returns:
        The metric in every cell.
    """
    request = Request(
        batch,
        cells=(base, *((*base, *edits) for _, edits in cells)),
        readout=WithTop(readout, top) if top else readout,
    )
    # The same prompts once more share everything with the cells' own untouched run.
    more = [Request(batch, readout=LastLogits())] if logits else []
    first = [Request(beside, readout=LastLogits())] if beside is not None else []
    outputs = run(model, [*first, request, *more], plan=plan, memory=memory)
    other = outputs.pop(0).values["logits"][0] if first else None
    output, *whole = outputs
    # What cannot change anything has the value of the run that nobody touched.
    which = np.zeros(math.prod(grid.shape), dtype=np.int64)
    which[[number for number, _ in cells]] = np.arange(1, len(cells) + 1)
    values = output.values[VALUE].float().cpu().numpy()
    found = values[which]
    forget_missing(found, grid, lengths_of(batch))
    kept = None
    if top:
        tokens, shares = output.values["top"], output.values["top_probability"]
        kept = (tokens.cpu().numpy()[which], shares.float().cpu().numpy()[which])
    said = whole[0].values["logits"][0] if whole else None
    return Swept(found, values[0], kept, said, other, output.plan, len(cells))


def sweep_parts(
    model: Any,
    batch: TokenBatch,
    grid: Grid,
    parts: Sequence[tuple[slice, Callable[[], Source | Beside]]],
    readout: Callable[[slice], Readout],
    *,
    differs: Bool[np.ndarray, "prompt position"],
    **settings: Any,
) -> Swept:
    """Exchange activations in every cell, part by part.

    Args:
        model: The model.
        batch: The prompts.
        grid: The cells' axes.
        parts: Ranges of prompts, with a function that gives what is written into each.
        readout: The metric's readout for a range of prompts.
        differs: Where what is written differs from what stands there, by embedding.
        **settings: As in `sweep`.

    Returns:
        The metric in every cell, of all prompts.
    """
    drive, lengths, swept = runner(model), lengths_of(batch), []
    for rows, source in parts:
        can = effects(drive, lengths[rows], differs[rows, : lengths[rows].max()])
        cells = list(exchanges(grid, can, source(), split=_worth_splitting(drive, can)))
        swept.append(sweep(model, batch.rows(rows), grid, cells, readout(rows), **settings))
    return joined(swept)


def joined(swept: Sequence[Swept]) -> Swept:
    """Put parts of the prompts together again.

    Args:
        swept: The parts, in order.

    Returns:
        The whole.
    """
    tops = [part.top for part in swept if part.top is not None]
    logits = [part.logits for part in swept if part.logits is not None]
    beside = [part.beside for part in swept if part.beside is not None]
    top = (
        (np.concatenate([t for t, _ in tops], axis=1), np.concatenate([p for _, p in tops], axis=1))
        if tops
        else None
    )
    return replace(
        swept[-1],
        values=np.concatenate([part.values for part in swept], axis=1),
        base=np.concatenate([part.base for part in swept]),
        top=top,
        logits=torch.cat(logits) if logits else None,
        beside=torch.cat(beside) if beside else None,
        n_run=max(part.n_run for part in swept),
    )


def forget_missing(values: np.ndarray, grid: Grid, lengths: np.ndarray) -> None:
    """Put NaN where a prompt has no such position, or a site no such head.

    Args:
        values: Values by cell and prompt, changed in place.
        grid: The cells.
        lengths: Number of tokens of each prompt.
    """
    shaped = values.reshape(*grid.shape, len(lengths))
    if grid.positions is not None:
        at = np.array(grid.positions)[:, None]
        missing = (at >= lengths) | (at < -lengths)
        axis = (slice(None), slice(None))
        for p in np.flatnonzero(missing.any(axis=1)):
            shaped[(*axis, p)][..., missing[p]] = np.nan
    elif grid.together is not None:
        at = np.array(grid.together)[:, None]
        shaped[..., ((at >= lengths) | (at < -lengths)).all(axis=0)] = np.nan
    if grid.heads is not None:
        for s, site in enumerate(grid.sites):
            for h, head in enumerate(grid.heads):
                if head >= grid.n_heads[site]:
                    axes = (slice(None),) * (len(grid.shape) - 2)
                    shaped[(s, *axes, h)] = np.nan


@dataclass(frozen=True)
class Observed:
    """Untouched runs: their last logits, and the activations of one, part by part.

    Attributes:
        logits: By name of the run.
        parts: Ranges of prompts, with a function that gives the activations of each.
    """

    logits: dict[str, Float[Tensor, "prompt d_vocab"]]
    parts: list[tuple[slice, Callable[[], Source]]]


def observe(
    model: Any,
    batches: dict[str, TokenBatch],
    kept: str,
    reads: dict[str, tuple[int, ...]],
    *,
    plan: str = "auto",
    memory: int | None = None,
) -> Observed:
    """Run prompts untouched, once, and keep what will be written elsewhere.

    Args:
        model: The model.
        batches: By name of the run, its prompts.
        kept: The run whose activations are kept.
        reads: Sites that are kept, and in which layers: the same for all.
        plan: The engine's plan.
        memory: Bytes for the engine.

    Returns:
        Logits of all runs, and the activations.
    """
    layers = next(iter(reads.values()), ())
    if not batches:
        return Observed({}, [])
    ranges = list(parts(runner(model), batches[kept], tuple(reads), len(layers)))

    def source(rows: slice) -> Source:
        batch = batches[kept].rows(rows)
        asked = Request(batch, reads=_reads(reads))
        (output,) = run(model, [asked], plan=plan, memory=memory)
        return Source(_first(reads, output), layers, lengths_of(batch))

    # One part: its activations come with the logits, in the same run.
    alone = len(ranges) == 1
    asked = [
        Request(batch, reads=_reads(reads) if alone and name == kept else (), readout=LastLogits())
        for name, batch in batches.items()
    ]
    outputs = dict(zip(batches, run(model, asked, plan=plan, memory=memory), strict=True))
    logits = {name: output.values["logits"][0] for name, output in outputs.items()}
    if not alone:
        return Observed(logits, [(rows, partial(source, rows)) for rows in ranges])
    whole = Source(_first(reads, outputs[kept]), layers, lengths_of(batches[kept]))
    return Observed(logits, [(ranges[0], lambda: whole)])


def _reads(reads: dict[str, tuple[int, ...]]) -> tuple[Read, ...]:
    return tuple(Read(site, layers, None) for site, layers in reads.items())


def _first(reads: dict[str, tuple[int, ...]], output: Output) -> dict[str, Tensor]:
    """The activations of the only cell, by site."""
    return {site: a[0] for site, a in zip(reads, output.activations, strict=True)}
