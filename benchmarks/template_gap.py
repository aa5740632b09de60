"""Why one vector carries the task with ``example:x->y`` and hardly with ``x→y`` on SmolLM2: the page.

python -m benchmarks.template_gap > docs/results/template_gap.md
"""

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

import tvlens as tv
from tvlens.engine import Edit, FirstToken, Read, Request, run
from tvlens.experiments.template_transfer import template_transfer
from tvlens.pages import cells
from tvlens.plots.theme import visible
from tvlens.templates import Role

BOS = "<|im_start|>"  # of SmolLM2, which is trained and run without one
TEMPLATES = (
    "example", "arrow", "{x}->{y}\n", "example:{x}→{y}\n", ":{x}→{y}\n", "\n{x}→{y}\n",
    BOS + "{x}→{y}\n",
)  # fmt: skip
TASKS = ("to_upper", "gerund", "past_simple", "plural_singular", "list_last")
ALONE, AFTER = "arrow", "\n{x}→{y}\n"
SHOWN = (0, 1, 2, 4, 7, 8, 10, 11, 14, 17, 20)
HEAD = """# Why the template decides, on {model}

{n_tasks} tasks ({tasks}), {n_test} test prompts each, {shots} demonstrations, seed {seed}, on {device}.
Made by

```bash
{command}
```

> {finding}

## Which part of the template

Theta of every template in bare queries of every other; the layer chosen on {n_dev} dev queries of the
template in which theta is used. *own*: theta made and used there. *used*, *made*: mean with theta of the
other templates, and of its theta in them. 95 % bootstrap intervals over distinct queries.

"""
BY_TASK = """
## Queries of one token and of several

Of a query of several tokens only the first one stands first. Tokens of a query, mean over test queries, and
accuracy of theta in the template that made it.

"""
TRACE = """
## Where the query goes

Of tasks whose queries are mostly one token ({single}).
Theta of `{alone}` is written at the last token, in bare queries as they are (*first*: the query is the first
token) and after one line break (*after*). Norm of the query's last token (median over queries), and mean
cosine between those of different queries, after each layer. Then this one state is carried from the prompt
with the line break into the one without (*repaired*), from another query's prompt (*other query*, the
control), and the other way (*broken*). Accuracy, mean over tasks. As they are: **first {first:.2f}, after
{after:.2f}**.

"""
HEADS = """
## Which heads read it

Heads above theta's layer. *gain*: how much likelier the right answer is (nats) when only this head's output
at the last token is taken from the prompt with the line break; *looks*: its attention from the last token to
the query's, in both prompts. Mean over tasks of the heads above the highest of the layers ({layer}) that dev
queries choose. All heads together: accuracy **{together:.2f}**, which must be that of *after*, since nothing
else above theta depends on the prompt.

"""


def traced(model: Any, task: str, layer: int, how: dict[str, Any]) -> dict[str, Any]:
    """Follow the query's last token in bare queries that stand first and that stand after a line break."""
    after = tv.build_prompts(task, model, template=AFTER, **how)
    same: dict[str, Any] = {**how, "answers": "any", "queries": after.queries}
    alone = tv.build_prompts(task, model, template=ALONE, **same)
    write = Edit("resid_post", layer, tv.extract(model, alone, layers=[layer]).at(layer))
    depth = tuple(range(model.cfg.n_layers))
    reads = (Read("resid_post", depth, -2), Read("pattern", depth), Read("z", depth))
    readout = FirstToken(after.answer_ids)
    both = run(
        model,
        [
            Request(prompts.zero_shot, cells=((write,),), reads=reads, readout=readout)
            for prompts in (alone, after)
        ],
    )
    (first, _, _), (second, pattern, z) = (output.activations for output in both)
    heads = [(at, head) for at in depth if at > layer for head in range(model.cfg.n_heads)]
    carried = [Edit("resid_post", at, second[0, :, at], position=-2) for at in depth]
    other = [replace(edit, values=edit.given.roll(1, dims=0)) for edit in carried]
    back = [Edit("resid_post", at, first[0, :, at], position=-2) for at in depth]
    outputs = [Edit("z", at, z[0, :, at, head], head=head) for at, head in heads]
    tried = (*((write, edit) for edit in (*carried, *other, *outputs)), (write, *outputs))
    found, broken = run(
        model,
        [
            Request(alone.zero_shot, cells=tried, readout=readout),
            Request(after.zero_shot, cells=tuple((write, e) for e in back), readout=readout),
        ],
    )
    right, likely = (found.values[name].float().cpu() for name in ("correct", "answer_log_prob"))
    n, start = len(depth), both[0].values["answer_log_prob"][0].float().cpu()
    shares = right.mean(dim=1).numpy()
    return {
        "layers": {
            "norm, first": first[0].norm(dim=-1).median(dim=0).values.cpu().numpy(),
            "norm, after": second[0].norm(dim=-1).median(dim=0).values.cpu().numpy(),
            "cosine, first": _alike(first[0]),
            "cosine, after": _alike(second[0]),
            "repaired": shares[:n],
            "other query": shares[n : 2 * n],
            "broken": broken.values["correct"].float().mean(dim=1).cpu().numpy(),
        },
        "heads": {
            "gain": dict(
                zip(heads, (likely[2 * n : -1] - start).mean(dim=1).tolist(), strict=True)
            ),
            "looks, first": _looks(both[0].activations[1][0], heads),
            "looks, after": _looks(pattern[0], heads),
        },
        "first": float(both[0].values["correct"].float().mean()),
        "after": float(both[1].values["correct"].float().mean()),
        "together": float(shares[-1]),
    }


