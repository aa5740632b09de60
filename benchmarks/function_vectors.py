"""Head effects (AIE) of one task: all heads and trials in one engine call, against one forward for each.

The peer does what the code of Todd et al. does (github.com/ericwtodd/function_vectors): one prompt and one
head a forward, at batch size 1, written with TransformerLens' `run_with_hooks`. Both get the same prompts
with shuffled labels and mean outputs, and give the change of the answer's probability by head and trial.
A peer that would take hours may run on some heads, evenly chosen (`--peer-heads`); its time is then scaled by
the number of forwards, and the record has `peer_measured_cells` heads and `peer_measured_s` seconds of what
was run. Differences are those of the heads that were run: `max_abs_diff` of AIE, `max_trial_diff` of trials.

    python -m benchmarks.function_vectors --json [--task gerund] [--trials 25] [--peer-heads 27]
                                          [--model smollm2 | gpt2] [--device cuda] [--repeats 3]

`--model gpt2` has GPT-2 small's shape and random weights, on random tokens, for machines without SmolLM2.
"""

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch

import tvlens as tv
from benchmarks.harness import compare, show
from benchmarks.patching import _then, make
from tvlens.encoding import TokenBatch
from tvlens.function_vectors import head_outputs, indirect_effects
from tvlens.prompts import Prompts

MODELS = ("smollm2", "gpt2", "tiny")
Head = tuple[int, int]


def pose(
    model: str, *, task: str, trials: int, shots: int, length: int, device: str, kind: str
) -> tuple[Any, torch.Tensor, Prompts]:
    """A model, the mean outputs of its heads, and prompts with shuffled labels."""
    if model == "gpt2":
        driven = make(kind, "hooked", device, "small")
        return driven, *random_prompts(driven, trials=trials, length=length)
    if model == "tiny":
        from tvlens.testing import tiny_model

        driven: Any = tiny_model()
    else:
        driven = tv.load_model("smollm2-135m", device=device)
    asked: dict[str, Any] = {"shots": shots, "n": trials, "n_dummy": 0, "demonstrations": "split"}
    proper = tv.build_prompts(task, driven, **asked)
    shuffled = tv.build_prompts(task, driven, labels="shuffled", **asked)
    return driven, head_outputs(driven, proper), shuffled


