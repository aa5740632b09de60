"""Fair prompts: does a prompt that prefers no label where nothing is asked answer better? Does its theta?

Ma et al. ask a prompt about nothing ("N/A", "", "[MASK]") and take the entropy over the labels as its
fairness. They find that fairer prompts predict better, and search for them: greedily (G-fair), or by how fair
each demonstration is alone (T-fair). Theirs are the measure and both searches; ours are small models, short
tasks, few queries, random prompts chosen from at equal cost, the least fair prompts as a control, and theta.

How to read it: the figure's left panel says whether fairness ranks prompts as accuracy does, the right panel
what choosing by it gains over random prompts. The least fair prompts should lose. The table "What fairness is
about" says when not to ask: where the labels get little probability after content-free inputs, or are so many
that the entropy says how many different answers were shown, fairness is not what the authors mean.
"""

import math
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from tvlens.experiments._dev import best_layer
from tvlens.icl.presets import at_least, settle
from tvlens.icl.studies import study
from tvlens.icl.studies._fairness import ARMS, FEW, MEASURES, Fairness
from tvlens.icl.studies._fairness_asking import CONTENT_FREE, Bench, Marks, check_content_free
from tvlens.icl.studies._fairness_search import (
    Greedy,
    Shown,
    fairest_alone,
    greedy,
    random_prompts,
)
from tvlens.icl.studies._fairness_tasks import classified
from tvlens.models import facts, load_model
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.sites import check_layer
from tvlens.tasks import Task
from tvlens.templates import Template

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "tasks": ("word_place", "word_kind", "word_language", "location_religion", "location_continent",
                  "country_capital"),
        "pools": 3, "candidates": 6, "shots": 3, "queries": 10, "draws": 8, "n_dev": 4,
    },
    "paper": {
        "tasks": ("word_place", "word_kind", "word_language", "list_length", "location_religion",
                  "location_continent", "list_max", "person_language", "antonyms", "country_capital"),
        "pools": 6, "candidates": 12, "shots": 4, "queries": 64, "draws": 60, "n_dev": 20,
    },
}  # fmt: skip
_DUMMIES = 2


