"""Ways to make a task vector, each behind one call, so that they can be compared.

A method sees dev prompts of a task, whose queries and demonstrations are none of the test queries, and gives
back what it would write into a prompt without demonstrations. Layers and other choices are made on the dev
prompts as well. What it cost is counted in forwards: one prompt once through the model; a step of gradient
descent counts three for each of its prompts.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import unknown
from tvlens.engine import Edit, FirstToken, Read, Request, run
from tvlens.extraction import extract
from tvlens.function_vectors import HeadEffects, function_vector, head_effects
from tvlens.learning import learn
from tvlens.linear_maps import fit_map
from tvlens.models.runner import runner
from tvlens.prompts import Prompts, build_prompts
from tvlens.tasks import Task

Write = Callable[[Prompts], tuple[Edit, ...]]
"""What is written into the zero-shot view of some prompts."""
Cells = Sequence[tuple[Edit, ...]]

MORE_SHOTS = 20
N_HEADS = 10
DEPTHS = (0.55, 0.69)  # where vectors are learned, as shares of the depth
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
_RATE, _STEPS = 0.03, 150


@dataclass(frozen=True, eq=False)
class Fitted:
    """A method that has seen a task.

    Attributes:
        write: What is written into a prompt.
        layer: Where; the highest layer if there are several.
        forwards: How often a prompt went through the model.
        seconds: How long that took.
        note: What else was chosen.
    """

    write: Write
    layer: int
    forwards: int
    seconds: float = 0.0
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Work:
    """What a method is given.

    Attributes:
        model: The model.
        task: The task.
        dev: Dev prompts; neither their queries nor their demonstrations are test queries.
        how: How they were made, as arguments of `build_prompts`.
        seed: Seed of the method's own choices.
        kept: What several methods need, made once.
    """

    model: Any
    task: Task
    dev: Prompts
    how: dict[str, Any]
    seed: int = 0
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return runner(self.model).n_layers

    def accuracies(self, cells: Cells, prompts: Prompts | None = None) -> Float[Tensor, " cell"]:
        """Accuracy of each way of writing into dev prompts without demonstrations."""
        prompts = prompts or self.dev
        readout = FirstToken(prompts.answer_ids)
        (output,) = run(self.model, [Request(prompts.zero_shot, tuple(cells), readout=readout)])
        return output.values["correct"].float().mean(dim=1).cpu()

    def best(self, cells: Cells) -> int:
        """The first of the ways that answer most dev prompts."""
        return int(self.accuracies(cells).argmax())

    def effects(self) -> HeadEffects:
        """What every head does for the task, by patching and by gradient; computed once."""
        if "effects" not in self.kept:
            items = _pool(self.dev)
            self.kept["effects"] = head_effects(
                self.model, self.task, shots=min(10, items - 1), seed=self.seed,
                demonstrations="split", template=self.how["template"], answers=self.how["answers"],
            )  # fmt: skip
        return self.kept["effects"]


def _pool(dev: Prompts) -> int:
    """How many items the dev split has."""
    return -(-int(dev.facts["n_items"]) // 2)


def hendel(work: Work) -> Fitted:
    """Theta of each prompt's own demonstrations, in place of the residual stream at one layer."""
    theta, n = extract(work.model, work.dev), work.n_layers
    layer = work.best([(Edit("resid_post", i, theta.at(i)),) for i in range(n)])

    def write(prompts: Prompts) -> tuple[Edit, ...]:
        own = extract(work.model, prompts, layers=[layer])
        return (Edit("resid_post", layer, own.at(layer)),)

    return Fitted(write, layer, len(work.dev) * (len(work.dev.dummies) + n))


def mean(work: Work) -> Fitted:
    """Theta averaged over all demonstrations: one vector for the task."""
    return _mean(work, work.dev)


def mean_more(work: Work) -> Fitted:
    """Theta averaged over prompts with more demonstrations than are compared with."""
    shots = min(MORE_SHOTS, _pool(work.dev) - 1 - len(work.dev.dummies))
    more = build_prompts(work.task, work.model, **{**work.how, "shots": shots})
    return replace(_mean(work, more), note={"shots": shots})


def _mean(work: Work, source: Prompts) -> Fitted:
    theta, n = extract(work.model, source).mean(), work.n_layers
    layer = work.best([(Edit("resid_post", i, theta.at(i)),) for i in range(n)])
    edit = Edit("resid_post", layer, theta.at(layer))
    return Fitted(lambda _: (edit,), layer, len(source) * len(source.dummies) + len(work.dev) * n)


def attention(work: Work) -> Fitted:
    """Mean attention outputs in all layers up to one, as state vectors have them."""
    found, n = extract(work.model, work.dev, site="attn_out").mean(), work.n_layers
    edits = [Edit("attn_out", i, found.at(i)) for i in range(n)]
    layer = work.best([tuple(edits[: i + 1]) for i in range(n)])
    cost = len(work.dev) * (len(work.dev.dummies) + n)
    return Fitted(lambda _: tuple(edits[: layer + 1]), layer, cost)


