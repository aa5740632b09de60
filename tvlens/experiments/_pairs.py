"""What one pair of tasks in conflict takes: shared queries, a layer for theta, and the four runs."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from tvlens.engine import Edit, FirstToken, Request, run
from tvlens.experiments._dev import accuracy_by_layer
from tvlens.extraction import average, dummy_requests
from tvlens.prompts import SPLITS, Prompts, build_prompts
from tvlens.tasks import Task
from tvlens.templates import Template

INJECTIONS = ("none", "other", "own", "random")


@dataclass(frozen=True)
class Settings:
    """What is the same for all prompts."""

    shots: int
    n: int
    n_dummy: int
    template: str | Template
    answers: str
    seed: int

    def build(self, task: Task, model: Any, **changes: Any) -> Prompts:
        return build_prompts(task, model, **{**vars(self), **changes})


@dataclass(frozen=True)
class Side:
    """One task: the first tokens of all that can be asked, the layer of its theta, and its dev queries."""

    task: Task
    ids: dict[str, tuple[int, ...]]
    layer: int = -1
    dev: frozenset[str] = frozenset()
    dev_accuracy: float = float("nan")


def askable(model: Any, task: Task, settings: Settings) -> dict[str, tuple[int, ...]]:
    """The first tokens that count as right, for every query that can be judged."""
    found: dict[str, tuple[int, ...]] = {}
    for split in SPLITS:
        made = settings.build(task, model, shots=0, n_dummy=0, n=len(task), split=split)
        found |= dict(zip(made.queries, made.answer_ids, strict=True))
    return {x: found[x] for x in task.inputs if x in found}


def with_layer(model: Any, side: Side, settings: Settings, fixed: int | None, n_dev: int) -> Side:
    """Choose the layer of a task's theta on dev prompts: the lowest of the best."""
    if fixed is not None:
        return replace(side, layer=fixed)
    made = settings.build(side.task, model, n=n_dev, split="dev")
    curve = accuracy_by_layer(model, made)
    best = int(np.argmax(curve))
    dev = frozenset(made.queries)
    return replace(side, layer=best, dev=dev, dev_accuracy=float(curve[best]))


@dataclass(frozen=True)
class Outcomes:
    """What one pair did."""

    queries: tuple[str, ...]
    predicted: Int[np.ndarray, "injection prompt"]
    obeys_demonstrations: Bool[np.ndarray, "injection prompt"]
    obeys_vector: Bool[np.ndarray, "injection prompt"]
    answers: tuple[list[str], list[str]]
    facts: Mapping[str, Any]


def run_pair(
    model: Any,
    sides: Mapping[str, Side],
    pair: tuple[str, str],
    queries: Sequence[str],
    settings: Settings,
) -> Outcomes:
    """Run the prompts of one pair in all four ways."""
    a, b = (sides[name] for name in pair)
    rng = random.Random(f"{settings.seed}:{pair[0]}:{pair[1]}:conflict")
    asked: list[str] = []
    while len(asked) < settings.n:
        asked += rng.sample(queries, len(queries))
    asked = asked[: settings.n]
    made = [settings.build(side.task, model, split="test", queries=asked) for side in (a, b)]
    reading = [dummy_requests(model, prompts, layers=[b.layer]) for prompts in made]
    read = run(model, [request for requests in reading for request in requests])
    own = average(model, made[0], reading[0], read[: len(reading[0])])
    other = average(model, made[1], reading[1], read[len(reading[0]) :])
    control = other.random_like(seed=rng.getrandbits(32))
    edits = [(Edit(v.site, b.layer, v.at(b.layer)),) for v in (other, own, control)]
    request = Request(made[0].regular, cells=((), *edits), readout=FirstToken(made[0].answer_ids))
    (output,) = run(model, [request])
    predicted = output.values["predicted"].cpu().numpy()
    by_vector = [[int(i) in b.ids[x] for i, x in zip(row, asked, strict=True)] for row in predicted]
    return Outcomes(
        tuple(asked),
        predicted,
        output.values["correct"].cpu().numpy(),
        np.array(by_vector),
        ([p[0] for p in made[0].answers], [p[0] for p in made[1].answers]),
        made[0].facts,
    )
