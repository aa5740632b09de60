"""Attribution by gradients: what does the answer owe to each token, layer and head, by whichever way?

A gradient says how much the metric would change if an activation changed a little, later layers included.
Times the activation it is a first guess at what taking the activation away would do; a rough one, since the
model is no straight line. Integrated gradients walk the line from a baseline to the prompt and average the
gradients on the way: then the attributions add up to the whole change, and what they miss of it says whether
there were steps enough.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import unknown, whole
from tvlens.attribution.direct import tokens_of
from tvlens.attribution.path import integrate
from tvlens.attribution.slopes import Gradients
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, LastLogits, Read, Request, run
from tvlens.engine.backward import Backward, backward
from tvlens.engine.readout import Readout
from tvlens.metrics import VALUE, Metric
from tvlens.models.runner import Runner, runner
from tvlens.patching.assemble import Task, make_task, needed_first
from tvlens.patching.gradients import MetricOf, check_smooth
from tvlens.patching.pairs import Answers, Prompts, as_batch, spelled
from tvlens.sites import check_layers

METHODS = {
    "gradient_x_activation": "Gradient x activation",
    "integrated_gradients": "Integrated gradients",
}
_SITES = {"token": "resid_pre", "layer": "resid_post", "head": "z"}
BASELINES = ("zero", "mean")
_STEPS_BYTES = 2**27  # of written activations in one call
_VOCABULARY_ROWS = 4096


@dataclass(frozen=True, eq=False)
class _Work:
    """What every step of the work needs."""

    model: Any
    drive: Runner
    batch: TokenBatch
    task: Task
    site: str
    layers: tuple[int, ...]
    memory: int | None

    @property
    def readout(self) -> Readout:
        return self.task.readout(slice(None))

    def gradients(
        self, batch: TokenBatch, places: Sequence[tuple[str, int]], edits: tuple[Edit, ...] = ()
    ) -> Backward:
        return backward(
            self.model,
            batch,
            MetricOf(self.drive, self.task),
            places=places,
            edits=edits,
            memory=self.memory,
        )

    def measured(self, values: Callable[[int], Tensor]) -> Float[Tensor, "layer prompt"]:
        """The metric with these values at the place, layer by layer."""
        cells = tuple((Edit(self.site, layer, values(layer), None),) for layer in self.layers)
        request = Request(self.batch, cells, readout=self.readout)
        (output,) = run(self.model, [request], memory=self.memory)
        return output.values[VALUE]


def attribute_gradients(
    model: Any,
    prompts: Prompts,
    *,
    metric: str | Metric | Callable[..., Any] = "logit_difference",
    answers: Answers | None = None,
    wrong: Answers | None = None,
    method: str = "gradient_x_activation",
    by: str = "token",
    layers: int | Sequence[int] | None = None,
    baseline: str | int | Float[Tensor, " d_model"] | None = None,
    steps: int = 64,
    memory: int | None = None,
) -> Gradients:
    """Attribute a metric to tokens, layers or heads by its gradient.

    Args:
        model: A TransformerLens model.
        prompts: A text, a list of texts, token ids ``prompt position``, or a `TokenBatch`.
        metric: As in `tvlens.patch`; one that changes smoothly.
        answers: As in `tvlens.patch`; by default what the model predicts.
        wrong: As in `tvlens.patch`; by default the model's second choice.
        method: ``"gradient_x_activation"``, one forward and one backward; or ``"integrated_gradients"``,
            ``steps`` of them, and for layers and heads as many for each layer.
        by: ``"token"``: the embeddings; ``"layer"``: the residual stream after each block; ``"head"``: the
            outputs of each layer's heads. Always position by position.
        layers: Layers, negative ones from the end; all by default. Not for tokens.
        baseline: Where integrated gradients begin: ``"mean"``, the mean embedding of the vocabulary in
            place of each token's (the default; layers and heads begin at what the model makes of that);
            a token id or a vector, in the same place; or ``"zero"``, zeros at the place itself, near which
            norms turn the smallest step into a large one, so that most models are never resolved.
            Gradient x activation always compares with zero.
        steps: At most how many points of the way from the baseline; they are put where the metric changes,
            and fewer are taken where they suffice.
        memory: Bytes that activations may take.

    Returns:
        ``attribution`` by (layer, head,) position and prompt, in units of the metric; ``value`` of the
        prompt, ``baseline``, and ``residual``, what the attributions miss of their difference.

    Raises:
        ValueError: An unknown name, a layer outside the model, a metric of a wrong shape or without a
            gradient, answers that cannot be told apart.
        TypeError: Prompts, metric or baseline are of another type.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> settings = {"answers": "B", "wrong": "b", "method": "integrated_gradients", "steps": 32}
        >>> found = attribute_gradients(tiny_model(), "a->A b->", **settings)
        >>> bool(found.completeness.max() < 0.01)
        True

    References:
        Sundararajan, Taly, Yan 2017, arXiv:1703.01365; Shrikumar et al. 2016, arXiv:1605.01713.
    """
    started = time.perf_counter()
    check_smooth(metric)
    work = _settle(model, prompts, metric, answers, wrong, by, layers, memory)
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    steps = whole("steps", steps)
    if steps < 3:
        raise ValueError(f"steps must be at least 3; {steps} arrived.")
    if method == "gradient_x_activation" and baseline not in (None, "zero"):
        raise ValueError(
            "gradient_x_activation compares with zero; baseline= is for integrated_gradients."
        )
    if method == "gradient_x_activation" and "reference" in work.task.metric.needs:
        raise ValueError(
            f"{work.task.metric.name} is least, and so flat, at the prompt itself: its gradient there is "
            "zero. Use method='integrated_gradients', or another metric."
        )
    here = work.gradients(work.batch, [(work.site, layer) for layer in work.layers])
    note: dict[str, Any] = {"method": method, "heading": METHODS[method], "by": by}
    if method == "gradient_x_activation":
        starts = _zeros(work)
        found = {
            n: (here.activations[work.site, n].double() * here.gradients[work.site, n]).sum(dim=-1)
            for n in work.layers
        }
    else:
        baseline = "mean" if baseline is None else baseline
        starts = _starts(work, baseline)
        walked = {n: _integrated(work, here, starts, n, steps) for n in work.layers}
        found = {n: each for n, (each, _) in walked.items()}
        note |= {"steps": max(used for _, used in walked.values())}
        note |= {"baseline": "given" if isinstance(baseline, Tensor) else baseline}
    base = work.measured(lambda n: starts[n])
    note["seconds"] = round(time.perf_counter() - started, 3)
    return _label(work, found, here.values, base, by, note)


def _settle(
    model: Any,
    prompts: Prompts,
    metric: Any,
    answers: Answers | None,
    wrong: Answers | None,
    by: str,
    layers: int | Sequence[int] | None,
    memory: int | None,
) -> _Work:
    """Check what was asked for, and find out what the model says where nothing was given."""
    if by not in _SITES:
        raise unknown("by", by, _SITES)
    drive, batch = runner(model), as_batch(model, prompts)
    if by == "token":
        if layers is not None:
            raise ValueError("tokens have no layers; use by='layer', or leave layers= out.")
        chosen = (0,)
    else:
        chosen = check_layers(layers, drive.n_layers)
    logits = {}
    if needed_first(metric, answers, wrong):
        (output,) = run(model, [Request(batch, readout=LastLogits())], memory=memory)
        logits["clean"] = output.values["logits"][0]
    task = make_task(model, batch, metric, logits, answers=answers, wrong=wrong)
    return _Work(model, drive, batch, task, _SITES[by], chosen, memory)


def _zeros(work: _Work) -> dict[int, Tensor]:
    shape = work.drive.site_shape(work.site)
    zero = torch.zeros(1, 1, *shape, device=work.drive.device, dtype=work.drive.dtype)
    return dict.fromkeys(work.layers, zero)


@torch.no_grad()
def _starts(work: _Work, baseline: str | int | Tensor) -> dict[int, Tensor]:
    """Where integrated gradients begin, by layer: prompt (or one), position (or one), the site's axes."""
    if isinstance(baseline, str) and baseline not in BASELINES:
        raise unknown("baseline", baseline, BASELINES, hint="Or give a token id or a vector.")
    if isinstance(baseline, str) and baseline == "zero":
        return _zeros(work)
    drive = work.drive
    token = _embedding(drive, work.model.cfg.d_vocab, baseline)
    place = torch.arange(int(work.batch.lengths.max()), device=drive.device)
    embedded = (token + drive.embed_position(torch.zeros_like(place), place))[None]
    if work.site == "resid_pre":
        return {0: embedded}
    request = Request(
        work.batch,
        cells=((Edit("resid_pre", 0, embedded, None),),),
        reads=(Read(work.site, work.layers, None),),
    )
    (output,) = run(work.model, [request], memory=work.memory)
    return {n: output.activations[0][0, :, i] for i, n in enumerate(work.layers)}


