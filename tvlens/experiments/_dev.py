"""What several experiments share: tasks by name, a layer chosen on dev queries, other templates, controls."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float

from tvlens.engine import Edit
from tvlens.extraction import extract
from tvlens.prompts import Prompts, build_prompts, usable_items
from tvlens.scoring import correct_cells
from tvlens.tasks import Task, as_task
from tvlens.templates import Template
from tvlens.vectors import random_directions


def resolved(tasks: Sequence[Task | str]) -> dict[str, Task]:
    """Load tasks by their names.

    Args:
        tasks: Tasks or names.

    Returns:
        The tasks by name, in the order given.

    Raises:
        ValueError: An unknown task, or the same name twice.
    """
    if isinstance(tasks, str | Task):
        raise ValueError(f"several tasks are needed, as a list; {tasks!r} arrived.")
    for task in tasks:
        if not isinstance(task, str | Task):
            raise TypeError(f"a task is a Task or its name; {task!r} arrived.")
    if not tasks:
        raise ValueError("at least one task is needed; an empty list arrived.")
    loaded = [as_task(task) for task in tasks]
    names = [task.name for task in loaded]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"each task once; given more than once: {', '.join(twice)}.")
    return dict(zip(names, loaded, strict=True))


def accuracy_by_layer(model: Any, prompts: Prompts) -> Float[np.ndarray, " layer"]:
    """Give the share of queries that theta(S) answers alone, injected at each layer.

    Args:
        model: A TransformerLens model.
        prompts: Prompts with dummy queries.

    Returns:
        Accuracy of the zero-shot prompts with theta at each layer.
    """
    theta = extract(model, prompts)
    cells = tuple((Edit(theta.site, layer, theta.at(layer)),) for layer in theta.layers)
    right = correct_cells(model, prompts, prompts.zero_shot, cells).astype("float32")
    return reduce(right, "layer prompt -> layer", "mean")


def best_layer(
    model: Any, tasks: Mapping[str, Task], n: int, settings: Mapping[str, Any], bar: Any
) -> tuple[int, float]:
    """Choose one layer for several tasks on dev prompts.

    Args:
        model: A TransformerLens model.
        tasks: The tasks by name.
        n: Dev prompts a task.
        settings: What else `build_prompts` is told.
        bar: A progress bar, moved by one for each task.

    Returns:
        The lowest layer at which theta answers most dev queries on average over the tasks, and how many.
    """
    curves = []
    for task in tasks.values():
        bar.set_postfix_str(f"{task.name}: layer")
        made = build_prompts(task, model, n=n, split="dev", **settings)
        curves.append(accuracy_by_layer(model, made))
        bar.update()
    mean = np.mean(curves, axis=0)
    return int(mean.argmax()), float(mean.max())


def same_queries(
    task: Task, model: Any, queries: Sequence[str], *, template: str | Template, **how: Any
) -> Prompts:
    """Ask queries in another template than the one they were chosen in.

    Args:
        task: The task.
        model: As in `build_prompts`.
        queries: The queries.
        template: How they are written.
        **how: What else `build_prompts` is told.

    Returns:
        Prompts, row by row. Where the template cannot judge a query, another one stands in its place, and
        ``prompts.queries`` differs there: such a row is not to be counted.
    """
    usable = usable_items(task, model, template=template, answers="any")
    asked = [x if x in usable else usable[0] for x in queries]
    how = {**how, "answers": "any", "queries": asked}
    return build_prompts(task, model, template=template, **how)


def random_cell(cell: Sequence[Edit], *, seed: str, n: int) -> tuple[Edit, ...]:
    """Write random directions of the same length at the same places: the control of what a cell writes.

    Args:
        cell: Edits with values of their own.
        seed: Decides the directions; name in it what is controlled, so that controls differ.
        n: How many prompts there are. Each has directions of its own, also where one vector is for all of
            them: a single direction may be a lucky one.

    Returns:
        The same edits with other values.
    """
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(32))
    drawn = []
    for edit in cell:
        values = edit.given.float().cpu()
        rows = values.expand(n, *values.shape[1:])
        drawn.append(replace(edit, values=random_directions(rows, generator)))
    return tuple(drawn)
