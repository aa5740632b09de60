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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvlens._errors import unknown, whole
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, FirstToken, Output, Read, Request, run
from tvlens.experiments import experiment
from tvlens.experiments._choices import DEFAULT, FACTORS, VARIANTS, Choices, Variant
from tvlens.experiments._dev import random_cell, resolved
from tvlens.models import facts, load_model
from tvlens.prompts import SPLITS, Prompts, build_prompts
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.scoring import correct_cells
from tvlens.sites import check_layers
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
    layers: int | Sequence[int] | None = None,
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
            ``"site"``, ``"position"``, ``"dummies"``, ``"shots"``. Where ``"dummies"`` is among them, all
            prompts but those of other shots are drawn for the most dummy queries, so that every number
            of these meets the same demonstrations.
        shots: Demonstrations a prompt.
        n_dev: Prompts on which each variant's layer is chosen; neither their queries nor what they
            show are test queries.
        n_test: Prompts on which accuracies are reported; their queries are not among the dev queries.
        n_dummy: Dummy queries over which theta is averaged.
        layers: Layers to choose from, or one layer, negative ones from the end; all if not given.
        template: How a demonstration is written, see `tvlens.Template`.
        answers: Which items are used, see `tvlens.build_prompts`.
        seed: Decides the split, all prompts, and the random vectors.
        progress: Whether to show a progress bar.

    Returns:
        Per-prompt outcomes, as a result that plots itself.

    Raises:
        ValueError: Unknown names, no factor, layer or dummy query, a task too small for the shots, or a
            tokenizer that joins the query with what follows it, so that it has no tokens of its own to
            write at.
        TypeError: A number that is none.

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
    chosen = tuple(sorted(check_layers(layers, known.n_layers)))
    how = {"template": template, "answers": answers, "seed": seed}
    # "Mean over S" writes what dev prompts show: none of it may be a test query with its answer.
    per_split = {"dev": {"n": n_dev, "demonstrations": "split"}, "test": {"n": n_test}}
    found, written, made, best, shares = [], [], {}, [], np.zeros(0)
    with tqdm(total=len(named) * len(SPLITS), disable=not progress, leave=False) as bar:
        for task in named.values():
            sides = {}
            for split in SPLITS:
                asked = {"shots": shots, "n_dummy": n_dummy, "split": split, **per_split[split]}
                bar.set_postfix_str(f"{task.name}: {split}")
                sides[split] = _side(model, task, variants, {**how, **asked})
                written.append(sides[split].places)
                if split == "dev":
                    best, shares = _best(model, sides["dev"], variants, chosen)
                bar.update()
            found.append(_judged(model, sides, variants, best, shares, f"{seed}:{task.name}"))
            made = sides["dev"].prompts.facts
    data = xr.concat(found, dim=xr.Variable("task", list(named)))
    data = data.isel(variant=_distinct(variants, written))
    note = collect(
        kind=Choices.kind, task=", ".join(named), tasks=list(named), factors=list(factors),
        **{k: made[k] for k in ("template", "bos", "shots", "seed")}, n_dummy=n_dummy, answers=answers,
        n_dev=n_dev, n_test=n_test, layers=list(chosen), model=known.name, n_layers=known.n_layers,
        model_facts=known.to_dict(), seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Choices(data.assign_attrs({ATTRIBUTE: encode(note)}))


def _asked(factors: Sequence[str], shots: int, n_dummy: int) -> tuple[Variant, ...]:
    """The default, and the variants that are not the same as it."""
    if isinstance(factors, str) or not factors:
        raise ValueError(
            f"factors are needed as a list, at least one of {', '.join(FACTORS)}; {factors!r} arrived."
        )
    for factor in factors:
        if factor not in FACTORS:
            raise unknown("factor", factor, FACTORS)
    if whole("n_dummy", n_dummy) < 1:
        raise ValueError(f"theta is read on dummy queries: n_dummy >= 1; {n_dummy} arrived.")
    own = {"shots": whole("shots", shots), "n_dummy": n_dummy}
    kept = [v for v in VARIANTS if v.factor in factors]
    return (DEFAULT, *(v for v in kept if all(getattr(v, name) != n for name, n in own.items())))


def _distinct(
    variants: Sequence[Variant], written: Sequence[Mapping[str, Int[Tensor, "_ _"]]]
) -> list[int]:
    """Which variants to keep: a separator of one token is the last token, and no variant of its own."""
    new: list[str] = []
    for at in dict.fromkeys(variant.at for variant in variants):
        if not any(all(torch.equal(one[at], one[old]) for one in written) for old in new):
            new.append(at)
    return [i for i, variant in enumerate(variants) if variant.at in new]


@dataclass(frozen=True, eq=False)
class _Side:
    """All that is read of one split.

    Attributes:
        prompts: The prompts that are asked.
        vectors: What was read, by `Key`.
        places: Where it is written in bare queries, by the name of the tokens.
        bare: Residual stream of the bare queries at the last token.
        correct: Whether baseline and regular are right.
        own: Shots and dummy queries of the default.
    """

    prompts: Prompts
    vectors: Mapping[Key, Float[Tensor, "_ prompt layer d_model"]]
    places: Mapping[str, Int[Tensor, "_ prompt"]]
    bare: Float[Tensor, "prompt layer d_model"]
    correct: Mapping[str, np.ndarray]
    own: Mapping[str, Any]

    def key(self, variant: Variant) -> Key:
        return _key(variant, self.own)


def _key(variant: Variant, own: Mapping[str, Any]) -> Key:
    shots = own["shots"] if variant.shots is None else variant.shots
    n_dummy = own["n_dummy"] if variant.n_dummy is None else variant.n_dummy
    return (shots, n_dummy), variant.site, variant.at


def _side(model: Any, task: Task, variants: Sequence[Variant], how: dict[str, Any]) -> _Side:
    """Build the prompts of a split and read all vectors in one run."""
    keys = list(dict.fromkeys(_key(variant, how) for variant in variants))
    prompts, dummies = _dummies(model, task, keys, how)
    views = (prompts.zero_shot, *prompts.dummies)
    counts = {at: min(len(_places(view, at)) for view in views) for _, _, at in keys}
    # Of the dummy queries that a number of shots has, a vector is read on the first few.
    reach: dict[tuple[int, str, str], int] = {}
    for (shots, k), site, at in keys:
        reach[shots, site, at] = max(k, reach.get((shots, site, at), 0))
    batches = [(shots, j, one) for shots, some in dummies.items() for j, one in enumerate(some)]
    wanted = [
        [(w, _places(one, w[2])[-counts[w[2]] :]) for w, k in reach.items() if w[0] == shots and j < k]
        for shots, j, one in batches
    ]  # fmt: skip
    depth = tuple(range(facts(model).n_layers))
    reading = [
        Request(one, reads=tuple(Read(w[1], depth, p) for w, at in some for p in at.unique().tolist()))
        for (*_, one), some in zip(batches, wanted, strict=True)
    ]  # fmt: skip
    readout = FirstToken(prompts.answer_ids)
    bare = Request(prompts.zero_shot, reads=(Read("resid_post", depth),), readout=readout)
    regular = Request(prompts.regular, readout=readout)
    *outputs, zero, told = run(model, [*reading, bare, regular])
    found: dict[tuple[int, str, str], list[Tensor]] = {where: [] for where in reach}
    for some, output in zip(wanted, outputs, strict=True):
        activations = iter(output.activations)
        for where, at in some:
            found[where].append(_gathered(at, activations))
    return _Side(
        prompts,
        {
            ((shots, k), site, at): torch.stack(found[shots, site, at][:k]).mean(dim=0)
            for (shots, k), site, at in keys
        },
        {at: _places(prompts.zero_shot, at)[-n:] for at, n in counts.items()},
        zero.activations[0][0],
        {"baseline": _right(zero), "regular": _right(told)},
        {name: how[name] for name in ("shots", "n_dummy")},
    )


def _right(output: Output) -> Bool[np.ndarray, " prompt"]:
    return output.values["correct"][0].cpu().numpy()


def _dummies(
    model: Any, task: Task, keys: Sequence[Key], how: Mapping[str, Any]
) -> tuple[Prompts, dict[int, tuple[TokenBatch, ...]]]:
    """The prompts that are asked, and for every number of shots its demonstrations with dummy queries."""
    most = max((k for (shots, k), *_ in keys if shots == how["shots"]), default=how["n_dummy"])
    prompts = build_prompts(task, model, **{**how, "n_dummy": max(most, how["n_dummy"])})
    found = {how["shots"]: prompts.dummies}
    for (shots, _), *_ in keys:
        if shots not in found:
            # The same queries, with other demonstrations.
            again = {**how, "shots": shots, "queries": prompts.queries}
            found[shots] = build_prompts(task, model, **again).dummies
    return prompts, found


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


def _ask(model: Any, side: _Side, cells: Sequence[Cell]) -> Bool[np.ndarray, "cell prompt"]:
    """Run bare queries with every cell."""
    return correct_cells(model, side.prompts, side.prompts.zero_shot, cells)


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
    seed: str,
) -> xr.Dataset:
    """Run test queries with every variant at its layer, and with its control."""
    dev, test = (sides[split] for split in SPLITS)
    cells = [
        _cell(variant, _values(variant, test, dev), test.places[variant.at], layer)
        for variant, layer in zip(variants, best, strict=True)
    ]
    controls = [
        random_cell(cell, seed=f"{seed}:{variant.name}", n=len(test.prompts))
        for variant, cell in zip(variants, cells, strict=True)
    ]
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
