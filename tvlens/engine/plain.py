"""The plain plan: one ordinary forward over whole prompts for every cell.

Slow and obviously right, it is what the faster plan is tested against, and what runs when someone's own
hooks sit on the model and may rely on seeing whole prompts.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tvlens.encoding import TokenBatch
from tvlens.engine.request import Edit, Output, Read, Request
from tvlens.models.runner import Runner
from tvlens.sites import hook_name


def run_plain(runner: Runner, requests: Sequence[Request]) -> list[Output]:
    """Run every cell of every request by itself.

    Args:
        runner: The model, block by block.
        requests: What to run.

    Returns:
        One output for each request.
    """
    return [_run(runner, request) for request in requests]


def _run(runner: Runner, request: Request) -> Output:
    cells = [_run_cell(runner, request, cell) for cell in request.cells]
    return Output(
        activations=tuple(torch.stack([c[0][i] for c in cells]) for i in range(len(request.reads))),
        values={key: torch.stack([c[1][key] for c in cells]) for key in cells[0][1]},
        plan="plain: one whole forward for each cell",
    )


def _run_cell(
    runner: Runner, request: Request, cell: tuple[Edit, ...]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    batch = request.batch
    kept: list[dict[int, Tensor]] = [{} for _ in request.reads]
    hooks: list[tuple[str, Any]] = [
        (hook_name(edit.site, edit.layer), partial(_edit, edit=edit, batch=batch)) for edit in cell
    ]
    # Reads come after edits, so that a read of an edited site sees the edit.
    for read, store in zip(request.reads, kept, strict=True):
        hooks += [
            (hook_name(read.site, layer), partial(_read, read=read, batch=batch, store=store))
            for layer in read.layers
        ]
    tokens, mask = batch.tokens.to(runner.device), batch.mask.long().to(runner.device)
    resid = runner.whole(tokens, mask, hooks)
    reads = [
        torch.stack([store[layer] for layer in read.layers], dim=1)
        for read, store in zip(request.reads, kept, strict=True)
    ]
    if request.readout is None:
        return reads, {}
    prompts = torch.arange(len(batch), device=resid.device)
    return reads, dict(request.readout(runner.logits(resid[:, -1]), prompts))


def _columns(batch: TokenBatch, position: int, device: torch.device) -> Tensor:
    """Where a position, given from the start or the end of each prompt, lies in the padded batch."""
    width = batch.tokens.shape[1]
    lengths = batch.lengths.to(device)
    return (
        torch.full_like(lengths, width) + position if position < 0 else width - lengths + position
    )


def _edit(activation: Tensor, hook: Any, *, edit: Edit, batch: TokenBatch) -> Tensor:
    at = _columns(batch, edit.position, activation.device)
    every = torch.arange(len(at), device=activation.device)
    changed = activation.clone()
    changed[every, at] = edit.apply(activation[every, at])
    return changed


def _read(
    activation: Tensor, hook: Any, *, read: Read, batch: TokenBatch, store: dict[int, Tensor]
) -> None:
    at = _columns(batch, read.position, activation.device)
    every = torch.arange(len(at), device=activation.device)
    store[hook.layer()] = activation[every, at]
