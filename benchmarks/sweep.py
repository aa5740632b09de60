"""A sweep against the bare calls that it makes: what keeping every cell costs, and what more workers bring.

Ours is `tv.sweep` into an empty folder; the peer calls the experiment for the same cells in a loop and keeps
the results in a list. Both load the model once before, and run with one thread and the same plans, so that
the numbers are equal to the bit.

    python -m benchmarks.sweep --json [--model smollm2-135m] [--cells 6] [--prompts 4] [--repeats 5]
                               [--tiny 10000] [--soak 1000]

`overhead` is how much longer a cell of ours takes, as a share of the bare one; `write_ms` what is spent on
writing it, and `summary_ms` on the numbers of its row. `workers` compares two processes with one, on cells
of the toy, with and without the seconds in which the processes start and load. `listing` says how long it
takes to write `--tiny` cells of one number, and then, in a new process, to say how many are there, to give a
row for each, and to join them. `soak` runs that many cells in one process, and says how much its memory grew
after the first tenth.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import tvlens as tv
from benchmarks.harness import compare, show
from tvlens import sweeps
from tvlens.engine import reproducible


def number(*, seed: int) -> float:
    """A cell that costs nothing."""
    return float(seed)


@cache
def loaded(name: str) -> Any:
    """A model, once a process."""
    return tv.load_model(name)


def overhead(model: str, *, cells: int, prompts: int, repeats: int) -> dict[str, Any]:
    """Compare a sweep of layer sweeps with the layer sweeps themselves."""
    torch.set_num_threads(1)
    settings = {"n_dev": prompts, "n_test": prompts}
    seeds, held = range(cells), loaded(model)

    def bare() -> Any:
        with reproducible():
            return [
                tv.layer_sweep(held, "to_upper", seed=seed, progress=False, **settings)
                for seed in seeds
            ]

    def kept() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            tv.sweep(
                "layer_sweep", tasks=["to_upper"], models={model: partial(loaded, model)}, seeds=seeds,
                out=folder, progress=False, **settings,
            )  # fmt: skip
            return sweeps.join(folder, "theta", "hypothesis_log_prob")

    def apart(ours: Any, peer: Any) -> float:
        return max(
            float(np.abs(ours[name].values[0, 0, i] - one.data[name].values).max())
            for name in ("theta", "hypothesis_log_prob")
            for i, one in enumerate(peer)
        )

    found = compare(
        "sweep",
        kept,
        bare,
        difference=apart,
        repeats=repeats,
        device="cpu",
        model=model,
        cells=cells,
    )
    found["cell_s"] = round(found["peer_s"] / cells, 4)
    found["overhead"] = round(found["ours_s"] / found["peer_s"] - 1, 4)
    return found | _parts(bare()[0])


def _parts(result: Any) -> dict[str, float]:
    """Milliseconds of what a sweep adds to a cell."""
    from tvlens.sweeps._arrays import to_bytes
    from tvlens.sweeps._folder import Folder

    with tempfile.TemporaryDirectory() as place:
        folder, record = Folder(place), {"cell": {}, "numbers": {}}
        write = _median(lambda: folder.keep("ab" * 16, record, to_bytes(result.data)))
    return {
        "write_ms": round(1e3 * write, 2),
        "summary_ms": round(1e3 * _median(result.summary), 2),
    }


def _median(work: Any, *, repeats: int = 9) -> float:
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return median(taken)


def workers(*, cells: int) -> dict[str, Any]:
    """Compare one process with two, on cells of the toy."""
    run = partial(
        tv.sweep, "layer_sweep", tasks=["to_upper"], models="toy", seeds=range(cells), progress=False,
        n_dev=100, n_test=100,
    )  # fmt: skip
    seconds, begun = {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, executor in (("one", None), ("two", 2)):
            started = time.perf_counter()
            run(out=Path(folder) / name, executor=executor)
            seconds[name] = time.perf_counter() - started
        # How long the first cell took to arrive says how long processes take to start and load.
        times = [p.stat().st_mtime for p in (Path(folder) / "two").glob("cells/*/*.json")]
        plan = next((Path(folder) / "two").glob("plans/*.json")).stat().st_mtime
        begun = min(times) - plan
        joined = [sweeps.join(Path(folder) / name) for name in ("one", "two")]
    return {
        "cells": cells,
        "one_s": round(seconds["one"], 2),
        "two_s": round(seconds["two"], 2),
        "start_s": round(begun, 2),
        "speedup": round(seconds["one"] / seconds["two"], 2),
        "speedup_after_start": round(seconds["one"] / (seconds["two"] - begun), 2),
        "identical": bool(joined[0].identical(joined[1])),
    }


def listing(n: int) -> dict[str, Any]:
    """Write many cells of one number, and read them in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        tv.sweep(number, seeds=range(n), out=folder, progress=False)
        written = time.perf_counter() - started
        script = (
            "import json, sys, time; from tvlens import sweeps; import tvlens.sweeps._read\n"
            "found = {}\n"
            "for name in ('status', 'collect', 'join'):\n"
            "    started = time.perf_counter(); what = getattr(sweeps, name)(sys.argv[1])\n"
            "    found[name + '_s'] = round(time.perf_counter() - started, 2)\n"
            "found['total'] = float(what['value'].sum()); print(json.dumps(found))\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, folder],
            capture_output=True,
            text=True,
            check=True,
        )
    found = json.loads(done.stdout)
    if found.pop("total") != n * (n - 1) / 2:
        raise RuntimeError("what was read is not what was written")
    return {"cells": n, "written_s": round(written, 2), **found}


def soak(n: int) -> dict[str, Any]:
    """Run cells of the smallest model in a process of their own, and watch its memory."""
    script = (
        "import sys, tempfile, tvlens as tv; from tvlens.testing import tiny_model\n"
        "n, sizes = int(sys.argv[1]), []\n"
        "def cell(model, task, *, seed):\n"
        "    found = tv.layer_sweep(model, task, n_dev=3, n_test=3, seed=seed, progress=False)\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    sizes.append(next(int(one.split()[1]) for one in lines if one.startswith('VmRSS')))\n"
        "    return found\n"
        "out = tempfile.mkdtemp()\n"
        "tv.sweep(cell, tasks=['to_upper'], models=tiny_model(), seeds=range(n), out=out, progress=False)\n"
        "print(sizes[n // 10 - 1], sizes[-1], max(sizes[n // 10 :]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(n)],
        capture_output=True,
        text=True,
        check=True,
    )
    early, last, most = map(int, done.stdout.split()[-3:])
    return {
        "cells": n,
        "mb_after_a_tenth": round(early / 1024, 1),
        "mb_at_the_end": round(last / 1024, 1),
        "growth": round(most / early - 1, 4),
    }


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cells", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", type=int, default=10_000)
    parser.add_argument("--soak", type=int, default=1000)
    given = parser.parse_args()
    record = overhead(given.model, cells=given.cells, prompts=given.prompts, repeats=given.repeats)
    record |= {
        "workers": workers(cells=40),
        "listing": listing(given.tiny),
        "soak": soak(given.soak),
    }
    show(record, as_json=given.json)


if __name__ == "__main__":
    main()
