"""Train the toy: ``python -m recipes.toy --out DIR``; `recipes.toy` has the packaged one's settings.

Besides the answers of prompts, the training asks for what task vectors are to do: the residual of a
separator, put at the same place of another query of the same task that stands alone, has to give
that query's answer ("task vector prompting", Yang et al. 2025, arXiv:2501.09240).

Without it (``--theta 0 --layer -1``) a model of this size learns the same tasks from demonstrations,
and theta of another query's prompt carries them nowhere: 0.20 of answers, where the bare query gets
0.19 (71 tasks, 6000 steps of 256). Why was tested on that run (12 tasks, 48 prompts each). Its
separator reads the query in the first block already: 0.77 remain right when it cannot attend to the
query after that. So one state holds task and query together, and theta, put in, takes the query's
place as well: 0.12 at the best layer. The task is there all the same: the state of a prompt that ends
in the same query gives 0.98, and what demonstrations change on average, *added* to the bare query's
state, 0.90. With the loss, the separator reads the query only after the block at which theta is put
in: 0.09 remain when it cannot. Why training without the loss prefers to read early was not tested.
``python -m recipes.toy.measure --run DIR --out PAGE`` measures all this for any run.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from recipes.toy.data import Batch, Stream
from recipes.toy.model import Shape, Toy
from recipes.toy.tables import PATH

_log = logging.getLogger("recipes.toy")
_EVERY = 100  # steps between lines of the log
_LATE = 4  # demonstrations after which the log expects a task to be known


def main(arguments: list[str] | None = None) -> Toy:
    """Read the command line and train."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return train(_arguments(arguments))


def train(args: argparse.Namespace) -> Toy:
    """Train, and write checkpoints, the configuration and a log.

    Args:
        args: What `main` reads off the command line.

    Returns:
        The trained model.
    """
    torch.set_float32_matmul_precision("high")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    stream = _stream(args, device)
    toy = _toy(args, len(stream.ids)).to(device)
    (out / "config.json").write_text(json.dumps(toy.shape.huggingface(), indent=2) + "\n")
    optimizer = _optimizer(toy, args, fused=device == "cuda")
    compiled = torch.compile(losses) if device == "cuda" and not args.eager else losses
    marks = {int(mark) for mark in args.checkpoints.split(",") if mark}
    clock, step, log = _clock(args.clock), 0, []
    while True:
        if step in marks:
            save(toy, out, step)
        seconds = clock(step)
        done = max(step / args.steps, seconds / (60 * args.minutes))
        if done >= 1:
            break
        for group in optimizer.param_groups:
            # Warm up, stay, and go down to nothing over the last third.
            group["lr"] = args.lr * min(1.0, (step + 1) / args.warmup, 3 * (1 - done))
        batch = stream.batch(args.batch)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, moved, right = compiled(toy, batch, args.layer)
        (loss + args.theta * moved).backward()
        torch.nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % _EVERY == 0 or step == args.steps - 1:
            log.append(_measured(step, seconds, loss, moved, right, batch, stream))
            _log.info(json.dumps({k: v for k, v in log[-1].items() if k != "tasks"}))
            (out / "log.json").write_text(
                json.dumps({"settings": vars(args), "log": log}, default=str) + "\n"
            )
        step += 1
    save(toy, out, step)
    return toy


