"""What a comparison of methods found, task by task and seed by seed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from tvlens.provenance import ATTRIBUTE, encode
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

REFERENCES = ("baseline", "random", "regular")
"""Runs that are no method."""
UNTOUCHED = "none"
"""Where nothing is written."""


class Comparison(Result):
    """What `compare` found; outcomes are kept by run, task, seed and prompt."""

    kind: ClassVar[str] = "comparison"
    references: ClassVar[tuple[str, ...]] = (
        "hendel2023context",
        "todd2024function",
        "yang2025learned",
    )
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "correct": ("task", "seed", "run", "prompt"),
        "kl": ("task", "seed", "run", "prompt"),
        "elsewhere": ("task", "seed", "where", "writer", "prompt"),
        "forwards": ("task", "seed", "writer"),
    }
    table: ClassVar[tuple[str, ...]] = ("correct", "kl", "answer_log_prob")
    method: ClassVar[str] = (
        "Each method makes its vector from dev prompts, whose queries and demonstrations are none of the "
        "test queries, and chooses layer and settings on them. It is written at the last token of test "
        "queries without demonstrations; a prediction is right when it is the first token of an accepted "
        "answer. "
        "Baseline: nothing is written. Random: random directions as long as the first method's vector. "
        "Regular: demonstrations in the prompt. KL: from the prediction with demonstrations to that of the "
        "run, in nats. Forwards: prompts through the model, a training step counted three times. Intervals: "
        "percentile bootstrap over seeds and, within each task and seed, over distinct queries, 95 %."
    )

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods."""
        return tuple(str(n) for n in self.data["run"].values if n not in REFERENCES)

    @property
    def title(self) -> str:
        """What was compared, on what."""
        n = self.data.sizes["task"]
        return f"{len(self.methods)} ways to make a task vector, {n} tasks on {self.provenance['model']}"

    def by_task(self) -> pd.DataFrame:
        """Accuracy of every run on every task, mean over seeds."""
        means = self.data["correct"].astype(float).mean(["prompt", "seed"])
        table = means.transpose("task", "run")
        tasks, runs = (pd.Index(table[dim].values.astype(str), name=dim) for dim in ("task", "run"))
        return pd.DataFrame(table.values, index=tasks, columns=runs)

    def means(self, *, level: float = 0.95) -> pd.DataFrame:
        """Means over tasks, run by run.

        Args:
            level: Confidence level between 0 and 1.

        Returns:
            ``accuracy, low, high``; ``lowest, highest`` of the seeds; ``of_regular``, the share of the
            accuracy with demonstrations; ``wins``, the number of tasks on which it is at least as good;
            ``kl``; and of methods ``forwards`` and ``seconds`` a task.

        Example:
            >>> result.means().loc["mean", "accuracy"]  # doctest: +SKIP
        """
        correct = self.data["correct"].astype(float)
        rows = correct.mean(["task", "seed"]).transpose("prompt", "run").values
        low, high = self._ends(level)
        seeds = correct.mean(["task", "prompt"]).transpose("seed", "run").values
        tasks = self.by_task()
        found = pd.DataFrame(
            {
                "accuracy": rows.mean(axis=0), "low": low, "high": high,
                "lowest": seeds.min(axis=0), "highest": seeds.max(axis=0),
            },
            index=pd.Index([str(n) for n in self.data["run"].values], name="run"),
        )  # fmt: skip
        found["of_regular"] = found["accuracy"] / found.loc["regular", "accuracy"]
        as_good = tasks.to_numpy() >= tasks[["regular"]].to_numpy() - 1e-9
        found["wins"] = as_good.sum(axis=0)
        found["kl"] = self.data["kl"].mean(["task", "seed", "prompt"]).values
        for cost in ("forwards", "seconds"):
            each = self.data[cost].mean(["task", "seed"])
            known = dict(zip(map(str, each["writer"].values), each.values.tolist(), strict=True))
            found[cost] = [known.get(str(name), np.nan) for name in found.index]
        return found

    def _ends(self, level: float, n_resamples: int = 2000) -> np.ndarray:
        """Ends of an interval of each run's mean: seeds are drawn again, and queries within task and seed."""
        rng, draws = np.random.default_rng(0), []
        correct = (
            self.data["correct"].astype(float).transpose("seed", "task", "prompt", "run").values
        )
        asked = self.data["query"].transpose("seed", "task", "prompt").values
        for of_seed, asked_in_seed in zip(correct, asked, strict=True):
            each = np.zeros((n_resamples, correct.shape[-1]))
            for right, queries in zip(of_seed, asked_in_seed, strict=True):
                # Prompts with one query stand or fall together.
                _, which = np.unique(queries.astype(str), return_inverse=True)
                belongs = np.eye(which.max() + 1)[which]
                n = belongs.shape[1]
                weights = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples) @ belongs.T
                each += (weights @ right) / weights.sum(axis=1, keepdims=True) / len(of_seed)
            draws.append(each)
        drawn = rng.integers(0, len(draws), (n_resamples, len(draws)))
        means = np.stack(draws)[drawn, np.arange(n_resamples)[:, None]].mean(axis=1)
        return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)

    def elsewhere(self) -> pd.DataFrame:
        """Accuracy where vectors were not made for, mean over tasks and seeds.

        Returns:
            By writer (``"none"`` is the untouched model): ``few_shot``, each other template, and
            ``unrelated_kl``, nats by which the prediction on unrelated text moves.

        Example:
            >>> result.elsewhere().loc["learned", "few_shot"]  # doctest: +SKIP
        """
        means = self.data["elsewhere"].astype(float).mean(["task", "seed", "prompt"])
        found = means.transpose("writer", "where").to_pandas()
        return found.assign(unrelated_kl=self.data["unrelated_kl"].mean(["task", "seed"]).values)

    def finding(self) -> str:
        """The best method, the best without training, and demonstrations."""
        table, n = self.means(), self.data.sizes["task"]
        regular = table.loc["regular", "accuracy"]
        neither = table.loc["baseline", "accuracy"]
        told = f"{self.provenance['shots']} demonstrations {regular:.2f}, neither {neither:.2f}"

        def said(name: str) -> str:
            row: Any = table.loc[name].to_dict()
            return (
                f"{name.replace('_', ' ')} {row['accuracy']:.2f} ({row['low']:.2f} to {row['high']:.2f}), at "
                f"least as good as demonstrations on {row['wins']:.0f} of {n} tasks"
            )

        methods = table.loc[list(self.methods), "accuracy"]
        best = str(methods.idxmax())
        free = methods.drop("learned", errors="ignore")
        other = (
            f"; best without training: {said(str(free.idxmax()))}"
            if best == "learned" and len(free)
            else ""
        )
        return f"Of test queries without demonstrations: {said(best)}{other}; {told}."

    def summary(self) -> dict[str, Any]:
        """The table, flat."""
        table = self.means()
        names = ("accuracy", "low", "high")
        return {
            "model": self.provenance["model"],
            "n_tasks": self.data.sizes["task"],
            "n_seeds": self.data.sizes["seed"],
            **{
                run + ("" if name == "accuracy" else f"_{name}"): float(table.loc[run, name])
                for run in table.index
                for name in names
            },
            "seconds": float(self.provenance["seconds"]),
        }

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw accuracies by task and method.

        Args:
            **channels: Of `tvlens.plots.comparison.comparison_heatmap`.

        Returns:
            The figure.
        """
        from tvlens.plots.comparison import comparison_heatmap

        return comparison_heatmap(self.data.assign_attrs(finding=self.finding()), **channels)

    @classmethod
    def join(cls, parts: Sequence["Comparison"]) -> "Comparison":
        """Put results of several tasks and seeds together.

        Args:
            parts: Results of one model, the same runs and equally many prompts.

        Returns:
            One result.

        Raises:
            ValueError: There are none, or they do not fit together.

        Example:
            >>> Comparison.join([first, second]).data.sizes["task"]  # doctest: +SKIP
        """
        if not parts:
            raise ValueError("there is nothing to join.")
        first = parts[0].provenance
        same = ("model", "shots", "n_dummy", "template", "n_dev", "n_test")
        for part in parts[1:]:
            differ = [name for name in same if part.provenance[name] != first[name]]
            for dim in ("run", "where"):
                if part.data[dim].values.tolist() != parts[0].data[dim].values.tolist():
                    differ.append(f"{dim}s")
            if differ:
                raise ValueError(f"comparisons of different {', '.join(differ)} do not join.")
        order = list(dict.fromkeys(str(t) for part in parts for t in part.data["task"].values))
        data = xr.combine_by_coords(
            [part.data.drop_attrs().drop_encoding() for part in parts], combine_attrs="drop", join="outer",
            compat="no_conflicts", data_vars="all",
        )  # fmt: skip
        if not isinstance(data, xr.Dataset) or bool(data["kl"].isnull().any()):
            raise ValueError("some task was not run with some seed: nothing to average over.")
        data = data.sel(task=order).sortby("seed")
        data = data.assign({name: data[name].astype(bool) for name in ("correct", "elsewhere")})
        note = {
            **first,
            "tasks": order,
            "notes": {k: v for part in parts for k, v in part.provenance["notes"].items()},
            "seconds": round(sum(float(part.provenance["seconds"]) for part in parts), 3),
        }
        return cls(data.assign_attrs({ATTRIBUTE: encode(note)}))
