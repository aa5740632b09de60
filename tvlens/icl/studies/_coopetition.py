"""What the model of coopetition found: when mechanism 1 came, and whether it went."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from tvlens.intervals import wilson
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

LEARNT, GONE, SETTLED = 0.01, 10.0, 1e-3
"""Mechanism 1 is learnt up to the first, gone above it and so many times its least; 2 stands below it."""
DIALS = ("alpha", "mu1", "mu2", "width")


class Coopetition(Result):
    """Losses of two mechanisms that share factors, by setting, seed and step."""

    kind: ClassVar[str] = "icl_coopetition"
    references: ClassVar[tuple[str, ...]] = ("singh2025strategy",)
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "loss_1": ("setting", "seed", "step"),
        "loss_2": ("setting", "seed", "step"),
        "cost": ("setting", "seed", "step"),
        "cosine": ("factor", "setting", "seed", "step"),
        "least_1": ("setting", "seed"),
        "step_of_least_1": ("setting", "seed"),
        **dict.fromkeys(DIALS, ("setting",)),
    }
    table: ClassVar[tuple[str, ...]] = ("loss_1", "loss_2", "cost")
    method: ClassVar[str] = (
        "Gradient descent on (L1 + mu1)(L2 + mu2) + alpha/2 mean((a⊗d)^2), where L1 is half the mean squared "
        "error of a⊗b⊗c, L2 that of d⊗b⊗c; a, b, c have 20 numbers. All in float64 and in closed form. "
        "Came and went: L1 fell to .01 or lower at some step, and ended above .01 and at 10 times its least "
        "or more, with L2 below .001. Intervals are Wilson's over seeds. The authors show one seed, as a "
        "figure, and stop at a loss of 1e-6; here every run takes all its steps."
    )

    @property
    def title(self) -> str:
        """What is modelled."""
        return "Two mechanisms that share factors"

    def fates(self) -> xr.Dataset:
        """Say of each member whether mechanism 1 was learnt, went away again, and whether 2 stands.

        Returns:
            ``learnt``, ``gone``, ``settled`` and ``transient`` (all three) by setting and seed.
        """
        last = self.data.isel(step=-1)
        learnt = self.data["least_1"] <= LEARNT
        gone = (last["loss_1"] > LEARNT) & (last["loss_1"] >= GONE * self.data["least_1"])
        settled = last["loss_2"] < SETTLED
        parts = {"learnt": learnt, "gone": gone, "settled": settled}
        both = xr.Dataset({**parts, "transient": learnt & gone & settled})
        return both.drop_vars("step", errors="ignore")

    def rates(self) -> pd.DataFrame:
        """Give for each setting how many seeds were transient, and the losses' medians.

        Returns:
            Dials, ``transient`` with ``low`` and ``high``, ``n``, ``least_1``, ``final_1``, ``final_2``.
        """
        fate, rows = self.fates(), []
        for i in range(self.data.sizes["setting"]):
            one, yes = self.data.isel(setting=i), fate["transient"].isel(setting=i)
            n = yes.size
            low, high = wilson(float(yes.sum()), n)
            rows.append(
                {name: float(one[name]) for name in DIALS}
                | {"transient": float(yes.mean()), "low": low, "high": high, "n": n}
                | {"least_1": float(one["least_1"].median())}
                | {f"final_{k}": float(one[f"loss_{k}"].isel(step=-1).median()) for k in (1, 2)}
            )
        return pd.DataFrame(rows)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Shares of transient seeds by setting."""
        return {"Seeds in which mechanism 1 came and went": self.rates()}

    def finding(self) -> str:
        """How many seeds were transient, in the first setting and without a cost."""
        said, rates = [], self.rates()
        for i in _shown(self.data):
            row = rates.iloc[i]
            what = "without a cost" if row["alpha"] == 0 else f"with a cost of {row['alpha']:g}"
            said.append(
                f"{what}, mechanism 1 came and went in {round(row['transient'] * row['n'])} of "
                f"{row['n']:.0f} seeds (median loss {row['least_1']:.1g} at best, {row['final_1']:.1g} in "
                "the end)"
            )
        text = "; ".join(said)
        return f"{text[0].upper()}{text[1:]}."

    def summary(self) -> dict[str, Any]:
        """Shares of transient seeds of the first setting and its control."""
        rates, flat = self.rates(), {}
        for name, i in zip(("", "control_"), _shown(self.data), strict=False):
            row = rates.iloc[i]
            flat |= {f"{name}transient": row["transient"], f"{name}transient_low": row["low"],
                     f"{name}transient_high": row["high"], f"{name}least_1": row["least_1"],
                     f"{name}final_1": row["final_1"], f"{name}final_2": row["final_2"]}  # fmt: skip
        flat = {name: float(value) for name, value in flat.items()}
        return super().summary() | flat | {
            "n": int(self.data.sizes["seed"]), "seconds": self.provenance["seconds"]
        }  # fmt: skip

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw both losses over steps; see `tvlens.plots.icl_coopetition.coopetition_curves`."""
        from tvlens.plots.icl_coopetition import coopetition_curves

        shown = self.data.isel(setting=_shown(self.data))
        return coopetition_curves(shown, **({"title": self.finding()} | channels))

    def figures(self) -> "dict[str, go.Figure]":
        """Curves, and where dials were turned the shares of transient seeds."""
        from tvlens.plots.icl_coopetition import coopetition_dials

        every = {"Losses over steps": self.plot()}
        if self.data.sizes["setting"] > 2:
            every["Dials"] = coopetition_dials(self.rates())
        return every


def _shown(data: xr.Dataset) -> list[int]:
    """Choose the first setting and, if there is one, that which differs in having no cost."""
    dials = np.stack([data[name].values for name in DIALS], axis=1)
    same = (dials[:, 1:] == dials[0, 1:]).all(axis=1)
    others = np.flatnonzero(same & (dials[:, 0] == 0) & (dials[0, 0] != 0))
    return [0, *map(int, others[:1])]


def dataset(
    found: Mapping[str, Any], *, settings: Float[np.ndarray, "setting dial"], seeds: Sequence[int]
) -> xr.Dataset:
    """Label everything.

    Args:
        found: Arrays by variable, and the steps that were kept.
        settings: alpha, mu1, mu2 and width of every setting.
        seeds: The seeds.

    Returns:
        The data of a `Coopetition`.
    """
    dials = {name: ("setting", settings[:, i]) for i, name in enumerate(DIALS)}
    variables = {k: (Coopetition.variables[k], v) for k, v in found.items() if k != "step"}
    coords = {"setting": np.arange(len(settings)), "seed": list(seeds), "step": found["step"],
              "factor": list("abcd")}  # fmt: skip
    return xr.Dataset(variables, coords=coords | dials)
