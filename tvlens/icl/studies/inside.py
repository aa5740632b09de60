"""Inside one transformer: the part that recalls and the part that copies, cut out and followed over training.

In the theory a model's answer f is alpha g + (1 - alpha) h: g knows only the query, h only the context. Here
both are found in a trained model by cutting, f is held against their mixture, and the label that the context
shows is followed through the layers, at each checkpoint of a training in which copying comes and goes.

References:
    Chan et al. 2025, arXiv:2410.23042, section 4; Zhang, Nanda 2024, arXiv:2309.16042.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from tvlens.icl.data import Data, Items, Setting
from tvlens.icl.export import as_tokens, export
from tvlens.icl.presets import at_least, settle, several, within
from tvlens.icl.probes import PROBES
from tvlens.icl.studies import study
from tvlens.icl.studies._inside import GROUPS, Inside, dataset
from tvlens.icl.studies._inside_cuts import answers
from tvlens.icl.studies._inside_mixture import fits, residual_by_cut
from tvlens.icl.studies._inside_parts import direct, moved_label
from tvlens.icl.training import Plan, Training, train
from tvlens.icl.transformer import Transformer
from tvlens.provenance import ATTRIBUTE, collect, encode

_KEPT = (25, 50, 100, 200, 400, 700, 1000, 1500, 2000, 3000)
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"seeds": 3, "steps": 3000, "checkpoints": _KEPT, "n_prompts": 60, "n_sequences": None},
    "paper": {"seeds": 5, "steps": 100_000, "n_prompts": 300, "n_sequences": 2**16,
              "checkpoints": (*_KEPT, 5000, 10_000, 20_000, 50_000, 100_000)},
}  # fmt: skip
_USUAL = 256  # prompts as training has them, over which means are taken


@study("inside")
def inside(
    *,
    preset: str = "quick",
    seed: int = 0,
    progress: bool = True,
    device: str | None = None,
    out: Path | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    checkpoints: Sequence[int] | int | None = None,
    n_prompts: int | None = None,
    n_sequences: int | None = None,
    noise: float = 0.3,
    label_scale: float = 1.0,
) -> Inside:
    """Find g and h in transformers as they learn, by cuts, direct attribution and patching.

    Args:
        preset: ``"quick"`` for two CPU cores, ``"paper"`` for as many steps as the authors trained.
        seed: The first seed; the others follow.
        progress: Whether to show progress bars.
        device: Where to train; the first GPU where there is one, else the CPU, where None.
        out: Folder for the state; a run that was stopped goes on from it.
        seeds: How many models; None, here and below, for what the preset says.
        steps: Training steps.
        checkpoints: Steps after which models are opened; the preset's, up to the last step, where None.
        n_prompts: Prompts of each probe, the same ones at every checkpoint.
        n_sequences: Sequences in the dataset; the preset "quick" draws new ones for ever.
        noise: Input noise; at .3 copying on rare classes comes and goes within 3000 steps.
        label_scale: Factor on the first label embeddings, see `tvlens.icl.Transformer`.

    Returns:
        Answers of every cut, fits of the mixture, parts and patching effects by seed and checkpoint, as a
        result that draws itself.

    Raises:
        ValueError: Settings that contradict each other, a checkpoint beyond the last step, or a state of
            another run.

    Example:
        >>> found = inside(seeds=1, steps=2, n_prompts=4, progress=False)
        >>> found.data.sizes["step"], found.data.sizes["run"]
        (1, 9)

    References:
        Chan et al. 2025, arXiv:2410.23042, section 4; Zhang, Nanda 2024, arXiv:2309.16042.
    """
    started = time.perf_counter()
    used = settle(
        PRESETS, preset, seeds=seeds, steps=steps, checkpoints=checkpoints, n_prompts=n_prompts,
        n_sequences=n_sequences,
    )  # fmt: skip
    at_least(1, seeds=used["seeds"], steps=used["steps"])
    at_least(3, n_prompts=used["n_prompts"])
    at_least(0, seed=seed)
    within(0, float("inf"), noise=noise, label_scale=label_scale)
    last = used["steps"]
    kept = sorted(several("checkpoints", used["checkpoints"]))
    if checkpoints is None:
        kept = sorted({step for step in kept if step < last} | {last})
    numbers = range(seed, seed + used["seeds"])
    settings = [Setting(noise=noise, n_sequences=used["n_sequences"], seed=s) for s in numbers]
    # Models are opened, not measured: one item of one probe is the least that a plan takes.
    asked = (PROBES["relevant low flipped"],)
    plan = Plan(steps=last, keep=tuple(kept), probes=asked, n_items=1)
    path = None if out is None else Path(out) / "inside.safetensors"
    training = train(
        settings, plan, model=Transformer(label_scale=label_scale), device=device, out=path,
        progress=progress, label="inside",
    )  # fmt: skip
    found = _open(training, kept, used["n_prompts"], progress)
    note = collect(
        kind=Inside.kind, preset=preset, seed=seed, noise=noise, label_scale=label_scale,
        **{name: value for name, value in used.items() if name != "checkpoints"}, checkpoints=kept,
        training_seconds=round(training.seconds, 3), seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Inside(dataset(found, seeds=numbers, steps=kept).assign_attrs({ATTRIBUTE: encode(note)}))


def probe_items(data: Data, n_prompts: int) -> Items:
    """Draw the prompts of all probes, one after another, and last prompts as training has them.

    Prompts with true and with moved labels show the same inputs.

    Args:
        data: The members' data.
        n_prompts: Prompts of each probe.

    Returns:
        The sequences, in the order of `tvlens.icl.PROBES`.
    """

    def index(n: int) -> Int[Tensor, "member item"]:
        return torch.arange(n, device=data.device).expand(len(data.settings), n)

    parts = [
        data.items(
            f"inside {probe.relevant} {probe.group}", index(n_prompts), relevant=probe.relevant,
            group=probe.group, flipped=probe.flipped,
        )
        for probe in PROBES.values()
    ]  # fmt: skip
    parts.append(data.items("inside usual", index(_USUAL)))
    names = ("inputs", "labels", "target", "own")
    return Items(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in names))


def _open(
    training: Training, steps: Sequence[int], n_prompts: int, progress: bool
) -> dict[str, np.ndarray]:
    """Take every model apart at every checkpoint; seed and step become the first axes."""
    from tqdm.auto import tqdm

    data = training.data
    items = probe_items(data, n_prompts)
    n_seeds = len(data.settings)
    rows = []
    with tqdm(total=n_seeds * len(steps), disable=not progress, leave=False, desc="cutting") as bar:
        for member in range(n_seeds):
            inputs, tokens = as_tokens(items, member=member, n_classes=data.n_classes)
            target, own = (each[member, :-_USUAL].cpu() for each in (items.target, items.own))
            for step in steps:
                model = export(training, inputs, member=member, step=step)
                # So small a model is opened fastest where there are no launches to wait for.
                model = model.to("cpu", print_details=False)
                rows.append(_one(model, tokens.cpu(), target, own))
                bar.update()
    return {
        name: rearrange(np.stack([row[name] for row in rows]), "(s t) ... -> s t ...", s=n_seeds)
        for name in rows[0]
    }


def _one(
    model: Any,
    tokens: Int[Tensor, "row position"],
    target: Int[Tensor, " prompt"],
    own: Int[Tensor, " prompt"],
) -> dict[str, np.ndarray]:
    """Everything about one model at one checkpoint."""
    probed, usual = tokens[:-_USUAL], tokens[-_USUAL:]
    said = answers(model, probed, usual)
    n = len(PROBES)
    shares = {
        run: rearrange(log.exp().cpu().numpy(), "(probe i) label -> probe i label", probe=n)
        for run, log in said.items()
    }
    every = np.stack(list(shares.values()))
    targets, owns = (
        rearrange(each.numpy(), "(probe i) -> probe i", probe=n) for each in (target, own)
    )
    alpha, distance = fits(*(shares[run] for run in ("f", "g", "h", "neither")))
    places = {
        name: slice(i * len(targets[0]), (i + 1) * len(targets[0])) for i, name in enumerate(PROBES)
    }
    parts, rises, totals = [], [], []
    for group in GROUPS:
        base, flipped = (places[f"relevant {group} {labels}"] for labels in ("base", "flipped"))
        parts.append(direct(model, probed[flipped], shown=target[flipped], own=own[flipped]))
        rise, total = moved_label(model, probed[base], probed[flipped])
        rises.append(rise)
        totals.append(total)
    return {
        "right": every.argmax(axis=-1) == targets,
        "p_target": _of(every, targets),
        "p_own": _of(every, owns),
        "alpha": alpha,
        "distance": distance,
        "by_cut": residual_by_cut(shares),
        "direct": np.stack(parts),
        "effect": np.stack(rises),
        "whole": np.stack(totals),
    }


def _of(shares: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Shares of one label for each prompt, in every run."""
    at = np.broadcast_to(labels, shares.shape[:-1])[..., None]
    return np.take_along_axis(shares, at, axis=-1)[..., 0]
