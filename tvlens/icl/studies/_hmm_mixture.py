"""What predictors made of prompts from a mixture of hidden Markov models."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from tvlens.intervals import wilson
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

PREDICTORS = ("concept known", "exact", "transformer", "no inference")
MEASURES = ("loss", "exact_loss", "divergence")


class HMMMixture(Result):
    """Answers of a transformer and of exact predictors, by length and number of examples."""

    kind: ClassVar[str] = "icl_hmm_mixture"
    references: ClassVar[tuple[str, ...]] = ("xie2022explanation",)
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "right": ("predictor", "length", "examples", "prompt"),
        "divergence": ("predictor", "length", "examples", "prompt"),
        "posterior": ("length", "examples", "prompt"),
        "training": ("step", "measure"),
    }
    table: ClassVar[tuple[str, ...]] = ("right", "divergence")
    method: ClassVar[str] = (
        "Documents of a mixture of hidden Markov models, made as the GINC data set but smaller, and with a "
        "share of .05 of uniform transitions between slots. Prompts: independent examples of one concept "
        "that begin in one slot, with delimiters; right is the likeliest last token to one who knows concept "
        "and slot. The exact predictor reads prompts as documents, as a model that has seen nothing else "
        "must. Divergence: from the exact predictor, nats. Intervals: Wilson's over prompts, and 1.96 "
        "standard errors of divergences. The authors show accuracies as figures; none of theirs are drawn."
    )

    @property
    def title(self) -> str:
        """What was compared."""
        note = self.provenance
        return (
            f"{note['n_concepts']} hidden Markov models and a {note['n_layers']}-layer transformer"
        )

    def rates(self) -> pd.DataFrame:
        """Give accuracies and divergences by predictor, length and number of examples.

        Returns:
            ``predictor, length, examples, accuracy, low, high, divergence, divergence_low,
            divergence_high``, and the posterior's mean probability of the true concept.
        """
        rows = []
        for place, one in _cells(self.data):
            n = one.sizes["prompt"]
            low, high = wilson(float(one["right"].sum()), n)
            mean, error = (
                float(one["divergence"].mean()),
                1.96 * float(one["divergence"].std()) / n**0.5,
            )
            rows.append(
                place
                | {"accuracy": float(one["right"].mean()), "low": low, "high": high}
                | {
                    "divergence": mean,
                    "divergence_low": mean - error,
                    "divergence_high": mean + error,
                }
                | {"posterior": float(one["posterior"].mean())}
            )
        return pd.DataFrame(rows)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Accuracies by number of examples, for each length."""
        rates, found = self.rates(), {}
        for length in self.data["length"].values:
            some: Any = rates[rates["length"] == length]
            wide = some.pivot_table(index="predictor", columns="examples", values="accuracy")
            found[f"Accuracy by examples of {length} tokens"] = wide.loc[list(PREDICTORS)]
        return found

    def _ends(self) -> dict[str, Any]:
        """Rates at the longest examples and the most of them, by predictor."""
        rates = self.rates()
        last = (rates[["length", "examples"]] == rates[["length", "examples"]].max()).all(axis=1)
        some: Any = rates[last]
        return {row["predictor"]: row for row in some.to_dict("records")}

    def finding(self) -> str:
        """How near the transformer comes to exact inference, at the most and longest examples."""
        at = self._ends()
        some = at["transformer"]
        none = at["no inference"]
        return (
            f"After {some['examples']} examples of {some['length']} tokens the transformer is right in "
            f"{some['accuracy']:.0%} of prompts, exact Bayesian inference in {at['exact']['accuracy']:.0%}, "
            f"one who never infers the concept in {none['accuracy']:.0%}; their divergences from exact "
            f"inference are {some['divergence']:.2f} and {none['divergence']:.2f} nats."
        )

    def summary(self) -> dict[str, Any]:
        """Accuracies with intervals at the most and longest examples, and divergences."""
        flat: dict[str, Any] = {}
        for name, row in self._ends().items():
            flat |= {name: float(row["accuracy"]), f"{name}_low": float(row["low"]),
                     f"{name}_high": float(row["high"]),
                     f"{name} divergence": float(row["divergence"])}  # fmt: skip
        held = self.data["training"].isel(step=-1).sel(measure="divergence")
        flat |= {"held-out divergence": float(held), "seconds": self.provenance["seconds"]}
        return super().summary() | flat

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw accuracies by number of examples; see `tvlens.plots.icl_hmm_mixture.hmm_accuracy`."""
        from tvlens.plots.icl_hmm_mixture import hmm_accuracy

        return hmm_accuracy(self.rates(), **({"title": self.finding()} | channels))

    def figures(self) -> "dict[str, go.Figure]":
        """Accuracies by examples, and the loss over training."""
        from tvlens.plots.icl_hmm_mixture import hmm_training

        return {"Accuracy by examples": self.plot(), "Training": hmm_training(self.data)}


def _cells(data: xr.Dataset) -> list[tuple[dict[str, Any], xr.Dataset]]:
    """Give the prompts of every predictor, length and number of examples."""
    return [
        (
            {"predictor": name, "length": int(length), "examples": int(n)},
            data.sel(predictor=name, length=length, examples=n),
        )
        for length in data["length"].values
        for name in PREDICTORS
        for n in data["examples"].values
    ]


def dataset(
    found: Mapping[str, np.ndarray],
    curve: Mapping[int, Any],
    *,
    lengths: Sequence[int],
    examples: Sequence[int],
) -> xr.Dataset:
    """Label everything.

    Args:
        found: Outcomes by variable.
        curve: Measures of training by step.
        lengths: Tokens of an example.
        examples: Whole examples in a prompt.

    Returns:
        The data of a `HMMMixture`.
    """
    steps = sorted(curve)
    training = np.stack([np.asarray(curve[step], dtype=float) for step in steps])
    variables = {name: (HMMMixture.variables[name], value) for name, value in found.items()}
    return xr.Dataset(
        {**variables, "training": (("step", "measure"), training)},
        coords={
            "predictor": list(PREDICTORS), "length": list(lengths), "examples": list(examples), "step": steps,
            "measure": list(MEASURES),
        },
    )  # fmt: skip
