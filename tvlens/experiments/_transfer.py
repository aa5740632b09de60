"""What `transfer` found: theta through a map, and theta of every task for every other."""

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


class Transfer(Result):
    """Outcomes of queries with theta of their own task, of other tasks, and through a fitted map."""

    kind: ClassVar[str] = "transfer"
    references: ClassVar[tuple[str, ...]] = ("hendel2023context", "hoerl1970ridge", "wilson1927")
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "correct": ("task", "run", "prompt"),
        "token": ("task", "run", "prompt"),
        "cross": ("vector", "task", "prompt"),
        "query": ("task", "prompt"),
        "cosine_mapped": ("task", "prompt"),
        "cosine_shuffled": ("task", "prompt"),
    }
    table: ClassVar[tuple[str, ...]] = ("correct", "token")
    method: ClassVar[str] = (
        "Theta replaces the residual stream at the last token of a zero-shot prompt, one theta for each "
        "prompt's own demonstrations. own: theta of the query's task, read where it is injected. mapped: "
        "theta read in the source from the same text, through an affine map fitted by ridge regression to "
        "pairs of last-token states of all other tasks' dev prompts. shuffled: the same with the pairs "
        "broken. mean: the mean of these other states, the same for all. unmapped: the source's theta as it"
        " is, where the widths allow. random: a random vector as long as theta. Cosines are taken between "
        "mapped and own theta, both less that mean. cross: theta of every task on the queries of every "
        "other, nothing fitted. Scored by first token on test queries; the layers come from dev queries "
        "unless they were given. Wilson 95 % intervals count distinct queries; intervals of means draw the "
        "tasks again."
    )

    @property
    def title(self) -> str:
        """From where to where."""
        made = self.provenance
        there = f"{made['model']} layer {made['layer']}"
        if made["same_model"] and made["source_layer"] == made["layer"]:
            return f"Theta of one task for another: {there}"
        return f"Theta from {made['source']} layer {made['source_layer']} to {there}"

    def accuracies(self) -> "pd.DataFrame":
        """Give the accuracy of every run.

        Returns:
            One row per task and run: task, run, accuracy, low, high (Wilson, 95 %), n_queries (distinct).
        """
        return self._rates("correct", "run")

    def cross(self) -> "pd.DataFrame":
        """Give the accuracy of theta of every task on the queries of every task.

        Returns:
            One row per pair: task (whose queries), vector (whose theta), accuracy, low, high, n_queries.
        """
        return self._rates("cross", "vector")

    def _rates(self, variable: str, by: str) -> "pd.DataFrame":
        import pandas as pd

        each, rows = self.data[variable].transpose("task", by, "prompt"), []
        for i, task in enumerate(each["task"].values.tolist()):
            asked = self.data["query"].transpose("task", "prompt").values[i].tolist()
            for j, name in enumerate(each[by].values.tolist()):
                rate = float(each.values[i, j].mean())
                rows.append((task, name, rate, *of_queries(rate, asked), len(set(asked))))
        return pd.DataFrame(rows, columns=["task", by, "accuracy", "low", "high", "n_queries"])

    def summary(self) -> dict[str, Any]:
        """Means over the tasks, and the pair of tasks that help each other most."""
        made, flat = self.provenance, dict[str, Any]()
        wide: Any = self.accuracies().pivot(index="task", columns="run", values="accuracy")
        wide["gain"] = wide["mapped"] - wide["mean"]
        for name in wide.columns:
            values = wide[name].to_numpy()
            flat[name] = float(values.mean())
            flat[f"{name}_low"], flat[f"{name}_high"] = bootstrap(values)
        for name in ("mapped", "shuffled"):
            flat[f"cosine_{name}"] = float(self.data[f"cosine_{name}"].mean())
        cross: Any = self.cross()
        cross = cross[cross["task"] != cross["vector"]].reset_index(drop=True)
        best = cross.loc[cross["accuracy"].idxmax()]
        return {
            "model": made["model"],
            "source": made["source"],
            "layer": made["layer"],
            "source_layer": made["source_layer"],
            **flat,
            "cross_other": float(cross["accuracy"].mean()),
            "best_vector": str(best["vector"]),
            "best_task": str(best["task"]),
            "best_accuracy": float(best["accuracy"]),
            "seconds": made["seconds"],
        }

    def finding(self) -> str:
        """The result in one sentence."""
        s, made = self.summary(), self.provenance
        if made["same_model"] and made["source_layer"] == made["layer"]:
            return self._crossed(s)
        return (
            f"Theta mapped from {made['source']} layer {made['source_layer']}, by a map that never saw the "
            f"task, answers {s['mapped']:.2f} (own theta {s['own']:.2f}, mean of other tasks "
            f"{s['mean']:.2f}, shuffled map {s['shuffled']:.2f}, random {s['random']:.2f})."
        )

    @staticmethod
    def _crossed(s: Mapping[str, Any]) -> str:
        return (
            f"Theta of a task answers {s['own']:.2f} of its own queries; theta of another task "
            f"{s['cross_other']:.2f} on average, at best {s['best_accuracy']:.2f} ({s['best_vector']} for "
            f"{s['best_task']})."
        )

    def tables(self) -> "dict[str, pd.DataFrame]":
        """Accuracies with intervals, cosines, and the matrix of tasks."""
        cosines = [f"cosine_{name}" for name in ("mapped", "shuffled")]
        matrix: Any = self.cross().pivot(index="vector", columns="task", values="accuracy")
        names = self.data["vector"].values.tolist()
        alike: Any = self.data[cosines].mean("prompt").to_dataframe()
        return {
            "Accuracy by task and run": self.accuracies().set_index("task"),
            "Cosine of mapped and own theta, less the mean of the other tasks": alike[cosines],
            "Theta of each task (rows) on the queries of each (columns)": matrix.loc[names, names],
        }

    def drawn(self) -> xr.Dataset:
        """Give what the figures show: accuracies by task and run, and by task and vector."""
        runs = self.accuracies().set_index(["task", "run"]).to_xarray()
        cross = self.cross().set_index(["task", "vector"]).to_xarray()
        cross = cross.rename({name: f"cross_{name}" for name in cross.data_vars})
        order = {name: self.data[name].values for name in ("task", "run", "vector")}
        data = runs.merge(cross).reindex({k: np.asarray(v) for k, v in order.items()})
        return data.assign_attrs(
            self.data.attrs | {"finding": self.finding(), "crossed": self._crossed(self.summary())}
        )

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw grouped bars, or the matrix where nothing was mapped; see `tvlens.plots.transfer`."""
        from tvlens.plots.transfer import cross_matrix, transfer_bars

        made = self.provenance
        here = made["same_model"] and made["source_layer"] == made["layer"]
        return (cross_matrix if here else transfer_bars)(self.drawn(), **channels)

    def figures(self) -> "dict[str, go.Figure]":
        """The main figure, and the matrix of tasks."""
        from tvlens.plots.transfer import cross_matrix

        return {"main": self.plot(), "cross": cross_matrix(self.drawn())}
