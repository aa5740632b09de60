"""The layer sweep of one task: tvlens' engine against the loop that TransformerLens users write.

The peer caches the residual stream of whole few-shot prompts with a names filter, then runs the zero-shot
batch once for each layer with a hook. Both do the same work for the same prompts: theta from two dummy
queries, regular answers, baseline, and one patched run a layer; the random-vector control is left out.

    python -m benchmarks.layer_sweep --json [--model tiny|smollm2-135m] [--n 50] [--repeats 5]
"""

import argparse
from typing import Any

import torch

import tvlens as tv
from benchmarks.harness import compare, show
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, LastLogits, Request, run
from tvlens.extraction import average, dummy_requests
from tvlens.prompts import Prompts


def ours(model: Any, prompts: Prompts) -> torch.Tensor:
    """Logits of regular, baseline and every patched layer, through the engine."""
    reading = dummy_requests(model, prompts)
    *read, regular = run(model, [*reading, Request(prompts.regular, readout=LastLogits())])
    theta = average(model, prompts, reading, read)
    cells = ((), *((Edit("resid_post", i, theta.at(i)),) for i in theta.layers))
    (zero_shot,) = run(model, [Request(prompts.zero_shot, cells=cells, readout=LastLogits())])
    return torch.cat([regular.values["logits"], zero_shot.values["logits"]])


@torch.no_grad()
def peer(model: Any, prompts: Prompts) -> torch.Tensor:
    """The same with run_with_cache and run_with_hooks, one forward a layer."""

    def inputs(batch: TokenBatch) -> dict[str, Any]:
        return {"input": batch.tokens, "attention_mask": batch.mask.long()}

    thetas = []
    for dummy in prompts.dummies:
        _, cache = model.run_with_cache(
            **inputs(dummy), names_filter=lambda n: n.endswith("hook_resid_post"), pos_slice=-1
        )
        thetas.append(
            torch.stack([cache["resid_post", i][:, 0] for i in range(model.cfg.n_layers)])
        )
    theta = torch.stack(thetas).mean(dim=0)
    logits = [model(**inputs(prompts.regular))[:, -1], model(**inputs(prompts.zero_shot))[:, -1]]
    for layer in range(model.cfg.n_layers):

        def write(resid: torch.Tensor, hook: Any, layer: int = layer) -> torch.Tensor:
            resid[:, -1] = theta[layer]
            return resid

        hooks = [(f"blocks.{layer}.hook_resid_post", write)]
        logits.append(model.run_with_hooks(**inputs(prompts.zero_shot), fwd_hooks=hooks)[:, -1])
    return torch.stack(logits)


def record(model_name: str, *, n: int, repeats: int, task: str = "antonyms") -> dict[str, Any]:
    """Run the comparison and return its record."""
    if model_name == "tiny":
        from tvlens.testing import tiny_model

        model: Any = tiny_model()
    else:
        model = tv.load_model(model_name)
    prompts = tv.build_prompts(tv.load_task(task), model, n=n)
    return compare(
        "layer_sweep",
        lambda: ours(model, prompts),
        lambda: peer(model, prompts),
        difference=lambda a, b: (a - b).abs().max().item(),
        repeats=repeats,
        device=str(model.cfg.device),
        model=model_name,
        n=n,
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    show(record(options.model, n=options.n, repeats=options.repeats), as_json=options.json)