def losses(toy: Toy, batch: Batch, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ask for the answers of prompts, and for one answer with theta in the prompt's place.

    Args:
        toy: The model.
        batch: The prompts.
        layer: The block after which theta is read and put in; below 0 nothing is.

    Returns:
        The mean loss over answers, that over answers with theta, and (sequence, demonstration) which
        answers of prompts are right.
    """
    unembed = toy.model.embed_tokens.weight
    normed, theta = toy(batch.tokens, layer=layer, place=batch.last)
    rows = torch.arange(len(normed), device=normed.device)
    logits = (normed[rows[:, None], batch.places] @ unembed.T).float()
    loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten(), ignore_index=-1)
    right = logits.argmax(-1) == batch.answers
    if layer < 0:
        return loss, loss.new_zeros(()), right
    alone, _ = toy(batch.lone, layer=layer, place=batch.lone_last, theta=theta)
    said = (alone[rows, batch.lone_last] @ unembed.T).float()
    return loss, F.cross_entropy(said, batch.lone_answer), right


def save(toy: Toy, out: Path, step: int) -> None:
    """Write the weights in half precision, under Hugging Face's names."""
    weights = {name: w.detach().half().cpu().contiguous() for name, w in toy.named_parameters()}
    save_file(weights, out / f"step_{step}.safetensors", metadata={"format": "pt"})


def _clock(log: Path | None) -> Callable[[int], float]:
    """Give the seconds since now, or those that another run had taken before a step."""
    if log is None:
        started = time.perf_counter()
        return lambda step: time.perf_counter() - started
    lines = json.loads(log.read_text(encoding="utf-8"))["log"]
    steps, seconds = ([line[name] for line in lines] for name in ("step", "seconds"))
    return lambda step: float(np.interp(step, steps, seconds))


def _stream(args: argparse.Namespace, device: str) -> Stream:
    only = tuple(name for name in args.only.split(",") if name)
    sizes = {"shots": args.shots, "width": args.width, "named": args.named}
    return Stream(PATH, seed=args.seed, device=device, only=only, **sizes)


def _toy(args: argparse.Namespace, d_vocab: int) -> Toy:
    shape = Shape(d_vocab, d_model=args.d_model, n_layers=args.layers, d_mlp=args.d_mlp)
    toy = Toy(shape)
    toy.start(torch.Generator().manual_seed(args.seed))
    return toy


def _optimizer(toy: Toy, args: argparse.Namespace, *, fused: bool) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in toy.parameters() if p.ndim == 2], "weight_decay": args.decay},
        {"params": [p for p in toy.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=fused)


def _measured(
    step: int,
    seconds: float,
    loss: Tensor,
    moved: Tensor,
    right: Tensor,
    batch: Batch,
    stream: Stream,
) -> dict[str, Any]:
    """Say how far the training is, by shots and by task."""
    asked = batch.answers >= 0
    few = asked & batch.few_shot[:, None]
    shots = torch.arange(few.shape[1], device=few.device).expand_as(few)
    late, task = few & (shots >= _LATE), batch.task[:, 0]
    tasks = {
        stream.tasks[i]: _share(right[task == i][late[task == i]])
        for i in stream.few_shot_tasks.tolist()
    }
    return {
        "step": step,
        "seconds": round(seconds, 1),
        "loss": round(float(loss.detach()), 4),
        "theta_loss": round(float(moved.detach()), 4),
        "right_after": {n: _share(right[few & (shots == n)]) for n in (0, 1, 2, 5)},
        "named": _share(right[asked & ~batch.few_shot[:, None]]),
        "learned": sum((share or 0) >= 0.9 for share in tasks.values()),
        "tasks": tasks,
    }


def _share(right: Tensor) -> float | None:
    return round(float(right.float().mean()), 3) if len(right) else None


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m recipes.toy", description="Train the toy.")
    parser.add_argument("--out", required=True, help="folder for weights and log")
    whole = {"seed": 0, "steps": 20000, "batch": 512, "shots": 11, "width": 128, "warmup": 300}
    sizes = {"d-model": 96, "layers": 6, "d-mlp": 256, "layer": 2}
    for name, value in (whole | sizes).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    shares = {"lr": 3e-3, "decay": 0.1, "named": 0.25, "theta": 0.3, "minutes": 60.0}
    for name, value in shares.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    parser.add_argument("--clock", type=Path, help="log of another run, whose seconds are taken")
    parser.add_argument("--checkpoints", default="", help="steps, with commas between them")
    parser.add_argument("--only", default="", help="these tasks alone, with commas between them")
    parser.add_argument("--device", default=None)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
