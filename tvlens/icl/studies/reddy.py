"""Abrupt in-context learning: two layers of attention that become an induction head all of a sudden.

A sequence shows N items with their labels and asks for the label of one more item. Items are noisy copies
of class means, so labels can be learnt by heart, class by class; in bursty sequences the target's class is
in the context, so its label can also be looked up. Looking up needs two layers that only work together:
the first writes each item next to its label, the second finds the label whose item is like the target.
Four measures follow the parts of this circuit while accuracy still looks flat.
"""

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tvlens.icl.neighbours import descend, stops
from tvlens.icl.presets import at_least, settle, several, within
from tvlens.icl.studies import study
from tvlens.icl.studies._reddy import Reddy, dataset
from tvlens.icl.studies._reddy_network import Task, initial, losses, measures
from tvlens.models._places import resolve_device
from tvlens.provenance import ATTRIBUTE, collect, encode

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"seeds": 2, "steps": 3000, "batch": 64, "lr": 0.2, "n_classes": (512, 64), "copies": (1,),
              "noise": (0.1,), "zipf": (0.0,), "p_bursty": 1.0, "n_labels": 8, "n_pairs": 4, "n_max": 6,
              "d_item": 19, "n_test": 256, "points": 40},
    "paper": {"seeds": 3, "steps": 100_000, "batch": 128, "lr": 0.01, "n_classes": (128, 512, 2048),
              "copies": (1, 4), "noise": (0.1,), "zipf": (0.0, 1.0), "p_bursty": 1.0, "n_labels": 32,
              "n_pairs": 8, "n_max": 32, "d_item": 63, "n_test": 1000, "points": 100},
}  # fmt: skip
_DECAY = 1e-6


@study("reddy")
def reddy(
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
    copies: int | Sequence[int] | None = None,
    noise: float | Sequence[float] | None = None,
    zipf: float | Sequence[float] | None = None,
    p_bursty: float | None = None,
    n_labels: int | None = None,
    n_pairs: int | None = None,
    n_max: int | None = None,
    d_item: int | None = None,
    n_test: int | None = None,
    points: int | None = None,
) -> Reddy:
    """Train two-layer networks on sequences that can be looked up or known by heart.

    Args:
        preset: ``"quick"``: a smaller task for two CPU cores, with many and with few classes. ``"paper"``:
            the authors' task over numbers of classes, copies and Zipf exponents, meant for a GPU.
        seed: The first seed; the others follow.
        progress: Whether to show a progress bar.
        device: Where to train; the first GPU where there is one, else the CPU, where None.
        out: A folder in which training is saved now and then; what is there is continued.
        seeds: Networks of each setting; None, here and below, for what the preset says.
        steps: Steps of gradient descent.
        batch: Sequences a step.
        lr: Step size.
        n_classes: Classes, K; all combinations of dials are run.
        copies: Burstiness B: how often each class of a bursty context is in it.
        noise: Within-class noise, epsilon.
        zipf: Exponent of the classes' frequencies.
        p_bursty: Share of bursty sequences in training.
        n_labels: Labels, L.
        n_pairs: Items with labels in a context, N.
        n_max: Pairs for which there are positions; where a sequence begins among them is random.
        d_item: Numbers in an item, D.
        n_test: Sequences in each test.
        points: About how many times to measure.

    Returns:
        Accuracies and progress measures by setting, seed and step, as a result that draws itself.

    Raises:
        ValueError: A preset that does not exist, classes that are no multiple of labels, copies that do not
            divide the context, or a file of another training.

    Example:
        >>> reddy(steps=8, seeds=1, progress=False).data["accuracy"].dims
        ('setting', 'seed', 'test', 'step')

    References:
        Reddy 2023, The mechanistic basis of data dependence and abrupt learning, arXiv 2312.03002.
    """
    started = time.perf_counter()
    given = {name: value for name, value in locals().items() if name in PRESETS["quick"]}
    used = settle(PRESETS, preset, **given)
    dials = {name: several(name, used[name]) for name in ("n_classes", "copies", "noise", "zipf")}
    used |= dials
    _check(used)
    at_least(0, seed=seed)
    settings = list(product(*dials.values()))
    members = [(*setting, seed + i) for setting in settings for i in range(used["seeds"])]
    where = resolve_device(device)
    task = Task.draw(members, used, device=where)
    tests = task.tests(used["n_test"], seed)
    mark = {"study": "reddy", "seed": seed} | used
    weights = initial(members, task.d_input, used["n_labels"], where)
    state = descend(
        weights, draw=lambda stream, n: task.chunk(stream, n, used["batch"]), losses=losses,
        measure=lambda w: measures(w, tests), at=stops(used["steps"], used["points"]), lr=used["lr"],
        decay=dict.fromkeys(weights, _DECAY), mark=mark, out=out, progress=progress,
    )  # fmt: skip
    steps_kept = stops(used["steps"], used["points"])
    found = torch.stack([state.measured[step] for step in steps_kept], dim=-1)
    data = dataset(
        found, settings=settings, seeds=range(seed, seed + used["seeds"]), steps=steps_kept
    )
    note = collect(
        kind=Reddy.kind, preset=preset, seed=seed, device=where, **used,
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Reddy(data.assign_attrs({ATTRIBUTE: encode(note)}))


def _check(used: dict[str, Any]) -> None:
    at_least(1, **{name: used[name] for name in ("seeds", "steps", "batch", "n_test", "n_pairs")})
    at_least(2, n_labels=used["n_labels"], d_item=used["d_item"], points=used["points"])
    within(0, 1, p_bursty=used["p_bursty"])
    within(0, float("inf"), lr=used["lr"])
    for name in ("noise", "zipf"):
        for value in used[name]:
            within(0, float("inf"), **{name: value})
    n, most, labels = used["n_pairs"], used["n_max"], used["n_labels"]
    if most < n:
        raise ValueError(
            f"there are positions for n_max = {most} pairs, but n_pairs = {n}. Nearest: {n}."
        )
    for k in used["n_classes"]:
        at_least(1, n_classes=k)
        if k % labels:
            near = max(labels, round(k / labels) * labels)
            raise ValueError(f"{k} classes are no multiple of {labels} labels. Nearest: {near}.")
    for b in used["copies"]:
        at_least(1, copies=b)
        if n % b:
            near = min((c for c in range(1, n + 1) if n % c == 0), key=lambda c: abs(c - b))
            raise ValueError(
                f"copies = {b} does not divide a context of {n} pairs. Nearest: {near}."
            )
