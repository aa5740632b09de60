"""What patching found: the metric in every cell for every prompt, and what follows from it.

The values are kept prompt by prompt next to those of the untouched runs. How much of the way from the
corrupted to the clean run a cell goes, its interval and its test are derived when asked.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr

from tvlens._errors import unknown
from tvlens.patching.statistics import bootstrap_ratio, correct, sign_flip
from tvlens.patching.words import spoken_place, spoken_position
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

VARIABLES = ("normalized", "effect", "value")
_ROUNDING = 1e-5  # of the size of a metric: smaller differences are none
_NOTHING = 0.005  # a share of the metric, or an effect, that is written as 0.00
_PAPERS = {
    "patch": ("zhang2024towards", "heimersheim2024patching"),
    "ablate": ("zhang2024towards", "heimersheim2024patching"),
    "trace": ("meng2022locating",),
    "patch_paths": ("wang2023interpretability", "goldowskydill2023localizing"),
    "attribution_patch": ("nanda2023attribution", "syed2023attribution"),
}


class _References:
    """The papers behind what was done; behind the class, those of all methods."""

    def __get__(self, result: "Patching | None", kind: type) -> tuple[str, ...]:
        if result is None:
            return tuple(dict.fromkeys(key for keys in _PAPERS.values() for key in keys))
        return _PAPERS.get(str(result.provenance.get("method")), ())


class Patching(Result):
    """What `patch` and its like found; the metric is kept prompt by prompt."""

    kind: ClassVar[str] = "patching"
    references: ClassVar[Any] = _References()
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {"clean": ("prompt",)}
    table: ClassVar[tuple[str, ...]] = ("value", "normalized")
    method: ClassVar[str] = (
        "Activations of one run are replaced, place by place, by those of another, and a metric of the "
        "logits at the last position is kept for every prompt. Normalised: 0 is the corrupted run, 1 the "
        "clean one. Intervals: percentile bootstrap over prompts, 95 %. Tests: paired sign flips over "
        "prompts, corrected for the number of cells."
    )

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return str(self.provenance["metric"])

    @property
    def direction(self) -> str:
        """``"denoise"``, ``"noise"`` or ``"ablate"``."""
        return str(self.provenance["direction"])

    @property
    def base(self) -> xr.DataArray:
        """The metric of the run that was changed, by prompt."""
        return self.data["corrupted" if self.direction == "denoise" else "clean"]

    @property
    def value(self) -> xr.DataArray:
        """The metric in every cell, by prompt."""
        return self.data["value"]

    @property
    def effect(self) -> xr.DataArray:
        """Change of the metric against the untouched run, by cell and prompt."""
        return (self.value - self.base).transpose(*self.value.dims).rename("effect")

    @property
    def normalized(self) -> xr.DataArray:
        """Share of the way from the corrupted (0) to the clean run (1); NaN where a pair agrees."""
        if "corrupted" not in self.data:
            raise ValueError("an ablation has one untouched run only; use .effect or .value.")
        shares = (self.value - self.data["corrupted"]) / self._gap()
        return shares.transpose(*self.value.dims).rename("normalized")

    def _gap(self) -> xr.DataArray:
        """Clean less corrupted metric; NaN where they agree up to rounding."""
        clean, corrupted = self.data["clean"], self.data["corrupted"]
        gap = clean - corrupted
        scale = np.maximum(np.abs(clean), np.abs(corrupted))
        return gap.where(np.abs(gap) > _ROUNDING * scale.clip(min=1e-3))

    def _variable(self, variable: str | None) -> tuple[str, xr.DataArray]:
        if variable is None:
            variable = "normalized" if "corrupted" in self.data else "effect"
            if variable == "normalized" and bool(self._gap().isnull().all()):
                variable = "effect"
        if variable not in VARIABLES:
            raise unknown("variable", variable, VARIABLES)
        return variable, getattr(self, variable)

    def mean(
        self,
        variable: str | None = None,
        *,
        level: float = 0.95,
        n_resamples: int = 2000,
        seed: int = 0,
    ) -> xr.Dataset:
        """Average over prompts, with bootstrap intervals.

        The mean of ``"normalized"`` is the ratio of mean changes, so that a pair whose two runs hardly
        differ cannot dominate it.

        Args:
            variable: ``"normalized"`` (the default where there are two runs), ``"effect"`` or ``"value"``.
            level: Confidence level between 0 and 1.
            n_resamples: How many draws of the prompts.
            seed: Seed of the draws.

        Returns:
            ``mean, low, high`` and ``n`` by cell; ends are NaN where fewer than two prompts have a value.

        Raises:
            ValueError: The variable is unknown, or an ablation is to be normalised.

        Example:
            >>> result.mean("effect")["mean"].sel(layer=3)  # doctest: +SKIP
        """
        name, values = self._variable(variable)
        if name == "normalized":
            gap = self._gap()
            above = (self.value - self.data["corrupted"]).where(gap.notnull())
            below = gap.broadcast_like(above).fillna(0.0)
        else:
            above, below = values, xr.ones_like(values)
        dims = [dim for dim in values.dims if dim != "prompt"]
        shape = tuple(values.sizes[dim] for dim in dims)
        rows, ones = (
            each.transpose("prompt", *dims).values.reshape(values.sizes["prompt"], -1).astype(float)
            for each in (above, below)
        )
        there = ~np.isnan(rows)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(there, rows, 0).sum(axis=0) / np.where(there, ones, 0).sum(axis=0)
        low, high = bootstrap_ratio(rows, ones, level=level, n_resamples=n_resamples, seed=seed)
        found = {"mean": mean, "low": low, "high": high, "n": there.sum(axis=0)}
        coords = {k: v for k, v in values.coords.items() if "prompt" not in v.dims}
        return xr.Dataset({k: (dims, v.reshape(shape)) for k, v in found.items()}, coords=coords)

    def test(self, *, correction: str = "holm", seed: int = 0) -> xr.Dataset:
        """Test in every cell whether the run changed at all, paired over prompts.

        Args:
            correction: ``"holm"`` (any false finding), ``"bh"`` (share of false findings) or ``"none"``.
            seed: Seed of drawn sign patterns, where there are too many to try all.

        Returns:
            ``effect`` (mean change), ``p`` and ``p_corrected`` by cell. Cells in which no prompt changed,
            as before the first differing token, have p = 1 and do not count as tested.

        Raises:
            ValueError: The correction is unknown.

        Example:
            >>> result.test()["p_corrected"].min()  # doctest: +SKIP
        """
        effect = self.effect
        dims = [dim for dim in effect.dims if dim != "prompt"]
        shape = tuple(effect.sizes[dim] for dim in dims)
        rows = effect.transpose("prompt", *dims).values.reshape(effect.sizes["prompt"], -1)
        # Rounding is no change.
        size = _ROUNDING * max(float(np.abs(self.value).max()), 1.0)
        rows = np.where(np.abs(np.nan_to_num(rows.astype(float))) > size, rows, 0.0)
        p, tested = sign_flip(rows, seed=seed), np.asarray(rows.any(axis=0))
        found = {"p": p, "p_corrected": correct(p, tested, correction=correction)}
        coords = {k: v for k, v in effect.coords.items() if "prompt" not in v.dims}
        table = xr.Dataset({k: (dims, v.reshape(shape)) for k, v in found.items()}, coords=coords)
        return table.assign(effect=effect.mean("prompt", skipna=True))

    def best(self, variable: str | None = None) -> dict[str, Any]:
        """Name the cell that moves the metric most, and how far, with its interval.

        Cells that turn one run into the other altogether, as the embedding of the only token that differs
        does, are no news and left out where there are others.

        Args:
            variable: As in `mean`.

        Returns:
            Labels of the cell, ``mean``, ``low``, ``high``.
        """
        name, _ = self._variable(variable)
        means = self.mean(name)
        moved = self.mean("effect", n_resamples=1)["mean"]
        size = np.abs(np.nan_to_num(moved.values))
        if "corrupted" in self.data:
            whole = 1.0 if self.direction == "denoise" else 0.0
            share = self.mean("normalized", n_resamples=1)["mean"].values
            news = np.where(np.abs(share - whole) < 1e-4, 0, size)
            size = news if news.any() else size
        at = np.unravel_index(int(size.argmax()), moved.shape)
        cell = means.isel(dict(zip(moved.dims, map(int, at), strict=True)))
        labels = {str(dim): cell[dim].values.item() for dim in moved.dims}
        if "token" in cell.coords:
            labels["token"] = str(cell["token"].values)
        return labels | {part: float(cell[part]) for part in ("mean", "low", "high")}

    @property
    def title(self) -> str:
        """What was done, where, and in which model."""
        made = self.provenance
        return f"{made['heading']}: {', '.join(made['sites'])} of {made['model']}"

    def finding(self) -> str:
        """The result in one sentence."""
        name, _ = self._variable(None)
        if name == "normalized":
            carried = self._carried()
            return self._share(carried)
        best, n = self.best(name), self.data.sizes["prompt"]
        if abs(best["mean"]) < _NOTHING:
            return f"{self.provenance['verb']} {_site_list(self)} nowhere moves the {self._named}{_over(n)}."
        return (
            f"{self.provenance['verb']} {spoken_place(best)} moves the {self._named} most: from "
            f"{float(self.base.mean()):.2f} by {best['mean']:+.2f}{_interval(best)}, mean of "
            f"{n} prompt{'s' * (n != 1)}."
        )

    @property
    def _named(self) -> str:
        return self.metric.replace("_", " ")

    @property
    def _stream(self) -> str:
        """The first site of the residual stream; empty where there is none."""
        return next((s for s in map(str, self.data["site"].values) if s.startswith("resid")), "")

    def _share(self, carried: str) -> str:
        """Say how much one cell recovers or destroys, or where at least half does."""
        n, denoise = self.data.sizes["prompt"], self.direction == "denoise"
        done, verb = "recovers" if denoise else "destroys", self.provenance["verb"]
        if carried:
            said = f"{verb} {self._stream} {done} at least half of the {self._named} at {carried}"
        else:
            best = self.best("normalized")
            if not denoise:
                flipped = {
                    "mean": 1 - best["mean"],
                    "low": 1 - best["high"],
                    "high": 1 - best["low"],
                }
                best |= flipped
            share = f"{best['mean']:.2f}{_interval(best)}"
            said = f"{verb} {spoken_place(best)} {done} {share} of the {self._named}"
            if abs(best["mean"]) < _NOTHING:
                said = f"{verb} {_site_list(self)} nowhere moves the {self._named}"
        clean, corrupted = (float(self.data[run].mean()) for run in ("clean", "corrupted"))
        return (
            f"{said}; the clean run has {clean:.2f}, the corrupted one {corrupted:.2f}{_over(n)}."
        )

    def _carried(self) -> str:
        """Say in which layers which position of the residual stream carries half of the answer.

        The strongest cell of a residual stream is no news: below the layer where information moves, the
        token that differs holds all of it, and above it the last one.
        """
        if not self._stream or self.value.dims[1:] != ("layer", "position", "prompt"):
            return ""
        shares = self.mean("normalized", n_resamples=1)["mean"].sel(site=self._stream)
        half = shares >= 0.5 if self.direction == "denoise" else shares <= 0.5
        spans = []
        for i in np.flatnonzero(half.any("layer").values):
            layers = half["layer"].values[half.isel(position=i).values]
            labels = {"position": int(half["position"][i]), "token": str(half["token"].values[i])}
            spans.append((int(layers.min()), int(layers.max()), spoken_position(labels)))
        if not 2 <= len(spans) <= 4:
            return ""
        said = [f"{where} in layers {low} to {high}" for low, high, where in sorted(spans)]
        return ", and at ".join(said)

    def summary(self) -> dict[str, Any]:
        """The strongest cell with its interval, both untouched runs, and the time taken."""
        name, _ = self._variable(None)
        best = self.best(name)
        ends = {
            name: best.pop("mean"),
            f"{name}_low": best.pop("low"),
            f"{name}_high": best.pop("high"),
        }
        made = self.provenance
        runs = {
            run: float(self.data[run].mean()) for run in ("clean", "corrupted") if run in self.data
        }
        return {
            "model": made["model"],
            "metric": self.metric,
            **{key: value for key, value in best.items() if key != "token"},
            **ends,
            **runs,
            "n_prompts": self.data.sizes["prompt"],
            "seconds": made["seconds"],
        }

    def to_dataframe(self, *variables: str) -> Any:
        """Give a tidy table: one row for each cell and prompt.

        Args:
            *variables: Variables of the data, ``"effect"`` or ``"normalized"``; by default the value and
                what can be derived from it.

        Returns:
            The table; labels are columns, too.

        Raises:
            ValueError: A variable does not exist.
        """
        derived = {"effect": self.effect}
        if "corrupted" in self.data:
            derived["normalized"] = self.normalized
        known = self.data.assign(derived)
        names = list(variables or ("value", *derived))
        for name in names:
            if name not in known.data_vars:
                raise unknown("variable", name, map(str, known.data_vars))
        frame = known[names].to_dataframe().reset_index()
        labels = [name for name in frame.columns if name not in names]
        return frame.reindex(columns=labels + names)

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw the heat map; see `tvlens.plots.patching_heatmap`."""
        from tvlens import plots

        name, _ = self._variable(channels.pop("variable", None))
        return plots.patching_heatmap(
            self.drawn(name, prompts=channels.pop("prompts", "mean")), **channels
        )

    def drawn(self, variable: str | None = None, *, prompts: str = "mean") -> xr.Dataset:
        """Give what a heat map shows: means, intervals and tokens, without the model.

        Args:
            variable: As in `mean`.
            prompts: ``"mean"``, or ``"each"`` for the mean and every prompt.

        Returns:
            Means and intervals by cell, and where asked for the same of every prompt.

        Raises:
            ValueError: A name is unknown.
        """
        if prompts not in ("mean", "each"):
            raise unknown("choice of prompts", prompts, ("mean", "each"))
        name, values = self._variable(variable)
        drawn = self.mean(name).assign(value=self.mean("value", n_resamples=1)["mean"])
        extra = [v for v in self.data.variables if str(v).startswith(("clean", "corrupted", "top"))]
        drawn = drawn.assign({str(v): self.data[v] for v in extra})
        if prompts == "each":
            drawn = drawn.assign(each=values, each_value=self.value)
        note = {"variable": name, "finding": self.finding()}
        return drawn.assign_attrs(**self.data.attrs, **note)


def _interval(labels: Mapping[str, Any]) -> str:
    """Write an interval, where there are prompts enough for one."""
    return "" if np.isnan(labels["low"]) else f" ({labels['low']:.2f} to {labels['high']:.2f})"


def _site_list(result: Patching) -> str:
    return ", ".join(map(str, result.data["site"].values))


def _over(n: int) -> str:
    return f", over {n} prompt{'s' * (n != 1)}"
