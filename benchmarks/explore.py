"""The panel's answer to a moved slider: from the message of the browser to the message back, in the kernel.

The peer is what one would write in a notebook cell: TransformerLens' own forward with one hook, whole logits,
once for each setting, with the clean run's logits in hand. Drawing in the browser is not part of it.

    python -m benchmarks.explore --json [--model smollm2-135m] [--repeats 7]

Each repeat moves the layer through the whole stack; `ours_s` and `peer_s` are seconds a change. `map_s` is
one change with the heat map of the changed run, in the middle of the stack at the first shown token, which
nearly the whole map follows; `open_s` a new prompt with its map.
"""

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch

import tvlens as tv
from benchmarks.harness import compare, show
from tvlens.widget._panel import panel


def record(name: str = "toy", *, repeats: int = 7) -> dict[str, Any]:
    """Time the panel of a model."""
    model = tv.load_model(name)
    explorer = tv.explore(model, task="to_upper")
    widget = explorer._panel = panel(explorer)
    layers = range(model.cfg.n_layers)

    def ask(**changes: Any) -> None:
        widget.asked = {"id": widget.asked.get("id", 0) + 1, "changes": changes}

    def ours() -> list[float]:
        found = []
        for layer in layers:
            ask(layer=layer)
            found.append(explorer.effect.answer_after)
        return found

    tokens = explorer.scene.prompt.tokens.to(model.cfg.device)
    theta = explorer._vector(explorer.state.vector)
    answer = model.tokenizer.encode(explorer.state.answer, add_special_tokens=False)[0]

    def write(resid: Any, hook: Any, *, value: Any) -> Any:
        resid[:, -1] = value
        return resid

    @torch.no_grad()
    def peer() -> list[float]:
        found = []
        for layer in layers:
            put = partial(write, value=theta.at(layer)[0])
            hooks = [(f"blocks.{layer}.hook_resid_post", put)]
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
            found.append(float(logits.softmax(-1)[answer]))
        return found

    def gap(one: list[float], other: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(one, other, strict=True))

    measured = compare(
        f"explore {name}", ours, peer, difference=gap, repeats=repeats, device=str(model.cfg.device)
    )
    steps = len(layers)
    for key in ("ours_s", "peer_s"):
        measured[key] = round(measured[key] / steps, 4)
        measured[key.replace("_s", "_range_s")] = [
            round(t / steps, 4) for t in measured[key.replace("_s", "_range_s")]
        ]
    middle = model.cfg.n_layers // 2
    ask(shown="examples")
    first = explorer.scene.first
    measured["map_s"] = _median(
        lambda i: ask(map="after", layer=middle, position=first, strength=1 + 0.1 * i), repeats
    )
    measured["open_s"] = _median(lambda i: ask(map="before", shown="examples", example=i), repeats)
    return measured | {"tokens": len(explorer.scene.tokens), "layers": steps}


def _median(run: Any, repeats: int) -> float:
    seconds = []
    for i in range(repeats):
        started = time.perf_counter()
        run(i)
        seconds.append(time.perf_counter() - started)
    return round(statistics.median(seconds), 4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="toy")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    show(record(given.model, repeats=given.repeats), as_json=given.json)
