"""Activation patching: `tvlens.patch` against TransformerLens' own `get_act_patch_*`.

A model of GPT-2 small's shape with random weights, made by TransformerLens, and two prompts of 30 random
tokens that differ from the first token on: the case in which nothing is shared that could be skipped. The
peer has its clean cache already. Both return the logit difference of every cell; ours also labels them and
says what the runs predict (`ours_s`), or returns the bare values (`engine_s`).

    python -m benchmarks.patching --json [--last-position | --sites head_z] [--backend bridge]
                                  [--device cuda] [--tf32] [--repeats 5]

`--model tvlens` lets both run on weights in the layout in which tvlens loads them, which spares
TransformerLens the copies of whole matrices that it makes on every forward.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import tvlens as tv
from benchmarks.harness import compare, show
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, Request, Taken, TokenLogits, run

SWEEPS = ("resid_pre", "last_position", "head_z")
RIGHT, WRONG = 100, 200


def ours(model: Any, clean: torch.Tensor, corrupted: torch.Tensor, sweep: str) -> torch.Tensor:
    """The sweep as a user of tvlens writes it."""
    by = ("layer", "head") if sweep == "head_z" else ("layer", "position")
    result = tv.patch(
        model,
        clean,
        corrupted,
        metric="logit_difference",
        answers=[RIGHT],
        wrong=[WRONG],
        sites="z" if sweep == "head_z" else "resid_pre",
        by=by,
        positions=[-1] if sweep == "last_position" else None,
    )
    return result.to_tensor("value").squeeze()


def engine(model: Any, clean: torch.Tensor, corrupted: torch.Tensor, sweep: str) -> torch.Tensor:
    """The same through the engine alone: the values without labels, statistics or top tokens."""
    layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
    if sweep == "head_z":
        cells = [(Edit("z", layer, Taken(0), None, head),) for layer in layers for head in heads]
    else:
        positions = [-1] if sweep == "last_position" else range(clean.shape[1])
        cells = [(Edit("resid_pre", layer, Taken(0), at),) for layer in layers for at in positions]
    readout = TokenLogits(torch.tensor([[RIGHT, WRONG]]))
    requests = [Request(TokenBatch.of_ids(clean))]
    requests.append(Request(TokenBatch.of_ids(corrupted), tuple(cells), (), readout))
    logits = run(model, requests)[1].values["logits"][:, 0].cpu()
    return logits[:, 0] - logits[:, 1]


def peer(model: Any, cache: Any, corrupted: torch.Tensor, sweep: str) -> torch.Tensor:
    """The same with TransformerLens: one forward for each cell, without gradients."""
    from transformer_lens import patching

    def difference(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, RIGHT] - logits[0, -1, WRONG]

    with torch.no_grad(), _quiet():
        if sweep == "resid_pre":
            return patching.get_act_patch_resid_pre(model, corrupted, cache, difference)
        if sweep == "head_z":
            return patching.get_act_patch_attn_head_out_all_pos(model, corrupted, cache, difference)
        import pandas as pd

        last = corrupted.shape[1] - 1
        cells = pd.DataFrame({"layer": range(model.cfg.n_layers), "pos": last})
        return patching.generic_activation_patch(
            model,
            corrupted,
            cache,
            difference,
            patching.layer_pos_patch_setter,
            "resid_pre",
            index_df=cells,
        )


def _quiet() -> Any:
    """TransformerLens shows a progress bar for every sweep."""
    import contextlib
    import io

    return contextlib.redirect_stderr(io.StringIO())


def make(kind: str, backend: str, device: str, size: str) -> Any:
    """A model with random weights: TransformerLens' own, tvlens' layout of it, or a Bridge."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width, vocabulary = {"small": (12, 768, 50257), "tiny": (2, 32, 400)}[size]
    torch.manual_seed(0)
    if kind == "transformer_lens" and backend == "hooked":
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        cfg = HookedTransformerConfig(
            n_layers=layers,
            d_model=width,
            n_ctx=1024,
            n_heads=width // 64 or 1,
            d_head=min(width, 64),
            d_mlp=4 * width,
            d_vocab=vocabulary,
            act_fn="gelu_new",
            normalization_type="LN",
            device=device,
            seed=0,
        )
        return HookedTransformer(cfg)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64 or 1,
        n_positions=1024,
    )
    from tvlens.testing import tiny_tokenizer

    hf = GPT2LMHeadModel(config).eval()
    return tv.load_model(hf, tokenizer=tiny_tokenizer(), backend=backend, device=device)


def record(
    sweep: str,
    *,
    backend: str = "hooked",
    model: str = "transformer_lens",
    device: str = "cpu",
    tf32: bool = False,
    repeats: int = 5,
    size: str = "small",
    length: int = 30,
) -> dict[str, Any]:
    """Run the comparison and return its record."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    driven = make(model, backend, device, size)
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(
        0, driven.cfg.d_vocab, (2, 1, length), generator=generator
    ).unbind()
    with torch.no_grad():
        _, cache = driven.run_with_cache(clean.to(device))
    finish = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    bare = _then(partial(engine, driven, clean, corrupted, sweep), finish)
    seconds = [_seconds(bare) for _ in range(max(repeats, 3) + 1)][1:]
    record = compare(
        f"patching {sweep}",
        _then(partial(ours, driven, clean, corrupted, sweep), finish),
        _then(partial(peer, driven, cache, corrupted.to(device), sweep), finish),
        difference=lambda a, b: float((a.cpu() - b.cpu().squeeze()).abs().max()),
        repeats=repeats,
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        backend=backend,
        model=f"{model}, GPT-2 {size} shape",
        tokens=length,
        tf32=tf32,
        threads=torch.get_num_threads(),
    )
    alone = statistics.median(seconds)
    return record | {
        "engine_s": round(alone, 4),
        "ratio_engine": round(record["peer_s"] / alone, 2),
        "engine_range_s": [round(min(seconds), 4), round(max(seconds), 4)],
    }


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _then(work: Callable[[], torch.Tensor], finish: Callable[[], None]) -> Callable[[], Any]:
    def both() -> torch.Tensor:
        out = work()
        finish()
        return out

    return both


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--last-position", action="store_true")
    parser.add_argument("--sites", choices=("resid_pre", "head_z"), default="resid_pre")
    parser.add_argument("--backend", choices=("hooked", "bridge"), default="hooked")
    parser.add_argument(
        "--model", choices=("transformer_lens", "tvlens"), default="transformer_lens"
    )
    parser.add_argument("--size", choices=("small", "tiny"), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    o = parser.parse_args()
    found = record(
        "last_position" if o.last_position else o.sites,
        backend=o.backend,
        model=o.model,
        device=o.device,
        tf32=o.tf32,
        repeats=o.repeats,
        size=o.size,
    )
    show(found, as_json=o.json)
