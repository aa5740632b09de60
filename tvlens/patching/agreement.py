"""How far can the estimate be trusted? Attribution patching against true patching, cell by cell.

A high rank correlation says that the estimate finds the cells that matter; it says nothing about their size,
and a few cells may still be far off. So the cells where it fails are named.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from tvlens.patching.results import Patching
from tvlens.patching.words import spoken_place
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

_ROUNDING = 1e-5  # of the largest effect: less is no effect
_FAR = 0.1  # of the largest true effect: more is a failure


class Agreement(Result):
    """Estimated and true effects of the same cells, by prompt."""

    kind: ClassVar[str] = "patching_agreement"
    references: ClassVar[tuple[str, ...]] = ("nanda2023attribution", "syed2023attribution")
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    table: ClassVar[tuple[str, ...]] = ("estimated", "true")
    method: ClassVar[str] = (
        "Effects of exchanging activations as estimated from gradients, against those of truly exchanging "
        "them, as means over prompts in every cell. Cells in which neither changes anything are left out. "
        "Correlations over cells: Spearman's of ranks, Pearson's of values. A cell fails where the estimate "
        "is off by more than a tenth of the largest true effect. Intervals: percentile bootstrap over "
        "prompts, 95 %."
    )

    @property
    def cells(self) -> pd.DataFrame:
        """Every cell in which anything changes: its labels, ``estimated``, ``true`` and ``error``."""
        means = self.data[["estimated", "true"]].mean("prompt", skipna=True)
        frame = means.to_dataframe().reset_index()
        labels = [n for n in ("site", "layer", "head", "position", "token") if n in frame]
        one, other = (frame[name].to_numpy(dtype=float) for name in ("estimated", "true"))
        kept = _changed(one, other)
        found = frame.loc[kept, labels].assign(estimated=one[kept], true=other[kept])
        return found.assign(error=(one - other)[kept]).reset_index(drop=True)

    def failures(self, *, share: float = _FAR) -> pd.DataFrame:
        """Name the cells where the estimate is far off, the worst first.

        Args:
            share: How far: a share of the largest true effect.

        Returns:
            As `cells`, those cells only.

        Example:
            >>> agreement.failures().head()  # doctest: +SKIP
        """
        cells = self.cells
        error, true = (np.abs(cells[name].to_numpy()) for name in ("error", "true"))
        order = np.argsort(-error, kind="stable")
        far = order[error[order] > share * true.max(initial=0.0)]
        return cells.iloc[far].reset_index(drop=True)

    def correlation(
        self, *, level: float = 0.95, n_resamples: int = 500, seed: int = 0
    ) -> dict[str, float]:
        """Correlate estimated and true effects over cells.

        Args:
            level: Confidence level between 0 and 1.
            n_resamples: How many draws of the prompts.
            seed: Seed of the draws.

        Returns:
            ``spearman`` and ``pearson``, each also with ``_low`` and ``_high``; ends are NaN for one prompt.

        Example:
            >>> agreement.correlation()["spearman"]  # doctest: +SKIP
        """
        pairs = [self.data[name].transpose("prompt", ...) for name in ("estimated", "true")]
        one, other = (each.values.reshape(len(each), -1).astype(float) for each in pairs)
        n, rng = len(one), np.random.default_rng(seed)
        names = ("spearman", "pearson")
        found: dict[str, float] = dict(zip(names, _correlations(one, other), strict=True))
        drawn = np.full((1, 2), np.nan)
        if n > 1:
            rows = rng.integers(0, n, (n_resamples, n))
            drawn = np.array([_correlations(one[row], other[row]) for row in rows])
        tail = 100 * (1 - level) / 2
        for i, name in enumerate(names):
            some = drawn[~np.isnan(drawn[:, i]), i]
            ends = np.percentile(some, [tail, 100 - tail]) if len(some) else (np.nan, np.nan)
            found |= {f"{name}_low": float(ends[0]), f"{name}_high": float(ends[1])}
        return found

    @property
    def title(self) -> str:
        """What was compared, in which model."""
        made = self.provenance
        return f"Attribution against patching: {', '.join(made['sites'])} of {made['model']}"

    def finding(self) -> str:
        """Both correlations, and the worst cell."""
        cells, far = self.cells, self.failures()
        if cells.empty:
            return "No cell changes anything, neither as estimated nor truly: nothing to compare."
        found = self.correlation()
        low, high = found["spearman_low"], found["spearman_high"]
        interval = "" if np.isnan(low) else f" ({low:.2f} to {high:.2f})"
        said = (
            f"Estimated and true effects of {len(cells):,} cells have rank correlation "
            f"{found['spearman']:.2f}{interval}, Pearson's {found['pearson']:.2f}"
        )
        if not len(far):
            return f"{said}; no cell is off by a tenth of the largest effect."
        worst: Any = far.iloc[0].to_dict()
        return (
            f"{said}; {len(far):,} {'is' if len(far) == 1 else 'are'} off by more than a tenth of the "
            f"largest effect, most {spoken_place(worst)}: {worst['estimated']:+.2f} estimated, "
            f"{worst['true']:+.2f} true."
        )

    def summary(self) -> dict[str, Any]:
        """Correlations with their intervals, how many cells there are, and how many fail."""
        made = self.provenance
        return {
            "model": made["model"],
            "metric": made["metric"],
            **self.correlation(),
            "n_cells": len(self.cells),
            "n_failures": len(self.failures()),
            "n_prompts": self.data.sizes["prompt"],
            "seconds_estimated": made["seconds_estimated"],
            "seconds_true": made["seconds_true"],
        }

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw the scatter; see `tvlens.plots.agreement.agreement_scatter`."""
        from tvlens.plots.agreement import agreement_scatter

        drawn = xr.Dataset.from_dataframe(self.cells.rename_axis("cell"))
        far = _FAR * float(np.abs(self.cells["true"].to_numpy()).max(initial=0.0))
        drawn = drawn.assign_attrs(**self.data.attrs, finding=self.finding(), far=far)
        return agreement_scatter(drawn, **channels)


