"""Training steps of the paper's transformer: an ensemble against one HookedTransformer at a time.

python -m benchmarks.icl --json --members 15
"""

import argparse
import time
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from benchmarks.harness import compare, show
from tvlens.icl import (
    Data,
    Items,
    Plan,
    Setting,
    Training,
    Transformer,
    as_tokens,
    export,
    positions,
)
from tvlens.icl.training import Stepper, train


def settings(members: int) -> list[Setting]:
    """Members of the noise grid: dataset sizes and seeds in turn."""
    return [Setting(n_sequences=2 ** (6 + 2 * (i % 8)), seed=i // 8) for i in range(members)]


class Single:
    """One member as its user would train it: a label tokeniser and a HookedTransformer, in eager torch."""

    def __init__(self, setting: Setting, *, device: str) -> None:
        self.data, self.step = Data([setting], device=device), 0
        first = Transformer().initial(self.data)
        probe = self.data.batch(torch.tensor(0, device=device), 1)
        inputs, _ = as_tokens(probe, member=0, n_classes=self.data.n_classes)
        blank = train_nothing(setting, first, device)
        self.model = export(blank, inputs).train()
        self.label = torch.nn.Linear(self.data.n_classes, self.data.d_model, device=device)
        with torch.no_grad():
            self.label.weight.copy_(first["label.w"][0].T)
            self.label.bias.copy_(first["label.b"][0])
        own = [
            p
            for name, p in self.model.named_parameters()
            if not name.startswith(("embed", "pos_embed"))
        ]
        self.optimizer = torch.optim.Adam([*own, *self.label.parameters()], lr=3e-4)

    def resid(self, items: Items) -> Tensor:
        """Inputs and labels in turn, with their positions."""
        inputs, labels = items.inputs[0], items.labels[0]
        place = positions(inputs.shape[1], inputs.shape[2], device=inputs.device)
        shown = self.label(torch.nn.functional.one_hot(labels, self.data.n_classes).float())
        pairs = torch.stack([inputs[:, :-1] + place[:-1], shown + place[:-1]], dim=2)
        pairs = rearrange(pairs, "i length two d -> i (length two) d")
        return torch.cat([pairs, inputs[:, -1:] + place[-1]], dim=1)

    def take(self, steps: int) -> Tensor:
        """Take so many steps and give their losses."""
        losses = []
        for _ in range(steps):
            items = self.data.batch(torch.tensor(self.step, device=self.data.device), 32)
            logits = self.model(self.resid(items), start_at_layer=0)[:, -1]
            loss = torch.nn.functional.cross_entropy(logits, items.target[0])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            self.step += 1
        return torch.stack(losses)


def train_nothing(setting: Setting, first: dict[str, Tensor], device: str) -> Training:
    """First weights in the form that `export` takes."""
    done = train(
        [setting], Plan(steps=1, n_items=1, lr=0.0, compiled=False), device=device, progress=False
    )
    return Training(done.measures, first, {}, done.data, done.model, 0.0)


def run(
    *, members: int, steps: int, repeats: int, device: str, compiled: bool = True
) -> dict[str, Any]:
    """Time `steps` steps of each, after checking that member 0 learns the same in both for 100 steps."""
    grid = settings(members)
    single = Single(grid[0], device=device)
    ensemble = Stepper.fresh(
        Transformer(), Data(grid, device=device), Plan(steps=1, compiled=compiled)
    )
    theirs = single.take(100)
    ours = torch.stack([ensemble.advance(1).mean_loss()[0] for _ in range(100)])
    gap = float((ours - theirs).abs().max())

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def both(taken: Any) -> Any:
        def timed() -> float:
            wait()
            began = time.perf_counter()
            taken()
            wait()
            return time.perf_counter() - began

        return timed

    record = compare(
        "icl", both(lambda: ensemble.advance(steps)), both(lambda: single.take(steps)), repeats=repeats,
        difference=lambda *_: gap, device=device, members=members, steps=steps,
    )  # fmt: skip
    record["ms_per_step_and_model"] = round(1e3 * record["ours_s"] / steps / members, 5)
    record["peer_ms_per_step"] = round(1e3 * record["peer_s"] / steps, 4)
    record["ratio"] = round(record["peer_ms_per_step"] / record["ms_per_step_and_model"], 2)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--members", type=int, default=15)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    record = run(
        members=asked.members, steps=asked.steps, repeats=asked.repeats, device=asked.device
    )
    show(record, as_json=asked.json)


if __name__ == "__main__":
    main()
