"""Checks of the forward pass: hooks, padding, the engine's plans, the lens, attribution."""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.checking.subject import Subject
from tvlens.checking.table import Measured, check
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, LastLogits, Read, Request, TokenLogits, run
from tvlens.engine.backward import Place, backward
from tvlens.engine.costs import costs
from tvlens.engine.planner import _obstacle
from tvlens.sites import SITES

_LIKELIEST = 32  # tokens whose logits are compared where there are hundreds of cells
_RUNS, _SANE = ("supported",), ("supported", "repeatable")


@check(
    "finite",
    what="weights and logits that are NaN or infinite",
    means="The model overflows or its weights are damaged: every number from it is meaningless.",
)
def finite(subject: Subject) -> Measured:
    """Count what is not finite in the weights and in the logits of some prompts."""
    spoilt = {
        name: int((~torch.isfinite(weight)).sum())
        for name, weight in subject.model.named_parameters()
        if not torch.isfinite(weight).all()
    }
    logits = [subject.own(row) for row in range(len(subject.ids))]
    n = sum(int((~torch.isfinite(each)).sum()) for each in logits)
    note = f"{n} logits" + "".join(f"; {name}" for name in list(spoilt)[:2]) if spoilt or n else ""
    return Measured(float(n + sum(spoilt.values())), 0.0, note)


@check(
    "supported",
    what="how far the model's parts are from its own forward",
    means="tvlens cannot drive this model: only its weights and its tokenizer were looked at.",
    needs=("finite",),
)
def supported(subject: Subject) -> Measured:
    """Make a runner, and say how the engine will run the model."""
    obstacle = _obstacle(subject.drive)
    if obstacle is None:
        return Measured(costs(subject.drive).difference, None, "runs in parts: all plans")
    return Measured(math.nan, None, f"runs whole forwards, which is slower: {obstacle}")


@check(
    "user_hooks",
    what="whether hooks of your own are on the model",
    means="Your hooks change every number that tvlens computes; remove them with model.reset_hooks().",
    needs=_RUNS,
)
def user_hooks(subject: Subject) -> Measured:
    """Say whether there are hooks; they are nobody's mistake."""
    there = subject.drive.has_user_hooks()
    note = "they stay active in all that follows" if there else "none"
    return Measured(float(there), None, note)


@check(
    "repeatable",
    what="difference between two runs of the same prompt",
    means="The same prompt gives other logits each time, as with dropout: call model.eval().",
    needs=_RUNS,
)
def repeatable(subject: Subject) -> Measured:
    """Run one prompt twice."""
    first, second = (subject.own(subject.longest) for _ in range(2))
    note = "the model is in training mode" if subject.model.training else ""
    return Measured(subject.apart(first, second), subject.tolerance, note)


def expected_places(subject: Subject) -> list[Place]:
    """Give the sites that a model of this build has, in every layer.

    Args:
        subject: The model.

    Returns:
        Sites and layers.
    """
    cfg, drive = subject.model.cfg, subject.drive
    lacks = set()
    side_by_side = type(subject.model.blocks[0]).__name__ == "ParallelBlockBridge"
    if side_by_side or getattr(cfg, "parallel_attn_mlp", False):
        lacks |= {"resid_mid"}
    if getattr(cfg, "attn_only", False):
        lacks |= {"resid_mid", "mlp_out"}
    return [(site, layer) for layer in range(drive.n_layers) for site in SITES if site not in lacks]


@check(
    "hook_names",
    what="sites that are missing, never fire, or have another shape",
    means="Reading or patching such a site fails or gives another activation than its name says.",
    needs=_RUNS,
)
def hook_names(subject: Subject) -> Measured:
    """Run once with a function on every site of every layer, and look at what arrives."""
    drive, batch = subject.drive, subject.batch
    places = expected_places(subject)
    shapes: dict[Place, list[tuple[int, ...]]] = {place: [] for place in places}

    def note(activation: Tensor, hook: Any, *, place: Place) -> None:
        shapes[place].append(tuple(activation.shape))

    there = [place for place in places if drive.has(*place)]
    hooks = [(drive.hook_name(*place), partial(note, place=place)) for place in there]
    drive.whole(batch.tokens.to(drive.device), batch.mask.long().to(drive.device), hooks)
    rows, width = batch.tokens.shape
    wrong = []
    for (site, layer), seen in shapes.items():
        own = drive.site_shape(site)
        wanted = (rows, *own, width, width) if site == "pattern" else (rows, width, *own)
        if seen != [wanted]:
            wrong.append(f"{site} of layer {layer}: {_arrived(seen)}, not {wanted}")
    note_ = f"{len(places)} sites" + "".join(f"; {each}" for each in wrong[:2])
    return Measured(float(len(wrong)), 0.0, note_)


