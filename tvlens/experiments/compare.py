"""Every way to make a task vector, on the same tasks and the same test prompts, with what it cost.

A method sees dev prompts alone; neither their queries nor their demonstrations are test queries. What it
writes is judged on test queries without demonstrations, and then where it was not made for: inside prompts
that have demonstrations, in other templates, and at the end of text that has nothing to do with the task.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, FirstToken, LastLogits, Request, run
from tvlens.engine.readout import Readout
from tvlens.experiments._comparison import UNTOUCHED, Comparison
from tvlens.experiments._dev import resolved
from tvlens.methods import METHODS, Fitted, Work, fit
from tvlens.metrics import KL, VALUE, Targets
from tvlens.models import facts, load_model
from tvlens.patching.pairs import as_batch
from tvlens.prompts import Prompts, build_prompts
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.tasks import PAPER_TASKS, Task

ELSEWHERE = ("qa", "arrow")
_PASSAGES, _WORDS = 32, 24


@dataclass(frozen=True, eq=False)
class _Judged:
    """Readout: first-token outcomes, and how far the prediction is from that with demonstrations."""

    first: FirstToken
    distance: Readout
    columns: None = None

    def rows(self, prompts: slice) -> "_Judged":
        return _Judged(self.first.rows(prompts), self.distance.rows(prompts))

    def __call__(
        self, logits: Float[Tensor, "row d_vocab"], prompt: Int[Tensor, " row"]
    ) -> Mapping[str, Tensor]:
        found = self.first(logits, prompt)
        kept = {name: found[name] for name in ("correct", "answer_log_prob")}
        return {**kept, "kl": self.distance(logits, prompt)[VALUE]}


def compare(
    model: Any,
    tasks: Sequence[Task | str] = PAPER_TASKS,
    *,
    methods: Sequence[str] = tuple(METHODS),
    shots: int = 5,
    n_dev: int = 100,
    n_test: int = 100,
    n_dummy: int = 2,
    template: str = "example",
    elsewhere: Sequence[str] = ELSEWHERE,
    answers: str = "auto",
    seeds: Sequence[int] = (0,),
    progress: bool = True,
    keep: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Compare ways to make a task vector with each other, with demonstrations, and with neither.

    Args:
        model: A TransformerLens model, or a name that `tvlens.load_model` knows.
        tasks: Tasks, or their names.
        methods: Names from `tvlens.methods.METHODS`.
        shots: Demonstrations a prompt.
        n_dev: Prompts that a method sees.
        n_test: Prompts that judge it.
        n_dummy: Dummy queries over which theta is averaged.
        template: How demonstrations are written where vectors are made.
        elsewhere: Templates in which the same vectors are tried, too.
        answers: Which items are used, see `tvlens.build_prompts`.
        seeds: Each decides split, prompts, and everything that a method draws.
        progress: Whether to show a progress bar.
        keep: Called with the result of each task and seed as it comes, for example to save it;
            `Comparison.join` puts them together.

    Returns:
        Outcomes of every run, task, seed and prompt.

    Raises:
        ValueError: Unknown names, no seeds, or a task too small for the shots.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> settings = {"methods": ["mean"], "shots": 2, "n_dev": 6, "n_test": 4, "elsewhere": ["qa"]}
        >>> found = compare(tiny_model(), ["to_upper"], **settings, progress=False)
        >>> found.means().index.tolist()
        ['baseline', 'random', 'regular', 'mean']

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916; Todd et al. 2024, arXiv:2310.15213; Yang et al. 2025,
        arXiv:2509.24169.
    """
    from tqdm.auto import tqdm

    for name in methods:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    if not methods or not seeds:
        raise ValueError("at least one method and one seed are needed.")
    model = load_model(model) if isinstance(model, str) else model
    loaded = resolved(tasks)
    how = {"shots": shots, "n_dummy": n_dummy, "template": template, "answers": answers}
    made: list[Comparison] = []
    with tqdm(total=len(loaded) * len(seeds) * len(methods), disable=not progress) as bar:
        for task in loaded.values():
            for seed in seeds:
                one = _One(model, task, {**how, "seed": seed}, n_dev, n_test, tuple(elsewhere), bar)
                made.append(one.judged(tuple(methods)))
                if keep is not None:
                    keep(made[-1])
    return Comparison.join(made)


