"""What attribution found: every part's share, prompt by prompt, with what the shares miss of the whole."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from tvlens._errors import unknown
from tvlens._words import fixed, listed
from tvlens.attribution.words import answers, read_from
from tvlens.patching.statistics import bootstrap_ratio
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Parts outside the layers, in the order in which the stream meets them, and how figures call them.
BEFORE = {"embedding": "embedding", "positional_embedding": "position embedding"}
AFTER = {"final_norm_bias": "bias of the last norm", "unembedding_bias": "bias of the unembedding"}
_TOLD = 0.02  # of the largest part: what is smaller is not named
TINY = 1e-12  # what no total is divided by less than


def means(
    values: xr.DataArray, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> xr.Dataset:
    """Average over prompts, with bootstrap intervals.

    Args:
        values: Values by ``prompt`` and other dimensions.
        level: Confidence level between 0 and 1.
        n_resamples: How many draws of the prompts.
        seed: Seed of the draws.

    Returns:
        ``mean, low, high`` by the other dimensions; ends are NaN where fewer than two prompts have a value.

    Example:
        >>> values = xr.DataArray([[1.0, 3.0]], dims=("layer", "prompt"))
        >>> means(values)["mean"].item()
        2.0
    """
    values = values.transpose("prompt", ...)
    shape = values.shape[1:]
    rows = values.values.reshape(len(values), -1).astype(float)
    there = ~np.isnan(rows)
    with np.errstate(invalid="ignore"):
        mean = np.where(there, rows, 0).sum(axis=0) / there.sum(axis=0)
    low, high = bootstrap_ratio(
        rows, np.ones_like(rows), level=level, n_resamples=n_resamples, seed=seed
    )
    found = {"mean": mean, "low": low, "high": high}
    coords = {k: v for k, v in values.coords.items() if "prompt" not in v.dims}
    return xr.Dataset({k: (values.dims[1:], v.reshape(shape)) for k, v in found.items()}, coords)


class Attribution(Result):
    """What `attribute` or `writers` found: parts that add up to a logit, or to a task vector's length."""

    kind: ClassVar[str] = "attribution"
    references: ClassVar[tuple[str, ...]] = (
        "elhage2021mathematical",
        "wang2023interpretability",
    )
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "embedding": ("prompt",),
        "mlp": ("layer", "prompt"),
        "total": ("prompt",),
        "residual": ("prompt",),
    }
    table: ClassVar[tuple[str, ...]] = ("attention",)
    method: ClassVar[str] = (
        "The residual stream is the sum of what embedding, attention and MLPs wrote into it. Each part is "
        "projected on the direction that is read from the stream; norms on the way are held at the scale "
        "they have in this run, so the parts add up, and what they miss by rounding is reported. These are "
        "direct contributions, not effects by way of later layers. Intervals: percentile bootstrap over "
        "prompts, 95 %."
    )

    @property
    def metric(self) -> str:
        """``"logit"``, ``"logit_difference"``, or ``"theta"``."""
        return str(self.provenance["metric"])

    @property
    def missed(self) -> float:
        """The largest share of a prompt's total that its parts miss."""
        total = np.abs(self.data["total"].values).clip(min=TINY)
        return float((np.abs(self.data["residual"].values) / total).max())

    def parts(self, *, heads: bool | None = None) -> xr.DataArray:
        """Give every part as one row; what attention reads from different positions is summed.

        Args:
            heads: Whether heads are rows of their own; by default where attention was split into them.

        Returns:
            Values by ``part`` and ``prompt``, in the order of the stream, with ``kind``, ``layer`` and
            ``head`` (-1 where there is none) as labels. With the residual they sum to the total.

        Raises:
            ValueError: Heads are wanted, but attention was not split into them.

        Example:
            >>> result.parts().sum("part")  # doctest: +SKIP
        """
        attention = self._attention(heads)
        rows: list[tuple[str, str, int, int, np.ndarray]] = []

        def outside(names: Mapping[str, str]) -> None:
            for name, spoken in names.items():
                if name in self.data and bool(self.data[name].any()):
                    rows.append((spoken, name, -1, -1, self.data[name].values))

        outside(BEFORE)
        bias = self.data["attention_bias"].values
        for i, layer in enumerate(self.data["layer"].values.tolist()):
            own = attention.isel(layer=i)
            if "head" not in attention.dims:
                rows.append((f"attention {layer}", "attention", layer, -1, own.values))
            else:
                rows += [
                    (f"head {layer}.{head}", "attention", layer, head, own.isel(head=j).values)
                    for j, head in enumerate(own["head"].values.tolist())
                ]
                if bias.any():
                    label = f"attention bias {layer}"
                    rows.append((label, "attention_bias", layer, -1, bias[i]))
            mlp = self.data["mlp"].isel(layer=i).values
            rows.append((f"MLP {layer}", "mlp", layer, -1, mlp))
        outside(AFTER)
        names, kinds, layers, at, values = zip(*rows, strict=True)
        return xr.DataArray(
            np.stack(values),
            dims=("part", "prompt"),
            coords={
                "part": np.array(names, dtype=object),
                "kind": ("part", np.array(kinds, dtype=object)),
                "layer": ("part", list(layers)),
                "head": ("part", list(at)),
            },
            name="value",
        )

    def _attention(self, heads: bool | None) -> xr.DataArray:
        """Attention by layer, and by head where wanted; without heads, with its biases."""
        attention = self.data["attention"]
        if heads and "head" not in attention.dims:
            raise ValueError("attention was not split into heads; ask for by='head'.")
        kept = {"layer", "prompt"} | ({"head"} if heads or heads is None else set())
        attention = attention.sum([d for d in attention.dims if d not in kept])
        if "head" not in attention.dims:
            attention = attention + self.data["attention_bias"]
        return attention.transpose("layer", ..., "prompt")

    def mean(
        self, variable: str = "attention", *, level: float = 0.95, seed: int = 0
    ) -> xr.Dataset:
        """Average one variable over prompts, with bootstrap intervals.

        Args:
            variable: A variable of the data.
            level: Confidence level between 0 and 1.
            seed: Seed of the draws.

        Returns:
            ``mean, low, high``.

        Raises:
            ValueError: There is no such variable.

        Example:
            >>> result.mean("mlp")["mean"].sel(layer=3)  # doctest: +SKIP
        """
        if variable not in self.data.data_vars:
            raise unknown("variable", variable, map(str, self.data.data_vars))
        return means(self.data[variable], level=level, seed=seed)

    def top(self, n: int = 10) -> pd.DataFrame:
        """Give the parts that add or take away most.

        Args:
            n: How many.

        Returns:
            ``part, kind, layer, head, mean, low, high``, largest absolute mean first.

        Raises:
            ValueError: ``n`` is less than 1.

        Example:
            >>> result.top(3)["part"]  # doctest: +SKIP
        """
        if n < 1:
            raise ValueError(f"n must be at least 1; {n} arrived.")
        frame = means(self.parts()).to_dataframe().reset_index()
        order = np.argsort(-np.abs(frame["mean"].to_numpy()), kind="stable")[:n]
        names = ["part", "kind", "layer", "head", "mean", "low", "high"]
        return pd.DataFrame(frame.iloc[order].reset_index(drop=True), columns=names)

    @property
    def title(self) -> str:
        """What was taken apart, and in which model."""
        made = self.provenance
        return f"{made['heading']}: {self._named} of {made['model']}"

    @property
    def _named(self) -> str:
        if self.metric == "theta":
            return f"theta after layer {self.provenance['layer']}"
        return self.metric.replace("_", " ")

    def finding(self) -> str:
        """The strongest parts for and against, and what attention reads them from, in one sentence."""
        rows = self.top(len(self.parts()["part"])).to_dict("records")
        least = _TOLD * abs(rows[0]["mean"])
        sides = []
        towards = "along it" if self.metric == "theta" else "for the answer"
        for way, sign in ((towards, 1), ("against it", -1)):
            some = [_spoken(row) for row in rows if sign * row["mean"] > least][:2]
            sides += [f"most {way} {listed(some)}"] * bool(some)
        read = read_from(self.data["attention"])
        read = f"; attention read most from {read}" if read else ""
        most = " at most" if self.data.sizes["prompt"] > 1 else ""
        return (
            f"{self._whole()}: {', '.join(sides) or 'no part adds anything'}{read}; the parts miss{most} "
            f"{self.missed:.0e}."
        )

    def _whole(self) -> str:
        """What was split, and how large it is."""
        n, total = self.data.sizes["prompt"], fixed(float(self.data["total"].mean()))
        over = f"mean of {n} prompts" if n > 1 else ""
        if self.metric == "theta":
            way = self.provenance["direction"]
            along = "its length" if way == "theta" else "the given direction"
            named = f"{self._named[:1].upper()}{self._named[1:]}"
            return f"{named}, {total} along {along}" + f" ({over})" * bool(over)
        before = " before the soft cap" if self.provenance.get("soft_cap") else ""
        said = ", ".join(filter(None, (answers(self.data), over)))
        return f"A {self._named}{before} of {total}" + f" ({said})" * bool(said)

    def summary(self) -> dict[str, Any]:
        """The total, the strongest part with its interval, and what the parts miss."""
        best, made = self.top(1).iloc[0], self.provenance
        return {
            "model": made["model"],
            "metric": self.metric,
            "total": float(self.data["total"].mean()),
            "part": str(best["part"]),
            "share": float(best["mean"]),
            "share_low": float(best["low"]),
            "share_high": float(best["high"]),
            "missed": self.missed,
            "n_prompts": self.data.sizes["prompt"],
            "seconds": made["seconds"],
        }

    def plot(self, figure: str | None = None, **channels: Any) -> "go.Figure":
        """Draw one of `drawings`: the first of them by default.

        Args:
            figure: ``"waterfall"``, ``"map"`` (layer by head, or layer by position), ``"tokens"``, or, of
                `writers`, ``"origins"``.
            **channels: Of `tvlens.plots.attribution.waterfall`, `tvlens.plots.patching_heatmap`,
                `tvlens.plots.attribution.token_highlights` or `tvlens.plots.attribution.origins`.

        Returns:
            The figure.

        Raises:
            ValueError: This result has no such figure.
        """
        from tvlens.plots.attribution import origins, token_highlights, waterfall
        from tvlens.plots.patching import patching_heatmap

        figure = figure or self.drawings[0]
        if figure not in self.drawings:
            raise unknown("figure", figure, self.drawings)
        draw = {
            "waterfall": waterfall,
            "map": patching_heatmap,
            "tokens": token_highlights,
            "origins": origins,
        }
        return draw[figure](self.drawn(figure), **channels)

    @property
    def drawings(self) -> tuple[str, ...]:
        """The figures that this result has."""
        dims = self.data["attention"].dims
        found = ["map"] * ("head" in dims or "position" in dims) + ["waterfall"]
        found += ["tokens"] * ("position" in dims) + ["origins"] * ("role" in dims)
        return tuple(found)

    def figures(self) -> dict[str, "go.Figure"]:
        """Draw every figure of the result, by name."""
        return {name: self.plot(name) for name in self.drawings}

    def drawn(self, figure: str = "waterfall") -> xr.Dataset:
        """Give what a figure shows, without the model.

        Args:
            figure: One of `drawings`.

        Returns:
            Means and intervals; for ``"tokens"``, every prompt's own values.
        """
        note = {**self.data.attrs, "variable": "attribution", "finding": self.finding()}
        total = self.data["total"].drop_vars(list(self.data["total"].coords))
        attention = self.data["attention"]
        if figure == "tokens":
            over = [d for d in attention.dims if d not in ("prompt", "position")]
            values = attention.sum(over, skipna=True).where(self.data["prompt_token"] != "")
            shown = xr.Dataset({"value": values.transpose("prompt", "position"), "total": total})
        elif figure == "map":
            over = [d for d in attention.dims if d in ("demonstration", "role")]
            shown = means(attention.sum(over)).assign(total=total)
        elif figure == "origins":
            shown = means(attention.sum(["layer", "head"])).assign(total=total)
        else:
            missed = self.data["residual"].drop_vars(list(self.data["residual"].coords))
            shown = means(self.parts(heads=False)).assign(total=total, residual=missed)
        return shown.assign_attrs(note)


def _spoken(row: Mapping[Any, Any]) -> str:
    """A part with its mean and interval."""
    ends = "" if np.isnan(row["low"]) else f" ({fixed(row['low'])} to {fixed(row['high'])})"
    return f"{row['part']} {fixed(row['mean'], sign=True)}{ends}"
