"""Memory of extraction: theta of every layer, against a cache of everything.

The peak is that of new tensors alive at once, watched operation by operation, not an estimate. `ratio` is
what a cache of all hook points at all positions holds, over our peak; `ratio_resid` the same for a cache
of the residual stream after every block alone. The `budget` figures are for a budget of a twentieth of that;
what is returned comes on top.

    python -m benchmarks.memory --json [--model smollm2-135m] [--n 100]
"""

import argparse
import time
from typing import Any

import torch

import tvlens as tv
from benchmarks.harness import show
from tvlens.engine.memory import peak_memory
from tvlens.prompts import Prompts


def cached_bytes(model: Any, prompts: Prompts) -> tuple[int, int]:
    """Bytes of everything TransformerLens caches, and of the residual stream alone, from one prompt."""
    longest = prompts.dummies[0]
    with torch.no_grad():
        _, cache = model.run_with_cache(longest.tokens[:1].to(model.cfg.device))
    # Other names for the same memory count once.
    every = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in cache.values()}
    resid = sum(cache["resid_post", layer].nbytes for layer in range(model.cfg.n_layers))
    return sum(every.values()) * len(longest), resid * len(longest)


def peak(model: Any, prompts: Prompts, memory: int | None) -> tuple[int, float, torch.Tensor]:
    """Peak bytes of extraction, seconds without the watching, and what was extracted."""
    tv.extract(model, prompts, memory=memory)
    started = time.perf_counter()
    theta = tv.extract(model, prompts, memory=memory).values
    seconds = time.perf_counter() - started
    with peak_memory(torch.device(model.cfg.device)) as watched:
        tv.extract(model, prompts, memory=memory)
    return watched.bytes, seconds, theta


def record(name: str, *, n: int, share: int = 20) -> dict[str, Any]:
    """Measure and return the record."""
    if name == "tiny":
        from tvlens.testing import tiny_model

        model: Any = tiny_model()
    else:
        model = tv.load_model(name)
    prompts = tv.build_prompts(tv.load_task("antonyms"), model, n=n, shots=5, n_dummy=1)
    every, resid = cached_bytes(model, prompts)
    whole, seconds, theta = peak(model, prompts, None)
    small, slower, same = peak(model, prompts, resid // share)
    return {
        "name": "memory of extraction",
        "ratio": round(every / whole, 1),
        "ratio_resid": round(resid / whole, 2),
        "ratio_resid_budget": round(resid / small, 2),
        "cached_mb": round(every / 1e6, 1),
        "resid_mb": round(resid / 1e6, 1),
        "peak_mb": round(whole / 1e6, 1),
        "peak_budget_mb": round(small / 1e6, 1),
        "ours_s": round(seconds, 3),
        "ours_budget_s": round(slower, 3),
        "peer_s": 0,
        "repeats": 1,
        "max_abs_diff": float((theta - same).abs().max()),
        "device": model.cfg.device if isinstance(model.cfg.device, str) else str(model.cfg.device),
        "model": name,
        "n": n,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    show(record(options.model, n=options.n), as_json=options.json)
