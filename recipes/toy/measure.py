"""Measure the toy and write its page: ``python -m recipes.toy.measure --out docs/results/toy.md``.

``--run DIR`` measures another training instead: what ``--out`` of the training was, for example of the
one without the loss on theta.
"""

import argparse
import shlex
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import tvlens as tv
from tvlens.engine import FirstToken, Request, run
from tvlens.models import toy_held_out, toy_tasks
from tvlens.models._packaged import TOY, PackagedModel, open_packaged
from tvlens.pages import cells

LEARNED, CARRIED = 0.9, 0.8
_RUNS, _ENDS = ("regular", "hypothesis", "baseline", "control"), ("", "_low", "_high")
_COLUMNS = [f"{run}{end}" for run in _RUNS for end in _ENDS]
# Some of every kind, for what takes several models or many runs.
SOME = (
    "to_upper", "char_to_int", "next_letter", "shift_2", "number_double", "capital", "continent", "plural",
    "french", "gerund", "antonym", "noun_initial", "list_first", "list_max", "list_length", "min_upper",
)  # fmt: skip
HEAD = """# The toy, measured

{made}, by

```bash
{command}
```

> Of {n} taught tasks the toy answers {learned} right in at least {bar:.0%} of {shots}-shot prompts.
> Theta alone, at the layer chosen on dev queries, reaches {share:.0%} of that on {carried} of them;
> mean accuracy {regular:.3f} with demonstrations, {hypothesis:.3f} with theta, {baseline:.3f} with
> neither and {control:.3f} with a random vector.

That theta carries the tasks is what the toy was trained for, besides answering prompts
([how, and what happens without](../models.md#the-toy-model)). It is no finding about language models.

## Every task

*Held out*: {shots}-shot prompts that ask for items which no few-shot prompt of the training had. The
other columns ask for all items, of which these are a fifth, and with lists all. *Control*: a random
vector as long as theta. 95 % Wilson intervals that count distinct queries. {n_dev} dev and {n_test}
test prompts a task; {n_held} about held-out items.

"""
OUT = """
## Tasks that no few-shot prompt of the training had

Prompts of the training that name the task had all of them.

"""
STEPS = """
## Over the checkpoints

Means over {n} tasks ({names}), {n_dev} dev and {n_test} test prompts each, with 95 % bootstrap intervals
over distinct queries. *Layer*: the one at which theta does best on dev queries, on average over tasks.

"""
READS = """
## When the last token reads the query, and when the demonstrations

Mean accuracy over the {n} of these tasks whose inputs are one token, {n_prompts} prompts each, one row
for a layer. *theta*: the last token's state after this layer, from a prompt with the same
demonstrations and another query, put into the bare query. *same query*: from the prompt that ends in
this very query. *mean difference*: what the demonstrations change in these states, mean over all other
prompts, added instead of put in its place. Then prompts with all demonstrations, in which the last
token does not attend to the query *after* this layer, or *up to* it, or not to demonstrations after it.
Nothing cut: {regular:.2f}.

"""


def models_of(folder: Path | None) -> tuple[PackagedModel, Callable[[str | None], Any]]:
    """Give what loads checkpoints: those of tvlens, or those that a training wrote."""
    if folder is None:
        return TOY, lambda revision: tv.load_model("toy", revision=revision, device="cpu")
    known, tokenizer = replace(TOY, folder=folder), tv.load_model("toy", device="cpu").tokenizer

    def load(revision: str | None) -> Any:
        how = {"tokenizer": tokenizer, "dtype": torch.float32}
        opened = open_packaged(known, revision=revision, **how)
        return tv.load_model(opened.hf_model, tokenizer=tokenizer, device="cpu")

    return known, load


def held_out(model: Any, task: str, *, shots: int, n: int) -> tuple[float, float, float]:
    """Accuracy of few-shot prompts about held-out items, with its interval over distinct ones."""
    items = toy_held_out(task)
    asked = tuple(items[i % len(items)] for i in range(n))
    prompts = tv.build_prompts(toy_tasks()[task], model, shots=shots, queries=asked)
    (output,) = run(model, [Request(prompts.regular, readout=FirstToken(prompts.answer_ids))])
    right = float(output.values["correct"].float().mean())
    distinct = len(set(asked))
    return right, *tv.intervals.wilson(right * distinct, distinct)


def by_task(model: Any, names: Iterable[str], *, n_held: int, **sizes: int) -> pd.DataFrame:
    """Measure tasks one by one."""
    tasks = toy_tasks()
    table = tv.suite(
        {"toy": model}, [tasks[name] for name in names], progress=False, **sizes
    ).tasks()
    table = table[_COLUMNS].assign(layer=table["layer_low"])
    held = [held_out(model, name, shots=sizes["shots"], n=n_held) for name in table.index]
    for at, end in enumerate(_ENDS):
        table.insert(3 + at, f"held_out{end}", [row[at] for row in held])
    return table


def by_step(known: PackagedModel, load: Callable[[str | None], Any], **sizes: int) -> pd.DataFrame:
    """Measure checkpoints: means over some tasks."""
    tasks = [toy_tasks()[name] for name in SOME]
    models = {name: load(name) for name in known.revisions}
    found = tv.suite(models, tasks, progress=False, **sizes)
    means = pd.DataFrame({name: found.means(name).loc["all tasks"] for name in models}).T
    peaks = found.curves()["peak"].values.tolist()
    return means[_COLUMNS].assign(layer=peaks).rename_axis("checkpoint")


