"""What `bijection` found: accuracies by task, run and direction, and what they come to."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr

from tvlens.intervals import bootstrap
from tvlens.results import Result
from tvlens.scoring import of_queries

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RUNS = (
    "regular_one_way",
    "regular",
    "one_way",
    "theta",
    "same_way",
    "other_way",
    "wrong_way",
    "random",
    "baseline",
)
DIRECTIONS = ("both", "forward", "backward")


class Bijection(Result):
    """Outcomes of queries of both directions, with demonstrations, with one theta, and with its controls."""

    kind: ClassVar[str] = "bijection"
    references: ClassVar[tuple[str, ...]] = (
        "dong2026understanding",
        "hendel2023context",
        "wilson1927",
    )
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "correct": ("task", "run", "prompt"),
        "token": ("task", "run", "prompt"),
        "query": ("task", "prompt"),
        "direction": ("task", "prompt"),
        "layer": ("task",),
    }
    table: ClassVar[tuple[str, ...]] = ("correct", "token")
    method: ClassVar[str] = (
        "Demonstrations are drawn from a task and its inverse together, and equally many queries of each are "
        "asked. regular: they stand in the prompt. All other runs are zero-shot prompts: theta replaces the "
        "residual stream at the last token, read from these demonstrations, averaged over all dummy queries "
        "(theta), over those of the query's direction (same_way) or of the other (other_way), at the layer "
        "that is best for theta on dev queries. one_way: theta of the query's own direction, from "
        "demonstrations of that direction alone, at the layer that is best for it; wrong_way: that of the "
        "other direction; regular_one_way: these demonstrations in the prompt. random: a random vector as "
        "long as theta; baseline: nothing. Scored by first token. Wilson 95 % intervals count distinct "
        "queries; intervals of means and of differences draw the tasks again."
    )

    @property
    def title(self) -> str:
        """How many tasks, and the model."""
        return f"Both ways: {self.data.sizes['task']} tasks on {self.provenance['model']}"

    def accuracies(self) -> "pd.DataFrame":
        """Give the accuracy of every run.

        Returns:
            One row per task, run and direction (both, forward, backward): task, run, direction,
            accuracy, low, high (Wilson, 95 %), n_queries (distinct).
        """
        import pandas as pd

        data, rows = self.data.transpose("task", "run", "prompt"), []
        for i, task in enumerate(data["task"].values.tolist()):
            asked, way = data["query"].values[i], data["direction"].values[i]
            for j, run in enumerate(data["run"].values.tolist()):
                right = data["correct"].values[i, j]
                for direction in DIRECTIONS:
                    mine = ~np.isnan(right) & ((way == direction) | (direction == "both"))
                    n = len(set(asked[mine].tolist()))
                    rate = float(right[mine].mean()) if n else float("nan")
                    low, high = of_queries(rate, asked[mine].tolist()) if n else (rate, rate)
                    rows.append((task, run, direction, rate, low, high, n))
        names = ["task", "run", "direction", "accuracy", "low", "high", "n_queries"]
        return pd.DataFrame(rows, columns=names)

    def _wide(self) -> "pd.DataFrame":
        table: Any = self.accuracies()
        table = table[table["direction"] == "both"]
        return table.pivot(index="task", columns="run", values="accuracy")[list(RUNS)]

    def summary(self) -> dict[str, Any]:
        """Means over the tasks, and the gaps between theta and what it should reach."""
        wide: Any = self._wide()
        wide["gap"] = wide["regular"] - wide["theta"]
        wide["gap_one_way"] = wide["one_way"] - wide["theta"]
        wide["gap_model"] = wide["regular_one_way"] - wide["regular"]
        flat: dict[str, Any] = {}
        for name in wide.columns:
            values = wide[name].dropna().to_numpy()
            flat[name] = float(values.mean()) if len(values) else None
            if len(values) > 1:
                flat[f"{name}_low"], flat[f"{name}_high"] = bootstrap(values)
        made = self.provenance
        return {"model": made["model"], "n_tasks": len(wide), **flat, "seconds": made["seconds"]}

    def finding(self) -> str:
        """The result in one sentence."""
        s = self.summary()
        interval = f" [{s['gap_low']:.2f}, {s['gap_high']:.2f}]" if "gap_low" in s else ""
        return (
            f"Demonstrations of both directions answer {s['regular']:.2f} (those of the query's own alone "
            f"{s['regular_one_way']:.2f}), one theta of theirs {s['theta']:.2f}: a gap of "
            f"{s['gap']:.2f}{interval}; theta of the query's own direction alone answers "
            f"{s['one_way']:.2f} (of the other {s['wrong_way']:.2f}, random {s['random']:.2f})."
        )

    def tables(self) -> "dict[str, pd.DataFrame]":
        """Accuracies with intervals, and those of theta by direction."""
        table: Any = self.accuracies().set_index("task")
        both = table["direction"] == "both"
        mixed = ["theta", "same_way", "other_way", "regular"]
        return {
            "Accuracy by task and run": table[both].drop(columns="direction"),
            "By the query's direction": table[~both & table["run"].isin(mixed)],
        }

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw grouped bars, see `tvlens.plots.bijection.bijection_bars`."""
        from tvlens.plots.bijection import bijection_bars

        return bijection_bars(self.drawn(), **channels)

    def drawn(self) -> xr.Dataset:
        """Give what the figure shows: accuracies by task, run and direction, and the layers."""
        table = self.accuracies().set_index(["task", "run", "direction"]).to_xarray()
        order = {"run": list(RUNS), "direction": list(DIRECTIONS)}
        table = table.reindex(task=self.data["task"].values, **order)
        return table.assign_attrs(self.data.attrs | {"finding": self.finding()})
