"""The engine: run a model once, read many sites, apply many edits; exact, batched, without gradients.

Every experiment states what it wants as `Request` objects and calls `run`. How that is computed is a
*plan*. ``"plain"`` runs one ordinary forward for each cell; ``"growing"`` makes one pass up the stack for
everything. The numbers are the same.
"""

from collections.abc import Sequence
from typing import Any

import torch

from tvlens._errors import unknown
from tvlens.engine.growing import run_growing
from tvlens.engine.plain import run_plain
from tvlens.engine.request import (
    Edit,
    FirstToken,
    LastLogits,
    Output,
    Read,
    Readout,
    Request,
)
from tvlens.models.runner import Runner, runner
from tvlens.sites import SITES, check_layer

__all__ = ["Edit", "FirstToken", "LastLogits", "Output", "Read", "Readout", "Request", "run"]

PLANS = ("auto", "growing", "plain")


@torch.no_grad()
def run(
    model: Any,
    requests: Sequence[Request],
    *,
    plan: str = "auto",
    memory: int = 2**30,
) -> list[Output]:
    """Run requests through a model and return what they asked for.

    Args:
        model: A TransformerLens model.
        requests: What to run. Requests of one call have equally many prompts; where row i of several
            starts with the same tokens, those are computed once.
        plan: ``"growing"``, ``"plain"`` or ``"auto"``: growing, unless someone's own hooks are on the
            model: in the blocks these see whole prompts, all at once, in one forward for each cell.
        memory: Bytes that a block's activations may take, by estimate; prompts are run in chunks.

    Returns:
        One output for each request.

    Raises:
        ValueError: Unequal numbers of prompts, a layer or position outside the model or prompt, values of
            another width, or an unknown plan.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> model = tiny_model()
        >>> prompts = tv.build_prompts(tv.load_task("to_upper"), model, shots=2, n=4)
        >>> output, = run(model, [Request(prompts.regular, readout=LastLogits())])
        >>> tuple(output.values["logits"].shape) == (1, 4, model.cfg.d_vocab)
        True
    """
    if plan not in PLANS:
        raise unknown("plan", plan, PLANS)
    stepper = runner(model)
    if not requests or len({len(request.batch) for request in requests}) != 1:
        sizes = ", ".join(str(len(request.batch)) for request in requests) or "no request"
        raise ValueError(f"a run needs requests of equally many prompts; {sizes} arrived.")
    for request in requests:
        _check(request, stepper)
    own_hooks = stepper.has_user_hooks()
    if plan == "auto":
        plan = "growing" if stepper.steppable and not own_hooks else "plain"
    execute = run_plain if plan == "plain" else run_growing
    n_prompts = len(requests[0].batch)
    # Someone's own hooks may hold a value for every prompt: they see the whole batch at once.
    chunk = n_prompts if own_hooks else _chunk(stepper, requests, plan=plan, memory=memory)
    starts = range(0, n_prompts, chunk)
    parts = [execute(stepper, [_rows(r, slice(s, s + chunk)) for r in requests]) for s in starts]
    return [_join([part[i] for part in parts]) for i in range(len(requests))]


def _check(request: Request, stepper: Runner) -> None:
    """Refuse what the model or the prompts do not have, before anything runs."""
    n_prompts, shortest = len(request.batch), int(request.batch.lengths.min())
    if not request.cells:
        raise ValueError("a request needs at least one cell; ((),) is the clean run.")
    for edit in (edit for cell in request.cells for edit in cell):
        _check_place(edit.site, edit.layer, stepper)
        if len(edit.values) not in (1, n_prompts):
            raise ValueError(
                f"an edit needs values for 1 or {n_prompts} prompts; {len(edit.values)} arrived."
            )
        width = tuple(stepper.site_shape(edit.site))
        if tuple(edit.values.shape[1:]) != width:
            raise ValueError(
                f"an edit of {edit.site!r} needs values of shape {width} for each prompt; "
                f"{tuple(edit.values.shape[1:])} arrived. Was the vector made by another model?"
            )
    for read in request.reads:
        if not read.layers:
            raise ValueError(f"a read of {read.site!r} needs at least one layer.")
        for layer in read.layers:
            _check_place(read.site, layer, stepper)
    for position in request.positions():
        if not -shortest <= position < shortest:
            raise ValueError(
                f"position {position} asked for, but the shortest prompt has {shortest} tokens: "
                f"{-shortest} to {shortest - 1}."
            )


def _check_place(site: str, layer: int, stepper: Runner) -> None:
    """Refuse a site or layer that this model does not have."""
    if check_layer(layer, stepper.n_layers) != layer:
        raise ValueError(f"the layers of edits and reads count from 0; {layer} arrived.")
    if not stepper.has(site, layer):
        there = [name for name in SITES if stepper.has(name, layer)]
        raise ValueError(f"this model has no site {site!r}; it has {', '.join(there)}.")


def _chunk(stepper: Runner, requests: Sequence[Request], *, plan: str, memory: int) -> int:
    """How many prompts at a time keep a block's activations within the memory, by estimate."""
    total = 0
    for request in requests:
        width = request.batch.tokens.shape[1]
        # Besides its clean row, each cell's row runs from the first edited or read position on.
        suffix = max(-p if p < 0 else width for p in request.positions())
        joining = len(request.cells) if plan == "growing" else 0
        total += stepper.bytes_of_rows(1, width, width)
        total += stepper.bytes_of_rows(joining, suffix, width)
    return max(1, memory // max(total, 1))


def _rows(request: Request, rows: slice) -> Request:
    """The same request for a range of its prompts."""
    cells = tuple(
        tuple(
            edit
            if len(edit.values) == 1
            else Edit(
                edit.site, edit.layer, edit.values[rows], edit.position, edit.mode, edit.scale
            )
            for edit in cell
        )
        for cell in request.cells
    )
    readout = (
        _Shifted(request.readout, rows.start) if request.readout and rows.start else request.readout
    )
    return Request(request.batch.rows(rows), cells, request.reads, readout)


class _Shifted:
    """A readout that is told prompt numbers of the whole request while a chunk runs."""

    def __init__(self, readout: Readout, by: int) -> None:
        self.readout, self.by = readout, by

    def __call__(self, logits: Any, prompt: Any) -> Any:
        return self.readout(logits, prompt + self.by)


def _join(parts: Sequence[Output]) -> Output:
    """Put the chunks of one request together again."""
    first = parts[0]
    return Output(
        activations=tuple(
            torch.cat([part.activations[i] for part in parts], dim=1)
            for i in range(len(first.activations))
        ),
        values={
            key: torch.cat([part.values[key] for part in parts], dim=1) for key in first.values
        },
        plan=first.plan,
    )
