"""The variants of paper A's procedure that are tried, and what came of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr

from tvlens.intervals import differences_over_tasks, over_tasks
from tvlens.results import Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RUNS = ("hypothesis", "control")


@dataclass(frozen=True)
class Variant:
    """One way to make and inject theta; what is not said is as in paper A.

    Attributes:
        name: What it is called.
        factor: The choice that it varies.
        site: Where theta is read and written.
        mode: ``"replace"`` or ``"add"``.
        scale: Factor on the vector.
        difference: Whether the mean residual of bare dev queries is taken off theta first.
        mean: Whether theta is the mean over the dev demonstrations, not of the prompt's own.
        span: ``"one"`` layer L; ``"upto"``: every layer from 0 to L; ``"around"``: L and its neighbours,
            which share the vector's strength.
        at: ``"last"`` token, the ``"query"``'s last token, the ``"separators"`` (all tokens after the
            query), or the ``"template"`` (all tokens but the query's).
        shots: Demonstrations a prompt, if others than was asked for.
        n_dummy: Dummy queries, likewise.
    """

    name: str
    factor: str
    site: str = "resid_post"
    mode: str = "replace"
    scale: float = 1.0
    difference: bool = False
    mean: bool = False
    span: str = "one"
    at: str = "last"
    shots: int | None = None
    n_dummy: int | None = None


DEFAULT = Variant("paper A", "default")
VARIANTS: tuple[Variant, ...] = (
    *(Variant(f"replace × {k:g}", "mode", scale=k) for k in (0.5, 1.5, 2.0)),
    *(Variant(f"add × {k:g}", "mode", mode="add", scale=k) for k in (0.25, 0.5, 1.0)),
    *(
        Variant(f"add difference × {k:g}", "mode", mode="add", scale=k, difference=True)
        for k in (0.5, 1.0, 2.0)
    ),
    Variant("mean over S", "source", mean=True),
    Variant("attention output", "site", site="attn_out"),
    Variant("attention output, layers 0 to L", "site", site="attn_out", span="upto"),
    Variant("MLP output", "site", site="mlp_out"),
    Variant("difference, layers L−1 to L+1", "site", mode="add", difference=True, span="around"),
    Variant("query's last token", "position", at="query"),
    Variant("all separator tokens", "position", at="separators"),
    Variant("all template tokens", "position", at="template"),
    *(Variant(f"{k} dummy quer{'y' if k == 1 else 'ies'}", "dummies", n_dummy=k) for k in (1, 2, 4)),
    *(Variant(f"{k} shot{'s' * (k > 1)}", "shots", shots=k) for k in (1, 2, 5, 10)),
)  # fmt: skip
FACTORS: tuple[str, ...] = tuple(dict.fromkeys(v.factor for v in VARIANTS))


class Choices(Result):
    """What `choices` found: for each task, variant and test prompt whether it was right, and its control."""

    kind: ClassVar[str] = "choices"
    references: ClassVar[tuple[str, ...]] = ("hendel2023context", "todd2024function", "wilson1927")
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "hypothesis": ("task", "variant", "prompt"),
        "control": ("task", "variant", "prompt"),
        "baseline": ("task", "prompt"),
        "regular": ("task", "prompt"),
        "layer": ("task", "variant"),
        "dev_accuracy": ("task", "variant"),
        "query": ("task", "prompt"),
    }
    table: ClassVar[tuple[str, ...]] = RUNS
    method: ClassVar[str] = (
        "The default is paper A's: theta of the prompt's own demonstrations replaces the residual stream "
        "after one layer at the last token of the bare query. Each variant changes one thing, chooses its "
        "own layer on dev queries, and is judged on test queries by first token. Its control writes random "
        "directions of the same length, in the same way, at the same layer and places. Differences to the "
        "default are paired by prompt. Dev prompts show no test query. Numbers of dummy queries share "
        "their demonstrations; numbers of shots have others. Where all separator tokens are one, writing at "
        "them is the default, and is left out. Intervals, 95 %: a percentile bootstrap over distinct queries "
        "within each task, and Wilson's for accuracies of 0 and 1; not corrected for the number of variants."
    )

    @property
    def title(self) -> str:
        """How many variants, on what."""
        tasks = [str(name) for name in self.data["task"].values]
        on = tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"
        return (
            f"{self.data.sizes['variant']} ways to inject theta: {on} on {self.provenance['model']}"
        )

    def means(self) -> "pd.DataFrame":
        """Average over the tasks.

        Returns:
            One row per variant, then ``baseline`` and ``regular``: factor, accuracy, low, high; control
            with its ``_low`` and ``_high``; difference to the default, likewise; layer, the median over
            tasks. NaN where there is none.
        """
        import pandas as pd

        names = [str(name) for name in self.data["variant"].values]
        right = {
            run: self.data[run].transpose("task", "prompt", "variant").values.astype(float)
            for run in RUNS
        }
        floors = [
            self.data[run].transpose("task", "prompt").values[..., None].astype(float)
            for run in ("baseline", "regular")
        ]
        theta = right["hypothesis"]
        differences = theta - theta[..., :1]
        queries = self.data["query"].transpose("task", "prompt").values[None]
        ends = over_tasks(np.concatenate([*right.values(), *floors], -1)[None], queries)
        clear = differences_over_tasks(differences[None], queries)
        every = np.concatenate([*right.values(), differences, *floors], -1)
        mean, at = every.mean(axis=(0, 1)), 2 * len(names)
        low, high = (
            np.concatenate([end[:at], some, end[at:]])
            for end, some in zip(ends, clear, strict=True)
        )
        parts = {"": mean, "_low": low, "_high": high}
        n = len(names)
        table = pd.DataFrame(index=pd.Index([*names, "baseline", "regular"], name="variant"))
        table["factor"] = [*self.data["factor"].values.tolist(), "", ""]
        for ending, values in parts.items():
            table["accuracy" if not ending else ending[1:]] = [*values[:n], *values[3 * n :]]
        for i, name in enumerate(("control", "difference"), 1):
            for ending, values in parts.items():
                table[name + ending] = [*values[i * n : (i + 1) * n], np.nan, np.nan]
        table["layer"] = [*self.data["layer"].median("task").values, np.nan, np.nan]
        return table

    def by_task(self) -> "pd.DataFrame":
        """Accuracy of every variant on every task, with baseline and regular."""
        means = self.data["hypothesis"].mean("prompt").transpose("task", "variant")
        found: Any = means.to_pandas()
        for run in ("baseline", "regular"):
            found[run] = self.data[run].mean("prompt").values
        return found

    def factors(self) -> "pd.DataFrame":
        """Say how far each choice moves accuracy.

        Returns:
            One row per factor, the one that moves most first: spread (highest less lowest, the default
            included), lowest and highest with their variants.
        """
        import pandas as pd

        table = self.means().iloc[:-2]
        rows = {}
        for factor in dict.fromkeys(table["factor"].iloc[1:]):
            own: Any = table["accuracy"][
                (table["factor"] == factor) | (table["factor"] == "default")
            ]
            rows[factor] = {
                "spread": own.max() - own.min(), "lowest": own.min(), "lowest_variant": own.idxmin(),
                "highest": own.max(), "highest_variant": own.idxmax(),
            }  # fmt: skip
        names = ["spread", "lowest", "lowest_variant", "highest", "highest_variant"]
        found = pd.DataFrame.from_dict(rows, orient="index", columns=None if rows else names)
        found = found.rename_axis("factor")
        return found.sort_values("spread", ascending=False, kind="stable")

    def finding(self) -> str:
        """Which choice matters most, and what is better than paper A's default."""
        table, factors = self.means(), self.factors()
        default = table.loc[DEFAULT.name]
        said = (
            f"Paper A's choices answer {default['accuracy']:.2f} of bare queries "
            f"(demonstrations {table.loc['regular', 'accuracy']:.2f}, random vector {default['control']:.2f})"
        )
        if factors.empty or not factors["spread"].iloc[0]:
            return f"{said}{'; no choice changes that' if len(factors) else ''}."
        most = factors.iloc[0]
        said = (
            f"The {WORDS.get(str(factors.index[0]), str(factors.index[0]))} moves accuracy most, from "
            f"{most['lowest']:.2f} ({most['lowest_variant']}) to {most['highest']:.2f} "
            f"({most['highest_variant']}). {said}; "
        )
        clear: Any = table[table["difference_low"] > 0]
        better = clear.sort_values("difference", ascending=False)
        if better.empty:
            return said + "no variant is clearly better."
        best = better.iloc[0]
        return said + (
            f"{len(better)} variant{'s are' if len(better) > 1 else ' is'} clearly better, most "
            f"{better.index[0]} (+{best['difference']:.2f}, {best['difference_low']:.2f} to "
            f"{best['difference_high']:.2f})."
        )

    def summary(self) -> dict[str, Any]:
        """Default, floors, and the choice that matters most."""
        table, factors = self.means(), self.factors()
        default = table.loc[DEFAULT.name]
        best: Any = table.iloc[:-2]["accuracy"].idxmax()
        return {
            "model": self.provenance["model"],
            "n_tasks": self.data.sizes["task"],
            "default": float(default["accuracy"]),
            "default_low": float(default["low"]),
            "default_high": float(default["high"]),
            "control": float(default["control"]),
            **{run: float(table.loc[run, "accuracy"]) for run in ("baseline", "regular")},
            "best": str(best),
            "best_accuracy": float(table.loc[best, "accuracy"]),
            "factor": str(factors.index[0]) if len(factors) else "",
            "seconds": self.provenance["seconds"],
        }

    def tables(self) -> "dict[str, pd.DataFrame]":
        """Variants, factors, and tasks."""
        return {
            "Variants, mean over tasks": self.means(),
            "How far each choice moves accuracy": self.factors(),
            "Accuracy by task": self.by_task().rename_axis("task"),
        }

    def drawn(self) -> xr.Dataset:
        """Give what the figure shows: `means`, with the finding."""
        attributes = self.data.attrs | {"finding": self.finding()}
        return self.means().to_xarray().assign_attrs(attributes)

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw a dot for each variant, see `tvlens.plots.choices.choices_dots`."""
        from tvlens.plots.choices import choices_dots

        return choices_dots(self.drawn(), **channels)


WORDS = {
    "mode": "way of writing (replace or add, and how strongly)",
    "source": "source of theta",
    "site": "site",
    "position": "position",
    "dummies": "number of dummy queries",
    "shots": "number of demonstrations",
}
"""What factors are called in a sentence."""