def ridge(work: Work) -> Fitted:
    """A closed-form map from what a query leaves without demonstrations to what it leaves with them."""
    layers, n = tuple(range(work.n_layers)), len(work.dev)
    bare, shown = _both(work.model, work.dev, layers)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(work.seed))
    fit, held = order[max(n // 5, 1) :], order[: max(n // 5, 1)]
    tried = [(layer, strength) for layer in layers for strength in STRENGTHS]
    cells = [
        (Edit("resid_post", i, fit_map(bare[fit, i], shown[fit, i], strength=s)(bare[:, i])),)
        for i, s in tried
    ]
    readout = FirstToken(work.dev.answer_ids)
    (output,) = run(work.model, [Request(work.dev.zero_shot, tuple(cells), readout=readout)])
    right = output.values["correct"].cpu().float()
    layer, strength = tried[int(right[:, held].mean(dim=1).argmax())]
    final = fit_map(bare[:, layer], shown[:, layer], strength=strength)

    def write(prompts: Prompts) -> tuple[Edit, ...]:
        (seen,) = run(
            work.model, [Request(prompts.zero_shot, reads=(Read("resid_post", (layer,)),))]
        )
        return (Edit("resid_post", layer, final(seen.activations[0][0, :, 0].cpu())),)

    return Fitted(write, layer, n * (2 + len(tried)), note={"strength": strength})


def _both(model: Any, prompts: Prompts, layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The residual stream at the last token of each query, without and with demonstrations."""
    reads = (Read("resid_post", layers),)
    views = [Request(view, reads=reads) for view in (prompts.zero_shot, prompts.regular)]
    bare, shown = (output.activations[0][0].double().cpu() for output in run(model, views))
    return bare, shown


def function(work: Work) -> Fitted:
    """The heads with the largest effects on prompts with shuffled labels, summed and added."""
    cost = int(work.effects().data["effect"].size)
    return _function(work, "effect", cost)


def function_gradient(work: Work) -> Fitted:
    """The same with heads chosen by gradient: one forward and backward in place of one forward a head."""
    cost = 3 * int(work.effects().data.sizes["trial"])
    return _function(work, "estimate", cost)


def _function(work: Work, by: str, cost: int) -> Fitted:
    effects, n = work.effects(), work.n_layers
    n_heads = min(N_HEADS, effects.outputs.shape[0] * effects.outputs.shape[1])
    heads = effects.heads(n_heads, by=by)
    vector = function_vector(work.model, effects.outputs, heads)
    edits = [Edit("resid_post", i, vector.at(i), mode="add") for i in range(n)]
    layer = work.best([(edit,) for edit in edits])
    cost += int(effects.provenance["n_means"]) + len(work.dev) * n
    return Fitted(lambda _: (edits[layer],), layer, cost, note={"heads": [list(h) for h in heads]})


def learned(work: Work) -> Fitted:
    """A vector trained by gradient, at the better of two layers."""
    layers = sorted({round(depth * (work.n_layers - 1)) for depth in DEPTHS})
    theta = extract(work.model, work.dev, layers=layers).mean()
    settings = {"start": theta, "steps": _STEPS, "rate": _RATE, "seed": work.seed}
    found = [learn(work.model, work.dev, layer=i, **settings) for i in layers]
    best = min(found, key=lambda one: float(one.held_out.min()))
    (layer,) = best.vector.layers
    steps = sum(len(one.losses) for one in found)
    edit = Edit("resid_post", layer, best.vector.at(layer))
    cost = len(work.dev) * len(work.dev.dummies) + 3 * steps * min(32, len(work.dev))
    note = {"steps": best.best, "stopped": best.stopped}
    return Fitted(lambda _: (edit,), layer, cost, note=note)


METHODS: dict[str, Callable[[Work], Fitted]] = {
    "hendel": hendel,
    "mean": mean,
    "mean_more": mean_more,
    "attention": attention,
    "ridge": ridge,
    "function": function,
    "function_gradient": function_gradient,
    "learned": learned,
}
"""By name, each way to make a vector."""
TRAINING_FREE = tuple(name for name in METHODS if name != "learned")


def fit(name: str, work: Work) -> Fitted:
    """Let a method see a task.

    Args:
        name: A name of `METHODS`.
        work: The task.

    Returns:
        What it would write, where, and what that cost.

    Raises:
        ValueError: There is no such method, or too few items for it.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> how = {"shots": 2, "n": 6, "n_dummy": 2, "template": "example", "answers": "auto"}
        >>> how |= {"split": "dev", "demonstrations": "split", "seed": 0}
        >>> model, task = tiny_model(), tv.load_task("to_upper")
        >>> work = Work(model, task, tv.build_prompts(task, model, **how), how)
        >>> [edit.site for edit in fit("mean", work).write(work.dev)]
        ['resid_post']
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    started = time.perf_counter()
    return replace(
        found := METHODS[name](work), seconds=found.seconds + time.perf_counter() - started
    )
