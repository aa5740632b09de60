"""What a suite of layer sweeps found: every model, task and seed in one table of outcomes.

Models differ in depth. Layers that a model does not have hold NaN, never 0, and curves are compared on
normalised depth, layer / (layers - 1).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from einops import rearrange

from tvlens._errors import unknown
from tvlens.experiments._suite_grid import LAYER, PROMPT, SAME, axes, dataset, grid_of
from tvlens.experiments.layer_sweep import LayerSweep
from tvlens.intervals import accuracy, over_tasks
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.results import Result
from tvlens.tasks import PAPER_TASKS

if TYPE_CHECKING:
    import plotly.graph_objects as go

RUNS = ("baseline", "hypothesis", "regular", "majority", "query_blind", "control")
"""Three runs and their three floors."""
PAPER_MEANS = {
    "LLaMA 7B": (0.132, 0.776, 0.860),
    "LLaMA 13B": (0.149, 0.793, 0.868),
    "LLaMA 30B": (0.158, 0.783, 0.902),
    "GPT-J 6B": (0.119, 0.679, 0.814),
    "Pythia 2.8B": (0.134, 0.717, 0.829),
    "Pythia 6.9B": (0.106, 0.712, 0.818),
    "Pythia 12B": (0.114, 0.732, 0.819),
}
"""Baseline, hypothesis and regular that Hendel et al. report, means of their 18 tasks; not measured here."""
ALL = "all tasks"


class Suite(Result):
    """Layer sweeps of several models and tasks; outcomes are kept prompt by prompt."""

    kind: ClassVar[str] = "suite"
    references: ClassVar[tuple[str, ...]] = ("hendel2023context", "wilson1927", "efron1979")
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **{name: PROMPT for name in ("baseline", "regular", "majority", "query")},
        **{name: LAYER for name in ("hypothesis", "control")},
        "split": ("prompt",),
        "depth": ("model", "layer"),
        "n_layers": ("model",),
        "family": ("task",),
    }
    table: ClassVar[tuple[str, ...]] = ("regular", "baseline", "majority", "hypothesis", "control")
    method: ClassVar[str] = (
        f"{LayerSweep.method} This is done for every model, task and seed. A task's accuracy counts the "
        "prompts of all seeds. Intervals of means over tasks, and of curves: percentile bootstrap over seeds "
        "and, within each task and seed, over distinct queries, 95 %, and Wilson's over distinct queries "
        "where all or none are right; the tasks stay the same."
    )

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(map(str, self.data["model"].values))

    @property
    def title(self) -> str:
        """How many tasks, on which models."""
        return f"{self.data.sizes['task']} tasks on {', '.join(self.models)}"

    def best_layers(self) -> xr.DataArray:
        """Give the layer with the highest dev accuracy, the lowest such, by model, task and seed."""
        dev = self._of("dev")["hypothesis"].mean("prompt")
        return (
            dev["layer"][dev.fillna(-1).argmax("layer")]
            .rename("best_layer")
            .reset_coords(drop=True)
        )

    def outcomes(self) -> xr.Dataset:
        """Give the outcomes of test prompts for the three runs and three floors, at the layers chosen on dev.

        Returns:
            ``baseline, hypothesis, regular, majority, query_blind, control``, 1 for right, by model, task,
            seed and prompt.
        """
        test, best = self._of("test"), self.best_layers()
        found = {name: test[name] for name in ("baseline", "regular", "majority", "query")}
        found |= {name: test[name].sel(layer=best) for name in ("hypothesis", "control")}
        found["query_blind"] = test["hypothesis"].sel(layer=test["n_layers"] - 1)
        bare = {name: values.reset_coords(drop=True) for name, values in found.items()}
        return xr.Dataset(bare).transpose(*PROMPT)

    def tasks(self, model: str | None = None) -> pd.DataFrame:
        """Give the paper's table for one model: every task's accuracies on test queries.

        Args:
            model: Which model; not needed where there is one.

        Returns:
            By task: family; ``baseline, hypothesis, regular, majority, query_blind, control``, each with
            ``_low`` and ``_high`` (Wilson intervals that count distinct queries of all seeds); and the
            layers that dev queries chose, lowest and highest over seeds.

        Raises:
            ValueError: There is no such model, or several and none is named.
        """
        name = self._named(model)
        found, best = self.outcomes().sel(model=name), self.best_layers().sel(model=name)
        rows = {}
        for task, family in zip(found["task"].values, self.data["family"].values, strict=True):
            one = found.sel(task=task).drop_vars("task").stack(draw=("seed", "prompt"))
            flat = xr.Dataset(
                {run: ("prompt", one[run].values) for run in RUNS},
                coords={"query": ("prompt", one["query"].values)},
            )
            layers = best.sel(task=task).values
            rows[str(task)] = {
                "family": str(family),
                **_flat(flat),
                "layer_low": int(layers.min()),
                "layer_high": int(layers.max()),
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("task")

    def means(self, model: str | None = None) -> pd.DataFrame:
        """Give means over all tasks, and over those of each family, for one model.

        Args:
            model: Which model; not needed where there is one.

        Returns:
            By family, and ``"all tasks"``: the number of tasks, accuracies as in `tasks` with bootstrap
            intervals, ``of_regular`` (hypothesis over regular), and of the hypothesis the ``lowest`` and
            ``highest`` mean of a seed.

        Raises:
            ValueError: As in `tasks`.
        """
        found = self.outcomes().sel(model=self._named(model)).transpose("seed", "task", "prompt")
        families = self.data["family"].values.astype(str)
        rows: dict[str, dict[str, float]] = {}
        for family in (ALL, *dict.fromkeys(families)):
            some = found.isel(task=np.flatnonzero((families == family) | (family == ALL)))
            right = np.stack([some[run].values.astype(float) for run in RUNS], axis=-1)
            ends = over_tasks(right, some["query"].values)
            share = right.mean(axis=(0, 1, 2))
            row: dict[str, float] = {"tasks": some.sizes["task"]}
            for i, run in enumerate(RUNS):
                row |= {run: share[i], f"{run}_low": ends[0][i], f"{run}_high": ends[1][i]}
            seeds = some["hypothesis"].mean(["task", "prompt"])
            row["of_regular"] = share[1] / share[2] if share[2] else np.nan
            row |= {"lowest": float(seeds.min()), "highest": float(seeds.max())}
            rows[family] = row
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("family")

    def curves(self) -> xr.Dataset:
        """Give mean accuracy over tasks and seeds by layer of each model, with intervals.

        Returns:
            ``hypothesis`` and ``control`` by model and layer, ``regular`` and ``baseline`` by model, each
            with ``_low`` and ``_high``; ``peak``, the layer with the highest mean on dev; and ``depth``.
            NaN where a model has no such layer.
        """
        test = self._of("test").transpose("model", "seed", "task", "prompt", "layer")
        deep = self.data.sizes["layer"]
        parts = []
        for i, n in enumerate(self.data["n_layers"].values.tolist()):
            one = test.isel(model=i)
            flat = [rearrange(one[name].values, "s t p -> s t p 1") for name in _LEVELS]
            right = np.concatenate(
                [one["hypothesis"].values[..., :n], one["control"].values[..., :n], *flat], axis=-1
            ).astype(float)
            rows = np.stack([right.mean(axis=(0, 1, 2)), *over_tasks(right, one["query"].values)])
            wide = np.full((2, 3, deep), np.nan)
            wide[:, :, :n] = rearrange(
                rows[:, : 2 * n], "part (run layer) -> run part layer", run=2
            )
            table: dict[str, Any] = {}
            for run, values in zip(("hypothesis", "control"), wide, strict=True):
                table |= _parts(run, values, ("layer",))
            for run, values in zip(_LEVELS, rows[:, 2 * n :].T, strict=True):
                table |= _parts(run, values, ())
            parts.append(xr.Dataset(table))
        found = xr.concat(parts, "model", data_vars="all")
        dev = self._of("dev")["hypothesis"].mean(["task", "seed", "prompt"]).fillna(-1)
        peak = ("model", dev.transpose("model", "layer").values.argmax(axis=1))
        where = {name: self.data[name] for name in ("model", "layer", "depth", "n_layers")}
        return found.assign(peak=peak).assign_coords(where).assign_attrs(self.data.attrs)

    def finding(self) -> str:
        """The means of each model, in one sentence."""
        said = []
        for name in self.models:
            row: Any = self.means(name).loc[ALL].to_dict()
            part = f", {row['of_regular']:.0%} of regular" if row["regular"] else ""
            said.append(
                f"{name} baseline {row['baseline']:.2f}, hypothesis {row['hypothesis']:.2f} "
                f"({row['hypothesis_low']:.2f} to {row['hypothesis_high']:.2f}{part}), regular "
                f"{row['regular']:.2f}, random vector {row['control']:.2f}"
            )
        n = self.data.sizes["task"]
        return f"Mean of {n} task{'s' * (n != 1)}: {'; '.join(said)}."

    def summary(self) -> dict[str, Any]:
        """The means over all tasks; their names begin with the model's where there are several."""
        flat: dict[str, Any] = {
            "models": ", ".join(self.models),
            "n_tasks": self.data.sizes["task"],
        }
        flat["n_seeds"] = self.data.sizes["seed"]
        for name in self.models:
            before = f"{name}: " if len(self.models) > 1 else ""
            row: dict[Any, Any] = self.means(name).loc[ALL].drop("tasks").to_dict()
            flat |= {
                f"{before}mean_{key}": float(value) if value == value else None
                for key, value in row.items()
            }
        return flat | {"seconds": float(self.provenance["seconds"])}

    def tables(self) -> dict[str, pd.DataFrame]:
        """The paper's table: for each model its tasks, and means over all tasks and each family."""
        found = {}
        for name in self.models:
            found[f"{name}: accuracy by task"] = self.tasks(name)
            found[f"{name}: means"] = self.means(name)
        return found

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw mean accuracy by normalised depth; see `tvlens.plots.suite.accuracy_by_depth`."""
        from tvlens.plots.suite import accuracy_by_depth

        return accuracy_by_depth(self.curves().assign_attrs(finding=self.finding()), **channels)

    def figures(self) -> "dict[str, go.Figure]":
        """Mean accuracy by depth, the means of each model, and the accuracies of every task."""
        from tvlens.plots.accuracy_bars import accuracy_bars
        from tvlens.plots.suite import model_bars

        rows = [
            {"model": name, **self.means(name).loc[ALL].drop("tasks").to_dict()}
            for name in self.models
        ]
        reported = PAPER_MEANS if self.provenance["paper"] else {}
        found = {
            "Accuracy by depth": self.plot(),
            "Means by model": model_bars(
                pd.DataFrame(rows), n_tasks=self.data.sizes["task"], reported=reported
            ),
        }
        for name in self.models:
            table = self.tasks(name).reset_index()
            layers = table["layer_low"].astype(str)
            apart = table["layer_low"] != table["layer_high"]
            table["layer"] = layers.where(~apart, layers + " to " + table["layer_high"].astype(str))
            found[f"Tasks: {name}"] = accuracy_bars(table)
        return found

    @classmethod
    def of(cls, sweeps: Mapping[str, Sequence[LayerSweep]] | Sequence[LayerSweep]) -> "Suite":
        """Collect layer sweeps that were made with the same settings.

        Args:
            sweeps: Sweeps of every task and seed by name of the model; in a plain list, models go by the
                names they know themselves.

        Returns:
            One result.

        Raises:
            ValueError: There are none, they have other settings, or one is missing or there twice.

        Example:
            >>> Suite.of([tv.load(path) for path in paths]).tables()  # doctest: +SKIP
        """
        if not isinstance(sweeps, Mapping):
            by_name: dict[str, list[LayerSweep]] = {}
            for sweep in sweeps:
                by_name.setdefault(str(sweep.provenance["model"]), []).append(sweep)
            sweeps = by_name
        grid = grid_of(sweeps)
        data = dataset(grid)
        first = next(iter(grid.values())).provenance
        names, tasks, seeds = axes(grid)
        note = collect(
            kind=cls.kind, model=", ".join(names), task=", ".join(tasks), seeds=seeds,
            **{key: first[key] for key in SAME},
            answers=_both(str(one.provenance["answers"]) for one in grid.values()),
            paper=set(PAPER_TASKS) == set(tasks),
            model_facts={name: grid[name, tasks[0], seeds[0]].provenance["model_facts"] for name in names},
            sweeps=[
                {"model": name, "task": task, "seed": seed}
                | {key: one.provenance[key] for key in _OWN}
                for (name, task, seed), one in grid.items()
            ],
            seconds=round(sum(float(one.provenance["seconds"]) for one in grid.values()), 3),
        )  # fmt: skip
        return cls(data.assign_attrs({ATTRIBUTE: encode(note)}))

    def _of(self, split: str) -> xr.Dataset:
        there = np.flatnonzero(self.data["split"].values == split)
        names = ("baseline", "regular", "majority", "hypothesis", "control")
        data = self.data.isel(prompt=there)
        return data.assign({name: data[name].astype(float) for name in names})

    def _named(self, model: str | None) -> str:
        if model is None and len(self.models) == 1:
            return self.models[0]
        if model not in self.models:
            raise unknown("model of this suite", str(model), self.models)
        return model


_LEVELS = ("regular", "baseline")
_OWN = (
    "task_fingerprint", "spacing", "answers", "n_items", "one_token_share", "ambiguous_share", "seconds",
)  # fmt: skip


def _both(answers: Iterable[str]) -> str:
    """Which items were used, in the order of tasks; it may be others for other tasks and models."""
    return ", ".join(dict.fromkeys(answers))


def _flat(data: xr.Dataset) -> dict[str, float]:
    found: dict[str, float] = {}
    for run in RUNS:
        rate = accuracy(data, run, split="all")
        for part, ending in (("accuracy", ""), ("low", "_low"), ("high", "_high")):
            found[f"{run}{ending}"] = float(rate[part])
    return found


def _parts(run: str, values: np.ndarray, dims: tuple[str, ...]) -> dict[str, Any]:
    """Name mean and ends."""
    return {f"{run}{end}": (dims, v) for end, v in zip(("", "_low", "_high"), values, strict=True)}