def random_prompts(model: Any, *, trials: int, length: int) -> tuple[torch.Tensor, Prompts]:
    """Random tokens in the place of prompts, and the outputs that heads have on others."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.cfg.d_vocab, (2, trials, length), generator=generator)
    answers = torch.randint(0, model.cfg.d_vocab, (trials,), generator=generator).tolist()
    names = tuple(map(str, range(trials)))
    proper, shuffled = (
        Prompts(
            regular=TokenBatch.of_ids(each),
            dummies=(),
            zero_shot=TokenBatch.of_ids(each[:, -1:]),
            queries=names,
            answers=tuple((name,) for name in names),
            answer_ids=tuple((answer,) for answer in answers),
            facts={},
        )
        for each in ids.unbind()
    )
    return head_outputs(model, proper), shuffled


def ours(model: Any, shuffled: Prompts, outputs: torch.Tensor) -> torch.Tensor:
    """Effects of all heads in all trials: layer, head, trial."""
    return indirect_effects(model, shuffled, outputs).effect


@torch.no_grad()
def peer(model: Any, shuffled: Prompts, outputs: torch.Tensor, heads: list[Head]) -> torch.Tensor:
    """Effects of some heads in all trials, one forward for each: head, trial."""
    device = model.cfg.device
    outputs = outputs.to(device)
    rows = []
    for i, answers in enumerate(shuffled.answer_ids):
        batch = shuffled.regular
        tokens = batch.tokens[i][batch.mask[i]][None].to(device)
        right = torch.tensor(answers, device=device)

        def probability(
            hooks: list[Any], tokens: torch.Tensor = tokens, right: torch.Tensor = right
        ) -> torch.Tensor:
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks, prepend_bos=False)
            return logits[0, -1].float().softmax(dim=-1)[right].sum()

        base = probability([])
        row = []
        for layer, head in heads:

            def write(z: torch.Tensor, hook: Any, at: Head = (layer, head)) -> torch.Tensor:
                z[:, -1, at[1]] = outputs[at]
                return z

            row.append(probability([(f"blocks.{layer}.attn.hook_z", write)]) - base)
        rows.append(torch.stack(row).cpu())
    return torch.stack(rows, dim=1)


def evenly(n_layers: int, n_heads: int, n: int | None) -> list[Head]:
    """Choose n heads, evenly over layers and heads; all of them if n is None."""
    every = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    if n is None or n >= len(every):
        return every
    return [every[i] for i in np.linspace(0, len(every) - 1, n).round().astype(int).tolist()]


def record(
    model: str = "smollm2",
    *,
    task: str = "gerund",
    trials: int = 25,
    shots: int = 10,
    peer_heads: int | None = None,
    device: str = "cpu",
    repeats: int = 1,
    length: int = 80,
    kind: str = "transformer_lens",
    tf32: bool = False,
) -> dict[str, Any]:
    """Run the comparison and return its record."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    driven, outputs, shuffled = pose(
        model, task=task, trials=trials, shots=shots, length=length, device=device, kind=kind
    )
    n_layers, n_heads, _ = outputs.shape
    heads = evenly(n_layers, n_heads, peer_heads)
    finish = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    at = tuple(torch.tensor(heads).T)
    small = shuffled.regular.rows(slice(0, 1))
    # What is measured once for a model: the engine's costs, and the GPU's kernels.
    head_outputs(driven, Prompts(small, (), small, ("",), (("",),), ((0,),), {}))
    apart: dict[str, float] = {}

    def difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
        each = (mine[at] - theirs).abs()
        apart["max_trial_diff"] = float(each.max())
        return float((mine[at].mean(dim=-1) - theirs.mean(dim=-1)).abs().max())

    found = compare(
        "function vectors, head effects",
        _then(partial(ours, driven, shuffled, outputs), finish),
        _then(partial(peer, driven, shuffled, outputs, heads), finish),
        difference=difference,
        repeats=repeats,
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        model={"smollm2": "smollm2-135m", "gpt2": f"GPT-2 small shape, {kind}"}.get(model, model),
        task=task if model != "gpt2" else "random tokens",
        trials=trials,
        shots=shots if model != "gpt2" else 0,
        tokens=round(float(shuffled.regular.lengths.float().mean()), 1),
        cells=n_layers * n_heads,
        tf32=tf32,
        threads=torch.get_num_threads(),
    )
    return scaled(found | apart, measured=len(heads), every=n_layers * n_heads)


def scaled(found: dict[str, Any], *, measured: int, every: int) -> dict[str, Any]:
    """Scale the peer's time from the heads that it ran to all; each trial runs untouched as well."""
    factor = (every + 1) / (measured + 1)
    seconds = found["peer_s"]
    return {
        **found,
        "ratio": round(factor * seconds / found["ours_s"], 2),
        "peer_s": round(factor * seconds, 3),
        "peer_range_s": [round(factor * s, 3) for s in found["peer_range_s"]],
        "peer_measured_cells": measured,
        "peer_measured_s": seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument(
        "--kind", choices=("transformer_lens", "tvlens"), default="transformer_lens"
    )
    parser.add_argument("--task", default="gerund")
    parser.add_argument("--trials", type=int, default=25)
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--length", type=int, default=80)
    parser.add_argument("--peer-heads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    o = parser.parse_args()
    done = record(
        o.model,
        task=o.task,
        trials=o.trials,
        shots=o.shots,
        peer_heads=o.peer_heads,
        device=o.device,
        repeats=o.repeats,
        length=o.length,
        kind=o.kind,
        tf32=o.tf32,
    )
    show(done, as_json=o.json)
