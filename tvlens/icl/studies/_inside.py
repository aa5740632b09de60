"""What cutting transformers found: g, h, whether f is their mixture, and where a moved label acts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from tvlens._words import fixed
from tvlens.icl.probes import PROBES
from tvlens.icl.studies._inside_cuts import RUNS
from tvlens.icl.studies._inside_mixture import CUTS, FITS
from tvlens.icl.studies._inside_parts import PARTS, SITES
from tvlens.intervals import bootstrap, wilson
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

GROUPS = ("high", "low")
MIXED = 0.05
"""f counts as a mixture where no more than this share of probability is left unexplained."""
_AT = ("seed", "step")
_EACH = ("probe", "prompt")


class Inside(Result):
    """Answers of cut transformers, fits of a mixture, parts and patching effects, by seed and step."""

    kind: ClassVar[str] = "icl_inside"
    references: ClassVar[tuple[str, ...]] = (
        "chan2025toward",
        "zhang2024towards",
        "elhage2021mathematical",
    )
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(("right", "p_target", "p_own"), (*_AT, "run", *_EACH)),
        **dict.fromkeys(("alpha", "distance"), (*_AT, "fit", *_EACH)),
        "by_cut": (*_AT, "probe", "cut"),
        "direct": (*_AT, "group", "part", "prompt"),
        "effect": (*_AT, "group", "site", "layer", "place", "prompt"),
        "whole": (*_AT, "group", "prompt"),
    }
    table: ClassVar[tuple[str, ...]] = ("right", "p_target", "p_own")
    method: ClassVar[str] = (
        "Transformers of two blocks were trained as one ensemble and opened at checkpoints, on prompts that "
        "no training saw, with true labels and with labels moved on within their group on the same inputs. "
        "Attention weights from the query are held as in the untouched run. g: the query sees itself alone, "
        "so that g is a function of the query. h: the query's input is the mean over training queries. A "
        "mixture alpha g + (1 - alpha) h is fitted to f's probabilities of each prompt; what it leaves is "
        "the total variation. The index of f is p(own) / (p(own) + p(context's label)). Direct attribution "
        "splits the logit of the context's label less that of the own one; patching writes one activation "
        "of the run with the moved label into the run with the true one. Intervals over prompts: Wilson's "
        "for errors, the bootstrap for means; seeds are shown one by one."
    )

    @property
    def title(self) -> str:
        """What was opened."""
        return "g and h inside a transformer"

    @property
    def index(self) -> xr.DataArray:
        """The index of f where labels are moved: p(own) / (p(own) + p(context's label)), by prompt."""
        f = self.data.sel(run="f", probe=[f"relevant {group} flipped" for group in GROUPS])
        return f["p_own"] / (f["p_own"] + f["p_target"])

    def errors(self) -> pd.DataFrame:
        """Give error rates with Wilson's intervals.

        Returns:
            ``seed, step, run, probe, error, low, high, n``.
        """
        wrong = (~self.data["right"].astype(bool)).sum("prompt")
        n = self.data.sizes["prompt"]
        low, high = wilson(wrong.values, n)
        frame = (wrong / n).rename("error").to_dataframe().reset_index()
        return frame.assign(low=low.ravel(), high=high.ravel(), n=n)

    def mixtures(self) -> pd.DataFrame:
        """Give what fits on prompts with moved labels, with bootstrap intervals over prompts.

        Returns:
            ``seed, step, probe, fit, alpha, alpha_low, alpha_high, distance, distance_low, distance_high``;
            the fit ``"index"`` is what f's probabilities say, without g and h.
        """
        index = self.index
        some = self.data.sel(probe=index["probe"].values)
        # NaN marks a fit without an alpha, and the index leaves no residual.
        blank = xr.full_like(index, np.nan)
        alpha = xr.concat([some["alpha"], index.drop_vars("run").expand_dims(fit=["index"])], "fit")
        distance = xr.concat(
            [some["distance"], blank.drop_vars("run").expand_dims(fit=["index"])], "fit"
        )
        columns: dict[str, Any] = {}
        for name, array in (("alpha", alpha), ("distance", distance)):
            rows = array.transpose("prompt", *_AT, "probe", "fit")
            flat = rows.values.reshape(len(rows), -1)
            there = ~np.isnan(flat).any(axis=0)
            low, high = (np.full(flat.shape[1], np.nan) for _ in range(2))
            low[there], high[there] = bootstrap(flat[:, there], n_resamples=500)
            columns |= {name: flat.mean(axis=0), f"{name}_low": low, f"{name}_high": high}
        labels = alpha.mean("prompt").transpose(*_AT, "probe", "fit").rename("x")
        frame = labels.to_dataframe().reset_index()[[*_AT, "probe", "fit"]]
        return frame.assign(**columns)

    def agreement(self) -> pd.DataFrame:
        """Say how well alpha by fit and by index agree, prompt by prompt.

        Returns:
            ``seed, step, probe, correlation, gap``: Pearson's correlation over prompts, and the mean of alpha
            by fit less that of the index.
        """
        index = self.index
        fitted = self.data["alpha"].sel(fit="mixture", probe=index["probe"].values)
        correlation = xr.corr(fitted, index, dim="prompt").rename("correlation")
        gap = (fitted - index).mean("prompt").rename("gap")
        both = xr.merge([correlation.reset_coords(drop=True), gap.reset_coords(drop=True)])
        return both.to_dataframe().reset_index()

    def cuts(self) -> pd.DataFrame:
        """Give what the mixture leaves unexplained at the last step, for other ways to cut g and h out.

        Returns:
            ``g, h, probe, distance``, means over seeds, of prompts with moved labels.
        """
        last = self.data["by_cut"].isel(step=-1).sel(probe=self.index["probe"].values).mean("seed")
        frame: Any = last.rename("distance").to_dataframe().reset_index()
        pairs = frame["cut"].str.split(" | ", regex=False, expand=True)
        return frame.assign(g=pairs[0], h=pairs[1])[["g", "h", "probe", "distance"]]

    def tables(self) -> dict[str, pd.DataFrame]:
        """Errors and fits at the last step, and residuals of other cuts."""
        errors: Any = self.errors()
        fits: Any = self.mixtures()
        last = self.data["step"].values[-1]
        return {
            "Errors at the last step": errors[errors["step"] == last].drop(columns="step"),
            "Mixtures at the last step": fits[fits["step"] == last].drop(columns="step"),
            "What the mixture leaves, by the way of cutting": self.cuts(),
        }

    def finding(self) -> str:
        """What f, g and h do with moved labels in the end, and whether f is a mixture."""
        found = self.summary_numbers()
        steps = int(self.data["step"].values[-1])
        verdict = "a mixture" if found["left_by_mixture"] <= MIXED else "no mixture"
        f, g, h = (fixed(found[f"{run}_error"]) for run in "fgh")
        left = {
            name: fixed(found[f"left_by_{name}"])
            for name in ("mixture", "one_alpha", "one", "shuffled")
        }
        return (
            f"After {steps} steps, with moved labels of rare classes, f errs in {f}, the context's part h in "
            f"{h}, the weights' part g in {g}; there f is {verdict} of g and h: each prompt's likeliest alpha"
            f" leaves {left['mixture']} of the probability (one alpha for all {left['one_alpha']}, the "
            f"better of the two {left['one']}, shuffled {left['shuffled']}); alpha is "
            f"{fixed(found['alpha'])} by fit, {fixed(found['index'])} by index."
        )

    def summary_numbers(self) -> dict[str, float]:
        """Means over seeds at the last step, on prompts of rare classes with moved labels."""
        last = self.data.isel(step=-1).sel(probe="relevant low flipped")
        error = 1 - last["right"].astype(float).mean(("seed", "prompt"))
        alpha, left = (last[name].mean(("seed", "prompt")) for name in ("alpha", "distance"))
        agreed = self.agreement()
        agreed = agreed[
            (agreed["probe"] == "relevant low flipped") & (agreed["step"] == agreed["step"].max())
        ]
        index = self.index.isel(step=-1).sel(probe="relevant low flipped").mean()
        rise = self.data["whole"].sel(group="low").mean(("seed", "prompt"))
        said = self.data["direct"].isel(step=-1).sel(group="low").mean(("seed", "prompt"))
        found = {f"{run}_error": error.sel(run=run) for run in ("f", "g", "h")} | {
            "alpha": alpha.sel(fit="mixture"),
            "index": index,
            "label_moves": rise.isel(step=-1),
            "label_moved_most": rise.max(),
            "label_says": said.sel(part=[part for part in PARTS if "label token" in part]).sum(),
            "mlps_say": said.sel(part=["MLP 0", "MLP 1"]).sum(),
            "correlation": agreed["correlation"].mean(),
            "left_by_mixture": left.sel(fit="mixture"),
            "left_by_log_linear": left.sel(fit="log-linear"),
            "left_by_sum": left.sel(fit="sum of logits"),
            "left_by_one_alpha": left.sel(fit="one alpha"),
            "left_by_one": left.sel(fit="one of the two"),
            "left_by_shuffled": left.sel(fit="shuffled"),
        }
        return {name: float(value) for name, value in found.items()}

    def summary(self) -> dict[str, Any]:
        """The numbers of the finding, and how many seeds and prompts there are."""
        sizes = {"seeds": self.data.sizes["seed"], "n": self.data.sizes["prompt"]}
        return super().summary() | self.summary_numbers() | sizes

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw errors, alpha and what the mixture leaves, over steps."""
        from tvlens.plots.icl_inside import inside_curves

        return inside_curves(self.errors(), self.mixtures(), title=self.finding(), **channels)

    def figures(self) -> dict[str, "go.Figure"]:
        """The curves, where a moved label acts, and who writes the context's label."""
        found = self.summary_numbers()
        moves, most, label, mlps = (
            fixed(found[name], 1, sign="say" in name)
            for name in ("label_moves", "label_moved_most", "label_says", "mlps_say")
        )
        from tvlens.plots.icl_inside import inside_effects, inside_parts

        return {
            "Over steps": self.plot(),
            "Where a moved label acts": inside_effects(
                self.data,
                title=f"Moving the label of a rare class moves {moves} logits in the end, {most} at most",
            ),
            "Who says the context's label": inside_parts(
                self.data,
                title=f"Of rare classes in the end, the label token says {label}, the MLPs {mlps}",
            ),
        }


def dataset(
    found: Mapping[str, np.ndarray], *, seeds: Sequence[int], steps: Sequence[int]
) -> xr.Dataset:
    """Label everything.

    Args:
        found: Arrays by variable, seed and step first.
        seeds: The seeds.
        steps: The checkpoints.

    Returns:
        The data of an `Inside`.
    """
    variables = {
        name: (dims, found[name] if found[name].dtype == bool else found[name].astype(np.float32))
        for name, dims in Inside.variables.items()
    }
    coords = {
        "seed": list(seeds), "step": list(steps), "run": list(RUNS), "probe": list(PROBES),
        "fit": list(FITS), "cut": [" | ".join(pair) for pair in CUTS], "group": list(GROUPS),
        "part": list(PARTS), "site": list(SITES), "layer": [0, 1], "place": ["label token", "query"],
    }  # fmt: skip
    return xr.Dataset(variables, coords=coords)
