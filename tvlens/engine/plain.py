"""The plain plan: one ordinary forward over whole prompts for every cell.

Slow and obviously right, it is what the faster plans are tested against, and what runs when someone's own
hooks sit on the model and may rely on seeing whole prompts.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.encoding import TokenBatch
from tvlens.engine.request import Edit, Kept, Read, Request, Taken
from tvlens.models.runner import Runner


def run_plain(runner: Runner, requests: Sequence[Request]) -> list[Kept]:
    """Run every cell of every request by itself.

    Args:
        runner: The model.
        requests: What to run.

    Returns:
        For each request what its reads kept and what its readout computed.
    """
    known: dict[tuple[int, str, int], Tensor] = {}
    return [_run(runner, _with_values(runner, requests, each, known)) for each in requests]


def _with_values(
    runner: Runner,
    requests: Sequence[Request],
    request: Request,
    known: dict[tuple[int, str, int], Tensor],
) -> Request:
    """Read what edits take from other requests' clean runs, and give the edits these values."""
    cells = tuple(
        tuple(_with_value(runner, requests, edit, known) for edit in cell) for cell in request.cells
    )
    return replace(request, cells=cells)


def _with_value(
    runner: Runner,
    requests: Sequence[Request],
    edit: Edit,
    known: dict[tuple[int, str, int], Tensor],
) -> Edit:
    if not isinstance(edit.values, Taken):
        return edit
    key = (edit.values.request, edit.site, edit.layer)
    if key not in known:
        read = Read(edit.site, (edit.layer,), None)
        clean = Request(requests[key[0]].batch, reads=(read,))
        known[key] = _run(runner, clean)[0][0][0, :, 0]
    values = known[key]
    if edit.position is not None:
        length = requests[key[0]].batch.lengths.to(values.device)
        at = length + edit.position if edit.position < 0 else torch.full_like(length, edit.position)
        at = torch.minimum(at.clamp_min(0), length - 1)
        values = values[torch.arange(len(at), device=values.device), at]
    if edit.head is not None:
        values = values.select(1 if edit.position is not None else 2, edit.head)
    return replace(edit, values=values)


def _run(runner: Runner, request: Request) -> Kept:
    cells = [_run_cell(runner, request, cell) for cell in request.cells]
    reads = [torch.stack([kept[i] for kept, _ in cells]) for i in range(len(request.reads))]
    return reads, {key: torch.stack([values[key] for _, values in cells]) for key in cells[0][1]}


def _run_cell(runner: Runner, request: Request, cell: tuple[Edit, ...]) -> Kept:
    batch = request.batch
    kept: list[dict[int, Tensor]] = [{} for _ in request.reads]
    hooks: list[tuple[str, Any]] = [
        (runner.hook_name(edit.site, edit.layer), partial(hook_edit, edit=edit, batch=batch))
        for edit in cell
    ]
    # Reads come after edits, so that a read of an edited site sees the edit.
    for read, store in zip(request.reads, kept, strict=True):
        hooks += [
            (
                runner.hook_name(read.site, layer),
                partial(_read, read=read, batch=batch, store=store, layer=layer),
            )
            for layer in read.layers
        ]
    tokens, mask = batch.tokens.to(runner.device), batch.mask.long().to(runner.device)
    resid = runner.whole(tokens, mask, hooks)
    reads = [
        torch.stack([store[layer].to(runner.device) for layer in read.layers], dim=1)
        for read, store in zip(request.reads, kept, strict=True)
    ]
    if request.readout is None:
        return reads, {}
    prompts = torch.arange(len(batch), device=resid.device)
    columns = request.readout.columns
    columns = None if columns is None else columns.to(resid.device)
    logits = runner.logits(resid[:, -1], columns)
    return reads, dict(request.readout(logits, prompts.to(logits.device)))


def _own(activation: Tensor, site: str, prompt: int, length: int) -> Tensor:
    """A view of one prompt's part of a left-padded activation: position, then the site's axes."""
    if site == "pattern":  # batch head query key
        return activation[prompt, :, -length:, -length:].transpose(0, 1)
    return activation[prompt, -length:]


def hook_edit(
    activation: Float[Tensor, "prompt _ *axes"], hook: Any, *, edit: Edit, batch: TokenBatch
) -> Float[Tensor, "prompt _ *axes"]:
    """Carry out an edit of a left-padded activation, as a hook."""
    changed = activation.clone()
    for prompt, length in enumerate(batch.lengths.tolist()):
        if edit.where is not None and not edit.where[prompt]:
            continue
        own = _own(changed, edit.site, prompt, length)
        new = edit.given[prompt if len(edit.given) > 1 else 0].to(own)
        if edit.position is None:
            new = new[:length]
        else:
            own, new = own[edit.position][None], new[None]
        if edit.head is not None:
            own = own[:, edit.head]
        if edit.site == "pattern":
            new = new[..., :length]
        new = edit.scale * new
        own.copy_(new if edit.mode == "replace" else own + new)
    return changed


def _read(
    activation: Tensor,
    hook: Any,
    *,
    read: Read,
    batch: TokenBatch,
    store: dict[int, Tensor],
    layer: int,
) -> None:
    whole = every_position(activation, read.site, batch)
    if read.position is not None:
        lengths = batch.lengths.to(whole.device)
        at = lengths + read.position if read.position < 0 else read.position
        whole = whole[torch.arange(len(whole), device=whole.device), at]
    store[layer] = whole


def every_position(
    activation: Float[Tensor, "prompt _ *axes"], site: str, batch: TokenBatch
) -> Float[Tensor, "prompt position *site"]:
    """Lay a left-padded activation out from each prompt's first token on, with zeros after its last.

    Args:
        activation: As a hook function sees it.
        site: Its site.
        batch: The prompts.

    Returns:
        The activation; attention weights have a key for every position of the longest prompt.
    """
    width = batch.tokens.shape[1]
    rows = []
    for prompt, length in enumerate(batch.lengths.tolist()):
        own = _own(activation, site, prompt, length)
        last = width if site == "pattern" else own.shape[-1]
        whole = own.new_zeros((width, *own.shape[1:-1], last))
        whole[:length, ..., : own.shape[-1]] = own
        rows.append(whole)
    return torch.stack(rows)
