"""First token or whole answer? The same prompts judged both ways, with demonstrations and with theta.

Theta goes into the last token of the prompt, and steers the first token of the answer. Where an answer has
several tokens, the rest must follow from that one, and so must its end: nothing else of the prompt says what
an answer looks like.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from tvlens.answers import AnswerScores, score_answers
from tvlens.experiments import experiment
from tvlens.experiments._answers import RUNS, WholeAnswers
from tvlens.experiments._dev import accuracy_by_layer, resolved
from tvlens.extraction import extract
from tvlens.models import facts, load_model
from tvlens.prompts import Prompts, build_prompts
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.sites import check_layer
from tvlens.tasks import Task
from tvlens.templates import Template

TASKS = ("en_fr", "en_es", "person_language", "country_capital")
_KEPT = ("first", "begins", "exact", "stopped", "n_tokens", "log_prob")


@experiment("whole_answers")
def whole_answers(
    model: Any,
    tasks: Sequence[Task | str] = TASKS,
    *,
    layer: int | None = None,
    shots: int = 5,
    n_test: int = 50,
    n_dev: int = 30,
    template: str | Template = "example",
    seed: int = 0,
    progress: bool = True,
) -> WholeAnswers:
    """Set first-token accuracy against exact match, for demonstrations, theta, and its controls.

    Args:
        model: A TransformerLens model, or a name that `tvlens.load_model` knows.
        tasks: Tasks, or their names; all items are used, however long their answers.
        layer: Where theta goes in, negative from the end; by default, for each task, the layer at which it
            answers most dev queries by first token.
        shots: Demonstrations a prompt.
        n_test: Test prompts a task.
        n_dev: Dev prompts a task that choose the layer.
        template: How a demonstration is written, see `tvlens.Template`.
        seed: Decides all prompts and the random vector.
        progress: Whether to show a progress bar.

    Returns:
        Outcomes of every prompt in every run (regular, theta, random, baseline), as a result that plots
        itself.

    Raises:
        ValueError: Unknown names, the same task twice, a layer outside the model, or a task too small.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> settings = {"layer": 1, "n_test": 3, "shots": 2, "progress": False}
        >>> found = whole_answers(tiny_model(), ["country_capital"], **settings)
        >>> found.rates()["run"].tolist()
        ['regular', 'theta', 'random', 'baseline']

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916, who score first tokens.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    model = load_model(model) if isinstance(model, str) else model
    named, known = resolved(tasks), facts(model)
    if not named:
        raise ValueError("at least one task is needed; none arrived.")
    at = None if layer is None else check_layer(layer, known.n_layers)
    how = {"shots": shots, "template": template, "answers": "any", "seed": seed}
    parts, about = [], {}
    with tqdm(total=len(named), disable=not progress, leave=False) as bar:
        for task in named.values():
            bar.set_postfix_str(task.name)
            best = _best(task, model, n_dev, how) if at is None else at
            prompts = build_prompts(task, model, n=n_test, split="test", **how)
            parts.append(_one(model, prompts, best, seed))
            about = about or prompts.facts
            bar.update()
    data: Any = xr.concat(parts, dim="task")
    data.attrs[ATTRIBUTE] = encode(
        collect(
            kind=WholeAnswers.kind,
            task=", ".join(named),
            n_dev=n_dev if at is None else 0,
            n_test=n_test,
            answers="any",
            **{k: about[k] for k in ("template", "bos", "shots", "n_dummy", "seed")},
            model=known.name,
            n_layers=known.n_layers,
            model_facts=known.to_dict(),
            seconds=round(time.perf_counter() - started, 3),
        )
    )
    return WholeAnswers(data)


def _best(task: Task, model: Any, n_dev: int, how: Mapping[str, Any]) -> int:
    """The layer at which theta answers most dev queries of a task."""
    dev = build_prompts(task, model, n=n_dev, split="dev", **how)
    return int(accuracy_by_layer(model, dev).argmax())


def _one(model: Any, prompts: Prompts, layer: int, seed: int) -> xr.Dataset:
    """Answer one task's prompts in all runs."""
    theta = extract(model, prompts, layers=[layer])
    bare: dict[str, Any] = {"view": "zero_shot", "layer": layer}
    scores: dict[str, AnswerScores] = {
        "regular": score_answers(model, prompts),
        "theta": score_answers(model, prompts, vector=theta, **bare),
        "random": score_answers(model, prompts, vector=theta.random_like(seed=seed), **bare),
        "baseline": score_answers(model, prompts, view="zero_shot"),
    }
    runs = [scores[run] for run in RUNS]
    values: dict[str, np.ndarray] = {
        name: torch.stack([getattr(one, name) for one in runs]).numpy() for name in _KEPT
    }
    values |= {
        name: np.array([getattr(one, name) for one in runs], object)
        for name in ("text", "likeliest")
    }
    return xr.Dataset(
        {name: (("task", "run", "prompt"), value[None]) for name, value in values.items()},
        coords={
            "task": [prompts.facts["task"]],
            "run": list(RUNS),
            "query": (("task", "prompt"), np.array([prompts.queries], object)),
            "layer": ("task", [layer]),
        },
    )