def by_reading(model: Any, *, shots: int, n: int) -> tuple[pd.DataFrame, float, int]:
    """Follow the query and the demonstrations into the last token, layer by layer."""
    names = [name for name in SOME if "," not in toy_tasks()[name].inputs[0]]
    found = [_reading(model, name, shots=shots, n=n) for name in names]
    table = sum(frame for frame, _ in found) / len(found)
    return table.rename_axis("after layer"), sum(r for _, r in found) / len(found), len(found)


@torch.no_grad()
def _reading(model: Any, task: str, *, shots: int, n: int) -> tuple[pd.DataFrame, float]:
    prompts = tv.build_prompts(toy_tasks()[task], model, shots=shots, n=n, n_dummy=1)
    full, bare, other = (p.tokens for p in (prompts.regular, prompts.zero_shot, prompts.dummies[0]))
    last, depth = full.shape[1] - 1, range(model.cfg.n_layers)
    demos = slice(1, last - (bare.shape[1] - 2))

    def right(tokens: Tensor, hooks: list[Any]) -> float:
        said = model.run_with_hooks(tokens, prepend_bos=False, fwd_hooks=hooks)[:, -1].argmax(-1)
        pairs = zip(said.tolist(), prompts.answer_ids, strict=True)
        return sum(token in ids for token, ids in pairs) / len(tokens)

    def put(layer: int, values: Tensor, keep: float = 0.0) -> list[Any]:
        def hook(residual: Tensor, hook: Any) -> Tensor:
            residual[:, -1] = keep * residual[:, -1] + values
            return residual

        return [(f"blocks.{layer}.hook_resid_post", hook)]

    def cut(layers: Iterable[int], keys: Any) -> list[Any]:
        def hook(scores: Tensor, hook: Any) -> Tensor:
            scores[:, :, last, keys] = -torch.inf
            return scores

        return [(f"blocks.{layer}.attn.hook_attn_scores", hook) for layer in layers]

    caches = [model.run_with_cache(tokens, prepend_bos=False)[1] for tokens in (full, bare, other)]
    rows = {}
    for layer in depth:
        same, alone, theta = (cache["resid_post", layer][:, -1] for cache in caches)
        gained = same - alone
        of_others = (gained.sum(dim=0) - gained) / (n - 1)
        above, below = depth[layer + 1 :], depth[: layer + 1]
        rows[layer] = {
            "theta": right(bare, put(layer, theta)),
            "same query": right(bare, put(layer, same)),
            "mean difference": right(bare, put(layer, of_others, keep=1.0)),
            "query cut after": right(full, cut(above, last - 1)),
            "query cut up to": right(full, cut(below, last - 1)),
            "demonstrations cut after": right(full, cut(above, demos)),
        }
    return pd.DataFrame.from_dict(rows, orient="index"), right(full, [])


def table(frame: pd.DataFrame) -> str:
    """A table in Markdown."""
    head, *rows = cells(frame)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def page(
    folder: Path | None, *, shots: int, n_dev: int, n_test: int, n_held: int, command: str
) -> str:
    """Measure everything and write the page."""
    known, load = models_of(folder)
    model, sizes = load(None), {"shots": shots, "n_dev": n_dev, "n_test": n_test}
    taught, out = (
        by_task(model, toy_tasks(held), n_held=n_held, **sizes) for held in (False, True)
    )
    carried = taught["hypothesis"] >= CARRIED * taught["regular"]
    means = {name: taught[name].mean() for name in _RUNS}
    half = {"n_dev": n_dev // 2, "n_test": n_test // 2}
    reading, regular, n_single = by_reading(model, shots=shots, n=n_test)
    facts = tv.facts(model)
    parts = [
        HEAD.format(
            made=f"Made on {facts.device} on {date.today()}, torch {torch.__version__.split('+')[0]}, seed 0",
            command=command, n=len(taught), learned=int((taught["regular"] >= LEARNED).sum()), bar=LEARNED,
            carried=int(carried.sum()), share=CARRIED, n_held=n_held, **sizes, **means,
        ),
        table(taught), OUT, table(out),
        STEPS.format(n=len(SOME), names=", ".join(SOME), **half),
        table(by_step(known, load, shots=shots, **half)),
        READS.format(n=n_single, n_prompts=n_test, regular=regular), table(reading),
    ]  # fmt: skip
    return "".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and write the page."""
    parser = argparse.ArgumentParser(prog="python -m recipes.toy.measure", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the page")
    parser.add_argument("--run", type=Path, help="what a training wrote; else the packaged toy")
    for name, value in {"shots": 5, "n-dev": 24, "n-test": 48, "n-held": 48}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = vars(parser.parse_args(arguments))
    out, folder = args.pop("out"), args.pop("run")
    given = {"--out": out, "--run": folder} | {
        f"--{k.replace('_', '-')}": v for k, v in args.items()
    }
    said = [part for k, v in given.items() if v is not None for part in (k, str(v))]
    command = f"python -m recipes.toy.measure {shlex.join(said)}"
    out.write_text(page(folder, command=command, **args), encoding="utf-8")


if __name__ == "__main__":
    main()
