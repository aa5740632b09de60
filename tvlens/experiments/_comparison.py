"""What a comparison of methods found, task by task and seed by seed."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from tvlens.intervals import differences_over_tasks, over_tasks
from tvlens.methods import TRAINED
from tvlens.provenance import ATTRIBUTE, encode
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

REFERENCES = ("baseline", "regular")
"""Runs that are no method."""
FLOORS = ("majority", "query_blind")
"""What a run must pass to have read the query."""
UNTOUCHED = ("none", "regular")
"""Writers where nothing is written: without demonstrations and with them."""


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
        "control": ("task", "seed", "way", "prompt"),
        "floor": ("task", "seed", "floor_kind", "prompt"),
        "elsewhere": ("task", "seed", "where", "writer", "prompt"),
        "forwards": ("task", "seed", "way"),
    }
    table: ClassVar[tuple[str, ...]] = ("correct", "kl", "answer_log_prob")
    method: ClassVar[str] = (
        "Each method makes its vector from dev prompts, whose queries and demonstrations are none of the "
        "test queries, and chooses layer and settings on them. It is written at the last token of test "
        "queries without demonstrations; a prediction is right when it is the first token of an accepted "
        "answer. "
        "Baseline: nothing is written. Regular: demonstrations in the prompt. Floors: majority is the most "
        "common dev answer, query blind mean theta at the last layer, constant the best single token in "
        "hindsight; a run that is not above them has read no query, and wins nothing. Control: random "
        "directions as long as what the method writes, others for each prompt, in the same places; where "
        "vectors are added they leave much of the baseline. Learned shuffled is a control, too, trained on "
        "the answers of other queries, and still theta where that helps nothing. KL: from the prediction "
        "with demonstrations to that of the run, in nats. Forwards: prompts through the model; a training "
        "step counts three times, and a prompt one however long it is. Intervals: percentile bootstrap over "
        "seeds (three say little about others) and, within each task and seed, over distinct queries, 95 %."
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
            ``accuracy`` with ``accuracy_low`` and ``accuracy_high``; ``lowest, highest`` of the seeds;
            ``of_regular``, the share of the accuracy with demonstrations; ``gain``, how much better it is
            than these, paired by query, with ``gain_low`` and ``gain_high``; ``wins``, the number of tasks
            on which it is at least as good and above the floors; ``kl``; and of methods ``control``, the
            accuracy of random directions, and ``forwards`` and ``seconds`` a task.

        Example:
            >>> result.means().loc["mean", "accuracy"]  # doctest: +SKIP
        """
        correct = self.data["correct"].astype(float)
        seeds = correct.mean(["task", "prompt"]).transpose("seed", "run").values
        at = list(map(str, self.data["run"].values)).index("regular")
        low, high = self._ends(over_tasks, correct, level)
        worst, most = self._ends(
            differences_over_tasks, correct - correct.sel(run="regular"), level
        )
        tasks, means = self.by_task(), seeds.mean(axis=0)
        found = pd.DataFrame(
            {
                "accuracy": means, "accuracy_low": low, "accuracy_high": high,
                "lowest": seeds.min(axis=0), "highest": seeds.max(axis=0),
                "of_regular": means / (means[at] or np.nan),
                "gain": means - means[at], "gain_low": worst, "gain_high": most,
            },
            index=pd.Index([str(n) for n in self.data["run"].values], name="run"),
        )  # fmt: skip
        as_good = tasks.to_numpy() >= tasks[["regular"]].to_numpy() - 1e-9
        above = tasks.to_numpy() > self.floors().to_numpy().max(axis=1, keepdims=True) + 1e-9
        found["wins"] = (as_good & above).sum(axis=0)
        found["kl"] = self.data["kl"].mean(["task", "seed", "prompt"]).values
        for name in ("control", "forwards", "seconds"):
            table = self.data[name].astype(float)
            each = table.mean([dim for dim in table.dims if dim != "way"])
            known = dict(zip(map(str, each["way"].values), each.values.tolist(), strict=True))
            found[name] = [known.get(str(run), np.nan) for run in found.index]
        return found

    def gains(self, *, level: float = 0.95) -> pd.DataFrame:
        """How much better than demonstrations each method is on each task, paired by query.

        Args:
            level: Confidence level between 0 and 1.

        Returns:
            By task, each method's difference with ``_low`` and ``_high``.
        """
        correct = self.data["correct"].astype(float)
        apart = correct - correct.sel(run="regular")
        rows = {}
        for task in map(str, self.data["task"].values):
            low, high = self._ends(differences_over_tasks, apart.sel(task=[task]), level)
            mean = apart.sel(task=task).mean(["seed", "prompt"]).values
            parts = zip(map(str, apart["run"].values), mean, low, high, strict=True)
            rows[task] = {
                f"{run}{end}": value
                for run, *three in parts
                if run in self.methods
                for end, value in zip(("", "_low", "_high"), three, strict=True)
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("task")

    def floors(self) -> pd.DataFrame:
        """Accuracy of what has not read the query, by task, mean over seeds.

        Returns:
            ``majority``, always the most common dev answer; ``query_blind``, mean theta at the last layer;
            ``constant``, the best single token in hindsight.
        """
        means = self.data["floor"].astype(float).mean(["seed", "prompt"]).transpose("task", ...)
        index = pd.Index(means["task"].values.astype(str), name="task")
        found = pd.DataFrame(means.values, index=index, columns=list(FLOORS))
        return found.assign(constant=self.data["constant"].mean("seed").values)

    def _ends(
        self, of: Callable[..., tuple[np.ndarray, np.ndarray]], values: xr.DataArray, level: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ends of an interval of each run's mean."""
        asked = self.data["query"].sel(task=values["task"]).transpose("seed", "task", "prompt")
        kept = values.transpose("seed", "task", "prompt", "run")
        return of(kept.values, asked.values, level=level)

    def elsewhere(self) -> pd.DataFrame:
        """Accuracy where vectors were not made for, mean over tasks and seeds.

        Returns:
            By writer (``"none"`` is the untouched model, ``"regular"`` with demonstrations in that
            template): ``few_shot``, each other template, and ``unrelated_kl``, nats by which the prediction
            on unrelated text moves.

        Example:
            >>> result.elsewhere().loc["learned", "few_shot"]  # doctest: +SKIP
        """
        # Task by task, since templates cannot judge equally many queries of each.
        means = self.data["elsewhere"].mean("prompt").mean(["task", "seed"])
        found = means.transpose("writer", "where").to_pandas()
        moved = self.data["unrelated_kl"].mean(["task", "seed"]).to_series()
        return found.assign(unrelated_kl=moved.reindex(found.index))

    def finding(self) -> str:
        """The best method, the best without training, and demonstrations."""
        table, n = self.means(), self.data.sizes["task"]
        regular = table.loc["regular", "accuracy"]
        neither = table.loc["baseline", "accuracy"]
        told = f"{self.provenance['shots']} demonstrations {regular:.2f}, neither {neither:.2f}"

        def said(name: str) -> str:
            row: Any = table.loc[name].to_dict()
            return (
                f"{name.replace('_', ' ')} {row['accuracy']:.2f} ({row['accuracy_low']:.2f} to "
                f"{row['accuracy_high']:.2f}), at least as good as demonstrations (and above the floors) on "
                f"{row['wins']:.0f} of {n} tasks"
            )

        methods = table.loc[list(self.methods), "accuracy"]
        best = str(methods.idxmax())
        free = methods.drop(list(TRAINED), errors="ignore")
        trained = best in TRAINED and len(free)
        other = f"; best without training: {said(str(free.idxmax()))}" if trained else ""
        return f"Of test queries without demonstrations: {said(best)}{other}; {told}."

    def summary(self) -> dict[str, Any]:
        """The table, flat."""
        table, flat = self.means(), {}
        for run in map(str, table.index):
            for end in ("", "_low", "_high"):
                value = float(table.loc[run, f"accuracy{end}"])  # pyright: ignore
                flat[f"{run}{end}"] = value if value == value else None
        return {
            "model": self.provenance["model"],
            "n_tasks": self.data.sizes["task"],
            "n_seeds": self.data.sizes["seed"],
            **flat,
            "seconds": float(self.provenance["seconds"]),
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """Means over tasks, accuracies by task, and what happens elsewhere."""
        return {
            "Means over tasks": self.means(),
            "By task": self.by_task().join(self.floors()),
            "Against demonstrations, task by task": self.gains(),
            "Elsewhere": self.elsewhere(),
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
        same = ("model", "origin", "shots", "n_dummy", "template", "answers", "n_dev", "n_test")
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
        data = data.assign({name: data[name].astype(bool) for name in ("correct", "control")})
        note = {
            **first,
            "tasks": order,
            **{
                name: {k: v for part in parts for k, v in part.provenance[name].items()}
                for name in ("notes", "fingerprints")
            },
            "seconds": round(sum(float(part.provenance["seconds"]) for part in parts), 3),
        }
        return cls(data.assign_attrs({ATTRIBUTE: encode(note)}))
