"""Attribution patching against one forward for each cell, and how far the two agree.

Ours estimates a whole map from two forwards and one backward; the peer patches truly, one forward for each
cell: tvlens' own plain plan, or TransformerLens' `get_act_patch_*`. Both give the change of the logit
difference in every cell. They are no two ways to the same number, so besides the largest difference the
record has their rank correlation (`spearman`), and Pearson's.

    python -m benchmarks.attribution --json [--map layer_position | heads] [--model gpt2 | smollm2]
                                     [--peer plain | transformer_lens] [--repeats 3] [--device cuda]
    python -m benchmarks.attribution --json --eap [--pairs 20] [--method eap-ig]

`--model gpt2` has GPT-2 small's shape and random weights, on random tokens; `smollm2` is SmolLM2-135M on
pairs of indirect object identification. `--eap` times edge attribution patching of SmolLM2, all edges; it has
no peer.
"""

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import numpy as np
import torch

import tvlens as tv
from benchmarks.harness import compare, show
from benchmarks.patching import _quiet, _then, make
from tvlens.circuits.edges import edge_scores
from tvlens.patching.agreement import agreement
from tvlens.patching.gradients import attribution_patch

MAPS = {
    "layer_position": {"sites": "resid_pre", "by": ("layer", "position")},
    "heads": {"sites": "z", "by": ("layer", "head")},
}
PEERS = ("plain", "transformer_lens")
RIGHT, WRONG = 100, 200


def task(
    model: str, *, size: str, length: int, pairs: int, device: str
) -> tuple[Any, dict[str, Any]]:
    """A model, and pairs of prompts with their answers."""
    if model == "smollm2":
        from tvlens.circuits.ioi import ioi_prompts

        driven = tv.load_model("smollm2-135m", device=device)
        # One template, so that positions mean the same in all prompts.
        return driven, dict(ioi_prompts(driven, n=pairs, template=0))
    driven = make("tvlens", "hooked", device, size)
    generator = torch.Generator().manual_seed(0)
    shape = (2, pairs, length)
    clean, corrupted = torch.randint(0, driven.cfg.d_vocab, shape, generator=generator).unbind()
    return driven, {"clean": clean, "corrupted": corrupted, "answers": RIGHT, "wrong": WRONG}


def theirs(model: Any, asked: dict[str, Any], cells: str) -> torch.Tensor:
    """True patching by TransformerLens: one forward for each cell, with the clean cache made first."""
    from transformer_lens import patching

    clean, corrupted = (asked[run].to(model.cfg.device) for run in ("clean", "corrupted"))

    def difference(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1, asked["answers"]] - logits[:, -1, asked["wrong"]]).mean()

    with torch.no_grad(), _quiet():
        _, cache = model.run_with_cache(clean)
        base = difference(model(corrupted))
        name = {"layer_position": "resid_pre", "heads": "attn_head_out_all_pos"}[cells]
        found = getattr(patching, f"get_act_patch_{name}")(model, corrupted, cache, difference)
    return (found - base).cpu()


def record(
    cells: str,
    *,
    model: str = "gpt2",
    peer: str = "plain",
    device: str = "cpu",
    repeats: int = 3,
    pairs: int = 1,
    size: str = "small",
    length: int = 30,
) -> dict[str, Any]:
    """Run the comparison and return its record."""
    driven, asked = task(model, size=size, length=length, pairs=pairs, device=device)
    if peer == "transformer_lens" and model != "gpt2":
        raise ValueError("TransformerLens' patching takes tokens of one length: use --model gpt2.")
    finish = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    options = {**asked, **MAPS[cells]}
    estimate = partial(attribution_patch, driven, **options)
    patched = {
        "plain": partial(tv.patch, driven, plan="plain", **options),
        "transformer_lens": partial(theirs, driven, asked, cells),
    }[peer]
    found = compare(
        f"attribution patching, {cells}",
        _then(estimate, finish),
        _then(patched, finish),
        difference=lambda a, b: float(np.abs(_effects(a) - _effects(b)).max()),
        repeats=repeats,
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        model="smollm2-135m" if model == "smollm2" else f"GPT-2 {size} shape",
        against=peer,
        pairs=pairs,
        threads=torch.get_num_threads(),
    )
    estimated, true = estimate(), tv.patch(driven, **options)
    agreed = agreement(estimated, true)
    correlations = {
        k: round(v, 4) for k, v in agreed.correlation(n_resamples=200).items() if v == v
    }
    return (
        found
        | correlations
        | {
            "cells": int(np.prod(estimated.value.shape[:-1])),
            "cells_changed": len(agreed.cells),
            "failures": len(agreed.failures()),
        }
    )


def _effects(result: Any) -> np.ndarray:
    """Mean change over prompts, by cell."""
    if isinstance(result, torch.Tensor):
        return result.numpy()
    return result.effect.mean("prompt").values.squeeze(0)


def record_edges(
    *,
    pairs: int = 20,
    method: str = "eap",
    repeats: int = 3,
    device: str = "cpu",
    model: str = "smollm2",
    size: str = "small",
) -> dict[str, Any]:
    """Time edge attribution patching of the whole graph."""
    driven, asked = task(model, size=size, length=12, pairs=pairs, device=device)
    seconds, scores = [], None
    for _ in range(repeats):
        started = time.perf_counter()
        scores = edge_scores(driven, **asked, method=method)
        seconds.append(time.perf_counter() - started)
    if scores is None:
        raise ValueError(f"repeats must be at least 1; {repeats} arrived.")
    return {
        "name": f"edge attribution patching, {method}",
        "seconds": round(statistics.median(seconds), 3),
        "range_s": [round(min(seconds), 3), round(max(seconds), 3)],
        "repeats": repeats,
        "pairs": pairs,
        "edges": scores.graph.n_edges,
        "model": scores.provenance["model"],
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--map", choices=tuple(MAPS), default="layer_position")
    parser.add_argument("--model", choices=("gpt2", "smollm2"), default="gpt2")
    parser.add_argument("--peer", choices=PEERS, default="plain")
    parser.add_argument("--eap", action="store_true")
    parser.add_argument("--method", choices=("eap", "eap-ig"), default="eap")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    o = parser.parse_args()
    common: dict[str, Any] = {"device": o.device, "repeats": o.repeats}
    if o.eap:
        edges = record_edges(pairs=o.pairs or 20, method=o.method, **common)
        said = (
            f"{edges['name']}: {edges['seconds']} s, {edges['edges']} edges, {edges['pairs']} pairs"
        )
        print(json.dumps(edges) if o.json else said)
    else:
        many = o.pairs or (1 if o.model == "gpt2" else 8)
        show(record(o.map, model=o.model, peer=o.peer, pairs=many, **common), as_json=o.json)
