"""Function vectors of one task: the heads that carry it, their sum, and what it does without demonstrations.

On dev queries the heads are chosen and then the layer at which their sum is added. Everything is reported on
test queries, which were neither queried nor shown before: bare queries, prompts whose demonstrations have
shuffled labels, and bare queries in other templates than the one the vector was made in. Two controls say
what the choice of heads is worth: as many random heads, and random vectors as long as the function vector,
several of each, each of them added at the layer where it does best on dev.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from einops import rearrange

from tvlens.engine import Edit, FirstToken, Request, run
from tvlens.experiments import experiment
from tvlens.experiments._dev import same_queries
from tvlens.function_vectors import HeadEffects, function_vector, head_effects
from tvlens.function_vectors.outcomes import CONTROLS, FunctionVectors
from tvlens.function_vectors.results import METHODS
from tvlens.function_vectors.vectors import random_heads
from tvlens.models import facts, load_model
from tvlens.prompts import Prompts, build_prompts
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.tasks import Task, as_task
from tvlens.templates import DEFAULT_TEMPLATE, Template
from tvlens.vectors import TaskVector


@experiment("function_vectors")
def function_vectors(
    model: Any,
    task: Task | str,
    *,
    shots: int = 10,
    n_heads: int = 10,
    heads: Sequence[tuple[int, int]] | None = None,
    by: str = "effect",
    n_means: int = 100,
    n_trials: int = 25,
    n_dev: int = 25,
    n_test: int = 50,
    n_random: int = 5,
    template: str | Template = DEFAULT_TEMPLATE,
    templates: Sequence[str] = ("qa", "arrow"),
    answers: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> FunctionVectors:
    """Find the heads that carry a task, sum them, and test the sum against random heads and vectors.

    Args:
        model: A TransformerLens model, or a name that `tvlens.load_model` knows.
        task: A task, or its name.
        shots: Demonstrations a prompt.
        n_heads: How many heads are summed.
        heads: These heads instead of those with the largest effects, e.g. from
            `tvlens.function_vectors.universal_heads`.
        by: What chooses heads: ``"effect"`` (patching) or ``"estimate"`` (gradient).
        n_means: Prompts over which the heads' outputs are averaged.
        n_trials: Prompts with shuffled labels in which heads are patched.
        n_dev: Bare queries on which the layer is chosen.
        n_test: Prompts on which accuracies are reported; none of their queries was seen before.
        n_random: How many random choices of heads, and how many random vectors.
        template: How a demonstration is written where the vector is made, see `tvlens.Template`.
        templates: Other templates in which it is tried.
        answers: Which items are used, see `tvlens.build_prompts`.
        seed: Decides the split, all prompts, and the controls.
        progress: Whether to show a progress bar.

    Returns:
        Per-prompt outcomes, as a result that draws itself.

    Raises:
        ValueError: Unknown names, a task too small for the shots, or a model with too few heads.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> small = {"shots": 3, "n_means": 4, "n_trials": 4, "n_dev": 4, "n_test": 6, "n_random": 2}
        >>> found = function_vectors(tiny_model(), "to_upper", n_heads=2, progress=False, **small)
        >>> found.data["view"].values.tolist()
        ['zero_shot', 'shuffled', 'qa', 'arrow']

    References:
        Todd et al. 2024, arXiv:2310.15213, sections 2 and 3.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    model = load_model(model) if isinstance(model, str) else model
    task = as_task(task)
    how: dict[str, Any] = {"template": template, "answers": answers, "seed": seed}
    with tqdm(total=3, desc=task.name, disable=not progress, leave=False) as bar:
        bar.set_postfix_str("effects of heads")
        methods = METHODS if heads is None or by == "effect" else (by,)
        effects = head_effects(
            model, task, shots=shots, n_means=n_means, n_trials=n_trials, methods=methods, **how
        )
        bar.update()
        chosen = effects.heads(n_heads, by=by) if heads is None else list(heads)
        made = {k: v for k, v in effects.provenance.items() if k in _ORIGIN} | {"heads_by": by}
        vectors = _vectors(model, effects, chosen, n_random=n_random, seed=seed, made=made)
        bar.set_postfix_str("choice of the layer")
        bare = {"shots": 0, "n_dummy": 0}
        dev = build_prompts(task, model, n=n_dev, split="dev", **bare, **how)
        by_layer, layers = _layers(model, dev, vectors)
        bar.update()
        bar.set_postfix_str("test queries")
        views, regular = _views(model, task, shots=shots, n=n_test, templates=templates, **how)
        outcomes = _test(model, views, regular, vectors, layers)
        bar.update()
    data = _dataset(dev, regular, by_layer, outcomes, views, layers, effects, vectors["vector"][0])
    note = collect(
        kind=FunctionVectors.kind, **made, n_test=n_test, n_dev=n_dev, n_random=n_random,
        heads=[list(head) for head in chosen], n_layers=effects.provenance["n_layers"],
        vector=vectors["vector"][0].made, effects=effects.provenance,
        model_facts=facts(model).to_dict(), seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return FunctionVectors(data.assign_attrs({ATTRIBUTE: encode(note)}))


# What of the effects' provenance is that of the vector, too.
_ORIGIN = (
    "task", "family", "template", "spacing", "bos", "shots", "seed", "n_means", "n_trials", "model",
    "answers",
)  # fmt: skip


def _vectors(
    model: Any,
    effects: HeadEffects,
    chosen: Sequence[tuple[int, int]],
    *,
    n_random: int,
    seed: int,
    made: Mapping[str, Any],
) -> dict[str, list[TaskVector]]:
    """The function vector and its controls."""
    vector = function_vector(model, effects.outputs, chosen, made=made)
    shape = effects.data.sizes["layer"], effects.data.sizes["head"]
    drawn = random_heads(chosen, shape, n_draws=n_random, seed=seed)
    return {
        "vector": [vector],
        "random_heads": [function_vector(model, effects.outputs, heads) for heads in drawn],
        "random_vector": [vector.random_like(seed=1000 * seed + i) for i in range(n_random)],
    }


def _add(vector: TaskVector, layer: int) -> tuple[Edit, ...]:
    return (Edit(vector.site, layer, vector.at(layer), mode="add"),)


def _correct(model: Any, requests: Sequence[Request]) -> list[np.ndarray]:
    """Whether predictions are right, by cell and prompt."""
    return [
        found.values["correct"].cpu().numpy().astype("float32") for found in run(model, requests)
    ]


def _layers(
    model: Any, dev: Prompts, vectors: Mapping[str, Sequence[TaskVector]]
) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Add every vector at every layer to bare dev queries; each gets the layer where it does best."""
    every = [vector for some in vectors.values() for vector in some]
    depth = every[0].layers
    cells = tuple(_add(vector, layer) for vector in every for layer in depth)
    request = Request(dev.zero_shot, cells=cells, readout=FirstToken(dev.answer_ids))
    (right,) = _correct(model, [request])
    right = rearrange(right, "(vector layer) prompt -> vector prompt layer", layer=len(depth))
    shares = right.mean(axis=1)
    best = shares.argmax(axis=-1)
    # A control that does as well at the vector's own layer as anywhere is added there.
    at = int(best[0])
    numbers = iter(np.where(shares[:, at] == shares.max(axis=-1), at, best).tolist())
    return right[0], {name: [depth[next(numbers)] for _ in some] for name, some in vectors.items()}


def _views(
    model: Any, task: Task, *, shots: int, n: int, templates: Sequence[str], **how: Any
) -> tuple[dict[str, Prompts], Prompts]:
    """The same test queries bare, after shuffled labels, and bare in other templates; and regular."""
    asked: dict[str, Any] = {"split": "test", "n_dummy": 0, "shots": shots, "n": n}
    regular = build_prompts(task, model, **asked, **how)
    shuffled = build_prompts(task, model, labels="shuffled", **asked, **how)
    others = {}
    for name in templates:
        same = {**asked, **how, "shots": 0, "template": name}
        others[str(name)] = same_queries(task, model, regular.queries, **same)
    return {"zero_shot": regular, "shuffled": shuffled} | others, regular


def _test(
    model: Any,
    views: Mapping[str, Prompts],
    regular: Prompts,
    vectors: Mapping[str, Sequence[TaskVector]],
    layers: Mapping[str, Sequence[int]],
) -> dict[str, np.ndarray]:
    """Run all views with nothing added, with the vector and with its controls, in one call."""
    cells = [()]
    for name, some in vectors.items():
        cells += [_add(vector, at) for vector, at in zip(some, layers[name], strict=True)]
    (vector,) = vectors["vector"]
    swept = [_add(vector, layer) for layer in vector.layers]
    requests = []
    for name, prompts in views.items():
        batch = prompts.regular if name == "shuffled" else prompts.zero_shot
        more = swept if name == "zero_shot" else []
        readout = FirstToken(prompts.answer_ids)
        requests.append(Request(batch, cells=tuple([*cells, *more]), readout=readout))
    requests.append(Request(regular.regular, readout=FirstToken(regular.answer_ids)))
    *found, proper = _correct(model, requests)
    every = np.stack([right[: len(cells)] for right in found])
    for right, prompts in zip(every, views.values(), strict=True):
        right[:, np.array(prompts.queries) != np.array(regular.queries)] = np.nan
    n = len(vectors["random_heads"])
    return {
        "regular": proper[0],
        "hypothesis": found[0][len(cells) :].T,
        "without": every[:, 0],
        "vector": every[:, 1],
        "random_heads": every[:, 2 : 2 + n],
        "random_vector": every[:, 2 + n :],
    }


def _dataset(
    dev: Prompts,
    test: Prompts,
    by_layer: np.ndarray,
    outcomes: Mapping[str, np.ndarray],
    views: Mapping[str, Prompts],
    layers: Mapping[str, Sequence[int]],
    effects: HeadEffects,
    vector: TaskVector,
) -> xr.Dataset:
    """Label everything; dev prompts come first, and have outcomes only where a layer was chosen on them."""
    dims = {
        "regular": ("prompt",),
        **{name: ("view", "prompt") for name in ("without", "vector")},
        **{name: ("view", "draw", "prompt") for name in CONTROLS},
    }
    table: dict[str, Any] = {}
    for name, axes in dims.items():
        unseen = np.full((*outcomes[name].shape[:-1], len(dev)), np.nan, dtype="float32")
        table[name] = (axes, np.concatenate([unseen, outcomes[name]], axis=-1))
    table["hypothesis"] = (
        ("prompt", "layer"),
        np.concatenate([by_layer, outcomes["hypothesis"]]).astype("float32"),
    )
    table["theta"] = ("d_model", vector.values[0, 0].numpy())
    found = xr.Dataset(
        table,
        coords={
            "split": ("prompt", ["dev"] * len(dev) + ["test"] * len(test)),
            "query": ("prompt", [*dev.queries, *test.queries]),
            "view": list(views),
            "layer": list(vector.layers),
            **{f"{name}_layer": ("draw", list(layers[name])) for name in CONTROLS},
        },
    )
    heads = effects.data.drop_attrs().rename(query="trial_query", answer="trial_answer")
    return xr.merge([found, heads])
