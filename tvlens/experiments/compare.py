"""Every way to make a task vector, on the same tasks and the same test prompts, with what it cost.

A method sees dev prompts alone; neither their queries nor their demonstrations are test queries. What it
writes is judged on test queries without demonstrations, and then where it was not made for: inside prompts
that have demonstrations, in other templates, and at the end of text that has nothing to do with the task.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.encoding import Encoder, TokenBatch
from tvlens.engine import Edit, FirstToken, LastLogits, Request, run
from tvlens.engine.probe import SAME, apart, probe
from tvlens.engine.readout import Readout
from tvlens.experiments._comparison import FLOORS, UNTOUCHED, Comparison
from tvlens.experiments._dev import random_cell, resolved, same_queries
from tvlens.extraction import extract
from tvlens.methods import METHODS, Fitted, Work, fit
from tvlens.metrics import KL, VALUE, Targets
from tvlens.models import facts, load_model
from tvlens.patching.pairs import as_batch
from tvlens.prompts import Prompts, build_prompts
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.scoring import correct_cells
from tvlens.tasks import PAPER_TASKS, Task
from tvlens.templates import get_template

ELSEWHERE = ("qa", "arrow")
_PASSAGES, _WORDS = 32, 24


@dataclass(frozen=True, eq=False)
class _Judged:
    """Readout: first-token outcomes, and how far the prediction is from that with demonstrations."""

    first: FirstToken
    distance: Readout
    columns: None = None

    @classmethod
    def of(cls, prompts: Prompts, reference: Float[Tensor, "prompt d_vocab"]) -> "_Judged":
        targets = Targets(len(prompts), reference=reference)
        return cls(FirstToken(prompts.answer_ids), KL().readout(targets))

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
    out: str | Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Compare ways to make a task vector with each other, with demonstrations, and with neither.

    Args:
        model: A TransformerLens model, or a name that `tvlens.load_model` knows.
        tasks: Tasks, or their names.
        methods: Names from `tvlens.methods.METHODS`.
        shots: Demonstrations a prompt.
        n_dev: Prompts that a method sees. Function vectors see 125 further ones of ten demonstrations, and
            ``mean_more`` as many with up to 20.
        n_test: Prompts that judge it.
        n_dummy: Dummy queries over which theta is averaged.
        template: How demonstrations are written where vectors are made.
        elsewhere: Templates in which the same vectors are tried, too.
        answers: Which items are used, see `tvlens.build_prompts`.
        seeds: Each decides split, prompts, and everything that a method draws.
        out: A folder in which the result of each task and seed is saved as it comes, and from which it is
            taken if it is there already.
        progress: Whether to show a progress bar.

    Returns:
        Outcomes of every run, task, seed and prompt.

    Raises:
        ValueError: Unknown names, no seeds, a task too small for the shots, or a result in the folder that
            was made with other settings.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> settings = {"methods": ["mean"], "shots": 2, "n_dev": 6, "n_test": 4, "elsewhere": ["qa"]}
        >>> found = compare(tiny_model(), ["to_upper"], **settings, progress=False)
        >>> found.means().index.tolist()
        ['baseline', 'regular', 'mean']

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916; Todd et al. 2024, arXiv:2310.15213; Yang et al. 2025,
        arXiv:2509.24169.
    """
    from tqdm.auto import tqdm

    for name in methods:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    for what, given in (("method", methods), ("seed", seeds)):
        if not given or len(set(given)) < len(given):
            raise ValueError(
                f"at least one {what} is needed, and each once; {list(given)} arrived."
            )
    for name in elsewhere:
        get_template(name)  # an unknown one is better known now
    model = load_model(model) if isinstance(model, str) else model
    loaded = resolved(tasks)
    how = {"shots": shots, "n_dummy": n_dummy, "template": template, "answers": answers}
    asked = {
        "model": facts(model).name, "origin": facts(model).origin, **how,
        "elsewhere": list(elsewhere), "n_dev": n_dev, "n_test": n_test,
        "methods": list(methods),
    }  # fmt: skip
    made: list[Comparison] = []
    jobs = [_Job(model, task, seed, asked) for task in loaded.values() for seed in seeds]
    for job in jobs[:: len(seeds)]:
        job.prompts()  # a task that is too small is better known now
    with tqdm(total=len(jobs) * len(methods), disable=not progress) as bar:
        for job in jobs:
            path = (
                None
                if out is None
                else Path(out) / f"{Comparison.kind}-{job.task.name}-{job.seed}.nc"
            )
            made.append(_kept(path, job) if path is not None and path.is_file() else job.run(bar))
            if path is not None and not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                made[-1].save(path)
            bar.update(len(methods) * len(made) - bar.n)
    return Comparison.join(made)


