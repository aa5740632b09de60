"""Can one vector go both ways? Tasks joined with their inverse, against theta.

Demonstrations show a mapping in both directions: a -> A beside B -> b. The model sees from the query which
way to go; theta was read on other queries and is injected into a prompt that shows none of this. Three thetas
are read from the same mixed demonstrations: of all dummy queries, of those that go the query's way, and of
those that go the other. Theta of the one-way task of the query's own direction says whether the model can be
steered there at all, theta of the other direction and a random vector what steering amounts to without it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvlens._errors import whole
from tvlens.encoding import Encoder, settle
from tvlens.engine import Edit, FirstToken, Request, run
from tvlens.experiments import experiment
from tvlens.experiments._bijection import RUNS, Bijection
from tvlens.experiments._dev import accuracy_by_layer, random_cell, resolved
from tvlens.extraction import average, dummy_requests, extract
from tvlens.models import facts, load_model
from tvlens.prompts import Prompts, build_prompts, usable_items
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.scoring import score
from tvlens.tasks import Task, both_ways, directions
from tvlens.templates import Template, get_template

TASKS = ("to_upper", "gerund", "plural_singular", "fr_en", "es_en", "antonyms")


@experiment("bijection")
def bijection(
    model: Any,
    tasks: Sequence[Task | str] = TASKS,
    *,
    shots: int = 10,
    n: int = 50,
    n_dev: int = 30,
    n_dummy: int = 6,
    template: str | Template = "example",
    seed: int = 0,
    progress: bool = True,
) -> Bijection:
    """Join each task with its inverse, and see whether one theta answers queries of both directions.

    Args:
        model: A TransformerLens model, or a name that `tvlens.load_model` knows.
        tasks: One-way tasks, or their names; `tvlens.tasks.directions` gives the way back.
        shots: Demonstrations a prompt, drawn from both directions.
        n: Test prompts a task, at least 2: one of each direction.
        n_dev: Dev prompts, at least 2, that choose the layer: one for theta of both ways, one for each
            direction alone.
        n_dummy: Dummy queries a prompt, drawn from both directions.
        template: How a demonstration is written, see `tvlens.Template`.
        seed: Decides all prompts and the random vector.
        progress: Whether to show a progress bar.

    Returns:
        Outcomes of every prompt in every run, as a result that plots itself.

    Raises:
        ValueError: Unknown names, the same task twice, fewer than 2 prompts or no dummy query, or a task too
            small for the shots or for queries of both directions.
        TypeError: A number that is none.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> found = bijection(tiny_model(), ["to_upper"], shots=2, n=6, n_dev=4, progress=False)
        >>> found.data.sizes["prompt"]
        6

    References:
        Dong et al. 2026, arXiv:2506.09048; Hendel, Geva, Globerson 2023, arXiv:2310.15916.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    for name, number, least in (("n", n, 2), ("n_dev", n_dev, 2), ("n_dummy", n_dummy, 1)):
        if whole(name, number) < least:
            why = "one for each direction" if least == 2 else "theta is read on them"
            raise ValueError(f"{name} >= {least} is needed, {why}; {number} arrived.")
    model = load_model(model) if isinstance(model, str) else model
    named, known = resolved(tasks), facts(model)
    how = {"shots": shots, "n_dummy": n_dummy, "seed": seed, "answers": "any"}
    parts, about = [], {}
    with tqdm(total=len(named), disable=not progress, leave=False) as bar:
        for task in named.values():
            bar.set_postfix_str(task.name)
            sides = _Sides.of(task, model, template)
            part, about = _one(model, sides, how | {"template": sides.template}, n, n_dev)
            parts.append(part)
            bar.update()
    data: Any = xr.concat(parts, dim="task")
    data.attrs[ATTRIBUTE] = encode(
        collect(
            kind=Bijection.kind,
            task=", ".join(named),
            n=n,
            n_dev=n_dev,
            **{k: about[k] for k in ("template", "bos", "shots", "n_dummy", "seed")},
            model=known.name,
            n_layers=known.n_layers,
            model_facts=known.to_dict(),
            seconds=round(time.perf_counter() - started, 3),
        )
    )
    return Bijection(data)