def agreement(estimated: Patching, true: Patching) -> Agreement:
    """Compare attribution patching with true patching of the same cells and prompts.

    Args:
        estimated: What `attribution_patch` gave.
        true: What `patch` gave, with the same arguments.

    Returns:
        Effects of both, as a result that draws itself.

    Raises:
        ValueError: They are swapped or of one kind, or have other cells, prompts, metrics or directions.
        TypeError: One of them is no result of patching.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.patching.gradients import attribution_patch
        >>> from tvlens.testing import tiny_model
        >>> asked = {"answers": "B", "wrong": "b", "sites": "z", "by": ("layer", "head")}
        >>> pair = tiny_model(), "a->A b->", "a->a b->"
        >>> found = agreement(attribution_patch(*pair, **asked), tv.patch(*pair, **asked))
        >>> found.correlation()["spearman"] > 0.5
        True

    References:
        Nanda 2023, nanda2023attribution; Syed, Rager, Conmy 2023, arXiv:2310.10348.
    """
    from tvlens.provenance import ATTRIBUTE, collect, encode

    _check_kinds(estimated, true)
    ours, theirs = estimated.provenance, true.provenance
    for name in ("metric", "direction", "model", "positions", "heads"):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"the estimate has {name} {ours.get(name)!r}, true patching {theirs.get(name)!r}."
            )
    one, other = estimated.value, true.value
    labels = [n for n in ("site", "layer", "head", "position") if n in {*one.dims, *other.dims}]
    for name in (*labels, "prompt"):
        if name not in one.dims or name not in other.dims or one.sizes[name] != other.sizes[name]:
            raise ValueError(
                f"the estimate has cells {dict(one.sizes)}, true patching {dict(other.sizes)}; "
                "give both the same arguments."
            )
    for name in (*labels, "clean_text", "corrupted_text", "answer", "wrong"):
        if name in estimated.data and not _same(estimated.data[name], true.data.get(name)):
            raise ValueError(f"the estimate and true patching have different {name}s.")
    note = collect(
        kind=Agreement.kind, model=ours["model"], metric=ours["metric"], sites=ours["sites"],
        by=ours["by"], direction=ours["direction"], n_layers=ours["n_layers"],
        seconds_estimated=ours["seconds"], seconds_true=theirs["seconds"],
    )  # fmt: skip
    kept = {"estimated": estimated.effect, "true": true.effect.transpose(*one.dims)}
    table = {name: (each.dims, each.values) for name, each in kept.items()}
    return Agreement(xr.Dataset(table, coords=one.coords, attrs={ATTRIBUTE: encode(note)}))


def _check_kinds(estimated: Any, true: Any) -> None:
    """Refuse all but an estimate and the truth, in this order."""
    needs = {"estimated": ("attribution_patch", estimated), "true": ("patch", true)}
    for name, (makes, given) in needs.items():
        if not isinstance(given, Patching):
            raise TypeError(
                f"{name} must be what tv.{makes} gives; {type(given).__name__} arrived."
            )
    made = {name: given.provenance.get("method") for name, (_, given) in needs.items()}
    if (made["estimated"], made["true"]) == ("patch", "attribution_patch"):
        raise ValueError(
            "the two are swapped: the estimate comes first, agreement(estimated, true)."
        )
    for name, (makes, _) in needs.items():
        if made[name] != makes:
            raise ValueError(
                f"{name} must be what tv.{makes} gives; a result of tv.{made[name]} arrived. "
                "agreement compares an estimate with true patching: agreement(estimated, true)."
            )


def _same(one: xr.DataArray, other: xr.DataArray | None) -> bool:
    return other is not None and one.values.tolist() == other.values.tolist()


def _correlations(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Spearman's and Pearson's correlation of means over prompts, of cells where anything changes."""
    there = ~np.isnan(one) & ~np.isnan(other)
    count = np.maximum(there.sum(axis=0), 1)
    x, y = (np.where(there, each, 0).sum(axis=0) / count for each in (one, other))
    kept = _changed(x, y)
    x, y = x[kept], y[kept]
    return _pearson(_ranks(x), _ranks(y)), _pearson(x, y)


def _changed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cells in which anything changes beyond rounding; none where a value is missing."""
    size = np.nan_to_num(np.maximum(np.abs(one), np.abs(other)))
    return size > _ROUNDING * max(float(size.max(initial=0.0)), 1e-12)


def _ranks(values: np.ndarray) -> np.ndarray:
    return pd.Series(values).rank().to_numpy()


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or not np.ptp(x) or not np.ptp(y):
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