class _One:
    """One task and one seed."""

    def __init__(
        self,
        model: Any,
        task: Task,
        how: dict[str, Any],
        n_dev: int,
        n_test: int,
        elsewhere: tuple[str, ...],
        bar: Any,
    ) -> None:
        self.model, self.task, self.how, self.bar = model, task, how, bar
        self.started = time.perf_counter()
        self.numbers = {"n_dev": n_dev, "n_test": n_test}
        dev_how = {**how, "n": n_dev, "split": "dev", "demonstrations": "split"}
        dev = build_prompts(task, model, **dev_how)
        self.work = Work(model, task, dev, dev_how, seed=how["seed"])
        self.test = build_prompts(task, model, n=n_test, split="test", **how)
        self.others = {
            name: build_prompts(
                task,
                model,
                queries=self.test.queries,
                **{**how, "template": name, "answers": "any"},
            )
            for name in elsewhere
        }

    def judged(self, methods: tuple[str, ...]) -> Comparison:
        fitted: dict[str, Fitted] = {}
        for name in methods:
            self.bar.set_postfix_str(f"{self.task.name}, seed {self.how['seed']}: {name}")
            fitted[name] = fit(name, self.work)
            self.bar.update()
        written = {name: one.write(self.test) for name, one in fitted.items()}
        cells = ((), self._random(written[methods[0]]), *written.values())
        reference = self._logits(self.test.regular)
        found = self._judge(self.test, self.test.zero_shot, cells, reference)
        shown = self._judge(self.test, self.test.regular, ((), *cells[2:]), reference)
        away = {"few_shot": shown["correct"]}
        for name, prompts in self.others.items():
            away[name] = self._judge(prompts, prompts.zero_shot, ((), *cells[2:]), reference)[
                "correct"
            ]
        runs = ("baseline", "random", "regular", *methods)
        data = {}
        for name, values in found.items():
            own = shown[name][0]  # with demonstrations, and nothing written
            data[name] = (("run", "prompt"), np.stack([*values[:2], own, *values[2:]]))
        coords: dict[str, Any] = {"run": list(runs), "query": ("prompt", list(self.test.queries))}
        data["elsewhere"] = (("where", "writer", "prompt"), np.stack(list(away.values())))
        coords |= {"where": list(away), "writer": [UNTOUCHED, *methods]}
        data["unrelated_kl"] = (("writer",), self._unrelated(((), *cells[2:])))
        for name in ("layer", "forwards", "seconds"):
            each = np.array([np.nan, *(getattr(one, name) for one in fitted.values())])
            data[name] = (("writer",), each.astype("float32"))
        return self._labelled(data, coords, fitted)

    def _random(self, like: tuple[Edit, ...]) -> tuple[Edit, ...]:
        """A control: what the first method writes, in random directions of the same length."""
        generator = torch.Generator().manual_seed(self.how["seed"])
        drawn = []
        for edit in like:
            values = edit.given.float().cpu()
            noise = torch.randn(values.shape, generator=generator)
            scaled = noise / noise.norm(dim=-1, keepdim=True) * values.norm(dim=-1, keepdim=True)
            drawn.append(Edit(edit.site, edit.layer, scaled, mode=edit.mode))
        return tuple(drawn)

    def _logits(self, batch: TokenBatch) -> Float[Tensor, "prompt d_vocab"]:
        (output,) = run(self.model, [Request(batch, readout=LastLogits())])
        return output.values["logits"][0]

    def _judge(
        self,
        prompts: Prompts,
        batch: TokenBatch,
        cells: Sequence[tuple[Edit, ...]],
        reference: Float[Tensor, "prompt d_vocab"],
    ) -> dict[str, np.ndarray]:
        """Outcomes by cell and prompt."""
        targets = Targets(len(prompts), reference=reference)
        readout = _Judged(FirstToken(prompts.answer_ids), KL().readout(targets))
        (output,) = run(self.model, [Request(batch, cells=tuple(cells), readout=readout)])
        found = {name: values.cpu() for name, values in output.values.items()}
        return {
            name: values.numpy() if name == "correct" else values.float().numpy()
            for name, values in found.items()
        }

    def _unrelated(self, cells: Sequence[tuple[Edit, ...]]) -> Float[np.ndarray, " cell"]:
        """Mean divergence, in nats, from the untouched prediction at the end of unrelated text."""
        from tvlens.lens.training import corpus

        words = corpus().split()
        texts = [" ".join(words[i * _WORDS : (i + 1) * _WORDS]) for i in range(_PASSAGES)]
        batch = as_batch(self.model, texts)
        n = len(texts)
        # A row for each test prompt does not fit other text: its mean is written.
        alike = [
            tuple(
                Edit(e.site, e.layer, e.given.mean(dim=0, keepdim=True), mode=e.mode) for e in cell
            )
            for cell in cells
        ]
        readout = KL().readout(Targets(n, reference=self._logits(batch)))
        (output,) = run(self.model, [Request(batch, cells=tuple(alike), readout=readout)])
        return output.values[VALUE].mean(dim=1).float().cpu().numpy()

    def _labelled(
        self, data: dict[str, Any], coords: dict[str, Any], fitted: Mapping[str, Fitted]
    ) -> Comparison:
        known, first = facts(self.model), self.test.facts
        table = xr.Dataset(data, coords).expand_dims(task=[self.task.name], seed=[self.how["seed"]])
        table["query"] = table["query"].expand_dims(task=table["task"], seed=table["seed"])
        note = collect(
            kind=Comparison.kind, tasks=[self.task.name], model=known.name, n_layers=known.n_layers,
            model_facts=known.to_dict(), **self.numbers,
            **{k: first[k] for k in ("shots", "n_dummy", "template")},
            notes={f"{self.task.name}:{self.how['seed']}": {n: f.note for n, f in fitted.items()}},
            seconds=round(time.perf_counter() - self.started, 3),
        )  # fmt: skip
        return Comparison(table.assign_attrs({ATTRIBUTE: encode(note)}))
