"""Gradients: how much a metric would change if an activation changed a little, at every place at once.

A zero is added to each activation that is asked about, in the model's own forward, and one backward pass
says how the metric depends on these zeros. The first-order answer to what patching asks one cell at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.encoding import TokenBatch
from tvlens.engine.check import check
from tvlens.engine.memory import peak_memory
from tvlens.engine.plain import every_position, hook_edit
from tvlens.engine.planner import default_memory
from tvlens.engine.request import Edit, Read, Request
from tvlens.models.runner import Runner, runner

Place = tuple[str, int]
"""A site and a layer."""


@dataclass(frozen=True, eq=False)
class Backward:
    """A metric, activations, and the metric's gradient with respect to them.

    Positions count from each prompt's first token; beyond its last there are zeros.

    Attributes:
        values: The metric of each prompt.
        activations: By site and layer, as they stood there, edits included.
        gradients: By site and layer, the derivative of a prompt's metric by its own activation.
    """

    values: Float[Tensor, " prompt"]
    activations: dict[Place, Float[Tensor, "prompt position *site"]]
    gradients: dict[Place, Float[Tensor, "prompt position *site"]]


Scalar = Callable[[Float[Tensor, "prompt d_model"], slice], Float[Tensor, " prompt"]]
"""From the residual after the last block at each prompt's last token, and which prompts these are."""


def backward(
    model: Any,
    batch: TokenBatch,
    scalar: Scalar,
    *,
    places: Sequence[Place],
    edits: tuple[Edit, ...] = (),
    memory: int | None = None,
) -> Backward:
    """Run forward and backward once, and give activations and gradients at some places.

    Weights get no gradients, and the user's own hooks go on firing.

    Args:
        model: A TransformerLens model.
        batch: The prompts.
        scalar: What is differentiated: one number for each prompt, of its final residual, which must not
            depend on other prompts.
        places: Sites and layers.
        edits: What is written before, as in a cell of a `Request`; values cannot be `Taken`.
        memory: Bytes that a pass may hold; prompts are run in chunks. By default as in `tvlens.engine.run`.

    Returns:
        The metric, the activations and the gradients.

    Raises:
        ValueError: The model has no such site or layer, or the scalar gives another shape.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> from tvlens.patching.pairs import as_batch
        >>> model = tiny_model()
        >>> unembed = lambda resid, rows: runner(model).logits(resid)[:, 0]
        >>> found = backward(model, as_batch(model, "a->b"), unembed, places=[("resid_post", 1)])
        >>> tuple(found.gradients["resid_post", 1].shape) == (1, 4, model.cfg.d_model)
        True
    """
    drive = runner(model)
    reads = tuple(Read(site, (layer,), None) for site, layer in places)
    check([Request(batch, cells=(edits,), reads=reads)], drive)
    drive.prepare(int(batch.lengths.max()))
    with torch.enable_grad(), _no_gradients_of(model):
        return _in_chunks(drive, batch, scalar, places, edits, memory)


def _in_chunks(
    drive: Runner,
    batch: TokenBatch,
    scalar: Scalar,
    places: Sequence[Place],
    edits: tuple[Edit, ...],
    memory: int | None,
) -> Backward:
    """Run as many prompts at once as the longest of them says the memory holds."""
    work = partial(_run, drive, batch, scalar, places, edits)
    n = len(batch)
    if n == 1:
        return work(slice(0, 1))
    longest = int(batch.lengths.argmax())
    with peak_memory(drive.device) as peak:
        work(slice(longest, longest + 1))
    memory = memory if memory is not None else default_memory(drive.device)
    size = min(n, max(1, memory // max(peak.bytes, 1)))
    parts = [work(slice(s, min(s + size, n))) for s in range(0, n, size)]
    width = int(batch.lengths.max())
    return Backward(
        torch.cat([part.values for part in parts]),
        {p: _joined([part.activations[p] for part in parts], p[0], width) for p in places},
        {p: _joined([part.gradients[p] for part in parts], p[0], width) for p in places},
    )


def _run(
    drive: Runner,
    whole: TokenBatch,
    scalar: Scalar,
    places: Sequence[Place],
    edits: tuple[Edit, ...],
    rows: slice,
) -> Backward:
    batch = whole.rows(rows)
    zeros: dict[Place, Tensor] = {}
    seen: dict[Place, Tensor] = {}

    def probe(activation: Tensor, hook: Any, *, place: Place) -> Tensor:
        seen[place] = activation.detach()
        zeros[place] = torch.zeros_like(activation, requires_grad=True)
        return activation + zeros[place]

    hooks: list[tuple[str, Any]] = [
        (drive.hook_name(e.site, e.layer), partial(hook_edit, edit=e.rows(rows), batch=batch))
        for e in edits
    ]
    # After the edits, so that the gradient is that of what was written.
    hooks += [(drive.hook_name(*place), partial(probe, place=place)) for place in places]
    tokens, mask = batch.tokens.to(drive.device), batch.mask.long().to(drive.device)
    values = scalar(drive.whole(tokens, mask, hooks)[:, -1], rows)
    if values.shape != (len(batch),):
        raise ValueError(
            f"what is differentiated must be one number for each of {len(batch)} prompts; shape "
            f"{tuple(values.shape)} arrived."
        )
    order = list(dict.fromkeys(places))
    found = torch.autograd.grad(values.sum(), [zeros[p] for p in order], materialize_grads=True)
    with torch.no_grad():
        gradients = {p: every_position(g, p[0], batch) for p, g in zip(order, found, strict=True)}
        activations = {p: every_position(seen[p], p[0], batch) for p in places}
    return Backward(values.detach(), activations, gradients)


def _joined(parts: list[Tensor], site: str, width: int) -> Tensor:
    """Prompts of several chunks, each as wide as the longest of them all."""
    if len(parts) == 1:
        return parts[0]
    whole = []
    for part in parts:
        shape = [len(part), width, *part.shape[2:]]
        shape[-1] = width if site == "pattern" else shape[-1]
        wide = part.new_zeros(shape)
        wide[:, : part.shape[1], ..., : part.shape[-1]] = part
        whole.append(wide)
    return torch.cat(whole)


@contextmanager
def _no_gradients_of(model: Any) -> Iterator[None]:
    """Keep weights out of the graph, which then begins at the places that are asked about."""
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in wanted:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in wanted:
            weight.requires_grad_(True)