@dataclass(frozen=True)
class _Job:
    """One task and one seed."""

    model: Any
    task: Task
    seed: int
    asked: Mapping[str, Any]

    @property
    def how(self) -> dict[str, Any]:
        """How prompts are made, as arguments of `build_prompts`."""
        names = ("shots", "n_dummy", "template", "answers")
        return {name: self.asked[name] for name in names} | {"seed": self.seed}

    def prompts(self) -> tuple[Prompts, Prompts]:
        """Dev prompts and test prompts."""
        both = [
            {"n": self.asked["n_dev"], "split": "dev", "demonstrations": "split"},
            {"n": self.asked["n_test"], "split": "test"},
        ]
        dev, test = (build_prompts(self.task, self.model, **self.how, **each) for each in both)
        return dev, test

    def run(self, bar: Any) -> Comparison:
        """Fit all methods, and judge them."""
        started, (dev, test) = time.perf_counter(), self.prompts()
        how = {**self.how, "n": len(dev), "split": "dev", "demonstrations": "split"}
        work, fitted = Work(self.model, self.task, dev, how, seed=self.seed), {}
        for name in self.asked["methods"]:
            bar.set_postfix_str(f"{self.task.name}, seed {self.seed}: {name}")
            fitted[name] = fit(name, work)
            bar.update()
        data = _Judge(self, dev, test, fitted).dataset()
        data = data.expand_dims(task=[self.task.name], seed=[self.seed])
        data["query"] = data["query"].expand_dims(task=data["task"], seed=data["seed"])
        known = facts(self.model)
        note = collect(
            kind=Comparison.kind, tasks=[self.task.name], n_layers=known.n_layers,
            model_facts=known.to_dict(), **self.asked, fingerprints={self.task.name: self.task.fingerprint},
            notes={f"{self.task.name}:{self.seed}": {n: f.note for n, f in fitted.items()}},
            probe=probe(self.model), seconds=round(time.perf_counter() - started, 3),
        )  # fmt: skip
        return Comparison(data.assign_attrs({ATTRIBUTE: encode(note)}))


def _kept(path: Path, job: _Job) -> Comparison:
    """What is in the folder already, if it was made in the same way."""
    part = Comparison.load(path)
    asked = {**job.asked, "fingerprints": {job.task.name: job.task.fingerprint}}
    made = part.provenance
    differ = [f"{k} {made.get(k)!r}, asked for {v!r}" for k, v in asked.items() if made.get(k) != v]
    if not apart(made.get("probe", ()), probe(job.model)) < SAME:
        differ.append(f"other weights than {job.asked['model']!r} has")
    if differ:
        raise ValueError(
            f"{str(path)!r} was made with {'; '.join(differ)}. Choose another folder, or remove it."
        )
    return part


