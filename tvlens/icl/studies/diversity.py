"""How many classes make a network learn in context: a race between memorising and looking up.

A sequence shows items with one of two labels and asks for the label of an item that was among them. With
few classes a network memorises them before it finds out how to look up; with many, looking up comes first.
Between them lies a threshold K*, at which some seeds go one way and some the other. Members without
attention can only memorise; how long they take grows as a power of the number of classes, and that power
says how K* grows.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tvlens.icl.neighbours import descend, stops
from tvlens.icl.presets import at_least, settle, several, within
from tvlens.icl.studies import study
from tvlens.icl.studies._diversity import Diversity, dataset
from tvlens.icl.studies._diversity_network import Task, initial, margins, measures
from tvlens.models._places import resolve_device
from tvlens.provenance import ATTRIBUTE, collect, encode

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"seeds": 4, "steps": 3000, "batch": 64, "lr": 0.1, "n_classes": (64, 128, 256, 512, 1024),
              "context": 20, "d_item": 15, "d_mlp": 64, "attention_decay": 1e-10, "n_test": 256,
              "points": 30},
    "paper": {"seeds": 4, "steps": 100_000, "batch": 128, "lr": 0.01,
              "n_classes": (500, 1000, 2000, 4000, 8000, 16_000, 32_000), "context": 100,
              "d_item": 63, "d_mlp": 512, "attention_decay": 1e-10, "n_test": 500, "points": 80},
}  # fmt: skip
_MLP_DECAY = 1e-10
_ATTENTION = ("Q", "K", "V", "gain", "shift")


@study("diversity")
def diversity(
    *,
    preset: str = "quick",
    seed: int = 0,
    progress: bool = True,
    device: str | None = None,
    out: Path | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    n_classes: int | Sequence[int] | None = None,
    context: int | None = None,
    d_item: int | None = None,
    d_mlp: int | None = None,
    attention_decay: float | None = None,
    n_test: int | None = None,
    points: int | None = None,
) -> Diversity:
    """Train one-layer networks on few and on many classes, with attention and without.

    Args:
        preset: ``"quick"``: a smaller task for two CPU cores. ``"paper"``: the authors' task, meant for a
            GPU.
        seed: The first seed; the others follow.
        progress: Whether to show a progress bar.
        device: Where to train; the first GPU where there is one, else the CPU, where None.
        out: A folder in which training is saved now and then; what is there is continued.
        seeds: Networks for each number of classes; None, here and below, for what the preset says.
        steps: Steps of gradient descent.
        batch: Sequences a step.
        lr: Step size.
        n_classes: Numbers of classes, K.
        context: Items in a sequence, N; the last is asked for.
        d_item: Numbers in an item, D.
        d_mlp: Width of the MLP.
        attention_decay: Weight decay of the attention; about .003 makes in-context learning transient.
        n_test: Sequences in each test.
        points: About how many times to measure.

    Returns:
        Accuracies by number of classes, seed and step, as a result that draws itself.

    Raises:
        ValueError: A preset that does not exist, a size that is too small, or a file of another training.

    Example:
        >>> diversity(steps=8, seeds=1, progress=False).data["value"].dims
        ('attention', 'n_classes', 'seed', 'measure', 'step')

    References:
        Nguyen and Reddy 2024, Differential learning kinetics, arXiv 2412.00104.
    """
    started = time.perf_counter()
    given = {name: value for name, value in locals().items() if name in PRESETS["quick"]}
    used = settle(PRESETS, preset, **given)
    used["n_classes"] = tuple(sorted(several("n_classes", used["n_classes"])))
    at_least(0, seed=seed)
    at_least(
        1, **{name: used[name] for name in ("seeds", "steps", "batch", "d_item", "d_mlp", "n_test")}
    )
    at_least(2, points=used["points"], context=used["context"])
    for k in used["n_classes"]:
        at_least(2, n_classes=k)
    within(0, 1, attention_decay=used["attention_decay"])
    within(0, float("inf"), lr=used["lr"])
    where, sizes = resolve_device(device), used["n_classes"]
    every = list(range(seed, seed + used["seeds"]))
    # The second half of the members has no attention: what memorising does alone.
    task = Task.draw(
        [*sizes, *sizes], every, d_item=used["d_item"], length=used["context"], device=where
    )
    members = every * (2 * len(sizes))
    attends = torch.arange(len(members), device=where) < len(members) // 2
    weights = initial(members, d_item=used["d_item"], d_mlp=used["d_mlp"], device=where)
    tests = task.tests(used["n_test"], seed)
    decay = {
        n: used["lr"] * (used["attention_decay"] if n in _ATTENTION else _MLP_DECAY)
        for n in weights
    }
    mark = {"study": "diversity", "seed": seed} | used
    at = stops(used["steps"], used["points"])
    state = descend(
        weights, draw=lambda stream, n: task.chunk(stream, n, used["batch"]),
        losses=lambda w, some: torch.nn.functional.softplus(-margins(w, some, attends)).mean(dim=1),
        measure=lambda w: measures(w, tests, attends), at=at, lr=used["lr"], decay=decay, mark=mark, out=out,
        progress=progress,
    )  # fmt: skip
    found = torch.stack([state.measured[step] for step in at], dim=-1)
    data = dataset(found, n_classes=sizes, seeds=every, steps=at)
    note = collect(
        kind=Diversity.kind, preset=preset, seed=seed, device=where, **used,
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Diversity(data.assign_attrs({ATTRIBUTE: encode(note)}))