@dataclass(frozen=True)
class _Sides:
    """A task one way, the way back, and both joined; only what can be asked, written alike."""

    there: Task
    back: Task
    joined: Task
    template: Template

    @classmethod
    def of(cls, task: Task, model: Any, template: str | Template) -> "_Sides":
        joined = both_ways(task)
        settled = settle(joined, get_template(template), Encoder.of(model))
        usable = {*usable_items(joined, model, template=settled)}
        there, back, joined = (
            replace(one, answers={x: ys for x, ys in one.answers.items() if x in usable})
            for one in (*directions(task), joined)
        )
        return cls(there, back, joined, settled)

    def forward(self, queries: Sequence[str]) -> Bool[Tensor, " prompt"]:
        """Which queries belong to the task itself, and not to its inverse."""
        return torch.tensor([x in self.there.answers for x in queries])

    def asked(self, model: Any, how: Mapping[str, Any], split: str, n: int) -> list[str]:
        """Queries of a split, one of each direction in turn."""
        bare = {"shots": 0, "n_dummy": 0, "n": len(self.joined)}
        pool = dict.fromkeys(
            build_prompts(self.joined, model, split=split, **{**how, **bare}).queries
        )
        sides = [[x for x in pool if x in one.answers] for one in (self.there, self.back)]
        if not all(sides):
            raise ValueError(
                f"task {self.joined.name!r} has {len(sides[0])} usable {split} queries of its own direction "
                f"and {len(sides[1])} of the other; each needs 1. Use a larger task, or another seed."
            )
        return [sides[i % 2][i // 2 % len(sides[i % 2])] for i in range(n)]

    def dummies(self, test: Prompts) -> Bool[Tensor, "dummy prompt"]:
        """Which dummy queries belong to the task itself."""
        written = {self.template.query(x)[0]: x for x in self.joined.inputs}
        found = []
        for dummy in test.dummies:
            pairs = zip(test.queries, test.text, dummy.text, strict=True)
            rest = [own[len(text) - len(self.template.query(x)[0]) :] for x, text, own in pairs]
            found.append(self.forward([written[text] for text in rest]))
        return torch.stack(found)


@dataclass(frozen=True, eq=False)
class _Theta:
    """Theta for each prompt, the layer it goes into, and which prompts have one."""

    values: Float[Tensor, "prompt d_model"]
    layer: int
    there: Bool[Tensor, " prompt"]

    def edit(self, where: Bool[Tensor, " prompt"] | None = None) -> Edit:
        there = self.there if where is None else where
        return Edit("resid_post", self.layer, self.values, where=there)


def _one(
    model: Any, sides: _Sides, how: dict[str, Any], n: int, n_dev: int
) -> tuple[xr.Dataset, dict[str, Any]]:
    """Everything for one task."""
    asked = {split: sides.asked(model, how, split, k) for split, k in (("dev", n_dev), ("test", n))}
    dev, test = (
        build_prompts(sides.joined, model, queries=queries, split=split, **how)
        for split, queries in asked.items()
    )
    layer = int(accuracy_by_layer(model, dev).argmax())
    there, back = (_alone(model, one, asked, how) for one in (sides.there, sides.back))
    cells: dict[str, tuple[Edit, ...]] = {"baseline": ()}
    found = _read(model, sides, test, layer)
    cells |= {name: (theta.edit(),) for name, theta in found.items()}
    cells["random"] = random_cell(
        cells["theta"], seed=f"{how['seed']}:{sides.joined.name}:theta", n=len(test)
    )
    # Each prompt gets theta of its own direction, or of the other, at the layer that is best for it.
    way = sides.forward(test.queries)
    cells["one_way"] = (there[0].edit(way), back[0].edit(~way))
    cells["wrong_way"] = (there[0].edit(~way), back[0].edit(way))
    readout = FirstToken(test.answer_ids)
    bare = Request(test.zero_shot, cells=tuple(cells.values()), readout=readout)
    outputs = run(model, [Request(test.regular, readout=readout), bare])
    correct, predicted = (
        dict(
            zip(
                ("regular", *cells), torch.cat([o.values[name] for o in outputs]).cpu(), strict=True
            )
        )
        for name in ("correct", "predicted")
    )
    correct["regular_one_way"] = torch.where(way, there[1][0], back[1][0])
    predicted["regular_one_way"] = torch.where(way, there[1][1], back[1][1])
    outcomes = {name: right.float().numpy() for name, right in correct.items()}
    for name in ("same_way", "other_way"):
        outcomes[name][~found[name].there.numpy()] = np.nan
    layers = (layer, there[0].layer, back[0].layer)
    return _dataset(model, sides, test, outcomes, predicted, layers), test.facts


def _dataset(
    model: Any,
    sides: _Sides,
    test: Prompts,
    correct: Mapping[str, Float[np.ndarray, " prompt"]],
    predicted: Mapping[str, Int[Tensor, " prompt"]],
    layers: Sequence[int],
) -> xr.Dataset:
    """Label everything of one task."""
    words = [[model.tokenizer.decode([i]) for i in predicted[name].tolist()] for name in RUNS]
    way = np.where(sides.forward(test.queries).numpy(), "forward", "backward").astype(object)
    dims, asked = ("task", "run", "prompt"), ("task", "prompt")
    names = ("layer", "layer_forward", "layer_backward")
    return xr.Dataset(
        {
            "correct": (dims, np.stack([correct[name] for name in RUNS])[None]),
            "token": (dims, np.array([words], object)),
        },
        coords={
            "task": [sides.joined.name],
            "run": list(RUNS),
            "query": (asked, np.array([test.queries], object)),
            "answer": (asked, np.array([[ys[0] for ys in test.answers]], object)),
            "direction": (asked, way[None]),
            **{name: ("task", [layer]) for name, layer in zip(names, layers, strict=True)},
        },
    )


def _alone(
    model: Any, direction: Task, asked: Mapping[str, Sequence[str]], how: Mapping[str, Any]
) -> tuple[_Theta, tuple[Bool[Tensor, " prompt"], Int[Tensor, " prompt"]]]:
    """One direction alone: a theta for every test prompt, and what its demonstrations give.

    Test prompts of the other direction have no query here and get the theta of another prompt.
    """
    dev = [x for x in asked["dev"] if x in direction.answers]
    made = build_prompts(direction, model, queries=dev, split="dev", **how)
    layer = int(accuracy_by_layer(model, made).argmax())
    rows = [i for i, x in enumerate(asked["test"]) if x in direction.answers]
    queries = [asked["test"][i] for i in rows]
    made = build_prompts(direction, model, queries=queries, split="test", **how)
    scores = score(model, made)
    at = torch.arange(len(asked["test"])) % len(rows)
    at[rows] = torch.arange(len(rows))
    values = extract(model, made, layers=[layer]).at(layer)[at]
    theta = _Theta(values, layer, torch.ones(len(at), dtype=torch.bool))
    return theta, (scores.correct[at], scores.predicted[at])


def _read(model: Any, sides: _Sides, test: Prompts, layer: int) -> dict[str, _Theta]:
    """Theta of mixed demonstrations: of all dummy queries, and of those of either direction."""
    requests = dummy_requests(model, test, layers=[layer])
    outputs = run(model, requests)
    theta = average(model, test, requests, outputs)
    each = torch.stack([out.activations[0][0, :, 0] for out in outputs])
    same = sides.dummies(test) == sides.forward(test.queries)
    every = torch.ones(len(test), dtype=torch.bool)
    found = {"theta": _Theta(theta.at(layer), layer, every)}
    for name, chosen in (("same_way", same), ("other_way", ~same)):
        weight = chosen.to(each)[..., None]
        mean = (each * weight).sum(dim=0) / weight.sum(dim=0).clamp_min(1)
        found[name] = _Theta(mean, layer, chosen.any(dim=0))
    return found
