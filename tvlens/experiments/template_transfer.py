"""Theta made in one template, used in another: is the task tied to how demonstrations are written?

Every template makes its own theta from its own demonstrations, and every theta is put into bare queries of
every template. The diagonal is the ordinary hypothesis; a column that is low throughout is a template whose
bare queries no theta can help, a row that is low is one whose demonstrations make no good theta.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr
from einops import rearrange
from jaxtyping import Bool

from tvlens._errors import whole
from tvlens.engine import Edit, FirstToken, Request, run
from tvlens.experiments import experiment
from tvlens.experiments._dev import random_cell, resolved, same_queries
from tvlens.experiments._template_transfer import TemplateTransfer
from tvlens.extraction import average, dummy_requests
from tvlens.models import facts, load_model
from tvlens.prompts import SPLITS, Prompts, build_prompts
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.scoring import injection
from tvlens.tasks import Task
from tvlens.templates import Template, get_template
from tvlens.vectors import TaskVector

TEMPLATES = ("example", "arrow", "qa")


@experiment("template_transfer")
def template_transfer(
    model: Any,
    tasks: Sequence[Task | str],
    *,
    templates: Sequence[str | Template] = TEMPLATES,
    shots: int = 5,
    n_dev: int = 50,
    n_test: int = 50,
    n_dummy: int = 2,
    answers: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> TemplateTransfer:
    r"""Put theta of every template into bare queries of every template.

    Args:
        model: A TransformerLens model, or a name that `tvlens.load_model` knows.
        tasks: Tasks, or their names.
        templates: How demonstrations are written, see `tvlens.Template`; names, or texts with ``{x}`` and
            ``{y}``. The first one chooses the queries.
        shots: Demonstrations a prompt.
        n_dev: Prompts on which the layer is chosen, for each pair in the template where theta is used.
        n_test: Prompts on which accuracies are reported; their queries are not among the dev queries.
        n_dummy: Dummy queries over which theta is averaged.
        answers: Which items are used in the first template, see `tvlens.build_prompts`; in the others any.
        seed: Decides the split, all prompts, and the random vectors.
        progress: Whether to show a progress bar.

    Returns:
        Per-prompt outcomes, as a result that plots itself.

    Raises:
        ValueError: Unknown names, the same template twice, two templates that can judge no query in common,
            or a task too small for the shots.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> settings = {"shots": 2, "n_dev": 4, "n_test": 4, "progress": False}
        >>> written = ["example", "{x}={y}\n"]
        >>> found = template_transfer(tiny_model(), ["to_upper"], templates=written, **settings)
        >>> found.matrix().shape
        (2, 2)

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916; Todd et al. 2024, arXiv:2310.15213, section 3.2.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    written = _written(templates)
    if whole("n_dummy", n_dummy) < 1:
        raise ValueError(f"theta is read on dummy queries: n_dummy >= 1; {n_dummy} arrived.")
    model = load_model(model) if isinstance(model, str) else model
    known, named = facts(model), resolved(tasks)
    how = {"shots": shots, "n_dummy": n_dummy, "answers": answers, "seed": seed}
    found, prompts = [], {}
    with tqdm(total=len(named) * len(SPLITS), disable=not progress, leave=False) as bar:
        for task in named.values():
            bar.set_postfix_str(f"{task.name}: dev")
            prompts = _prompts(task, model, written, {**how, "n": n_dev, "split": "dev"})
            curves = _dev(model, prompts)
            bar.update()
            bar.set_postfix_str(f"{task.name}: test")
            prompts = _prompts(task, model, written, {**how, "n": n_test, "split": "test"})
            found.append(_test(model, prompts, curves, f"{seed}:{task.name}"))
            bar.update()
    sides = {"made": list(written), "used": list(written), "task": list(named)}
    data = xr.concat(found, dim="task").assign_coords(sides)
    first = next(iter(prompts.values())).facts
    note = collect(
        kind=TemplateTransfer.kind, task=", ".join(named), tasks=list(named),
        templates={name: template.demo for name, template in written.items()},
        **{k: first[k] for k in ("bos", "shots", "n_dummy", "seed")}, answers=answers,
        n_dev=n_dev, n_test=n_test, model=known.name, n_layers=known.n_layers,
        model_facts=known.to_dict(), seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return TemplateTransfer(data.assign_attrs({ATTRIBUTE: encode(note)}))


def _written(templates: Sequence[str | Template]) -> dict[str, Template]:
    """Templates by what they are called."""
    if isinstance(templates, str | Template) or not templates:
        raise ValueError(f"templates are needed as a list, at least one; {templates!r} arrived.")
    for one in templates:
        if not isinstance(one, str | Template):
            raise TypeError(f"a template is a Template, a name or a text; {one!r} arrived.")
    names = [one.demo if isinstance(one, Template) else one for one in templates]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"each template once; given more than once: {', '.join(map(repr, twice))}."
        )
    written = {name: get_template(one) for name, one in zip(names, templates, strict=True)}
    for (name, one), (other, same) in combinations(written.items(), 2):
        if one == same:
            raise ValueError(f"each template once; {name!r} and {other!r} are the same one.")
    return written


