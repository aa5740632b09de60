"""What gradients found: how much of a metric each place accounts for, with what they miss of the change."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr

from tvlens._words import fixed
from tvlens.attribution.results import TINY, means
from tvlens.plots.theme import visible
from tvlens.results import Result

_MUCH = 0.01  # of the metric's change: missing more says that there were too few steps
_TOO_MUCH = 0.1  # missing more, no place accounts for anything

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Gradients(Result):
    """What `attribute_gradients` found: how much of the metric each place accounts for, by its gradient."""

    kind: ClassVar[str] = "gradients"
    references: ClassVar[tuple[str, ...]] = ("sundararajan2017axiomatic", "shrikumar2016just")
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {"value": ("prompt",)}
    table: ClassVar[tuple[str, ...]] = ("attribution",)
    method: ClassVar[str] = (
        "An activation less its baseline is multiplied by the gradient of the metric: at the prompt itself "
        "(gradient x activation, baseline zero), or integrated along the straight line from the baseline "
        "(integrated gradients, by Simpson's rule on stretches that are halved where they miss the change of "
        "the metric). The residual is what the attributions miss of the metric's change from the baseline. "
        "Intervals: percentile bootstrap over prompts, 95 %."
    )

    @property
    def metric(self) -> str:
        """Name of the metric."""
        return str(self.provenance["metric"])

    @property
    def completeness(self) -> xr.DataArray:
        """Size of what the attributions miss, as a share of the metric's change from the baseline."""
        gap = abs(self.data["value"] - self.data["baseline"]).clip(min=TINY)
        missed = abs(self.data["residual"])
        return (missed / gap).transpose(*missed.dims).rename("completeness")

    def mean(self, *, level: float = 0.95, seed: int = 0) -> xr.Dataset:
        """Average the attributions over prompts, with bootstrap intervals.

        Args:
            level: Confidence level between 0 and 1.
            seed: Seed of the draws.

        Returns:
            ``mean, low, high``.

        Example:
            >>> result.mean()["mean"]  # doctest: +SKIP
        """
        return means(self.data["attribution"], level=level, seed=seed)

    @property
    def title(self) -> str:
        """What was attributed, how, and in which model."""
        made = self.provenance
        return (
            f"{made['heading']} by {made['by']}: {self.metric.replace('_', ' ')} of {made['model']}"
        )

    def best(self) -> dict[str, Any]:
        """Name the place with the largest absolute mean, with its interval.

        Returns:
            Its labels, ``mean``, ``low``, ``high``.
        """
        found = self.mean()
        size = np.abs(np.nan_to_num(found["mean"].values))
        at = np.unravel_index(int(size.argmax()), size.shape)
        cell = found.isel(dict(zip(found["mean"].dims, map(int, at), strict=True)))
        labels = {str(dim): cell[dim].values.item() for dim in found["mean"].dims}
        return labels | {"token": str(cell["token"].values)} | {
            part: float(cell[part]) for part in ("mean", "low", "high")
        }  # fmt: skip

    def finding(self) -> str:
        """The strongest place in one sentence."""
        best, n = self.best(), self.data.sizes["prompt"]
        token = best["token"].partition(": ")[2]
        where = [f"{d} {best[d]}" for d in ("layer", "head", "position") if d in best]
        named = f" ({visible(token)})" if token and not token.endswith("…") else ""
        place = f"{', '.join(where)}{named}"
        missed, integrated = float(self.completeness.max()), self._integrated
        if integrated and missed <= _TOO_MUCH:
            said = f"{place[:1].upper()}{place[1:]} accounts for"
        else:
            said = f"{'Integrated gradients give' if integrated else 'Gradient x activation gives'} {place}"
        value, base = (float(self.data[name].mean()) for name in ("value", "baseline"))
        interval = (
            "" if np.isnan(best["low"]) else f" ({fixed(best['low'])} to {fixed(best['high'])})"
        )
        over, most = (f", mean of {n} prompts", " at most") if n > 1 else ("", "")
        return (
            f"{said} {fixed(best['mean'], sign=True)}{interval} of the change of the "
            f"{self.metric.replace('_', ' ')} from {fixed(base)} at the baseline to {fixed(value)}{over}; "
            f"the attributions miss {missed:.1%} of it{most}{self._advice(missed)}."
        )

    @property
    def _integrated(self) -> bool:
        return self.provenance["method"] == "integrated_gradients"

    def _advice(self, missed: float) -> str:
        """What to do where much is missed."""
        if self._integrated:
            return ": take more steps" * (missed > _MUCH)
        return ': use method="integrated_gradients"' * (missed > _TOO_MUCH)

    def summary(self) -> dict[str, Any]:
        """The strongest place with its interval, the metric, and what the attributions miss."""
        best, made = self.best(), self.provenance
        ends = {
            "share": best.pop("mean"),
            "share_low": best.pop("low"),
            "share_high": best.pop("high"),
        }
        return {
            "model": made["model"],
            "method": made["method"],
            "metric": self.metric,
            **{key: value for key, value in best.items() if key != "token"},
            **ends,
            "value": float(self.data["value"].mean()),
            "completeness_error": float(self.completeness.max()),
            "n_prompts": self.data.sizes["prompt"],
            "seconds": made["seconds"],
        }

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw highlighted tokens, or a map of layers (and heads) by position.

        Args:
            **channels: Of `tvlens.plots.attribution.token_highlights` or `tvlens.plots.patching_heatmap`.

        Returns:
            The figure.
        """
        from tvlens.plots.attribution import token_highlights
        from tvlens.plots.patching import patching_heatmap

        draw = (
            token_highlights
            if self.data["attribution"].dims == ("position", "prompt")
            else patching_heatmap
        )
        return draw(self.drawn(), **channels)

    def drawn(self) -> xr.Dataset:
        """Give what the figure shows, without the model.

        Returns:
            Values by prompt and position for tokens; else means by layer, head and position.
        """
        note = {**self.data.attrs, "variable": "attribution", "finding": self.finding()}
        values = self.data["attribution"]
        total = self.data["value"].drop_vars(list(self.data["value"].coords))
        if values.dims == ("position", "prompt"):
            shown = xr.Dataset({"value": values.transpose("prompt", "position"), "total": total})
        elif "head" in values.dims:
            # A map has two axes: where a head acts is in the data.
            shown = means(values.sum("position", skipna=True)).assign(total=total)
        else:
            shown = self.mean().assign(total=total)
        return shown.assign_attrs(note)
