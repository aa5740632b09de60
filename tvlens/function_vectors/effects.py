"""What every head does for the task: its causal indirect effect on prompts whose labels are shuffled.

The mean output of a head on proper prompts replaces its output at the last token of a shuffled one, head by
head, and the probability of the right answer says what that brought. All heads and all trials go through the
engine at once: nothing before the last token changes, so a cell costs one token from its layer up. The
gradient of the same probability estimates all heads from one forward and one backward pass.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import unknown
from tvlens.engine import Edit, Plan, Read, Request, run
from tvlens.engine.backward import backward
from tvlens.function_vectors.results import METHODS, HeadEffects
from tvlens.metrics import VALUE, Probability, Targets
from tvlens.models.runner import Runner, runner
from tvlens.patching.sweep import parts
from tvlens.prompts import Prompts, build_prompts
from tvlens.tasks import Task, as_task
from tvlens.templates import DEFAULT_TEMPLATE, Template


def head_outputs(
    model: Any, prompts: Prompts, *, plan: str = "auto", memory: int | None = None
) -> Float[Tensor, "layer head d_head"]:
    """Average every head's output at the last token of few-shot prompts.

    Args:
        model: A TransformerLens model.
        prompts: Prompts; their regular view is run.
        plan: How the engine runs the prompts, see `tvlens.engine.run`.
        memory: Bytes that the engine's activations may take.

    Returns:
        The mean outputs, before W_O, in float32.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> prompts = tv.build_prompts("to_upper", tiny_model(), shots=3, n=4, n_dummy=0)
        >>> tuple(head_outputs(tiny_model(), prompts).shape)
        (2, 4, 8)

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.2.
    """
    layers = tuple(range(runner(model).n_layers))
    request = Request(prompts.regular, reads=(Read("z", layers),))
    (output,) = run(model, [request], plan=plan, memory=memory)
    return output.activations[0][0].float().mean(dim=0)


@dataclass(frozen=True, eq=False)
class Indirect:
    """Probability of the right answer on prompts with shuffled labels, as they are and with one head patched.

    Attributes:
        shuffled: Of each prompt as it is.
        patched: With the mean output of one head in its place.
        plan: How the engine ran it, and why so.
    """

    shuffled: Float[Tensor, " prompt"]
    patched: Float[Tensor, "layer head prompt"]
    plan: Plan

    @property
    def effect(self) -> Float[Tensor, "layer head prompt"]:
        """How much more probable the answer became: the causal indirect effect."""
        return self.patched - self.shuffled


def indirect_effects(
    model: Any,
    prompts: Prompts,
    outputs: Float[Tensor, "layer head d_head"],
    *,
    plan: str = "auto",
    memory: int | None = None,
) -> Indirect:
    """Patch every head's mean output into prompts with shuffled labels, one head at a time.

    Args:
        model: A TransformerLens model.
        prompts: Prompts made with ``labels="shuffled"``; their regular view is run.
        outputs: What `head_outputs` gave for proper prompts.
        plan: How the engine runs the prompts, see `tvlens.engine.run`.
        memory: Bytes that the engine's activations may take.

    Returns:
        The probability of the accepted first tokens, together, in every cell.

    Raises:
        ValueError: The outputs are those of a model with other heads.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> model, asked = tiny_model(), {"shots": 3, "n": 4, "n_dummy": 0}
        >>> outputs = head_outputs(model, tv.build_prompts("to_upper", model, **asked))
        >>> shuffled = tv.build_prompts("to_upper", model, labels="shuffled", **asked)
        >>> tuple(indirect_effects(model, shuffled, outputs).effect.shape)
        (2, 4, 4)

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.2.
    """
    drive = runner(model)
    outputs = _fitting(drive, outputs)
    n_layers, n_heads, _ = outputs.shape
    cells = tuple(
        (Edit("z", layer, outputs[layer, head][None], -1, head),)
        for layer in range(n_layers)
        for head in range(n_heads)
    )
    request = Request(prompts.regular, cells=((), *cells), readout=_probability(prompts))
    (found,) = run(model, [request], plan=plan, memory=memory)
    values = found.values[VALUE].float().cpu()
    patched = rearrange(values[1:], "(layer head) prompt -> layer head prompt", head=n_heads)
    return Indirect(values[0], patched, found.plan)


def estimated_effects(
    model: Any,
    prompts: Prompts,
    outputs: Float[Tensor, "layer head d_head"],
    *,
    memory: int | None = None,
) -> Float[Tensor, "layer head prompt"]:
    """Estimate the indirect effect of every head from one forward and one backward pass.

    To first order, the change of a head's output times the gradient of the answer's probability there.

    Args:
        model: A TransformerLens model.
        prompts: As in `indirect_effects`.
        outputs: As in `indirect_effects`.
        memory: Bytes that a pass may hold; prompts are run in chunks.

    Returns:
        The estimated effects.

    Raises:
        ValueError: As in `indirect_effects`.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> model, asked = tiny_model(), {"shots": 3, "n": 4, "n_dummy": 0}
        >>> outputs = head_outputs(model, tv.build_prompts("to_upper", model, **asked))
        >>> shuffled = tv.build_prompts("to_upper", model, labels="shuffled", **asked)
        >>> tuple(estimated_effects(model, shuffled, outputs).shape)
        (2, 4, 4)

    References:
        Nanda 2023, nanda2023attribution; Syed, Rager, Conmy 2023, arXiv:2310.10348.
    """
    drive = runner(model)
    outputs, batch = _fitting(drive, outputs), prompts.regular
    places = [("z", layer) for layer in range(drive.n_layers)]
    found = []
    # Activations and gradients are kept, hence twice the layers.
    for rows in parts(drive, batch, ("z",), 2 * drive.n_layers):
        readout = _probability(prompts).rows(rows)

        def scalar(
            resid: Float[Tensor, "prompt d_model"], some: slice, readout: Any = readout
        ) -> Float[Tensor, " prompt"]:
            logits = drive.logits(resid)
            return readout.rows(some)(logits, torch.arange(len(logits), device=logits.device))[
                VALUE
            ]

        part = batch.rows(rows)
        run_back = backward(model, part, scalar, places=places, memory=memory)
        last = (torch.arange(len(part)), part.lengths.cpu() - 1)
        found.append(
            torch.stack(
                [
                    einsum(
                        # A large model's layers may be on several devices.
                        outputs[layer].cpu().float()
                        - run_back.activations[place][last].cpu().float(),
                        run_back.gradients[place][last].cpu().float(),
                        "prompt head d, prompt head d -> head prompt",
                    )
                    for layer, place in enumerate(places)
                ]
            )
        )
    return torch.cat(found, dim=-1)


def head_effects(
    model: Any,
    task: Task | str,
    *,
    shots: int = 10,
    n_means: int = 100,
    n_trials: int = 25,
    methods: Sequence[str] = METHODS,
    template: str | Template = DEFAULT_TEMPLATE,
    answers: str = "auto",
    split: str = "dev",
    demonstrations: str = "split",
    seed: int = 0,
    plan: str = "auto",
    memory: int | None = None,
) -> HeadEffects:
    """Measure what every head does for a task, as Todd et al. do, and estimate the same by gradient.

    Args:
        model: A TransformerLens model.
        task: The task, or its name.
        shots: Demonstrations a prompt.
        n_means: Prompts over which the heads' outputs are averaged.
        n_trials: Prompts with shuffled labels in which heads are patched.
        methods: ``"effect"`` patches every head, ``"estimate"`` takes the gradient; one of them or both.
        template: How a demonstration is written, see `tvlens.Template`.
        answers: Which items are used, see `tvlens.build_prompts`.
        split: Whose queries are asked.
        demonstrations: Where demonstrations come from, see `tvlens.build_prompts`; from the same split, so
            that the other split's queries stay unseen.
        seed: Decides the split and all prompts.
        plan: How the engine runs the prompts, see `tvlens.engine.run`.
        memory: Bytes that the engine's activations may take.

    Returns:
        Effects by layer, head and trial, with the mean outputs, as a result that draws itself.

    Raises:
        ValueError: An unknown name, too few items for the shots, or no method.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> found = head_effects(tiny_model(), "to_upper", shots=3, n_means=4, n_trials=5)
        >>> dict(found.data["effect"].sizes)
        {'layer': 2, 'head': 4, 'trial': 5}

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.2.
    """
    started = time.perf_counter()
    task = as_task(task)
    chosen = tuple(methods)
    for name in chosen:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    if not chosen:
        raise ValueError(f"methods needs at least one of: {', '.join(METHODS)}; none arrived.")
    how: dict[str, Any] = {
        "shots": shots, "n_dummy": 0, "template": template, "answers": answers, "split": split,
        "demonstrations": demonstrations, "seed": seed,
    }  # fmt: skip
    proper = build_prompts(task, model, n=n_means, **how)
    shuffled = build_prompts(task, model, n=n_trials, labels="shuffled", **how)
    outputs = head_outputs(model, proper, plan=plan, memory=memory)
    found, seconds = {}, {"means": time.perf_counter() - started}
    for name in chosen:
        began = time.perf_counter()
        if name == "effect":
            found[name] = indirect_effects(model, shuffled, outputs, plan=plan, memory=memory)
        else:
            found[name] = estimated_effects(model, shuffled, outputs, memory=memory)
        seconds[name] = time.perf_counter() - began
    return _result(model, shuffled, outputs, found, seconds, n_means=n_means)


def _probability(prompts: Prompts) -> Any:
    targets = Targets(len(prompts), answers=prompts.answer_ids)
    return Probability().readout(targets)


def _fitting(drive: Runner, outputs: Tensor) -> Tensor:
    """Refuse outputs of other heads; bring the others to the model."""
    wanted = (drive.n_layers, *drive.site_shape("z"))
    if tuple(outputs.shape) != wanted:
        raise ValueError(
            f"this model has head outputs of shape {wanted} (layer, head, d_head); "
            f"{tuple(outputs.shape)} arrived. Make them with head_outputs(model, prompts)."
        )
    return outputs.to(drive.device, drive.dtype)


def _result(
    model: Any,
    shuffled: Prompts,
    outputs: Float[Tensor, "layer head d_head"],
    found: dict[str, Any],
    seconds: dict[str, float],
    *,
    n_means: int,
) -> HeadEffects:
    """Label everything."""
    from tvlens.models import facts
    from tvlens.provenance import ATTRIBUTE, collect, encode

    table: dict[str, Any] = {"output": (("layer", "head", "d_head"), outputs.cpu().numpy())}
    if "effect" in found:
        table["shuffled"] = ("trial", found["effect"].shuffled.numpy())
        table["effect"] = (("layer", "head", "trial"), found["effect"].effect.numpy())
    if "estimate" in found:
        table["estimate"] = (("layer", "head", "trial"), found["estimate"].numpy())
    known = facts(model)
    note = collect(
        kind=HeadEffects.kind,
        **{k: v for k, v in shuffled.facts.items() if k not in ("constant", "ambiguous", "labels")},
        n_means=n_means,
        n_trials=len(shuffled),
        model=known.name,
        n_layers=known.n_layers,
        model_facts=known.to_dict(),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        # What a function-vectors run of the same heads takes: every cell, and the untouched prompt.
        cells=(outputs.shape[0] * outputs.shape[1] + 1) * len(shuffled),
    )
    data = xr.Dataset(
        table,
        coords={
            "layer": range(outputs.shape[0]),
            "head": range(outputs.shape[1]),
            "query": ("trial", list(shuffled.queries)),
            "answer": ("trial", [each[0] for each in shuffled.answers]),
        },
    )
    return HeadEffects(data.assign_attrs({ATTRIBUTE: encode(note)}))
