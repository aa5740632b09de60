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
from tvlens.sites import check_layer

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
            model (they see whole prompts and every cell, as in an ordinary forward).
        memory: Bytes that activations may take; prompts are run in chunks that fit.

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
    for request in requests:
        _check(request, stepper)
    if len({len(request.batch) for request in requests}) != 1:
        sizes = ", ".join(str(len(request.batch)) for request in requests)
        raise ValueError(f"requests of one run need equally many prompts; {sizes} arrived.")
    if plan == "auto":
        plan = "growing" if stepper.steppable and not stepper.has_user_hooks() else "plain"
    execute = run_plain if plan == "plain" else run_growing
    chunk = max(1, memory // _bytes_a_prompt(stepper, requests, plan=plan))
    starts = range(0, len(requests[0].batch), chunk)
    parts = [execute(stepper, [_rows(r, slice(s, s + chunk)) for r in requests]) for s in starts]
    return [_join([part[i] for part in parts]) for i in range(len(requests))]


def _check(request: Request, stepper: Runner) -> None:
    """Refuse what the model or the prompts do not have, before anything runs."""
    n_prompts, shortest = len(request.batch), int(request.batch.lengths.min())
    for edit in (edit for cell in request.cells for edit in cell):
        check_layer(edit.layer, stepper.n_layers)
        if edit.layer < 0:
            raise ValueError(f"an edit's layer counts from 0; {edit.layer} arrived.")
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
        for layer in read.layers:
            check_layer(layer, stepper.n_layers)
    for position in request.positions():
        if not -shortest <= position < shortest:
            raise ValueError(
                f"position {position} asked for, but the shortest prompt has {shortest} tokens: "
                f"{-shortest} to {shortest - 1}."
            )


def _bytes_a_prompt(stepper: Runner, requests: Sequence[Request], *, plan: str) -> int:
    """Estimate what one prompt's activations take inside a block, in bytes."""
    total = 0
    for request in requests:
        width = request.batch.tokens.shape[1]
        joining = len(request.cells) if plan == "growing" else 0
        total += (width + joining) * stepper.bytes_a_token(width)
    return max(total, 1)


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