@dataclass(frozen=True)
class _Judge:
    """What methods write is tried on test prompts, and then where it was not made for."""

    job: _Job
    dev: Prompts
    test: Prompts
    fitted: Mapping[str, Fitted]

    def dataset(self) -> xr.Dataset:
        """Outcomes by run and prompt, by place and writer, and of the controls."""
        model, test, n = self.job.model, self.test, len(self.fitted)
        reference = _logits(model, test.regular)
        cells = self._written(test.zero_shot)
        seed = f"{self.job.seed}:{self.job.task.name}"
        controls = [
            random_cell(cell, seed=f"{seed}:{name}", n=len(test))
            for name, cell in zip(self.fitted, cells, strict=True)
        ]
        ways = ((), *cells, *controls, self._query_blind())
        found = _outcomes(model, test, test.zero_shot, ways, reference)
        told = _measured(test, reference)
        shown = correct_cells(model, test, test.regular, self._written(test.regular))
        data: dict[str, Any] = {}
        for name, values in found.items():
            rows = np.stack([values[0], told[name], *values[1 : 1 + n]])
            data[name] = (("run", "prompt"), rows)
        data["control"] = (("way", "prompt"), found["correct"][1 + n : -1])
        majority = [self.dev.facts["constant"] in ids for ids in test.answer_ids]
        data["floor"] = (("floor_kind", "prompt"), np.stack([majority, found["correct"][-1]]))
        away = {"few_shot": np.stack([told["correct"], told["correct"], *shown]).astype("float32")}
        for name in self.job.asked["elsewhere"]:
            away[name] = self._in_template(name)
        said = Counter(token for ids in test.answer_ids for token in set(ids))
        data["constant"] = max(said.values()) / len(test)
        data["elsewhere"] = (("where", "writer", "prompt"), np.stack(list(away.values())))
        data["unrelated_kl"] = (("way",), self._unrelated())
        for name in ("layer", "forwards", "seconds"):
            each = [getattr(one, name) for one in self.fitted.values()]
            data[name] = (("way",), np.array(each, "float32"))
        coords = {
            "run": ["baseline", "regular", *self.fitted], "way": list(self.fitted),
            "floor_kind": list(FLOORS),
            "writer": [*UNTOUCHED, *self.fitted], "where": list(away),
            "query": ("prompt", list(test.queries)),
        }  # fmt: skip
        return xr.Dataset(data, coords)

    def _query_blind(self) -> tuple[Edit, ...]:
        """Mean theta at the last layer, after which no query can be read."""
        last = facts(self.job.model).n_layers - 1
        theta = extract(self.job.model, self.dev, layers=[last]).mean()
        return (Edit(theta.site, last, theta.at(last)),)

    def _written(self, view: TokenBatch) -> list[tuple[Edit, ...]]:
        return [one.write(self.test, view) for one in self.fitted.values()]

    def _in_template(self, name: str) -> Float[np.ndarray, "writer prompt"]:
        """Outcomes in another template, of the queries that it can judge."""
        job = self.job
        how = {**job.how, "template": name, "answers": "any", "n": len(self.test), "split": "test"}
        prompts = same_queries(job.task, job.model, self.test.queries, **how)
        usable = np.array(prompts.queries) == np.array(self.test.queries)
        ways = [(), *self._written(prompts.zero_shot)]
        bare = correct_cells(job.model, prompts, prompts.zero_shot, ways)
        told = correct_cells(job.model, prompts, prompts.regular, [()])
        found = np.stack([bare[0], told[0], *bare[1:]]).astype("float32")
        return np.where(usable, found, np.nan).astype("float32")

    def _unrelated(self) -> Float[np.ndarray, " method"]:
        """Mean divergence, in nats, from the untouched prediction at the end of unrelated text.

        NaN for a model whose tokenizer does not know the words of any.
        """
        from tvlens.lens.training import corpus

        words = corpus().split()
        texts = [" ".join(words[i * _WORDS : (i + 1) * _WORDS]) for i in range(_PASSAGES)]
        foreign = Encoder.of(self.job.model).foreign(texts)
        texts = [text for text in texts if text not in foreign]
        if not texts:
            return np.full(len(self.fitted), np.nan, "float32")
        batch = as_batch(self.job.model, texts)
        reference = _logits(self.job.model, batch)
        readout = KL().readout(Targets(len(texts), reference=reference))
        cells = tuple(self._written(batch))
        (output,) = run(self.job.model, [Request(batch, cells=cells, readout=readout)])
        return output.values[VALUE].mean(dim=1).float().cpu().numpy()


def _logits(model: Any, batch: TokenBatch) -> Float[Tensor, "prompt d_vocab"]:
    (output,) = run(model, [Request(batch, readout=LastLogits())])
    return output.values["logits"][0]


def _outcomes(
    model: Any,
    prompts: Prompts,
    batch: TokenBatch,
    cells: Sequence[tuple[Edit, ...]],
    reference: Float[Tensor, "prompt d_vocab"],
) -> dict[str, np.ndarray]:
    """Outcomes by cell and prompt, and the divergence from the prediction with demonstrations."""
    readout = _Judged.of(prompts, reference)
    (output,) = run(model, [Request(batch, cells=tuple(cells), readout=readout)])
    return _arrays(output.values)


def _measured(prompts: Prompts, logits: Float[Tensor, "prompt d_vocab"]) -> dict[str, np.ndarray]:
    """Outcomes by prompt of logits that are there already."""
    readout = _Judged.of(prompts, logits)
    return _arrays(readout(logits, torch.arange(len(logits), device=logits.device)))


def _arrays(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    found = {name: each.cpu() for name, each in values.items()}
    return {n: (v if v.dtype == torch.bool else v.float()).numpy() for n, v in found.items()}