def _prompts(
    task: Task, model: Any, written: Mapping[str, Template], how: Mapping[str, Any]
) -> dict[str, Prompts]:
    """The same queries in every template."""
    first, *others = written
    made = {first: build_prompts(task, model, template=written[first], **how)}
    for name in others:
        made[name] = same_queries(task, model, made[first].queries, template=written[name], **how)
    return made


def _judged(prompts: Mapping[str, Prompts]) -> Bool[np.ndarray, "made used prompt"]:
    """Where both templates ask the query that the first one chose."""
    asked = np.array([one.queries for one in prompts.values()], object)
    own = asked == asked[0]
    both = own[:, None] & own[None]
    names = list(prompts)
    for i, j in np.argwhere(~both.any(axis=-1)):
        raise ValueError(
            f"templates {names[i]!r} and {names[j]!r} can judge no query in common with this tokenizer."
        )
    return both


def _read(
    model: Any, prompts: Mapping[str, Prompts], *, told: bool
) -> tuple[list[TaskVector], list[np.ndarray]]:
    """Read theta in every template; and if that is asked for, answer with demonstrations."""
    reading = [dummy_requests(model, one) for one in prompts.values()]
    readouts = [FirstToken(one.answer_ids) for one in prompts.values()]
    regular = [
        Request(one.regular, readout=readout)
        for one, readout in zip(prompts.values(), readouts, strict=True)
    ]
    flat = [request for some in reading for request in some]
    outputs = run(model, [*flat, *(regular if told else [])])
    thetas, at = [], 0
    for one, some in zip(prompts.values(), reading, strict=True):
        thetas.append(average(model, one, some, outputs[at : at + len(some)]))
        at += len(some)
    return thetas, [output.values["correct"][0].cpu().numpy() for output in outputs[at:]]


def _bare(
    model: Any, prompts: Mapping[str, Prompts], cells: Sequence[Sequence[tuple[Edit, ...]]]
) -> list[np.ndarray]:
    """Ask bare queries in every template, each with its own cells: right or not, by cell and prompt."""
    requests = [
        Request(one.zero_shot, cells=tuple(some), readout=FirstToken(one.answer_ids))
        for one, some in zip(prompts.values(), cells, strict=True)
    ]
    return [
        output.values["correct"].cpu().numpy().astype("float32") for output in run(model, requests)
    ]


def _dev(model: Any, prompts: Mapping[str, Prompts]) -> np.ndarray:
    """Accuracy on dev queries with every theta in every template, by made, used and layer."""
    counted = _judged(prompts)
    thetas, _ = _read(model, prompts, told=False)
    cells = [injection(model, theta, layer) for theta in thetas for layer in theta.layers]
    right = np.stack(_bare(model, prompts, [cells] * len(prompts)), axis=1)
    right = rearrange(right, "(made layer) used prompt -> made used layer prompt", made=len(thetas))
    return np.nanmean(np.where(counted[:, :, None], right, np.nan), axis=-1)


def _test(model: Any, prompts: Mapping[str, Prompts], curves: np.ndarray, seed: str) -> xr.Dataset:
    """Ask test queries: bare, with every theta at its layer, with its control, and with demonstrations."""
    counted = _judged(prompts)
    thetas, regular = _read(model, prompts, told=True)
    n, layers = len(thetas), thetas[0].layers
    best = np.array(layers)[curves.argmax(axis=-1)]
    cells = []
    for j, used in enumerate(prompts):
        own = [injection(model, theta, int(best[i, j])) for i, theta in enumerate(thetas)]
        controls = [
            random_cell(cell, seed=f"{seed}:{made}:{used}", n=len(prompts[used]))
            for made, cell in zip(prompts, own, strict=True)
        ]
        cells.append([(), *own, *controls])
    right = np.stack(_bare(model, prompts, cells), axis=1)
    own = np.diagonal(counted).T
    pairs, alone = ("made", "used", "prompt"), ("used", "prompt")
    return xr.Dataset(
        {
            "hypothesis": (pairs, np.where(counted, right[1 : 1 + n], np.nan)),
            "control": (pairs, np.where(counted, right[1 + n :], np.nan)),
            "baseline": (alone, np.where(own, right[0], np.nan)),
            "regular": (alone, np.where(own, np.stack(regular), np.nan).astype("float32")),
            "dev": (("made", "used", "layer"), curves),
            "best_layer": (("made", "used"), best),
            "query": (("prompt",), np.array(next(iter(prompts.values())).queries, object)),
        },
        coords={"layer": list(layers)},
    )
