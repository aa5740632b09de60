"""What every head does for a task, kept trial by trial, and which heads do it for every task."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import needs, unknown
from tvlens.intervals import bootstrap
from tvlens.patching.agreement import Agreement
from tvlens.patching.statistics import bootstrap_ratio
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

METHODS = ("effect", "estimate")


class HeadEffects(Result):
    """Indirect effect of every head on shuffled-label prompts, by trial, and the heads' mean outputs."""

    kind: ClassVar[str] = "head_effects"
    references: ClassVar[tuple[str, ...]] = (
        "todd2024function",
        "nanda2023attribution",
        "syed2023attribution",
    )
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {"output": ("layer", "head", "d_head")}
    table: ClassVar[tuple[str, ...]] = ()
    method: ClassVar[str] = (
        "Each head's output at the last token is averaged over prompts with proper demonstrations. In "
        "prompts whose demonstrations have shuffled labels it then replaces the head's own output, one head "
        "at a time; the effect is the rise of the probability of the right answer's first token, and its "
        "mean over trials the average indirect effect (AIE). The estimate is the change of the head's "
        "output times that probability's gradient. Intervals: percentile bootstrap over trials, 95 %."
    )

    @property
    def methods(self) -> tuple[str, ...]:
        """Which effects there are: ``"effect"``, ``"estimate"``."""
        return tuple(name for name in METHODS if name in self.data)

    @property
    def outputs(self) -> Float[Tensor, "layer head d_head"]:
        """Mean outputs of all heads on proper prompts, before W_O."""
        return self.to_tensor("output")

    def mean(
        self, by: str | None = None, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
    ) -> xr.Dataset:
        """Average over trials, with bootstrap intervals.

        Args:
            by: ``"effect"`` or ``"estimate"``; the first that there is by default.
            level: Confidence level between 0 and 1.
            n_resamples: How many draws of the trials.
            seed: Seed of the draws.

        Returns:
            ``mean, low, high`` by layer and head; ends are NaN for a single trial.

        Raises:
            ValueError: There are no such effects.

        Example:
            >>> effects.mean()["mean"].max()  # doctest: +SKIP
        """
        found = self.data[self._method(by)].transpose("trial", "layer", "head")
        rows = rearrange(found.values.astype(float), "trial layer head -> trial (layer head)")
        low, high = bootstrap_ratio(
            rows, np.ones_like(rows), level=level, n_resamples=n_resamples, seed=seed
        )
        parts = {"mean": rows.mean(axis=0), "low": low, "high": high}
        dims, shape = found.dims[1:], found.shape[1:]
        table = {name: (dims, values.reshape(shape)) for name, values in parts.items()}
        return xr.Dataset(table, coords={dim: found[dim] for dim in dims})

    def top(self, n: int = 10, *, by: str | None = None) -> pd.DataFrame:
        """Give the heads with the largest mean effect.

        Args:
            n: How many.
            by: As in `mean`.

        Returns:
            ``layer, head, mean, low, high``, largest first.

        Raises:
            ValueError: The model has fewer heads, or there are no such effects.

        Example:
            >>> effects.top(3)  # doctest: +SKIP
        """
        return _largest(self.mean(by).to_dataframe().reset_index(), n)

    def heads(self, n: int = 10, *, by: str | None = None) -> list[tuple[int, int]]:
        """Give the same heads as pairs of layer and head, for `function_vector`.

        Args:
            n: How many.
            by: As in `mean`.

        Returns:
            Layer and head of each, largest mean effect first.
        """
        best = self.top(n, by=by)
        return list(zip(best["layer"].astype(int), best["head"].astype(int), strict=True))

    def shared(self, n: int = 10) -> int:
        """Count the heads that both methods have among their first n.

        Args:
            n: How many of each.

        Returns:
            How many they share.
        """
        return len(set(self.heads(n, by="effect")) & set(self.heads(n, by="estimate")))

    def agreement(self) -> Agreement:
        """Compare the gradient's estimate with patching, head by head.

        Returns:
            Correlations with intervals, and a scatter, as a result.

        Raises:
            ValueError: Only one of them was measured.

        Example:
            >>> effects.agreement().correlation()["spearman"]  # doctest: +SKIP
        """
        made = self.provenance
        for name in METHODS:
            self._method(name)
        both = {"estimated": self.data["estimate"], "true": self.data["effect"]}
        table = xr.Dataset(both).rename(trial="prompt").expand_dims(site=["z"]).drop_attrs()
        note = collect(
            kind=Agreement.kind, model=made["model"], metric="probability", sites=["z"],
            by=["layer", "head"], direction="denoise", n_layers=made["n_layers"],
            seconds_estimated=made["seconds"]["estimate"], seconds_true=made["seconds"]["effect"],
        )  # fmt: skip
        return Agreement(table.assign_attrs({ATTRIBUTE: encode(note)}))

    def _method(self, by: str | None) -> str:
        name = self.methods[0] if by is None and self.methods else str(by)
        if name not in METHODS:
            raise unknown("kind of effect", name, METHODS)
        if name not in self.data:
            raise ValueError(
                f"these heads were measured by {', '.join(self.methods) or 'nothing'}, not by {name!r}; "
                f"ask for head_effects(..., methods={METHODS})."
            )
        return name

    @property
    def title(self) -> str:
        """What was measured, on which task and model."""
        made = self.provenance
        return f"Head effects: {made['task']} on {made['model']}"

    def finding(self) -> str:
        """The strongest head, how the effect is spread, and how far the gradient agrees."""
        n = self.data.sizes["trial"]
        means = self.mean(n_resamples=1)["mean"].values
        best = self.top(1).iloc[0]
        interval = "" if np.isnan(best["low"]) else f" ({best['low']:+.3f} to {best['high']:+.3f})"
        base = f" from {float(self.data['shuffled'].mean()):.3f}" if "shuffled" in self.data else ""
        patched = "effect" in self.methods
        said = (
            f"{'Patching' if patched else 'By gradient, patching'} head {best['head']:.0f} of layer "
            f"{best['layer']:.0f} raises the answer's probability most:{base} by {best['mean']:+.3f}"
            f"{interval}, mean of {n} trial{'s' * (n != 1)}; the median head {np.median(means):+.4f}"
        )
        if len(self.methods) < len(METHODS):
            return f"{said}."
        k = min(10, means.size)
        rank = self.agreement().correlation(n_resamples=1)["spearman"]
        return (
            f"{said}. The gradient names {self.shared(k)} of the same {k} heads, rank correlation "
            f"{rank:.2f}."
        )

    def summary(self) -> dict[str, Any]:
        """The strongest head with its interval, the agreement of both methods, and the time."""
        made, best = self.provenance, self.top(1).iloc[0]
        found: dict[str, Any] = {
            "task": made["task"],
            "model": made["model"],
            "head": f"{best['layer']:.0f}.{best['head']:.0f}",
            "aie": float(best["mean"]),
            "aie_low": float(best["low"]),
            "aie_high": float(best["high"]),
        }
        if len(self.methods) == len(METHODS):
            found |= self.agreement().correlation()
            found["shared_of_10"] = self.shared(min(10, self.data["effect"].isel(trial=0).size))
        return found | {"n_trials": self.data.sizes["trial"], "seconds": made["seconds"]}

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw the map of layers and heads; see `tvlens.plots.patching_heatmap`."""
        from tvlens.plots.patching import patching_heatmap

        drawn = self.drawn(channels.pop("by", None))
        axes: dict[str, Any] = {"x": "head", "y": "layer"}
        return patching_heatmap(drawn, **(axes | channels))

    def drawn(self, by: str | None = None) -> xr.Dataset:
        """Give what the map shows: means and intervals, without trials.

        Args:
            by: As in `mean`.

        Returns:
            ``mean, low, high`` by layer and head.
        """
        note = {"variable": "effect", "metric": "probability", "finding": self.finding()}
        text = encode(self.provenance | {"metric": "probability"})
        return self.mean(by).assign_attrs(**note, **{ATTRIBUTE: text})

    def figures(self) -> "dict[str, go.Figure]":
        """The map, and where both were measured, estimate against effect."""
        both = len(self.methods) == len(METHODS)
        agreed = {"Gradient against patching": self.agreement().plot()} if both else {}
        return {"Average indirect effect of every head": self.plot()} | agreed


def universal_heads(
    effects: Sequence[HeadEffects],
    *,
    n: int = 10,
    by: str | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank heads by their mean effect over several tasks of one model.

    Args:
        effects: What `head_effects` gave, one for each task.
        n: How many heads are wanted.
        by: ``"effect"`` or ``"estimate"``; effects where all have them by default.
        level: Confidence level between 0 and 1.
        n_resamples: How many draws of the tasks.
        seed: Seed of the draws.

    Returns:
        ``layer, head, mean, low, high`` (a bootstrap interval over tasks, NaN for a single one), and
        ``n_tasks``: in how many tasks the head is among that task's own first n. Largest mean first.

    Raises:
        ValueError: No effects, those of different models, or fewer heads.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> from tvlens.function_vectors import head_effects
        >>> asked = {"shots": 3, "n_means": 4, "n_trials": 5}
        >>> both = [head_effects(tiny_model(), task, **asked) for task in ("to_upper", "to_lower")]
        >>> universal_heads(both, n=2)["n_tasks"].tolist() <= [2, 2]
        True

    References:
        Todd et al. 2024, arXiv:2310.15213, section 2.2.
    """
    if not effects:
        raise ValueError("universal heads need the effects of at least one task; none arrived.")
    for e in effects:
        needs("an effect", e, HeadEffects, "what tv.head_effects(model, task) gives")
    places = {(e.provenance["model"], e.outputs.shape) for e in effects}
    if len(places) > 1:
        models = ", ".join(sorted({str(name) for name, _ in places}))
        raise ValueError(f"heads are ranked within one model; effects of {models} arrived.")
    if by is None:
        by = next((m for m in METHODS if all(m in e.data for e in effects)), METHODS[0])
    means = [e.mean(by, n_resamples=1)["mean"] for e in effects]
    each = xr.concat(means, dim="task").transpose("task", "layer", "head")
    rows = rearrange(each.values, "task layer head -> task (layer head)")
    low = high = np.full(rows.shape[1], np.nan)
    if len(rows) > 1:
        low, high = bootstrap(rows, level=level, n_resamples=n_resamples, seed=seed)
    frame = each.mean("task").to_dataframe(name="mean").reset_index()
    own = [head for e in effects for head in e.heads(min(n, rows.shape[1]), by=by)]
    named = list(zip(frame["layer"], frame["head"], strict=True))
    frame = frame.assign(low=low, high=high, n_tasks=[own.count(head) for head in named])
    return _largest(frame, n)


def _largest(frame: pd.DataFrame, n: int) -> pd.DataFrame:
    if not 1 <= n <= len(frame):
        raise ValueError(
            f"{n} heads asked for, but this model has {len(frame)}: 1 to {len(frame)}."
        )
    best = frame.sort_values("mean", ascending=False, kind="stable").head(n)
    return best.reset_index(drop=True)
