"""Paper A's choices, one varied at a time: which of them does a task vector depend on?

Hendel et al. replace, at one layer and the last token, by theta of the prompt's own demonstrations. Others
add, average over demonstrations, take attention outputs, or write at more tokens, on other queries and models
each. Here every variant differs from the default in one thing, chooses its layer by itself on dev
queries, and stands beside random directions that are as long and are written in the same way.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, FirstToken, Output, Read, Request, run
from tvlens.experiments import experiment
from tvlens.experiments._choices import DEFAULT, FACTORS, VARIANTS, Choices, Variant
from tvlens.experiments._dev import random_cell, resolved
from tvlens.models import facts, load_model
from tvlens.prompts import SPLITS, Prompts, build_prompts
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.sites import check_layer
from tvlens.tasks import Task
from tvlens.templates import Role, Template

# What is read: of how many shots and dummy queries, at which site, at which tokens.
Key = tuple[tuple[int, int], str, str]
# For each token that is read or written, its place in each prompt, counted from the end.
Places = Int[Tensor, "slot prompt"]
# One row for each prompt, or one for all.
Vectors = Float[Tensor, "slot row layer d_model"]
Cell = tuple[Edit, ...]


@experiment("choices")
def choices(
    model: Any,
    tasks: Sequence[Task | str],
    *,
    factors: Sequence[str] = FACTORS,
    shots: int = 5,
    n_dev: int = 50,
    n_test: int = 50,
    n_dummy: int = 2,
    layers: Sequence[int] | None = None,
    template: str | Template = "example",
    answers: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Choices:
    """Vary the choices behind a task vector one at a time, each variant at the layer that is best for it.

    Args:
        model: A TransformerLens model, or a name that `tvlens.load_model` knows.
        tasks: Tasks, or their names.
        factors: Which choices are varied: ``"mode"`` (replace or add, and strength), ``"source"``,
            ``"site"``, ``"position"``, ``"dummies"``, ``"shots"``.
        shots: Demonstrations a prompt.
        n_dev: Prompts on which each variant's layer is chosen.
        n_test: Prompts on which accuracies are reported; their queries are not among the dev queries.
        n_dummy: Dummy queries over which theta is averaged.
        layers: Layers to choose from, negative ones from the end; all if not given.
        template: How a demonstration is written, see `tvlens.Template`.
        answers: Which items are used, see `tvlens.build_prompts`.
        seed: Decides the split, all prompts, and the random vectors.
        progress: Whether to show a progress bar.

    Returns:
        Per-prompt outcomes, as a result that plots itself.

    Raises:
        ValueError: Unknown names, a task too small for the shots, or a tokenizer that joins the query with
            what follows it, so that it has no tokens of its own to write at.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> settings = {"factors": ["source"], "shots": 2, "n_dev": 4, "n_test": 4, "progress": False}
        >>> choices(tiny_model(), ["to_upper"], **settings).data["variant"].values.tolist()
        ['paper A', 'mean over S']

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916; Todd et al. 2024, arXiv:2310.15213; Li et al. 2024,
        arXiv:2404.11225.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    variants = _asked(factors, shots, n_dummy)
    model = load_model(model) if isinstance(model, str) else model
    known, named = facts(model), resolved(tasks)
    depth = tuple(range(known.n_layers))
    chosen = depth if layers is None else tuple(check_layer(at, known.n_layers) for at in layers)
    how = {"template": template, "answers": answers, "seed": seed}
    numbers = {"dev": n_dev, "test": n_test}
    found, made, best, shares = [], {}, [], np.zeros(0)
    with tqdm(total=len(named) * len(SPLITS), disable=not progress, leave=False) as bar:
        for task in named.values():
            sides = {}
            for split in SPLITS:
                asked = {"shots": shots, "n_dummy": n_dummy, "n": numbers[split], "split": split}
                bar.set_postfix_str(f"{task.name}: {split}")
                sides[split] = _side(model, task, variants, {**how, **asked})
                if split == "dev":
                    best, shares = _best(model, sides["dev"], variants, chosen)
                bar.update()
            found.append(_judged(model, sides, variants, best, shares, seed))
            made = sides["dev"].prompts.facts
    data = xr.concat(found, dim=xr.Variable("task", list(named)))
    note = collect(
        kind=Choices.kind, task=", ".join(named), tasks=list(named), factors=list(factors),
        **{k: made[k] for k in ("template", "bos", "shots", "n_dummy", "seed")}, answers=answers,
        n_dev=n_dev, n_test=n_test, layers=list(chosen), model=known.name, n_layers=known.n_layers,
        model_facts=known.to_dict(), seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Choices(data.assign_attrs({ATTRIBUTE: encode(note)}))


def _asked(factors: Sequence[str], shots: int, n_dummy: int) -> tuple[Variant, ...]:
    """The default, and the variants that are not the same as it."""
    for factor in factors:
        if factor not in FACTORS:
            raise unknown("factor", factor, FACTORS)
    own = {"shots": shots, "n_dummy": n_dummy}
    kept = [v for v in VARIANTS if v.factor in factors]
    return (DEFAULT, *(v for v in kept if all(getattr(v, name) != n for name, n in own.items())))


@dataclass(frozen=True, eq=False)
class _Side:
    """All that is read of one split.

    Attributes:
        prompts: The prompts that are asked.
        vectors: What was read, by `Key`.
        places: Where it is written in bare queries, by the name of the tokens.
        bare: Residual stream of the bare queries at the last token.
        correct: Whether baseline and regular are right.
    """

    prompts: Prompts
    vectors: Mapping[Key, Float[Tensor, "_ prompt layer d_model"]]
    places: Mapping[str, Int[Tensor, "_ prompt"]]
    bare: Float[Tensor, "prompt layer d_model"]
    correct: Mapping[str, np.ndarray]

    def key(self, variant: Variant) -> Key:
        return _key(variant, self.prompts.facts)


def _key(variant: Variant, own: Mapping[str, Any]) -> Key:
    numbers = variant.shots or own["shots"], variant.n_dummy or own["n_dummy"]
    return numbers, variant.site, variant.at


def _side(model: Any, task: Task, variants: Sequence[Variant], how: dict[str, Any]) -> _Side:
    """Build the prompts of a split and read all vectors in one run."""
    keys = list(dict.fromkeys(_key(variant, how) for variant in variants))
    prompts = build_prompts(task, model, **how)
    sets = {(how["shots"], how["n_dummy"]): prompts}
    for numbers, _, _ in keys:
        if numbers not in sets:
            # The same queries, with other demonstrations.
            again = {"shots": numbers[0], "n_dummy": numbers[1], "queries": prompts.queries}
            sets[numbers] = build_prompts(task, model, **{**how, **again})
    views = (prompts.zero_shot, *prompts.dummies)
    counts = {at: min(len(_places(view, at)) for view in views) for _, _, at in keys}
    batches = [(numbers, batch) for numbers, some in sets.items() for batch in some.dummies]
    wanted = [
        [(key, _places(batch, key[2])[-counts[key[2]] :]) for key in keys if key[0] == numbers]
        for numbers, batch in batches
    ]
    depth = tuple(range(facts(model).n_layers))
    reading = [
        Request(
            batch,
            reads=tuple(Read(k[1], depth, p) for k, at in some for p in at.unique().tolist()),
        )
        for (_, batch), some in zip(batches, wanted, strict=True)
    ]
    readout = FirstToken(prompts.answer_ids)
    bare = Request(prompts.zero_shot, reads=(Read("resid_post", depth),), readout=readout)
    regular = Request(prompts.regular, readout=readout)
    *outputs, zero, told = run(model, [*reading, bare, regular])
    found: dict[Key, list[Tensor]] = {key: [] for key in keys}
    for some, output in zip(wanted, outputs, strict=True):
        activations = iter(output.activations)
        for key, at in some:
            found[key].append(_gathered(at, activations))
    return _Side(
        prompts,
        {key: torch.stack(each).mean(dim=0) for key, each in found.items()},
        {at: _places(prompts.zero_shot, at)[-n:] for at, n in counts.items()},
        zero.activations[0][0],
        {name: _right(output)[0] for name, output in (("baseline", zero), ("regular", told))},
    )


def _places(batch: TokenBatch, at: str) -> Places:
    """Find tokens of the part that is asked, each counted from the end; as many as every prompt has."""
    found = []
    for text, roles in zip(batch.text, batch.roles.tolist(), strict=True):
        asked = [i for i, role in enumerate(roles) if role == Role.QUERY]
        if at == "last":
            chosen = [len(roles) - 1]
        elif not asked:
            raise ValueError(
                f"this tokenizer leaves the query of {text[-40:]!r} no token of its own to write at. Leave "
                "'position' out of factors, or use another template."
            )
        elif at == "query":
            chosen = [asked[-1]]
        else:
            start = asked[0]
            while at == "template" and start and roles[start - 1] == Role.OTHER:
                start -= 1
            chosen = [*range(start, asked[0]), *range(asked[-1] + 1, len(roles))]
        found.append([i - len(roles) for i in chosen])
    n = min(map(len, found))
    return torch.tensor([each[-n:] for each in found]).T


def _gathered(
    at: Places, activations: Iterator[Float[Tensor, "1 prompt layer d_model"]]
) -> Vectors:
    """Put together what was read at each of the places: one reading for each distinct one."""
    found = torch.zeros(())
    for place in at.unique().tolist():
        (read,) = next(activations)
        here = rearrange((at == place).to(read.device), "slot prompt -> slot prompt 1 1")
        found = torch.where(here, read, found.to(read))
    return found


def _values(variant: Variant, side: _Side, dev: _Side) -> Vectors:
    """What a variant writes, before its scale; one row for all prompts where it is a mean."""
    vectors = (dev if variant.mean else side).vectors[side.key(variant)]
    if variant.mean:
        vectors = vectors.mean(dim=1, keepdim=True)
    return vectors - dev.bare.mean(dim=0) if variant.difference else vectors


def _cell(variant: Variant, values: Vectors, places: Places, layer: int) -> Cell:
    """The edits of a variant at a layer."""
    spans = {"one": (layer,), "upto": range(layer + 1), "around": range(layer - 1, layer + 2)}
    span = [at for at in spans[variant.span] if 0 <= at < values.shape[2]]
    scale = variant.scale / (len(span) if variant.span == "around" else 1)
    edits = []
    for at in span:
        for slot, where in enumerate(places):
            for place in where.unique().tolist():
                here = where == place
                edits.append(
                    Edit(
                        variant.site, at, values[slot, :, at], position=place, mode=variant.mode,
                        scale=scale, where=None if bool(here.all()) else here,
                    )
                )  # fmt: skip
    return tuple(edits)


def _right(output: Output) -> np.ndarray:
    """Whether predictions are right, by cell and prompt."""
    return output.values["correct"].cpu().numpy()


def _ask(model: Any, side: _Side, cells: Sequence[Cell]) -> np.ndarray:
    """Run bare queries with every cell."""
    readout = FirstToken(side.prompts.answer_ids)
    (output,) = run(model, [Request(side.prompts.zero_shot, cells=tuple(cells), readout=readout)])
    return _right(output)


def _best(
    model: Any, dev: _Side, variants: Sequence[Variant], layers: Sequence[int]
) -> tuple[list[int], np.ndarray]:
    """Choose the layer of every variant: the lowest of the best on dev queries, and its accuracy."""
    every = [_values(variant, dev, dev) for variant in variants]
    cells = [
        _cell(variant, values, dev.places[variant.at], layer)
        for variant, values in zip(variants, every, strict=True)
        for layer in layers
    ]
    shares = reduce(
        _ask(model, dev, cells).astype(float),
        "(variant layer) prompt -> variant layer", "mean", layer=len(layers),
    )  # fmt: skip
    return [layers[i] for i in shares.argmax(axis=1)], shares.max(axis=1)


def _judged(
    model: Any,
    sides: Mapping[str, _Side],
    variants: Sequence[Variant],
    best: Sequence[int],
    shares: np.ndarray,
    seed: int,
) -> xr.Dataset:
    """Run test queries with every variant at its layer, and with its control."""
    dev, test = (sides[split] for split in SPLITS)
    cells = [
        _cell(variant, _values(variant, test, dev), test.places[variant.at], layer)
        for variant, layer in zip(variants, best, strict=True)
    ]
    controls = [random_cell(cell, seed=1000 * seed + i) for i, cell in enumerate(cells)]
    right = _ask(model, test, [*cells, *controls])
    outcomes = ("variant", "prompt")
    return xr.Dataset(
        {
            "hypothesis": (outcomes, right[: len(cells)]),
            "control": (outcomes, right[len(cells) :]),
            **{name: (("prompt",), found) for name, found in test.correct.items()},
            "layer": (("variant",), list(best)),
            "dev_accuracy": (("variant",), shares),
            "query": (("prompt",), np.array(test.prompts.queries, object)),
        },
        coords={
            "variant": [variant.name for variant in variants],
            "factor": ("variant", [variant.factor for variant in variants]),
        },
    )
