"""Theta on the move: of one task for another, and of one model in another.

Is theta written in a model's private code? A linear map is fitted between the last-token states of two
models, or of two layers, that read the same prompts of some tasks. Then theta of a task that the map has
never seen is sent through it and injected. If it works there, what the two have in common is more than
these tasks. Three runs tell this from less: the mean state of the other tasks (a prompt has been read, no
task in particular), a map fitted to shuffled pairs, and a random vector. Beside it, theta of every task
answers queries of every other one in the same model, with nothing fitted.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, FirstToken, Output, Read, Request, run
from tvlens.experiments import experiment
from tvlens.experiments._dev import best_layer, resolved
from tvlens.experiments._transfer import Transfer
from tvlens.linear_maps import LinearMap, fit_map
from tvlens.models import facts, load_model
from tvlens.patching.pairs import as_batch
from tvlens.prompts import Prompts, build_prompts
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.sites import check_layer
from tvlens.tasks import Task
from tvlens.templates import Template
from tvlens.vectors import TaskVector

TASKS = ("to_upper", "to_lower", "next_letter", "fr_en", "es_en", "gerund", "past_simple")


@experiment("transfer")
def transfer(
    model: Any,
    tasks: Sequence[Task | str] = TASKS,
    *,
    source: Any = None,
    layer: int | None = None,
    source_layer: int | None = None,
    strength: float = 0.01,
    shots: int = 5,
    n: int = 40,
    n_dev: int = 30,
    n_fit: int = 40,
    n_dummy: int = 2,
    template: str | Template = "example",
    answers: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Transfer:
    """Inject theta of another task, and theta that a linear map brings from another model or layer.

    Args:
        model: Where thetas are injected: a TransformerLens model, or a name that `tvlens.load_model` knows.
        tasks: At least 3 tasks, or their names; the map for one is fitted on all others.
        source: Where thetas come from: likewise; the model itself if not given.
        layer: Where to inject, negative from the end; by default the layer at which theta answers most dev
            queries over all tasks.
        source_layer: Where the source's theta is read; by default found in the source in the same way.
        strength: How strongly the map is pulled, see `tvlens.linear_maps.fit_map`: within one model towards
            doing nothing, between two towards the mean.
        shots: Demonstrations a prompt.
        n: Test prompts a task.
        n_dev: Dev prompts a task that choose a layer.
        n_fit: Dev prompts a task that the map is fitted on, each with all its dummy queries.
        n_dummy: Dummy queries a prompt.
        template: How a demonstration is written, see `tvlens.Template`.
        answers: Which items are used, see `tvlens.build_prompts`; the model's tokenizer decides.
        seed: Decides all prompts, the random vector and the shuffled pairs.
        progress: Whether to show a progress bar.

    Returns:
        Outcomes of every prompt in every run, as a result that plots itself.

    Raises:
        ValueError: Fewer than 3 tasks, unknown names, the same task twice, or a layer outside its model.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> tasks = ["to_upper", "to_lower", "next_letter"]
        >>> how = {"layer": 1, "source_layer": 0, "n": 4, "n_fit": 4, "shots": 2}
        >>> found = transfer(tiny_model(), tasks, **how, progress=False)
        >>> dict(found.data["cross"].sizes)
        {'vector': 3, 'task': 3, 'prompt': 4}

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    named = resolved(tasks)
    if len(named) < 3:
        raise ValueError(f"a map needs at least 2 tasks beside each; {len(named)} arrived in all.")
    model = load_model(model) if isinstance(model, str) else model
    source = model if source is None else source
    source = load_model(source) if isinstance(source, str) else source
    how = {"shots": shots, "n_dummy": n_dummy, "template": template, "answers": answers}
    how |= {"seed": seed}
    with tqdm(total=4 * len(named), disable=not progress, leave=False) as bar:
        layer = _layer(model, named, layer, n_dev, how, bar)
        if source is not model or source_layer is not None:
            source_layer = _layer(source, named, source_layer, n_dev, how, bar)
        ends = _Ends(source, layer if source_layer is None else source_layer, model, layer)
        fitting = {}
        for task in named.values():
            bar.set_postfix_str(f"{task.name}: states")
            fitting[task.name] = ends.states(build_prompts(task, model, n=n_fit, **how))
            bar.update()
        tests = {
            task.name: build_prompts(task, model, n=n, split="test", **how)
            for task in named.values()
        }
        data = _test(ends, tests, fitting, strength, seed, bar)
    known = facts(model)
    data.attrs[ATTRIBUTE] = encode(
        collect(
            kind=Transfer.kind,
            task=", ".join(named),
            n=n,
            n_dev=n_dev,
            n_fit=n_fit,
            strength=strength,
            towards=ends.towards,
            layer=ends.layer,
            source_layer=ends.source_layer,
            source=facts(source).name,
            source_facts=facts(source).to_dict(),
            same_model=source is model,
            shots=shots,
            n_dummy=n_dummy,
            template=next(iter(tests.values())).facts["template"],
            answers=answers,
            seed=seed,
            model=known.name,
            n_layers=known.n_layers,
            model_facts=known.to_dict(),
            seconds=round(time.perf_counter() - started, 3),
        )
    )
    return Transfer(data)


def _layer(
    model: Any,
    named: Mapping[str, Task],
    layer: int | None,
    n_dev: int,
    how: Mapping[str, Any],
    bar: Any,
) -> int:
    """The layer asked for, or the one that is best on dev prompts."""
    if layer is not None:
        return check_layer(layer, facts(model).n_layers)
    return best_layer(model, named, n_dev, how, bar)[0]