def _arrived(seen: list[tuple[int, ...]]) -> str:
    return "nothing" if not seen else str(seen[0]) if len(seen) == 1 else f"{len(seen)} calls"


@check(
    "hooks_live",
    what="sites on which the logits do not depend",
    means="What is patched there changes nothing: the hook shows a copy that the model does not use.",
    needs=(*_SANE, "hook_names"),
)
def hooks_live(subject: Subject) -> Measured:
    """Take the gradient of the likeliest token's logit with respect to every site of every layer."""
    drive, places = subject.drive, expected_places(subject)

    def best(resid: Tensor, rows: slice) -> Tensor:
        return drive.logits(resid).float().amax(dim=-1)

    found = backward(subject.model, subject.alone, best, places=places, memory=subject.memory)
    dead = [
        f"{site} of layer {layer}"
        for (site, layer), slope in found.gradients.items()
        if not (slope.abs().sum() > 0)
    ]
    return Measured(float(len(dead)), 0.0, "; ".join(dead[:3]))


@check(
    "self_patch",
    what="change of the logits when activations are replaced by themselves",
    means="Replacing an activation by its own value changes the output: no patching effect can be trusted.",
    needs=(*_SANE, "hook_names"),
)
def self_patch(subject: Subject) -> Measured:
    """Patch each site of each layer at the last token with its own clean value."""
    batch = subject.batch.rows(slice(0, None, 2))
    layers: dict[str, tuple[int, ...]] = {}
    for site, layer in expected_places(subject):
        layers[site] = (*layers.get(site, ()), layer)
    # All layers of a site at once through the model's own hooks, then each by itself in the engine.
    edits = _own_values(subject, batch, layers, plan="plain")
    together = ((), *(tuple(edits[site, layer] for layer in layers[site]) for site in layers))
    (own,) = run(subject.model, [Request(batch, together, readout=LastLogits())], plan="plain")
    clean, *patched = own.values["logits"]
    # np.max lets NaN through, which max() may drop.
    worst = np.max([subject.apart(each, clean) for each in patched])
    if _obstacle(subject.drive) is None:
        edits = _own_values(subject, batch, layers, plan="auto")
        cells = ((), *((edit,) for edit in edits.values()))
        columns = clean.topk(min(_LIKELIEST, clean.shape[-1])).indices
        request = Request(batch, cells, readout=TokenLogits(columns))
        (each,) = run(subject.model, [request], memory=subject.memory)
        logits = each.values["logits"].float()
        spread = clean.float().std(-1).mean().clamp_min(1e-6)
        worst = np.max([worst, float((logits[1:] - logits[:1]).abs().amax() / spread)])
    return Measured(float(worst), subject.tolerance, f"{len(edits)} places")


def _own_values(
    subject: Subject, batch: TokenBatch, layers: dict[str, tuple[int, ...]], *, plan: str
) -> dict[Place, Edit]:
    """For each site and layer an edit that writes what stands there."""
    reads = tuple(Read(site, layers[site]) for site in layers)
    (clean,) = run(subject.model, [Request(batch, reads=reads)], plan=plan)
    return {
        (site, layer): Edit(site, layer, kept[0, :, i])
        for site, kept in zip(layers, clean.activations, strict=True)
        for i, layer in enumerate(layers[site])
    }


@check(
    "last_lens",
    what="logit lens of the last layer against the model's own logits",
    means="Lenses, attribution and first-token scores read out something else than the model says.",
    needs=_SANE,
)
def last_lens(subject: Subject) -> Measured:
    """Read the last residual out as the logit lens does, beside the model's own forward."""
    drive = subject.drive
    read = Read("resid_post", (drive.n_layers - 1,), None)
    (output,) = run(subject.model, [Request(subject.alone, reads=(read,))], plan="plain")
    seen = drive.logits(output.activations[0][0, 0, 0])
    return Measured(subject.apart(seen, subject.own(subject.longest)), subject.tolerance)


