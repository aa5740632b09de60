"""What a lens saw: for every layer, position and prompt, what the model would have said there.

The final distribution, which every layer is compared with, is kept beside it, so that the first layer from
which on the prediction stands can be derived when asked.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr

from tvlens._errors import unknown
from tvlens.intervals import bootstrap
from tvlens.plots.theme import visible
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

_NAMES = {"logit": "logit lens", "tuned": "tuned lens"}
_CELL = ("lens", "layer", "position", "prompt")


class Lens(Result):
    """What `logit_lens` saw, by lens, layer, position and prompt."""

    kind: ClassVar[str] = "lens"
    references: ClassVar[Any] = ("nostalgebraist2020interpreting", "belrose2023eliciting")
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "top_token": (*_CELL, "rank"),
        "top_probability": (*_CELL, "rank"),
        "entropy": _CELL,
        "kl": _CELL,
        "final_top_token": ("position", "prompt", "rank"),
    }
    table: ClassVar[tuple[str, ...]] = ("entropy", "kl")
    method: ClassVar[str] = (
        "The residual stream after each layer is sent through the model's own final norm, unembedding and "
        "soft cap; a tuned lens applies an affine map of its own to each layer before. Entropy and "
        "KL(final || layer) are in nats; ranks count from 1."
    )

    @property
    def lenses(self) -> tuple[str, ...]:
        """Which lenses were used: ``"logit"``, ``"tuned"``."""
        return tuple(map(str, self.data["lens"].values))

    def _lens(self, lens: str | None) -> str:
        """The lens asked for; by default the tuned one, where there is one."""
        if lens is None:
            return self.lenses[-1]
        if lens not in self.lenses:
            raise unknown("lens", lens, self.lenses)
        return lens

    def settled(self, lens: str | None = None) -> xr.DataArray:
        """Find the layer from which on the final prediction stays the likeliest token.

        Args:
            lens: Which lens; by default the tuned one, where there is one.

        Returns:
            The layer by position and prompt; NaN where the deepest layer that was read says something else,
            or where there is no such position.

        Raises:
            ValueError: There is no such lens.

        Example:
            >>> import tvlens as tv
            >>> from tvlens.lens import logit_lens
            >>> from tvlens.testing import tiny_model
            >>> logit_lens(tiny_model(), "a->A", positions=-1).settled().shape
            (1, 1)
        """
        data = self.data.sel(lens=self._lens(lens)).sortby("layer", ascending=False)
        agrees = data["top_token"].isel(rank=0) == data["final_top_token"].isel(rank=0)
        # The run of agreement that reaches the top: its deepest member.
        reaches = agrees.astype(int).cumprod("layer").astype(bool)
        layer = data["layer"].where(reaches).min("layer").astype("float64")
        return layer.where(data["kl"].notnull().any("layer")).transpose("position", "prompt")

    def by_layer(
        self, variable: str = "kl", *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
    ) -> xr.Dataset:
        """Average over positions and prompts, with bootstrap intervals over prompts.

        Args:
            variable: ``"kl"``, ``"entropy"``, ``"log_probability"`` or ``"target_rank"``.
            level: Confidence level between 0 and 1.
            n_resamples: How many draws of the prompts.
            seed: Seed of the draws.

        Returns:
            ``mean, low, high`` by lens and layer (and target); ends are NaN with fewer than two prompts.

        Raises:
            ValueError: There is no such variable.
        """
        numeric = [v for v in ("kl", "entropy", "log_probability", "target_rank") if v in self.data]
        if variable not in numeric:
            raise unknown("variable", variable, numeric)
        each = self.data[variable].mean("position", skipna=True)
        each = each.transpose("prompt", "lens", "layer", ...)
        mean = each.mean("prompt")
        low = high = xr.full_like(mean, np.nan)
        if each.sizes["prompt"] > 1:
            ends = bootstrap(each.values, level=level, n_resamples=n_resamples, seed=seed)
            low, high = (mean.copy(data=end) for end in ends)
        return xr.Dataset({"mean": mean, "low": low, "high": high})

    @property
    def title(self) -> str:
        """Which lens, where, and in which model."""
        made = self.provenance
        names = " and ".join(_NAMES[name] for name in self.lenses)
        return f"{names.capitalize()} of {made['site']} in {made['model']}"

    def finding(self) -> str:
        """Say from which layer on the final prediction stands, and how far layers are from the end."""
        lenses = tuple(reversed(self.lenses))
        what = self._last() if self.data.sizes["prompt"] == 1 else self._median()
        layers = self.data["layer"].values
        stands = [
            f"{self._stands(lens, of=i == 0)} through the {_NAMES[lens]}"
            for i, lens in enumerate(lenses)
        ]
        kl = [f"{float(self.data['kl'].sel(lens=lens).mean()):.2f}" for lens in lenses]
        mean = f"the mean KL over positions and layers is {' and '.join(kl)} nats"
        if len(layers) == 1:
            return f"At layer {layers[0]}, {mean} ({' and '.join(_NAMES[n] for n in lenses)})."
        return f"{what} {', and '.join(stands)}; {mean}."

    def _last(self) -> str:
        """What is said of the last position that was read, where there is one prompt."""
        at = int(np.flatnonzero(self._there()[:, 0])[-1])
        label = str(self.data["token"].values[at]).partition(": ")[2]
        word = str(self.data["final_top_token"].isel(position=at, prompt=0, rank=0).values)
        return (
            f"At position {self.data['position'].values[at]} ({visible(label)}) the model's prediction "
            f"{visible(word)} is the likeliest token"
        )

    def _median(self) -> str:
        n = self.data.sizes["prompt"]
        return (
            f"At the median of {int(self._there().sum())} positions in {n} prompts the model's prediction is "
            "the likeliest token"
        )

    def _there(self) -> np.ndarray:
        """Positions that prompts have: position by prompt."""
        kl = self.data["kl"].isel(lens=0).notnull().any("layer")
        return kl.transpose("position", "prompt").values

    def _stands(self, lens: str, *, of: bool) -> str:
        """Say from which layer on the prediction stands, at the last position or in the median."""
        layers, there = self.data["layer"].values, self._there()
        settled = self.settled(lens).fillna(layers.max() + 1).values
        one = self.data.sizes["prompt"] == 1
        layer = settled[there[:, 0], 0][-1] if one else np.median(settled[there])
        if layer > layers.max():
            return f"at no layer up to {layers.max()}"
        return f"from layer {layer:.0f}{f' of {layers.min()} to {layers.max()}' if of else ''} on"

    def summary(self) -> dict[str, Any]:
        """KL, entropy and the layer at which predictions settle, for each lens."""
        made = self.provenance
        found: dict[str, Any] = {"model": made["model"], "site": made["site"]}
        for lens in self.lenses:
            layer = float(self.settled(lens).median())
            found[f"{lens}_settled_layer"] = None if np.isnan(layer) else layer
            found[f"{lens}_kl"] = float(self.data["kl"].sel(lens=lens).mean())
        return found | {"n_prompts": self.data.sizes["prompt"], "seconds": made["seconds"]}

    def to_dataframe(self, *variables: str) -> Any:
        """Give a tidy table: one row for each lens, layer, position and prompt.

        Args:
            *variables: Variables of the data; by default the likeliest token, its probability, entropy, KL.

        Returns:
            The table; labels are columns, too.

        Raises:
            ValueError: A variable does not exist.
        """
        if variables:
            return super().to_dataframe(*variables)
        names = ["top_token", "top_probability"]
        first = self.data[[*names, "entropy", "kl"]].isel(rank=0)
        frame = first.to_dataframe().reset_index()
        labels = [name for name in frame.columns if name not in (*names, "entropy", "kl")]
        return frame.reindex(columns=[*labels, *names, "entropy", "kl"])

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw the heat map of one prompt; see `tvlens.plots.lens_heatmap`."""
        from tvlens.plots.lens import lens_heatmap

        return lens_heatmap(self.data.assign_attrs(finding=self.finding()), **channels)

    def plot_by_layer(self, variable: str = "kl", **channels: Any) -> "go.Figure":
        """Draw means by layer; see `tvlens.plots.lens_by_layer`."""
        from tvlens.plots.lens import lens_by_layer

        made = self.by_layer(variable).assign_attrs(self.data.attrs)
        return lens_by_layer(made.assign_attrs(variable=variable), **channels)

    def figures(self) -> dict[str, "go.Figure"]:
        """The heat map, and the divergence from the final distribution by layer."""
        found = {"main": self.plot()}
        return found | (
            {"kl by layer": self.plot_by_layer()} if self.data.sizes["layer"] > 1 else {}
        )
