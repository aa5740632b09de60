"""Steerable but not decodable? What theta makes the model do, beside what theta says in words.

Hendel et al. show that theta, projected onto the vocabulary, names words of its task. Words that stood in its
own demonstrations prove little, and so do words that every theta likes. So theta is made from one half of a
task's answers and asked for the other half: does the projection rank unseen answers above those of other
tasks, and does the same vector, injected, make the model give them? A vector may do the second without the
first: it holds an instruction, not an answer.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from tvlens._errors import unknown, whole
from tvlens.engine import Edit, FirstToken, Request, run
from tvlens.experiments import experiment
from tvlens.experiments._decodability import Decodability
from tvlens.experiments._dev import random_cell, resolved
from tvlens.experiments._readout import read_out
from tvlens.experiments._unseen import HALVES, PARTS, Half, Settings, naming
from tvlens.extraction import extract
from tvlens.lens.tuned import TunedLens
from tvlens.models import facts, load_model
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.tasks import PAPER_TASKS, Task
from tvlens.templates import Template
from tvlens.vectors import TaskVector


@experiment("decodability")
def decodability(
    model: Any,
    tasks: Sequence[Task | str] = PAPER_TASKS,
    *,
    shots: int = 5,
    n_vectors: int = 25,
    n_dev: int = 25,
    n_test: int = 25,
    n_dummy: int = 2,
    k: int = 20,
    n_random: int = 20,
    lens: TunedLens | None = None,
    words: Mapping[str, Sequence[str]] | None = None,
    template: str | Template = "example",
    answers: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Decodability:
    """Ask thetas of several tasks for answers they have not seen, in words and in deeds.

    Args:
        model: A TransformerLens model, or a name that `tvlens.load_model` knows.
        tasks: At least two tasks, or their names; three, for thetas of other tasks to be a control.
        shots: Demonstrations a prompt.
        n_vectors: Prompts over which theta is averaged, for each half of a task's answers.
        n_dev: Queries of each half on which layers are chosen, at most half of them all.
        n_test: Queries of each half on which everything is reported.
        n_dummy: Dummy queries over which theta is averaged.
        k: How many top tokens are searched for answers and words of the task.
        n_random: How many random directions are read out.
        lens: A tuned lens that translates theta before it is read out; the logit lens if not given.
        words: Lists of words that name a task, by its name; by default the longer words of its name and
            description.
        template: How a demonstration is written, see `tvlens.Template`.
        answers: Which items are used, see `tvlens.build_prompts`.
        seed: Decides halves, prompts and random vectors.
        progress: Whether to show a progress bar.

    Returns:
        Ranks of answers under every theta, and outcomes of every query, as a result that draws itself.

    Raises:
        ValueError: Unknown names, fewer than two tasks, a number too small, words for a task that is not
            among these, or a task with too few answers or items.
        TypeError: A number is not whole, or the words of a task are no list of texts.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> small = {"shots": 2, "n_vectors": 3, "n_dev": 4, "n_test": 4, "progress": False}
        >>> found = decodability(tiny_model(), ["to_upper", "char_to_int"], **small)
        >>> found.rates().index.tolist()
        ['to_upper', 'char_to_int']

    References:
        Nadaf 2026, arXiv:2604.02608; Hendel, Geva, Globerson 2023, arXiv:2310.15916, section 4.2.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    named = resolved(tasks)
    if len(named) < 2:
        raise ValueError(
            f"other tasks' answers are the control, so at least 2 tasks are needed; {len(named)} arrived."
        )
    how = Settings(shots, n_vectors, n_dev, n_test, n_dummy, template, answers, seed)
    for name in (*_NUMBERS, "n_random"):
        least = {"seed": -math.inf, "shots": 0}.get(name, 1)
        if whole(name, asked := n_random if name == "n_random" else getattr(how, name)) < least:
            raise ValueError(f"{name} must be at least {least}, got {asked}.")
    labels = _labels(named, words or {})
    model = load_model(model) if isinstance(model, str) else model
    d_vocab = int(model.cfg.d_vocab)
    if not 1 <= k <= d_vocab:
        raise ValueError(f"k = {k} top tokens asked for; this model has {d_vocab}: 1 to {d_vocab}.")
    made, thetas, deeds = {}, {}, []
    with tqdm(total=len(named), disable=not progress, leave=False) as bar:
        for name, task in named.items():
            bar.set_postfix_str(name)
            made[name] = how.halves(model, task), how.words(model, task, labels[name])
            halves = made[name][0]
            thetas[name] = [extract(model, half.shown).mean() for half in halves]
            deeds.append(_steer(model, halves, thetas[name], how, f"{seed}:{name}"))
            bar.update()
    said = read_out(model, made, thetas, lens=lens, k=k, n_random=n_random, seed=seed)
    known, first = facts(model), next(iter(made.values()))[0][0].shown.facts
    data = _dataset(named, said, deeds, known.n_layers)
    note = collect(
        kind=Decodability.kind, task=", ".join(named), **{f: getattr(how, f) for f in _NUMBERS}, k=k,
        n_random=n_random, lens="tuned" if lens is not None else "logit", template=first["template"],
        bos=first["bos"], answers=answers,
        words=labels,
        model=known.name, n_layers=known.n_layers, model_facts=known.to_dict(),
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Decodability(data.assign_attrs({ATTRIBUTE: encode(note)}))


_NUMBERS = ("shots", "n_vectors", "n_dev", "n_test", "n_dummy", "seed")


def _labels(named: Mapping[str, Task], words: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Words that name each task."""
    for name, some in words.items():
        if name not in named:
            raise unknown("task with words", name, named)
        if isinstance(some, str) or not all(isinstance(word, str) for word in some):
            raise TypeError(
                f"the words of a task are a list of texts, e.g. ['{name}']; {some!r} arrived for {name!r}."
            )
        if not len(some):
            raise ValueError(
                f"at least one word names task {name!r}; an empty list arrived. Leave the task out of words "
                "for those of its name and description."
            )
    return {name: list(words.get(name) or naming(task)) for name, task in named.items()}


def _steer(
    model: Any,
    halves: Sequence[Half],
    thetas: Sequence[TaskVector],
    how: Settings,
    stream: str,
) -> dict[str, Any]:
    """Inject theta of each half, and random vectors, at every layer of the other half's bare queries."""
    requests = []
    for i, (half, theta) in enumerate(zip(halves, thetas, strict=True)):
        cells = [(Edit(theta.site, layer, theta.at(layer)),) for layer in theta.layers]
        for part in PARTS:
            made, there = half.asked[part], f"{stream}:{i}:{part}"
            controls = [
                random_cell(cell, seed=f"{there}:{layer}", n=len(made))
                for layer, cell in zip(theta.layers, cells, strict=True)
            ]
            every, readout = ((), *cells, *controls), FirstToken(made.answer_ids)
            requests.append(Request(made.zero_shot, cells=every, readout=readout))
    n_layers, sizes = len(thetas[0].layers), {"dev": how.n_dev, "test": how.n_test}
    shape = (1 + 2 * n_layers, HALVES * sum(sizes.values()))
    right, queries, at = np.full(shape, np.nan, dtype="float32"), [""] * shape[1], 0
    places = [(half, part) for half in halves for part in PARTS]
    for (half, part), found in zip(places, [run(model, [one])[0] for one in requests], strict=True):
        values = found.values["correct"].cpu().numpy()
        right[:, at : at + values.shape[1]] = values
        queries[at : at + values.shape[1]] = half.asked[part].queries
        at += sizes[part]
    return {
        "bare": right[0],
        "steer": right[1 : 1 + n_layers],
        "steer_random": right[1 + n_layers :],
        "query": queries,
        "split": [p for _ in range(HALVES) for p, n in sizes.items() for _ in range(n)],
    }


def _dataset(
    named: Mapping[str, Task],
    said: Mapping[str, Any],
    deeds: Sequence[Mapping[str, Any]],
    n_layers: int,
) -> xr.Dataset:
    """Label everything."""
    dims = Decodability.variables
    words = {name: (dims[name], said[name]) for name in (*_SAID, "top_token")}
    acts = {
        name: np.stack([one[name] for one in deeds]) for name in ("bare", "steer", "steer_random")
    }
    return xr.Dataset(
        words | {name: (dims[name], values) for name, values in acts.items()},
        coords={
            "task": list(named),
            "other": list(named),
            "part": list(PARTS),
            "half": range(HALVES),
            "layer": range(n_layers),
            "token": np.array(said["token"], dtype=object),
            "split": ("prompt", deeds[0]["split"]),
            "query": (("task", "prompt"), np.array([one["query"] for one in deeds], dtype=object)),
            "family": ("task", [task.family for task in named.values()]),
        },
    )


_SAID = (
    "rank", "shown", "member", "asked", "auc", "auc_random", "share", "share_random",
)  # fmt: skip