def by_task(found: Any, model: Any, how: dict[str, Any]) -> pd.DataFrame:
    """How long queries are, and how well theta does in the template that made it."""
    rows = {}
    for name in map(str, found.data["task"].values):
        roles = tv.build_prompts(name, model, template=ALONE, **how).zero_shot.roles
        own = found.data["hypothesis"].sel(task=name).mean("prompt")
        rows[name] = {"query tokens": float((roles == Role.QUERY).sum(dim=1).float().mean())} | {
            visible(template): float(own.sel(made=template, used=template))
            for template in ("example", ALONE, AFTER)
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("task")


def _alike(states: torch.Tensor) -> np.ndarray:
    """Mean cosine between the states of different prompts, by layer."""
    unit = torch.nn.functional.normalize(states.float(), dim=-1)
    cosines = torch.einsum("alm,blm->lab", unit, unit)
    n = len(states)
    return ((cosines.sum(dim=(1, 2)) - n) / (n * (n - 1))).cpu().numpy()


def _looks(pattern: torch.Tensor, heads: list[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """Attention from the last token to the query's last token, mean over prompts."""
    keys = pattern[..., -2].float().mean(dim=0).cpu()
    return {(at, head): float(keys[at, head]) for at, head in heads}


def by_layer(traces: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean over tasks of what happens to the query's state, in some of the layers."""
    mean = {
        name: np.mean([t["layers"][name] for t in traces], axis=0) for name in traces[0]["layers"]
    }
    found = pd.DataFrame(mean).rename_axis("after layer")
    return found.loc[[at for at in SHOWN if at < len(found)]]


def by_head(traces: list[dict[str, Any]], most: int = 6) -> pd.DataFrame:
    """Mean over tasks of the heads that help most."""
    shared = set.intersection(*(set(t["heads"]["gain"]) for t in traces))
    rows = {
        f"{at}.{head}": {
            name: np.mean([t["heads"][name][at, head] for t in traces])
            for name in traces[0]["heads"]
        }
        for at, head in sorted(shared)
    }
    found = pd.DataFrame.from_dict(rows, orient="index").rename_axis("head")
    return found.sort_values("gain", ascending=False).head(most)


def table(frame: pd.DataFrame) -> str:
    """A table in Markdown."""
    frame = frame.rename(index=_written, columns=_written)
    head, *rows = cells(frame)
    rows = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _written(name: Any) -> str:
    """A template as it can stand in a table, where neither the BOS token's bars nor its underscore can."""
    return f"`{visible(name).replace(BOS, 'BOS ')}`" if "{x}" in str(name) else str(name)


def page(model: Any, tasks: list[str], *, n_dev: int, n_test: int, seed: int, command: str) -> str:
    """Run everything and write the page.

    Args:
        model: A model, or its name.
        tasks: Names of tasks.
        n_dev: Dev prompts a task.
        n_test: Test prompts a task.
        seed: Decides all prompts.
        command: What made the page.

    Returns:
        The page, as Markdown.
    """
    model = tv.load_model(model) if isinstance(model, str) else model
    shots = 5
    numbers: dict[str, Any] = {"n_dev": n_dev, "n_test": n_test, "shots": shots, "seed": seed}
    found = template_transfer(model, tasks, templates=TEMPLATES, **numbers)
    how: dict[str, Any] = {
        "shots": shots,
        "n": n_test,
        "split": "test",
        "seed": seed,
        "answers": "auto",
    }
    layers = found.data["best_layer"].sel(made=ALONE, used=AFTER)
    lengths = by_task(found, model, how)
    single = [name for name in tasks if lengths.loc[name, "query tokens"] < 1.5]
    if not single:
        raise ValueError(
            f"of {', '.join(tasks)} none has queries of one token, which are followed here."
        )
    traces = [traced(model, name, int(layers.sel(task=name)), how) for name in single]
    means = {name: np.mean([t[name] for t in traces]) for name in ("first", "after", "together")}
    made = found.provenance
    head = HEAD.format(
        model=made["model"], n_tasks=len(tasks), tasks=", ".join(tasks), finding=found.finding(),
        device=made["model_facts"]["device"], command=command, **numbers,
    )  # fmt: skip
    tables = found.tables()
    parts = [head, *(f"**{name}**\n\n{table(frame)}\n" for name, frame in tables.items())]
    parts += [BY_TASK, table(lengths)]
    parts += [TRACE.format(alone="x→", single=", ".join(single), **means), table(by_layer(traces))]
    parts += [HEADS.format(layer=int(layers.max()), **means), table(by_head(traces))]
    return "".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--n-dev", type=int, default=30)
    parser.add_argument("--n-test", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    line = (
        f"python -m benchmarks.template_gap --model {asked.model} --tasks {asked.tasks} "
        f"--n-dev {asked.n_dev} --n-test {asked.n_test} --seed {asked.seed} > docs/results/template_gap.md"
    )
    settings = {"n_dev": asked.n_dev, "n_test": asked.n_test, "seed": asked.seed, "command": line}
    print(page(asked.model, asked.tasks.split(","), **settings), end="")
