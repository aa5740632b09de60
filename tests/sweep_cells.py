"""Functions that other processes compute as cells of a sweep; they are imported there by name."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr


def numbers(task: Any, *, seed: int, size: int = 50) -> xr.Dataset:
    """A cell that takes about as long to write as to compute."""
    draw = np.random.default_rng([seed, len(task.name)])
    return xr.Dataset(
        {
            "x": (("row", "column"), draw.normal(size=(size, size))),
            "said": ("row", ["a", "b"] * (size // 2)),
        },
        {"row": np.arange(size)},
    )


def slowly(task: Any, *, seed: int) -> xr.Dataset:
    """A cell that leaves time to lose the node it runs on."""
    time.sleep(0.7)
    return numbers(task, seed=seed, size=4)


def scalar(*, seed: int) -> float:
    return 0.1 * seed


def named(task: Any, *, seed: int, scale: float = 1.0) -> dict[str, Any]:
    return {"score": scale * (seed + len(task.name)), "word": task.name[:2], "none": None}


def fails_on_odd(task: Any, *, seed: int) -> float:
    if seed % 2:
        raise ValueError(f"{task.name} has no seed {seed}")
    return float(seed)


def dies_once(task: Any, *, seed: int, folder: str) -> float:
    """Kill the worker that computes seed 2 for the first time."""
    mark = Path(folder) / f"{task.name}-died"
    if seed == 2 and not mark.exists():
        mark.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return float(seed)


def dies(*, seed: int) -> float:
    if seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(seed)


def layers(model: Any, task: Any, *, seed: int) -> xr.Dataset:
    """As many layers as the model has, and as many prompts as the seed says."""
    n = model.cfg.n_layers
    return xr.Dataset(
        {
            "by_layer": (("layer", "prompt"), np.ones((n, 2 + seed), dtype=bool)),
            "depth": ("layer", np.arange(n) / max(n - 1, 1)),
            "query": ("prompt", [f"{task.name} {i}" for i in range(2 + seed)]),
        },
        {"layer": range(n)},
    )


def shallow() -> Any:
    from tvlens.testing import tiny_model

    return tiny_model()


def deep() -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from tvlens.models import load_model
    from tvlens.testing import tiny_tokenizer

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=2, n_positions=128)
    return load_model(GPT2LMHeadModel(config).eval(), tokenizer=tiny_tokenizer(), device="cpu")


if __name__ == "__main__":
    # What a killed run computes: python -m tests.sweep_cells FOLDER N_SEEDS.
    import tvlens as tv

    tv.sweep(
        numbers,
        tasks=["to_upper", "gerund"],
        seeds=range(int(sys.argv[2])),
        out=sys.argv[1],
        progress=False,
    )
