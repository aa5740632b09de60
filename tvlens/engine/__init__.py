"""The engine: run a model once, read many sites, apply many edits; exact, batched, without gradients.

Every experiment states what it wants as `Request` objects and calls `run`. How that is computed is a
*plan*. ``"plain"`` runs one ordinary forward for each cell; ``"suffix"`` makes one pass up the stack for
everything and runs only what an edit can change; ``"growing"`` is that pass with whole prompts. The numbers
are the same.
"""

from collections.abc import Sequence
from typing import Any

import torch

from tvlens._errors import needs, unknown, whole
from tvlens.engine.check import check
from tvlens.engine.costs import reproducible
from tvlens.engine.planner import run_planned
from tvlens.engine.readout import FirstToken, LastLogits, Readout, TokenLogits
from tvlens.engine.request import Edit, Output, Plan, Read, Request, Taken
from tvlens.models.runner import runner

__all__ = [
    "Edit",
    "FirstToken",
    "LastLogits",
    "Output",
    "Plan",
    "Read",
    "Readout",
    "Request",
    "Taken",
    "TokenLogits",
    "reproducible",
    "run",
]

PLANS = ("auto", "suffix", "growing", "plain")


@torch.no_grad()
def run(
    model: Any,
    requests: Sequence[Request],
    *,
    plan: str = "auto",
    memory: int | None = None,
) -> list[Output]:
    """Run requests through a model and return what they asked for.

    Args:
        model: A TransformerLens model.
        requests: What to run. Requests of one call have equally many prompts; where row i of several
            starts with the same tokens, those are computed once.
        plan: ``"suffix"``, ``"growing"``, ``"plain"`` or ``"auto"``, which takes the one that measured costs
            say is fastest; but ``"plain"`` where someone's own hooks are on the model (in the blocks these
            see whole prompts, all at once, in one forward for each cell) and where the model cannot be
            run in parts.
        memory: Bytes that activations may take; prompts, then cells, are run in chunks. By default 1 GiB,
            or half of what is free on a GPU.

    Returns:
        One output for each request; its ``plan`` says how it was run, and why so.

    Raises:
        ValueError: Unequal numbers of prompts, a layer or position outside the model or prompt, values of
            another shape, an unknown plan, or a plan that this model does not allow.

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
    needs("requests", requests, Sequence, "a list of Request")
    if memory is not None and whole("memory", memory) < 1:
        raise ValueError(
            f"memory is a number of bytes from 1; {memory} arrived. None takes the default."
        )
    stepper = runner(model)
    check(requests, stepper)
    return run_planned(stepper, requests, plan=plan, memory=memory)