def _embedding(
    drive: Runner, d_vocab: int, baseline: str | int | Tensor
) -> Float[Tensor, " d_model"]:
    """What stands in place of each token's embedding, without its position."""
    if isinstance(baseline, Tensor):
        width = drive.site_shape("resid_pre")
        if tuple(baseline.shape) != width:
            raise ValueError(
                f"a baseline is one vector of width {width[0]}; shape {tuple(baseline.shape)} arrived."
            )
        return baseline.to(drive.device, drive.dtype)
    if isinstance(baseline, int) and not 0 <= baseline < d_vocab:
        raise ValueError(f"baseline {baseline} is no token id of this model: 0 to {d_vocab - 1}.")
    chosen = torch.tensor([baseline]) if isinstance(baseline, int) else torch.arange(d_vocab)
    total = torch.zeros(drive.site_shape("resid_pre"), device=drive.device, dtype=torch.double)
    for ids in chosen.to(drive.device).split(_VOCABULARY_ROWS):
        first = torch.zeros_like(ids)
        total += (drive.embed(ids, first) - drive.embed_position(ids, first)).double().sum(dim=0)
    return (total / len(chosen)).to(drive.dtype)


def _integrated(
    work: _Work, here: Backward, starts: dict[int, Tensor], layer: int, steps: int
) -> tuple[Float[Tensor, "prompt position *head"], int]:
    """Attributions summed along the way from the baseline, and at how many points."""
    place = (work.site, layer)
    end = here.activations[place]
    way = end - starts[layer]
    at_once = max(_STEPS_BYTES // max(end.numel() * end.element_size(), 1), 1)

    def look(at: Tensor) -> tuple[Tensor, Tensor]:
        values: list[Tensor] = []
        slopes: list[Tensor] = []
        for some in at.split(at_once):
            left = (1 - some).to(end).reshape(*some.shape, *[1] * (end.ndim - 1))
            written = (end - left * way).flatten(0, 1)
            batch = _repeated(work.batch, len(some))
            found = work.gradients(batch, [place], (Edit(*place, written, None),))
            each = found.gradients[place].unflatten(0, some.shape).double() * way.double()
            values.append(found.values.unflatten(0, some.shape))
            slopes.append(each.sum(dim=-1))
        return torch.cat(values), torch.cat(slopes)

    return integrate(look, len(work.batch), steps=steps)


def _repeated(batch: TokenBatch, times: int) -> TokenBatch:
    """All prompts several times over."""
    tokens, mask, roles = (
        each.repeat(times, 1) for each in (batch.tokens, batch.mask, batch.roles)
    )
    return TokenBatch(batch.text * times, tokens, mask, roles)


def _label(
    work: _Work,
    found: dict[int, Tensor],
    value: Float[Tensor, " prompt"],
    base: Float[Tensor, "layer prompt"],
    by: str,
    note: dict[str, Any],
) -> Gradients:
    from tvlens.models import facts
    from tvlens.provenance import ATTRIBUTE, collect, encode

    heads = ["head"] * (by == "head")
    each = torch.stack([found[n] for n in work.layers])
    each = rearrange(each, "layer prompt position ... -> layer ... position prompt")
    missed = value - base - reduce(each, "layer ... prompt -> layer prompt", "sum")
    width = each.shape[-2]
    beyond = torch.arange(width)[:, None] >= work.batch.lengths
    each = each.masked_fill(beyond.to(each.device), float("nan"))
    layered = ["layer"] * (by != "token")
    if not layered:
        each, base, missed = each[0], base[0], missed[0]
    variables = {
        "attribution": ((*layered, *heads, "position", "prompt"), each),
        "value": (("prompt",), value),
        "baseline": ((*layered, "prompt"), base),
        "residual": ((*layered, "prompt"), missed),
    }
    coords = tokens_of(work.model, work.batch, width) | {
        "text": ("prompt", np.array(work.batch.text, dtype=object))
    }
    coords |= {"layer": list(work.layers)} if layered else {}
    coords |= {"head": np.arange(each.shape[1])} if heads else {}
    for name, ids in (("answer", work.task.targets.answers), ("wrong", work.task.targets.wrong)):
        if ids is not None:
            spoken = [" | ".join(spelled(work.model, row)) for row in ids]
            coords[name] = ("prompt", np.array(spoken, dtype=object))
    table = {
        name: (dims, values.float().cpu().numpy()) for name, (dims, values) in variables.items()
    }
    known = facts(work.model)
    made = collect(
        kind=Gradients.kind, metric=work.task.metric.name, n_prompts=len(work.batch), model=known.name,
        n_layers=known.n_layers, model_facts=known.to_dict(), **note,
    )  # fmt: skip
    return Gradients(xr.Dataset(table, coords, {ATTRIBUTE: encode(made)}))
