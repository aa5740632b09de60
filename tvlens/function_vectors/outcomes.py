"""What the function-vectors experiment found: outcomes prompt by prompt, and what follows from them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr

from tvlens.function_vectors.results import METHODS, HeadEffects, universal_heads
from tvlens.intervals import accuracy, wilson
from tvlens.provenance import ATTRIBUTE, encode
from tvlens.results import Result
from tvlens.vectors import TaskVector

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

CONTROLS = ("random_heads", "random_vector")
_RUNS = ("without", "vector", *CONTROLS)
_RESAMPLES = 2000


class FunctionVectors(Result):
    """What `function_vectors` found for one task and model; outcomes are kept prompt by prompt."""

    kind: ClassVar[str] = "function_vectors"
    references: ClassVar[tuple[str, ...]] = ("todd2024function",)
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "split": ("prompt",),
        "hypothesis": ("prompt", "layer"),
        "regular": ("prompt",),
        "without": ("view", "prompt"),
        "vector": ("view", "prompt"),
        "random_heads": ("view", "draw", "prompt"),
        "random_vector": ("view", "draw", "prompt"),
        "theta": ("d_model",),
        "output": ("layer", "head", "d_head"),
    }
    table: ClassVar[tuple[str, ...]] = ("without", "vector", "regular")
    method: ClassVar[str] = (
        f"{HeadEffects.method} The function vector is the sum of what the heads with the largest effects "
        "write on average, through W_O; it is added to the residual stream after a block, at the last token. "
        "Heads and layer are chosen on dev queries with demonstrations that are dev items, too. A prediction "
        "is right when it is the first token of an accepted answer; accuracies are those of test queries, "
        "with Wilson 95 % intervals that count distinct queries. Controls: as many random heads, and random "
        "vectors of the same norm, each at the layer that is best for it on dev; means over draws, with "
        "the wider of Wilson's interval and a bootstrap over queries and draws. In other templates "
        "queries stand alone, and those whose answer has no telling first token there are left out."
    )

    @property
    def best_layer(self) -> int:
        """The layer with the highest dev accuracy; the lowest such layer."""
        dev = accuracy(self.data, "hypothesis", split="dev")["accuracy"]
        return int(dev["layer"][int(dev.argmax("layer"))])

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Layer and head of those that were summed."""
        return [(int(layer), int(head)) for layer, head in self.provenance["heads"]]

    @property
    def effects(self) -> HeadEffects:
        """Effect of every head, with its map and the agreement of patching and gradient."""
        names = [n for n in ("output", "shuffled", *METHODS) if n in self.data]
        return HeadEffects(
            self.data[names].assign_attrs({ATTRIBUTE: encode(self.provenance["effects"])})
        )

    @property
    def function_vector(self) -> TaskVector:
        """The vector, the same at every layer, for `tvlens.score` and `tvlens.inject` with mode ``"add"``."""
        made, layers = self.provenance, tuple(self.data["layer"].values.tolist())
        values = self.to_tensor("theta").expand(1, len(layers), -1)
        return TaskVector(values.clone(), layers, made=made["vector"])

    @property
    def title(self) -> str:
        """Experiment, task and model."""
        made = self.provenance
        return f"Function vector: {made['task']} on {made['model']}"

    def rates(self) -> "pd.DataFrame":
        """Accuracy on test queries by view and run, with its 95 % interval.

        Returns:
            ``view, run, accuracy, low, high``, and for controls ``best``, the accuracy of the best draw.
        """
        import pandas as pd

        one = accuracy(self.data, "regular")
        rows = [_row("regular", "regular", *(float(one[p]) for p in ("accuracy", "low", "high")))]
        for view in map(str, self.data["view"].values):
            for name in _RUNS:
                here = self.data.sel(view=view)
                if name in CONTROLS:
                    rows.append(_row(view, name, *_over_draws(here, name)))
                    continue
                rate = accuracy(here, name)
                rows.append(
                    _row(view, name, *(float(rate[p]) for p in ("accuracy", "low", "high")))
                )
        return pd.DataFrame(rows)

    def finding(self) -> str:
        """The result in one sentence."""
        s = self.summary()
        n = len(self.heads)
        return (
            f"The sum of {n} head{'s' * (n != 1)}, added at layer {s['layer']} of {s['n_layers']}, answers "
            f"{s['vector']:.2f} of bare test queries (demonstrations {s['regular']:.2f}, nothing "
            f"{s['without']:.2f}; {n} random heads {s['random_heads']:.2f}, random vectors "
            f"{s['random_vector']:.2f}), and {s['shuffled_vector']:.2f} after shuffled labels, against "
            f"{s['shuffled_without']:.2f}."
        )

    def summary(self) -> dict[str, Any]:
        """Accuracies on test queries with their intervals, the controls, the layer, and the time taken."""
        made, layer = self.provenance, self.best_layer
        flat: dict[str, Any] = {}
        for rate in self.rates().to_dict(orient="records"):
            prefix = "" if rate["view"] in ("regular", "zero_shot") else f"{rate['view']}_"
            name = f"{prefix}{rate['run']}"
            flat |= {
                name: rate["accuracy"],
                f"{name}_low": rate["low"],
                f"{name}_high": rate["high"],
            }
            if rate["run"] in CONTROLS:
                flat[f"{name}_best"] = rate["best"]
        return {
            "task": made["task"],
            "model": made["model"],
            **flat,
            "ratio": flat["vector"] / flat["regular"] if flat["regular"] else None,
            "layer": layer,
            "n_layers": made["n_layers"],
            "heads": " ".join(f"{i}.{h}" for i, h in self.heads),
            "n_test": int((self.data["split"] == "test").sum()),
            "seconds": made["seconds"],
        }

    @classmethod
    def overview_tables(cls, results: "Sequence[Result]") -> "dict[str, pd.DataFrame]":
        """Accuracy by task, and the heads with the largest effects over all tasks."""
        import pandas as pd

        runs = ("regular", "without", "vector", "random_heads", "random_vector")
        rows = [result.summary() for result in results]

        def of(names: Sequence[str]) -> pd.DataFrame:
            ends = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
            return pd.DataFrame(rows, columns=["task", "layer", *ends])

        views = [
            f"{view}_{run}" for view in ("shuffled", "qa", "arrow") for run in ("without", "vector")
        ]
        effects = [result.effects for result in results if isinstance(result, cls)]
        return {
            "Bare test queries": of(runs),
            "Elsewhere": of([name for name in views if all(name in row for row in rows)]),
            "Universal heads": universal_heads(effects),
        }

    def tables(self) -> "dict[str, pd.DataFrame]":
        """Accuracy by view and run."""
        return {"Test queries": self.rates()}

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw accuracies with and without the vector; see `tvlens.plots.function_vectors`."""
        from tvlens.plots.function_vectors import function_vector_bars

        note = {"finding": self.finding()}
        return function_vector_bars(
            self.rates(), title=channels.pop("title", note["finding"]), **channels
        )

    def figures(self) -> "dict[str, go.Figure]":
        """Accuracies, accuracy by layer, and the effects of all heads."""
        from tvlens.plots.function_vectors import function_vector_layers

        by_layer = function_vector_layers(self.data, layer=self.best_layer)
        return {
            "With and without the function vector": self.plot(),
            "Accuracy by layer": by_layer,
            **self.effects.figures(),
        }


def _row(view: str, run: str, mean: float, low: float, high: float, best: float = np.nan) -> dict:
    return {"view": view, "run": run, "accuracy": mean, "low": low, "high": high, "best": best}


def _over_draws(data: xr.Dataset, name: str) -> tuple[float, float, float, float]:
    """Mean over draws and queries, its interval, and the best draw."""
    test = data.isel(prompt=np.flatnonzero(data["split"].values == "test"))
    each = test[name].groupby("query").mean("prompt").transpose("draw", "query").values
    each = each[:, ~np.isnan(each).any(axis=0)]
    whole = test[name].mean("prompt").values
    rng, (n_draws, n) = np.random.default_rng(0), each.shape
    queries = rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) / n
    draws = rng.multinomial(n_draws, np.full(n_draws, 1 / n_draws), size=_RESAMPLES) / n_draws
    again = np.einsum("rd,dq,rq->r", draws, each, queries)
    drawn = np.quantile(again, [0.025, 0.975])
    mean = float(whole.mean())
    # Where every draw got every query wrong the bootstrap has no width, and few queries prove little.
    low, high = wilson(mean * n, n)
    return mean, min(low, float(drawn[0])), max(high, float(drawn[1])), float(whole.max())