@study("fairness")
def fairness(
    *,
    preset: str = "quick",
    seed: int = 0,
    progress: bool = True,
    device: str | None = None,
    model: Any = "smollm2-135m",
    tasks: Sequence[Task | str] | None = None,
    pools: int | None = None,
    candidates: int | None = None,
    shots: int | None = None,
    queries: int | None = None,
    draws: int | None = None,
    n_dev: int | None = None,
    layer: int | None = None,
    content_free: Sequence[str] = CONTENT_FREE,
    template: str | Template = "example",
    answers: str = "any",
) -> Fairness:
    """Search for fair prompts, and ask whether they, and their thetas, answer better than random ones.

    Args:
        preset: ``"quick"``: six tasks, five of them with few labels, on two CPU cores. ``"paper"``: ten
            tasks, more pools and queries, meant for a GPU.
        seed: Decides queries, pools and random prompts.
        progress: Whether to show a progress bar.
        device: Where to run, if the model is named; tvlens' default where None.
        model: A TransformerLens model, or a name that `tvlens.load_model` knows.
        tasks: Tasks, or their names: tvlens' own, or word_place, word_kind, word_language, which ask what a
            word is. None, here and below, for what the preset says.
        pools: Pools of demonstrations a task; the search is run in each.
        candidates: Demonstrations of a pool.
        shots: Demonstrations of random and T-fair prompts; the greedy search ends where it will.
        queries: Queries a task, none of which any demonstration may be.
        draws: Random prompts of each pool whose accuracy is measured.
        n_dev: Prompts a task on which theta's layer is chosen.
        layer: Theta's layer, negative from the end; chosen if not given.
        content_free: Inputs without content.
        template: How a demonstration is written, see `tvlens.Template`.
        answers: Which items are used, see `tvlens.build_prompts`.

    Returns:
        Fairness and outcomes of every prompt, as a result that draws itself.

    Raises:
        ValueError: A preset or task that does not exist, a task with too few items or one label, more shots
            than candidates, or content-free inputs that the tokenizer does not know.

    Example:
        >>> from tvlens.models import toy_tasks
        >>> few = {"pools": 1, "candidates": 3, "shots": 2, "queries": 4, "draws": 4, "layer": 2}
        >>> some = {"model": "toy", "tasks": [toy_tasks()["continent"]], "content_free": ("", ",")}
        >>> found = fairness(progress=False, **some, **few)
        >>> found.data["regular"].dims
        ('task', 'pool', 'set', 'query')

    References:
        Ma et al. 2023, Fairness-guided Few-shot Prompting for Large Language Models, arXiv 2303.13217.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    used = settle(PRESETS, preset, pools=pools, candidates=candidates, shots=shots, queries=queries,
                  draws=draws, n_dev=n_dev)  # fmt: skip
    named = classified(used.pop("tasks") if tasks is None else tasks)
    used.pop("tasks", None)
    _check(used, seed)
    model = load_model(model, device=device) if isinstance(model, str) else model
    known, inputs = facts(model), check_content_free(model, content_free)
    asking = {"template": template, "answers": answers, "seed": seed}
    sizes = {name: used[name] for name in ("pools", "candidates", "queries")}
    benches = [
        Bench.of(model, task, n_dummy=_DUMMIES, content_free=inputs, **sizes, **asking)
        for task in named.values()
    ]
    with tqdm(total=3 * len(benches), disable=not progress, leave=False) as bar:
        if layer is None:
            # Dev queries and what is shown with them are of the half from which pools come.
            how = asking | {"shots": used["shots"], "n_dummy": _DUMMIES, "demonstrations": "split"}
            layer, _ = best_layer(model, named, used["n_dev"], how, bar)
        layer = check_layer(layer, known.n_layers)
        parts = [_searched(bench, used, layer, seed, bar) for bench in benches]
    data = _dataset(benches, parts)
    note = collect(
        kind=Fairness.kind, preset=preset, seed=seed, model=known.name, model_facts=known.to_dict(),
        **used, layer=layer, content_free=inputs, template=benches[0].template.demo, answers=answers,
        few=FEW, seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Fairness(data.assign_attrs({ATTRIBUTE: encode(note)}))


def fairness_of(
    model: Any,
    task: Task | str,
    prompts: Sequence[Sequence[str]],
    *,
    content_free: Sequence[str] = CONTENT_FREE,
    template: str | Template = "example",
    answers: str = "any",
) -> xr.Dataset:
    """Say how fair prompts are: the entropy over a task's labels where nothing is asked.

    Args:
        model: A TransformerLens model.
        task: The task, or its name.
        prompts: For each prompt the inputs of its demonstrations, in order; any number of them.
        content_free: Inputs without content.
        template: How a demonstration is written, see `tvlens.Template`.
        answers: Which items' answers are labels, see `tvlens.build_prompts`.

    Returns:
        By prompt: ``entropy`` (nats), ``fairness`` (as a share of log(labels), 0 to 1) and ``mass`` (the
        probability of all labels together).

    Raises:
        ValueError: Unknown names or inputs, one label, or content-free inputs without tokens.

    Example:
        >>> from tvlens.models import load_model, toy_tasks
        >>> found = fairness_of(load_model("toy"), toy_tasks()["continent"], [("France", "Japan"), ()],
        ...                     content_free=("",))
        >>> bool((found["fairness"] <= 1).all())
        True

    References:
        Ma et al. 2023, Fairness-guided Few-shot Prompting for Large Language Models, arXiv 2303.13217.
    """
    (task,) = classified([task]).values()
    inputs = check_content_free(model, content_free)
    bench = Bench.of(
        model, task, pools=0, candidates=0, queries=1, n_dummy=0, content_free=inputs, template=template,
        answers=answers,
    )  # fmt: skip
    bench.check(prompts)
    shown = [tuple(one) for one in prompts]
    entropy, mass = bench.scored(shown), bench.mass(shown)
    share = entropy / np.log(len(bench.labels))
    return xr.Dataset(
        {"entropy": ("prompt", entropy), "fairness": ("prompt", share), "mass": ("prompt", mass)}
    )


def _check(used: Mapping[str, Any], seed: int) -> None:
    """Refuse numbers that are too small, and more shots than there are demonstrations."""
    at_least(1, pools=used["pools"], shots=used["shots"], queries=used["queries"])
    at_least(1, n_dev=used["n_dev"])
    at_least(2, draws=used["draws"], candidates=used["candidates"])
    at_least(0, seed=seed)
    if used["shots"] > used["candidates"]:
        raise ValueError(
            f"a pool of {used['candidates']} candidates has no prompt of {used['shots']} demonstrations. "
            f"Nearest: shots={used['candidates']}."
        )
    there = math.perm(used["candidates"], used["shots"])
    if there < used["draws"]:
        raise ValueError(
            f"a pool of {used['candidates']} candidates has {there} prompts of {used['shots']} "
            f"demonstrations; draws={used['draws']} arrived. Nearest: {there}."
        )


def _searched(
    bench: Bench, used: Mapping[str, Any], layer: int, seed: int, bar: Any
) -> dict[str, Any]:
    """Search all pools of a task, and mark what was found and random prompts."""
    bar.set_postfix_str(f"{bench.task.name}: search")
    shots, draws = used["shots"], used["draws"]
    searches = greedy(bench.scored, bench.pools, least=shots)
    rng = random.Random(f"{seed}:{bench.task.name}:fairness")
    # As many random prompts as G-fair scored; and as many as are marked, if these are more.
    drawn = [
        random_prompts(pool, shots, max(search.evaluations, draws), rng)
        for pool, search in zip(bench.pools, searches, strict=True)
    ]
    bar.update()
    bar.set_postfix_str(f"{bench.task.name}: mark")
    marked = list(dict.fromkeys(shown for some in drawn for shown in some[:draws]))
    marks = bench.mark(marked, layer)
    bench.scored([shown for some in drawn for shown in some])
    chosen = [
        _chosen(bench, search, some, shots, draws)
        for search, some in zip(searches, drawn, strict=True)
    ]
    more = dict.fromkeys(shown for row in chosen for _, shown in row if shown not in marked)
    if more:
        marks = marks.and_of(bench.mark([*more], layer))
    bar.update()
    return {"searches": searches, "chosen": chosen, "distinct": [*marked, *more], "marks": marks}


def _chosen(
    bench: Bench, search: Greedy, drawn: Sequence[Shown], shots: int, draws: int
) -> list[tuple[str, Shown]]:
    """Name the prompts of a pool that are marked, each with how it was chosen."""
    # Where more prompts are marked than G-fair scored, all of them would be a larger search.
    budget = drawn[: search.evaluations]
    fair = dict(zip(budget, bench.scored(budget), strict=True))
    found = {
        "G-fair": search.found,
        "G-fair, all shots": search.steps[shots - 1],
        "T-fair": fairest_alone(search.alone, shots),
        "fairest of random": max(fair, key=fair.__getitem__),
        "least fair of random": min(fair, key=fair.__getitem__),
    }
    return [*((arm, found[arm]) for arm in ARMS if arm in found),
            *(("random", shown) for shown in drawn[:draws])]  # fmt: skip


def _dataset(benches: Sequence[Bench], parts: Sequence[dict[str, Any]]) -> xr.Dataset:
    """Label everything."""
    variables = [_of_task(bench, part) for bench, part in zip(benches, parts, strict=True)]
    arms = [arm for arm, _ in parts[0]["chosen"][0]]
    return xr.Dataset(
        {
            name: (dims, np.stack([of_task[name] for of_task in variables]))
            for name, dims in Fairness.variables.items()
        },
        coords={
            "task": [bench.task.name for bench in benches],
            "pool": np.arange(len(parts[0]["chosen"])),
            "set": np.arange(len(arms)),
            "arm": ("set", arms),
            "query": np.arange(len(benches[0].asked)),
            "asked": (("task", "query"), [list(bench.asked.queries) for bench in benches]),
        },
    )


def _of_task(bench: Bench, part: Mapping[str, Any]) -> dict[str, Any]:
    """All variables of one task."""
    prompts = [[shown for _, shown in row] for row in part["chosen"]]
    marks: Marks = part["marks"]
    at = {shown: i for i, shown in enumerate(part["distinct"])}
    which = np.array([[at[shown] for shown in row] for row in prompts])
    whole = np.log(len(bench.labels))
    firsts = [ids[0] for ids in bench.asked.answer_ids]
    return {
        "fairness": np.stack([bench.scored(row) for row in prompts]) / whole,
        "mass": np.stack([bench.mass(row) for row in prompts]),
        "balance": np.array([[bench.balance(shown) for shown in row] for row in prompts]) / whole,
        "length": np.array([[len(shown) for shown in row] for row in prompts]),
        "demonstrations": np.array([[" | ".join(shown) for shown in row] for row in prompts]),
        **{name: getattr(marks, name)[which] for name in MEASURES},
        "baseline": marks.baseline,
        "constant": max(firsts.count(first) for first in firsts) / len(firsts),
        "labels": len(bench.labels),
        "evaluations": np.array([search.evaluations for search in part["searches"]]),
        "spent": np.array([search.spent for search in part["searches"]]),
    }
