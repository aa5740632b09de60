"""Residuals of prompts, layer by layer, through the engine; as many prompts at a time as memory holds."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.encoding import TokenBatch
from tvlens.engine import Plan, Read, Request, run
from tvlens.models.runner import Runner, runner
from tvlens.sites import SITES

STREAM = "resid_post"
_MEMORY = 2**28
# From so many positions on, one read of all of them is cheaper than a read of each.
_FEW = 4


def wide_site(drive: Runner, site: str) -> str:
    """Refuse a site that is no vector of width d_model.

    Args:
        drive: The model.
        site: Name of the site.

    Returns:
        The name.

    Raises:
        ValueError: The site is unknown, has another width, or this model lacks it.
    """
    if site not in SITES:
        raise unknown("site", site, SITES)
    there = [n for n, s in SITES.items() if s.dims == ("d_model",) and drive.has(n, 0)]
    if site not in there:
        raise ValueError(
            f"a lens reads vectors of width d_model: {', '.join(there)}; not {site!r}."
        )
    return site


def chosen_positions(
    positions: int | Sequence[int] | None, lengths: Int[np.ndarray, " prompt"]
) -> tuple[tuple[int, ...], Int[np.ndarray, "prompt position"]]:
    """Settle which positions are read, and where each prompt has them.

    Args:
        positions: Positions, negative ones from each prompt's end; all if None.
        lengths: Number of tokens of each prompt.

    Returns:
        Labels of the positions; and for each prompt, where they are from its first token on, -1 where the
        prompt does not have it.

    Raises:
        ValueError: No prompt has such a position, or there is none.
    """
    width = int(lengths.max())
    given = range(width) if positions is None else positions
    labels = tuple(dict.fromkeys([given] if isinstance(given, int) else map(int, given)))
    if not labels:
        raise ValueError("positions is empty; leave it out for all positions.")
    for position in labels:
        if not -width <= position < width:
            raise ValueError(
                f"position {position} asked for, but the longest prompt has {width} tokens: "
                f"{-width} to {width - 1}."
            )
    asked = np.array(labels)[None]
    at = np.where(asked < 0, lengths[:, None] + asked, asked)
    return labels, np.where((at >= 0) & (at < lengths[:, None]), at, -1)


def read_parts(
    model: Any,
    batch: TokenBatch,
    at: Int[np.ndarray, "prompt position"],
    reads: Sequence[tuple[str, tuple[int, ...]]],
    *,
    plan: str = "auto",
    memory: int | None = None,
) -> Iterator[tuple[Int[np.ndarray, "row 2"], list[Float[Tensor, "layer row d_model"]], Plan]]:
    """Read residuals at some positions of all prompts, a part of the prompts at a time.

    Args:
        model: The model.
        batch: The prompts.
        at: Where to read, -1 for nowhere.
        reads: Sites with their layers.
        plan: How the engine runs the prompts.
        memory: Bytes that the engine's activations and what is read may take.

    Yields:
        For each part: number of the prompt and column of `at` for each row; by read its vectors; the plan.
    """
    drive = runner(model)
    keep = sum(len(layers) for _, layers in reads) * drive.site_shape(STREAM)[0] * 4
    columns = [int(c) for c in at[0]] if (at == at[:1]).all() else []
    few = 0 < len(columns) <= _FEW and min(columns) >= 0
    each = keep * (len(columns) if few else int(batch.lengths.max()))
    size = max(1, (memory // 2 if memory is not None else _MEMORY) // max(each, 1))
    for start in range(0, len(batch), size):
        part = batch.rows(slice(start, start + size))
        here = at[start : start + size]
        wanted = tuple(
            Read(site, layers, column)
            for site, layers in reads
            for column in (columns if few else [None])
        )
        (output,) = run(model, [Request(part, reads=wanted)], plan=plan, memory=memory)
        rows = np.argwhere(here >= 0)
        kept = [activation[0] for activation in output.activations]
        if few:
            n = len(columns)
            kept = [torch.stack(kept[i : i + n], dim=2) for i in range(0, len(kept), n)]
            places = rows[:, 1]
        else:
            places = here[rows[:, 0], rows[:, 1]]
        prompt, place = torch.from_numpy(rows[:, 0]), torch.from_numpy(places)
        vectors = [each.movedim(1, 0)[:, prompt, place] for each in kept]
        yield rows + np.array([[start, 0]]), vectors, output.plan
