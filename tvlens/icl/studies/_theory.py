"""What the study of the theory found: bounds and their crossing, gates, losses, regret."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd

from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

LEVELS = (0.5, 0.85)
"""Gates at which a class counts as switched."""


class Theory(Result):
    """What `theory` found."""

    kind: ClassVar[str] = "icl_theory"
    references: ClassVar[tuple[str, ...]] = (
        "chan2025toward", "krichevsky1981performance", "cesabianchi2006prediction",
    )  # fmt: skip
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "in_weight": ("n",),
        "in_weight_low": ("n",),
        "in_weight_high": ("n",),
        "in_weight_next": ("n",),
        "in_weight_exact": ("n",),
        "in_context_low": ("irrelevant",),
        "in_context_high": ("irrelevant",),
        "crossover": ("irrelevant", "end"),
        "alpha": ("label_noise", "seed", "time", "frequency", "context"),
        "loss": ("label_noise", "seed", "time"),
        "best": ("label_noise", "seed", "time"),
        "regret": ("label_noise", "seed", "time"),
        "bound": ("label_noise", "seed", "time"),
        "bound_known": ("label_noise", "seed", "time"),
        "switch": ("label_noise", "seed", "frequency", "level"),
        "switch_of_mean": ("label_noise", "frequency", "level"),
        "predicted": ("label_noise", "frequency"),
        "predicted_exact": ("label_noise", "frequency"),
        "p_switch": ("p_high", "seed", "frequency", "level"),
        "p_switch_of_mean": ("p_high", "frequency", "level"),
        "p_predicted": ("p_high", "frequency"),
        "frequency_ratio": ("p_high",),
    }
    table: ClassVar[tuple[str, ...]] = ("alpha", "loss", "best", "regret", "bound", "bound_known")
    method: ClassVar[str] = (
        "Figure 1: in weights, Bayes risk + (C - 1) / 2 log(N) / N, plus and minus constant / N, not "
        "below the Bayes risk; in context, the ends of Corollary 1 at k items with other labels. The "
        "authors' figure leaves epsilon (C - 1) out of the lower end, counts C instead of C - 1 wrong "
        "labels in the Bayes risk, and its axis shows natural logarithms where it says log2; here these "
        "are mended. Algorithm 1: inputs are classes, five common and five rare, with one item in the "
        "context; KT counts labels by query; the gate of each input (query and context, without labels) "
        "is moved by exponentiated gradient at a falling rate. Gates are averaged over inputs as often as "
        "they come. The predicted switch is N_x* of the cumulative bound over the class's share of "
        "queries, since a gate passes one half where the two sums of losses are the same. Regret is taken "
        "against the better predictor of each input in hindsight."
    )

    @property
    def title(self) -> str:
        """What was run."""
        note = self.provenance
        runs = f"{note['rounds']:,} rounds, {note['seeds']} seeds"
        return f"Theory of in-context and in-weight learning: {runs}"

    def crossings(self) -> pd.DataFrame:
        """Give Figure 1 in numbers.

        Returns:
            By number of irrelevant items: the ends of the in-context loss, and N_x* for both (the first where
            the loss is the upper end).
        """
        data = self.data
        return pd.DataFrame(
            {
                "irrelevant": data["irrelevant"].values,
                "loss at least": data["in_context_low"].values,
                "loss at most": data["in_context_high"].values,
                "N_x* first": data["crossover"].sel(end="first").values,
                "N_x* last": data["crossover"].sel(end="last").values,
            }
        ).set_index("irrelevant")

    def switches(self, by: str = "label_noise") -> pd.DataFrame:
        """Give switching times of common and rare classes, and what was predicted.

        Args:
            by: ``"label_noise"`` or ``"p_high"``.

        Returns:
            One row for each setting: for each level, when the mean gate over seeds of C_H and C_L passes it
            (NaN: never), and the ratio, with its range over seeds that pass; predicted rounds, in closed form
            and with KT's exact regret; the rare classes' gate at the end, or the ratio of frequencies.
        """
        name = "switch" if by == "label_noise" else "p_switch"
        each = self.data[name].transpose(by, "seed", "frequency", "level")
        mean = self.data[f"{name}_of_mean"].transpose(by, "frequency", "level").values
        ratio = (each.sel(frequency="C_L") / each.sel(frequency="C_H")).transpose(
            by, "seed", "level"
        )
        low, high = (getattr(ratio, end)("seed").values for end in ("min", "max"))
        columns: dict[str, Any] = {}
        for j, level in enumerate(LEVELS):
            columns |= {f"{f} at {level}": mean[:, i, j] for i, f in enumerate(("C_H", "C_L"))}
            columns[f"ratio at {level}"] = mean[:, 1, j] / mean[:, 0, j]
            columns |= {f"ratio at {level}_low": low[:, j], f"ratio at {level}_high": high[:, j]}
        said = self.data["predicted" if by == "label_noise" else "p_predicted"].transpose(
            by, "frequency"
        )
        columns |= {f"{f} predicted": said.values[:, i] for i, f in enumerate(("C_H", "C_L"))}
        if by == "label_noise":
            exact = self.data["predicted_exact"].transpose(by, "frequency").values
            columns |= {f"{f} exact": exact[:, i] for i, f in enumerate(("C_H", "C_L"))}
            end = self.data["alpha"].sel(frequency="C_L", context="relevant").isel(time=-1)
            columns["C_L gate at the end"] = end.mean("seed").transpose(by).values
        else:
            columns["frequency ratio"] = self.data["frequency_ratio"].values
        return pd.DataFrame(columns, index=pd.Index(self.data[by].values, name=by))

    def costs(self) -> pd.DataFrame:
        """Give loss and regret at the end, means over seeds.

        Returns:
            By label noise: the mixture's ``loss`` per round, that of the ``best`` fixed choice per input, the
            ``regret`` in sum and its bounds.
        """
        end = self.data[["loss", "best", "regret", "bound", "bound_known"]].isel(time=-1)
        names = {"bound_known": "bound, horizon known"}
        return (
            end.mean("seed")
            .to_dataframe()
            .drop(columns=["time"], errors="ignore")
            .rename(columns=names)
        )

    def _shown(self) -> float:
        """The label noise that stands for all: .05 where it was run, or the largest."""
        noises = self.data["label_noise"].values
        return float(
            noises[np.isclose(noises, 0.05)][0] if np.isclose(noises, 0.05).any() else noises.max()
        )

    def finding(self) -> str:
        """How far prediction and run agree."""
        rho, table, costs = self._shown(), self.switches(), self.costs()
        row, cost = table.loc[rho], costs.loc[rho]
        said = (
            f"With {rho:.0%} label noise, gates of relevant contexts pass one half after "
            f"{_rounds(row['C_H at 0.5'])} rounds on common and {_rounds(row['C_L at 0.5'])} on rare classes "
            f"(predicted: {_rounds(row['C_H predicted'])} and {_rounds(row['C_L predicted'])}; with KT's "
            f"exact regret {_rounds(row['C_H exact'])} and {_rounds(row['C_L exact'])})"
        )
        if np.isfinite(row["ratio at 0.5"]):
            said += f", {row['ratio at 0.5']:.1f} times later"
        if 0.0 in table.index:
            end = table.loc[0.0, "C_L gate at the end"]
            said += f"; without noise, that of rare classes ends at {end:.2f}"
        return (
            f"{said}. Regret against the best choice per input is {cost['regret']:.0f}, of at most "
            f"{cost['bound']:,.0f}."
        )

    def summary(self) -> dict[str, Any]:
        """Switching times, their ratio, and losses at one label noise."""
        rho = self._shown()
        row, cost = self.switches().loc[rho], self.costs().loc[rho]
        flat = {"label_noise": rho} | {name: float(value) for name, value in row.items()}
        flat |= {name: float(cost[name]) for name in ("loss", "best", "regret", "bound")}
        return {**super().summary(), **flat, "seconds": self.provenance["seconds"]}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Crossings, switching times and costs."""
        return {
            "Figure 1: in-context loss, and where the in-weight loss falls below it": self.crossings(),
            "Rounds until gates of relevant contexts pass a level, by label noise": self.switches(),
            "The same by share of common classes": self.switches("p_high"),
            "Loss per round, and regret": self.costs(),
        }

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw gates over time; see `tvlens.plots.icl_theory.gate_curves`."""
        from tvlens.plots.icl_theory import gate_curves

        return gate_curves(self.data, **({"title": self.finding()} | channels))

    def figures(self) -> "dict[str, go.Figure]":
        """Gates, the paper's Figure 1, switching times against frequencies, and regret."""
        from tvlens.plots.icl_theory import bound_panels, ratio_lines, regret_curves

        return {
            "Gates": self.plot(),
            "Bounds (Figure 1)": bound_panels(self.data),
            "Ratio of switching times": ratio_lines(self.data),
            "Regret": regret_curves(self.data),
        }


def _rounds(value: float) -> str:
    return f"{value:,.0f}" if np.isfinite(value) else "no number of"
