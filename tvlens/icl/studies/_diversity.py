"""What networks learnt from few and from many classes: the threshold, and the power law behind it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from tvlens.intervals import wilson
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

MEASURES = ("new_classes", "in_weights", "loss", "unexplained")
"""Accuracy on new classes, and with the query's class absent; loss; mean probability of the wrong label."""
LEARNT = 0.75
_MEMORISED = 0.1
NU = 0.7
"""The authors' exponent, from the abstract's theory: I_K ~ K^nu, K* ~ N^(1/nu)."""


class Diversity(Result):
    """Accuracies of networks with and without attention, by number of classes, seed and step."""

    kind: ClassVar[str] = "icl_diversity"
    references: ClassVar[tuple[str, ...]] = ("nguyen2025differential",)
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "value": ("attention", "n_classes", "seed", "measure", "step")
    }
    table: ClassVar[tuple[str, ...]] = ("value",)
    method: ClassVar[str] = (
        "One layer of attention (one head, scale 1, LayerNorm before it) and a three-layer ReLU network on N "
        "tokens, each an item beside its binary label, trained by SGD; the query's class is always in the "
        "context. Learnt in context: accuracy on new classes above .75 at the end. K*: where the share of "
        "seeds that did passes one half, between numbers of classes on a log scale. Members without "
        "attention memorise alone: I_K is the integral over training of the mean probability of the wrong "
        "label, times the step size, of those that end below .1 (our reading of the authors' integral); nu "
        "is its slope over K on log scales, with 1.96 standard errors over seeds. Authors: nu about .7."
    )

    @property
    def title(self) -> str:
        """What was trained."""
        return f"Networks on {', '.join(str(k) for k in self.data['n_classes'].values)} classes"

    def ends(self) -> pd.DataFrame:
        """Give what each network with attention ends with.

        Returns:
            ``n_classes, seed``; ``new_classes`` and ``in_weights`` at the end, the ``best`` accuracy on new
            classes and its step, and ``learnt``.
        """
        one = self.data["value"].sel(attention="with", drop=True)
        curve = one.sel(measure="new_classes", drop=True)
        frame = xr.Dataset(
            {
                "new_classes": curve.isel(step=-1, drop=True),
                "in_weights": one.sel(measure="in_weights", drop=True).isel(step=-1, drop=True),
                "best": curve.max("step"),
                "best_step": curve.idxmax("step"),
            }
        )
        table = frame.to_dataframe().reset_index()
        return table.assign(learnt=table["new_classes"] > LEARNT)

    def rates(self) -> pd.DataFrame:
        """Give for each number of classes how many seeds learnt in context.

        Returns:
            ``n_classes``, ``learnt`` with ``low`` and ``high``, ``n``, mean ``new_classes`` and
            ``in_weights``, and ``memorising``: the mean integral I_K without attention, NaN where it did
            not end.
        """
        rows, integrals = [], self.memorising()
        some: Any
        for k, some in self.ends().groupby("n_classes"):
            low, high = wilson(float(some["learnt"].sum()), len(some))
            rows.append(
                {
                    "n_classes": k,
                    "learnt": some["learnt"].mean(),
                    "low": low,
                    "high": high,
                    "n": len(some),
                }
                | {name: some[name].mean() for name in ("new_classes", "in_weights")}
                | {"memorising": float(integrals.sel(n_classes=k).mean(skipna=False))}
            )
        return pd.DataFrame(rows)

    def memorising(self) -> xr.DataArray:
        """Give the integral I_K of networks without attention, NaN where memorising did not end.

        Returns:
            Values by number of classes and seed.
        """
        curve = self.data["value"].sel(attention="without", measure="unexplained")
        ended = curve.isel(step=-1, drop=True) < _MEMORISED
        return (curve.integrate("step") * self.provenance["lr"]).where(ended)

    def threshold(self) -> float:
        """Give K*, or infinity or 0 where all or none of the numbers of classes lie below it."""
        rates = self.rates()
        share, k = rates["learnt"].to_numpy(), np.log(rates["n_classes"].to_numpy(dtype=float))
        above = np.flatnonzero(share >= 0.5)
        if not len(above):
            return float("inf")
        i = int(above[0])
        if i == 0:
            return 0.0
        part = (0.5 - share[i - 1]) / (share[i] - share[i - 1])
        return float(np.exp(k[i - 1] + part * (k[i] - k[i - 1])))

    def exponent(self) -> tuple[float, float]:
        """Give nu, and 1.96 standard errors over seeds; NaN for fewer than three numbers of classes."""
        integrals = self.memorising().transpose("n_classes", "seed")
        whole = integrals.values[np.isfinite(integrals.values).all(axis=1)]
        k = np.log(integrals["n_classes"].values[np.isfinite(integrals.values).all(axis=1)])
        if len(whole) < 3:
            return float("nan"), float("nan")
        slopes = np.polyfit(k, np.log(whole), 1)[0]
        error = 1.96 * slopes.std(ddof=1) / len(slopes) ** 0.5 if len(slopes) > 1 else float("nan")
        return float(slopes.mean()), float(error)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Shares by number of classes."""
        return {"Seeds that learnt in context": self.rates()}

    def finding(self) -> str:
        """Where the threshold lies, how seeds split around it, and how memorising grows."""
        ends, at, (nu, error) = self.ends(), self.threshold(), self.exponent()
        first, last = (int(self.data["n_classes"][i]) for i in (0, -1))
        if np.isinf(at):
            where = f"fewer than half of the seeds learn in context with up to {last} classes"
        elif at == 0:
            where = f"half of the seeds or more learn in context with {first} classes already"
        else:
            where = f"half of the seeds learn in context from {_two_digits(at)} classes on"
        between = ((ends["new_classes"] > 0.65) & (ends["new_classes"] < 0.9)).mean()
        law = (
            ""
            if nu != nu
            else f"; memorising takes K^{nu:.2f}" + (f" ± {error:.2f}" if error == error else "")
        )
        return f"{where[0].upper()}{where[1:]}; {between:.0%} of all networks end between .65 and .9{law}."

    def summary(self) -> dict[str, Any]:
        """The threshold, the exponent, and shares."""
        at, (nu, error) = self.threshold(), self.exponent()
        known = {"threshold": at if np.isfinite(at) and at > 0 else None}
        known |= (
            {"nu": nu, "nu_low": nu - error, "nu_high": nu + error} if nu == nu else {"nu": None}
        )
        last = self.rates().iloc[-1]
        return super().summary() | known | {
            "learnt with most classes": float(last["learnt"]), "networks": len(self.ends()),
            "seconds": self.provenance["seconds"],
        }  # fmt: skip

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw accuracies by number of classes; see `tvlens.plots.icl_diversity.diversity_sweep`."""
        from tvlens.plots.icl_diversity import diversity_sweep

        settings = {"title": self.finding(), "threshold": self.threshold()}
        return diversity_sweep(self.ends(), **(settings | channels))

    def figures(self) -> "dict[str, go.Figure]":
        """The sweep, memorising without attention, and accuracies over steps."""
        from tvlens.plots.icl_diversity import diversity_curves, memorising_law

        return {
            "Accuracy by number of classes": self.plot(),
            "Memorising alone": memorising_law(
                self.memorising(), exponent=self.exponent()[0], authors=NU
            ),
            "Over steps": diversity_curves(self.data["value"].sel(attention="with")),
        }


def _two_digits(x: float) -> int:
    scale = 10 ** max(0, int(np.log10(x)) - 1)
    return round(x / scale) * scale


def dataset(
    found: Float[Tensor, "member measure step"],
    *,
    n_classes: Sequence[int],
    seeds: Sequence[int],
    steps: Sequence[int],
) -> xr.Dataset:
    """Label everything.

    Args:
        found: Measures of every member: with attention, then without, numbers of classes by seeds.
        n_classes: Numbers of classes.
        seeds: The seeds.
        steps: When it was measured.

    Returns:
        The data of a `Diversity`.
    """
    values = torch.unflatten(found, 0, (2, len(n_classes), len(seeds))).double().numpy()
    return xr.Dataset(
        {"value": (Diversity.variables["value"], values)},
        coords={"attention": ["with", "without"], "n_classes": list(n_classes), "seed": list(seeds),
                "measure": list(MEASURES), "step": list(steps)},
    )  # fmt: skip
