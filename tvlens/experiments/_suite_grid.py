"""Layer sweeps put in order by model, task and seed, and their outcomes in one dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from tvlens.experiments.layer_sweep import LayerSweep

PROMPT = ("model", "task", "seed", "prompt")
LAYER = (*PROMPT, "layer")
MODEL = ("name", "weights_sha256", "revision", "processing", "dtype", "n_layers", "d_model")
"""Facts in which all sweeps of one model agree."""
TASK = ("task_fingerprint", "family")
"""Facts in which all sweeps of one task agree."""
ITEMS = ("answers", "n_items")
"""What says which items of a task were used; depends on the tokenizer, so it is the same for one model."""
SAME = ("shots", "n_dummy", "template", "n_dev", "n_test")
"""Settings that all sweeps of a suite share."""


def axes(grid: Mapping[tuple[str, str, int], Any]) -> tuple[list[str], list[str], list[int]]:
    """Models, tasks and seeds, each once."""
    names, tasks, seeds = zip(*grid, strict=True)
    return list(dict.fromkeys(names)), list(dict.fromkeys(tasks)), list(dict.fromkeys(seeds))


def grid_of(sweeps: Mapping[str, Sequence[LayerSweep]]) -> dict[tuple[str, str, int], LayerSweep]:
    """Put sweeps in order, and refuse a table with holes."""
    grid: dict[tuple[str, str, int], LayerSweep] = {}
    for name, some in sweeps.items():
        for sweep in some:
            made = sweep.provenance
            key = (name, str(made["task"]), int(made["seed"]))
            if key in grid:
                raise ValueError(f"task {key[1]!r} with seed {key[2]} is there twice for {name!r}.")
            grid[key] = sweep
    if not grid:
        raise ValueError("a suite collects at least one layer sweep; none arrived.")
    names, tasks, seeds = axes(grid)
    wanted = [(name, task, seed) for name in names for task in tasks for seed in seeds]
    missing = [key for key in wanted if key not in grid]
    if missing:
        name, task, seed = missing[0]
        raise ValueError(
            f"{len(missing)} of {len(wanted)} sweeps are missing: a suite has every task and seed of every "
            f"model, but not {task!r} with seed {seed} of {name!r}."
        )
    made = {key: grid[key].provenance for key in wanted}
    for (name, task, _), own in made.items():
        _agree("sweeps", own, made[wanted[0]], SAME)
        known = made[name, tasks[0], seeds[0]]["model_facts"]
        _agree(f"models that all go by {name!r}, but are", known, own["model_facts"], MODEL)
        _agree(
            f"tasks that are all called {task!r}, but are",
            made[names[0], task, seeds[0]],
            own,
            TASK,
        )
        _agree(f"seeds of {task!r} on {name!r}", made[name, task, seeds[0]], own, ITEMS)
    return {key: grid[key] for key in wanted}


def _agree(
    what: str, one: Mapping[str, Any], other: Mapping[str, Any], keys: Sequence[str]
) -> None:
    differ = [key for key in keys if one.get(key) != other.get(key)]
    if differ:
        both = "; ".join(f"{key} {one.get(key)!r} and {other.get(key)!r}" for key in differ)
        raise ValueError(f"{what} of different {', '.join(differ)} do not make one suite: {both}.")


def dataset(grid: Mapping[tuple[str, str, int], LayerSweep]) -> xr.Dataset:
    """Label everything; layers that a model does not have are NaN."""
    names, tasks, seeds = axes(grid)
    parts = {key: one.data for key, one in grid.items()}
    n_layers = [parts[name, tasks[0], seeds[0]].sizes["layer"] for name in names]
    deep = max(n_layers)

    def stacked(variable: str, one: xr.DataArray) -> np.ndarray:
        values = one.transpose("prompt", ...).values
        if values.ndim == 1:
            return values
        return np.pad(
            values.astype("float32"), ((0, 0), (0, deep - values.shape[1])), constant_values=np.nan
        )

    table: dict[str, Any] = {}
    for variable in ("baseline", "regular", "majority", "hypothesis", "control", "query"):
        flat = np.stack([stacked(variable, one[variable]) for one in parts.values()])
        shape = (len(names), len(tasks), len(seeds), *flat.shape[1:])
        table[variable] = (LAYER if flat.ndim == 3 else PROMPT, flat.reshape(shape))
    query = table.pop("query")
    depth = np.full((len(names), deep), np.nan)
    for i, (name, n) in enumerate(zip(names, n_layers, strict=True)):
        depth[i, :n] = parts[name, tasks[0], seeds[0]]["depth"].values
    some = {task: grid[names[0], task, seeds[0]] for task in tasks}
    return xr.Dataset(
        table,
        coords={
            "model": names,
            "task": tasks,
            "seed": seeds,
            "layer": range(deep),
            "split": ("prompt", parts[names[0], tasks[0], seeds[0]]["split"].values),
            "query": (query[0], query[1].astype(object)),
            "depth": (("model", "layer"), depth),
            "n_layers": ("model", n_layers),
            "family": ("task", [str(one.provenance["family"]) for one in some.values()]),
        },
    )