@check(
    "padding",
    what="a prompt in a padded batch against the same prompt alone",
    means="A prompt's numbers depend on what else is in the batch: masks, positions or hooks leak.",
    needs=(*_SANE, "last_lens"),
)
def padding(subject: Subject) -> Measured:
    """Run prompts of mixed length as one batch, and each of them by itself."""
    (output,) = run(subject.model, [Request(subject.batch, readout=LastLogits())], plan="plain")
    alone = torch.stack([subject.own(row)[-1] for row in range(len(subject.ids))])
    tokenizer = getattr(subject.model, "tokenizer", None)
    none = tokenizer is not None and tokenizer.pad_token_id is None
    note = "the tokenizer has no pad token: token 0 stands in, masked" if none else ""
    return Measured(subject.apart(output.values["logits"][0], alone), subject.tolerance, note)


@check(
    "plans",
    what="the engine's plans against one forward of TransformerLens for each prompt and cell",
    means="Sweeps give other numbers than the model's own forward with hooks: do not trust them.",
    needs=("padding",),
)
def plans(subject: Subject) -> Measured:
    """Run some edits with every plan, and with ``run_with_hooks``, prompt by prompt."""
    drive, model = subject.drive, subject.model
    middle = drive.n_layers // 2
    read = Request(subject.batch, reads=(Read("resid_post", (0, middle)),))
    (clean,) = run(model, [read], plan="plain")
    first, deep = clean.activations[0][0].unbind(dim=1)
    # Each prompt gets another's state: a large change that stays within what the model knows.
    cells = (
        (),
        (Edit("resid_post", middle, deep.roll(1, dims=0)),),
        (Edit("resid_post", 0, first.roll(1, dims=0), mode="add"),),
    )
    wanted = torch.stack([_own_cell(subject, cell) for cell in cells])
    names = ("plain",) if _obstacle(drive) is not None else ("plain", "suffix", "growing")
    request, worst = Request(subject.batch, cells, readout=LastLogits()), {}
    for name in names:
        (output,) = run(model, [request], plan=name, memory=subject.memory)
        found = output.values["logits"].flatten(0, 1)
        worst[name] = subject.apart(found, wanted.flatten(0, 1))
    note = ", ".join(f"{name} {value:.1e}" for name, value in worst.items())
    return Measured(float(np.max([*worst.values()])), subject.tolerance, note)


def _own_cell(subject: Subject, cell: tuple[Edit, ...]) -> Float[Tensor, "prompt d_vocab"]:
    """One forward for each prompt, with TransformerLens' hooks alone."""

    def written(activation: Tensor, hook: Any, *, edit: Edit, row: int) -> Tensor:
        changed, new = activation.clone(), edit.given[row].to(activation)
        changed[0, -1] = new + changed[0, -1] if edit.mode == "add" else new
        return changed

    name = subject.drive.hook_name
    return torch.stack(
        [
            subject.own(
                row,
                [(name(e.site, e.layer), partial(written, edit=e, row=row)) for e in cell],
            )[-1]
            for row in range(len(subject.ids))
        ]
    )


@check(
    "attribution",
    what="what direct attribution misses of the logit difference, as a share of all parts",
    means="The parts do not add up to the logit: something writes into the stream that has no name.",
    needs=("last_lens",),
)
def attribution(subject: Subject) -> Measured:
    """Split the two likeliest tokens' logit difference into parts, and sum the parts."""
    from tvlens.attribution import attribute

    said = subject.own(subject.longest)[-1].double()
    cap = subject.drive.soft_cap
    said = cap * torch.atanh(said / cap) if cap else said
    right, wrong = said.topk(2).indices.tolist()
    by = "head" if subject.drive.steppable else "layer"
    found = attribute(subject.model, subject.alone, answers=right, wrong=wrong, by=by, plan="plain")
    parts = found.parts()
    missed = abs(float(parts.sum()) - float(said[right] - said[wrong]))
    size = float(abs(parts).sum())
    return Measured(missed / max(size, 1e-9), subject.tolerance, f"by {by}, {parts.size} parts")
