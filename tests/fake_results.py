"""A synthetic result of the layer-sweep schema, drawn from known curves."""

from typing import ClassVar

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from tvlens import intervals, plots, provenance
from tvlens.results import Result

STRANGE = [
    " <script>alert(1)</script>",
    "\n",
    "$x$",
    "é👩‍👧",
    "</td>",
    "&amp;",
    "\x01\x1b",
    "%{x}",
    "",
    " ",
]


def sweep_data(task="to_upper", *, family="linguistic", layers=30, n=50, peak=0.9, seed=0):
    rng = np.random.default_rng(seed)
    layer = np.arange(layers)
    depth = layer / (layers - 1)
    curve = 0.04 + (peak - 0.04) / (1 + np.exp(-25 * (depth - 0.42))) / (
        1 + np.exp(28 * (depth - 0.76))
    )
    prompts = 2 * n
    split = np.repeat(["dev", "test"], n)
    hypothesis = rng.random((prompts, layers)) < curve
    token = np.array(["A", " B", "\n", "b", " the", "Madrid", "…"])
    probability = np.sort(rng.dirichlet(np.full(10, 0.3), layers).astype("float32"), axis=1)[
        :, ::-1
    ]
    words = np.array([" upper", "A", " B", " capital", "ER", "\n", *STRANGE])
    note = provenance.collect(
        kind="fake_sweep",
        task=task,
        family=family,
        model="fake-135m",
        n_layers=layers,
        best_layer=int(hypothesis[:n].mean(0).argmax()),
        seed=seed,
        shots=5,
        template="example:{x}->{y}\n",
        seconds=1.5,
    )
    return xr.Dataset(
        {
            "baseline": ("prompt", rng.random(prompts) < 0.06),
            "regular": ("prompt", rng.random(prompts) < min(peak + 0.06, 0.98)),
            "hypothesis": (("prompt", "layer"), hypothesis),
            "control": (("prompt", "layer"), rng.random((prompts, layers)) < 0.03),
            "majority": ("prompt", rng.random(prompts) < 0.1),
            "baseline_token": ("prompt", rng.choice(token, prompts)),
            "regular_token": ("prompt", rng.choice(token, prompts)),
            "hypothesis_token": (("prompt", "layer"), rng.choice(token, (prompts, layers))),
            "top_token": (("layer", "rank"), rng.choice(words, (layers, 10))),
            "top_probability": (("layer", "rank"), probability),
        },
        coords={
            "split": ("prompt", split),
            "query": ("prompt", np.array([f"q{i}" for i in range(prompts)])),
            "answer": ("prompt", rng.choice(token, prompts)),
            "layer": layer,
            "depth": ("layer", depth),
        },
        attrs={provenance.ATTRIBUTE: provenance.encode(note)},
    )


class FakeSweep(Result):
    kind = "fake_sweep"
    references = ("hendel2023context",)
    variables: ClassVar = {
        "hypothesis": ("prompt", "layer"),
        "regular": ("prompt",),
        "split": ("prompt",),
    }
    table = ("baseline", "regular", "hypothesis", "control")
    method = "Outcomes are drawn from known curves; nothing ran."

    @property
    def title(self):
        return f"{self.provenance['task']} · {self.provenance['model']}"

    def finding(self):
        row = self.summary()
        return f"Layer {row['layer']}: {row['hypothesis']:.2f}, regular {row['regular']:.2f}."

    def summary(self):
        best = self.provenance["best_layer"]
        row = {"kind": self.kind, "title": self.title, "task": self.provenance["task"]}
        row |= {"family": self.provenance["family"], "layer": best}
        for name in ("baseline", "hypothesis", "regular", "majority", "control"):
            share = intervals.accuracy(self.data, name)
            if "layer" in share.dims:
                share = share.sel(layer=best)
            row[name] = float(share.accuracy)
            if name in ("baseline", "hypothesis", "regular"):
                row |= {f"{name}_low": float(share.low), f"{name}_high": float(share.high)}
        blind = intervals.accuracy(self.data, "hypothesis").isel(layer=-1)
        return row | {"query_blind": float(blind.accuracy)}

    def plot(self, **channels) -> go.Figure:
        return plots.accuracy_by_layer(self.data, **channels)

    def figures(self):
        return {"accuracy": self.plot(), "vocabulary": plots.vocabulary(self.data)}

    @classmethod
    def overview(cls, results):
        import pandas as pd

        table = pd.DataFrame([result.summary() for result in results])
        return {
            "accuracies": plots.accuracy_bars(table),
            "layers": plots.accuracy_by_layer({r.provenance["task"]: r.data for r in results}),
        }
