"""What a cell of a grid costs on this machine: seconds and bytes of layer sweeps on models of a given size.

The weights are random, which changes neither. From these figures a grid's hours and bytes are a
multiplication; `docs/howto/sweeps.md` does it for 100 models, 3,000 tasks and 10 seeds.

    python -m benchmarks.cells --json [--shape 1.5B] [--dtype bfloat16] [--prompts 50] [--processes 4]

Each process runs 12 cells, 3 tasks with 4 seeds each. `cell_s` is the median of one process, `cells_per_s`
what all of them do together once they have loaded, `identical` whether all found the same bits.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tvlens as tv
from tvlens import sweeps
from tvlens.testing import tiny_tokenizer

# Width, layers, heads, key-value heads, width of the MLP, tokens.
SHAPES = {
    "tiny": (64, 2, 4, 2, 128, 500),
    "135M": (576, 30, 9, 3, 1536, 49152),
    "1.5B": (1536, 28, 12, 2, 8960, 151936),
    "7B": (4096, 32, 32, 32, 11008, 32000),
}
TASKS = ("to_upper", "gerund", "country_capital")


def model(shape: str, dtype: str) -> Any:
    """A Llama of that size with random weights, on the GPU if there is one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, heads, kv_heads, mlp, tokens = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=tokens, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            made = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return tv.load_model(made, tokenizer=tiny_tokenizer(), dtype=dtype)


def cells(shape: str, dtype: str, *, prompts: int) -> dict[str, Any]:
    """Run twelve cells, and say what they cost."""
    with tempfile.TemporaryDirectory() as folder:
        found = tv.sweep(
            "layer_sweep", tasks=TASKS, models={shape: partial(model, shape, dtype)}, seeds=range(4),
            out=folder, progress=False, on_error="raise", n_dev=prompts, n_test=prompts,
        )  # fmt: skip
        seconds = found.data["seconds"].values.ravel()
        files = [path for path in Path(folder).glob("cells/*/*") if path.is_file()]
        joined = sweeps.join(folder, "theta", "hypothesis_log_prob")
        bits = sha256(b"".join(joined[name].values.tobytes() for name in sorted(joined.data_vars)))
        return {
            "cells": len(seconds),
            "first_s": round(float(seconds[0]), 2),
            "cell_s": round(float(median(seconds[1:])), 3),
            "after_load_s": round(float(seconds[1:].sum()), 2),
            "bytes": sum(path.stat().st_size for path in files) // len(seconds),
            "bits": bits.hexdigest()[:16],
        }


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shape", default="135M", choices=SHAPES)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    if given.processes == 1:
        print(json.dumps(cells(given.shape, given.dtype, prompts=given.prompts)))
        return
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cells", "--json"]
    command += ["--shape", given.shape, "--dtype", given.dtype, "--prompts", str(given.prompts)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(given.processes)
    ]
    said = [json.loads(one.communicate()[0]) for one in running]
    together = sum((one["cells"] - 1) / one["after_load_s"] for one in said)
    record = {
        "name": "cells",
        "shape": given.shape,
        "dtype": given.dtype,
        "processes": given.processes,
        "cell_s": median(one["cell_s"] for one in said),
        "cells_per_s": round(together, 3),
        "bytes": said[0]["bytes"],
        "identical": len({one["bits"] for one in said}) == 1,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