@dataclass(frozen=True, eq=False)
class _Ends:
    """Where thetas come from and where they go."""

    source: Any
    source_layer: int
    model: Any
    layer: int

    @property
    def same(self) -> bool:
        return self.source is self.model and self.source_layer == self.layer

    @property
    def towards(self) -> str:
        return "identity" if self.source is self.model else "mean"

    def states(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Last-token states of the dummy prompts in both: dummy, prompt, d_model."""
        mine = self._read(self.model, prompts.dummies, self.layer)
        if self.source is self.model:
            return self._read(self.model, prompts.dummies, self.source_layer), mine
        written = [as_batch(self.source, list(dummy.text)) for dummy in prompts.dummies]
        return self._read(self.source, written, self.source_layer), mine

    @staticmethod
    def _read(
        model: Any, batches: Sequence[TokenBatch], layer: int
    ) -> Float[Tensor, "dummy prompt d_model"]:
        read = Read("resid_post", (layer,))
        outputs = run(model, [Request(batch, reads=(read,)) for batch in batches])
        return torch.stack([output.activations[0][0, :, 0] for output in outputs])

    def fit(
        self, pairs: Sequence[tuple[Tensor, Tensor]], strength: float, shuffled: int | None = None
    ) -> LinearMap:
        """Fit the map to all states of some tasks; ``shuffled`` is the seed that breaks the pairs."""
        x, y = (
            torch.cat(
                [rearrange(pair[end], "dummy prompt d -> (dummy prompt) d") for pair in pairs]
            )
            for end in (0, 1)
        )
        if shuffled is not None:
            generator = torch.Generator().manual_seed(shuffled)
            y = y[torch.randperm(len(y), generator=generator).to(y.device)]
        return fit_map(x.cpu(), y.cpu(), strength=strength, towards=self.towards)


def _test(
    ends: _Ends,
    tests: Mapping[str, Prompts],
    fitting: Mapping[str, tuple[Tensor, Tensor]],
    strength: float,
    seed: int,
    bar: Any,
) -> xr.Dataset:
    """Ask every task's test queries in all ways."""
    thetas = {}
    for name, prompts in tests.items():
        thetas[name] = tuple(states.mean(dim=0) for states in ends.states(prompts))
        bar.update()
    parts: list[Any] = []
    for number, (name, prompts) in enumerate(tests.items()):
        bar.set_postfix_str(f"{name}: test")
        others = [pair for other, pair in fitting.items() if other != name]
        theirs, own = thetas[name]
        maps = {
            "mapped": ends.fit(others, strength),
            "shuffled": ends.fit(others, strength, shuffled=seed + number),
        }
        mean = maps["mapped"].mean[None].to(own)
        vectors = {run: each(theirs.cpu()).to(own) for run, each in maps.items()}
        noise = TaskVector(own[:, None], (ends.layer,)).random_like(seed=seed + number)
        vectors = {
            "own": own,
            **vectors,
            "mean": mean.expand_as(own),
            "random": noise.at(ends.layer),
        }
        if theirs.shape == own.shape and not ends.same:
            vectors["unmapped"] = theirs
        cross = [theta for _, theta in thetas.values()]
        cells = ((), *(_replace(ends.layer, v) for v in (*vectors.values(), *cross)))
        readout = FirstToken(prompts.answer_ids)
        told, bare = run(
            ends.model,
            [
                Request(prompts.regular, readout=readout),
                Request(prompts.zero_shot, cells=cells, readout=readout),
            ],
        )
        alike = {
            run: torch.cosine_similarity(vectors[run] - mean, own - mean, dim=-1).cpu().numpy()
            for run in ("mapped", "shuffled")
        }
        names = ("regular", "baseline", *vectors)
        parts.append(_labelled(ends, prompts, told, bare, names, tuple(tests), alike))
        bar.update()
    data: Any = xr.concat(parts, dim="task")
    return data


def _replace(layer: int, values: Float[Tensor, "prompt d_model"]) -> tuple[Edit, ...]:
    return (Edit("resid_post", layer, values),)


def _labelled(
    ends: _Ends,
    prompts: Prompts,
    told: Output,
    bare: Output,
    names: Sequence[str],
    tasks: Sequence[str],
    alike: Mapping[str, Float[np.ndarray, " prompt"]],
) -> xr.Dataset:
    """Label everything of one task."""
    correct, predicted = (
        torch.cat([told.values[name], bare.values[name]]).cpu() for name in ("correct", "predicted")
    )
    k, asked = len(names), ("task", "prompt")
    ids: Int[Tensor, "run prompt"] = predicted[:k]
    words = [[ends.model.tokenizer.decode([i]) for i in row] for row in ids.tolist()]
    queries = np.array([prompts.queries], object)
    return xr.Dataset(
        {
            "correct": (("task", "run", "prompt"), correct[:k].numpy()[None]),
            "token": (("task", "run", "prompt"), np.array([words], object)),
            "cross": (("task", "vector", "prompt"), correct[k:].numpy()[None]),
            **{f"cosine_{name}": (asked, values[None]) for name, values in alike.items()},
        },
        coords={
            "task": [prompts.facts["task"]],
            "run": list(names),
            "vector": list(tasks),
            "query": (asked, queries),
            "answer": (asked, np.array([[ys[0] for ys in prompts.answers]], object)),
        },
    ).transpose("vector", "task", "run", "prompt")
