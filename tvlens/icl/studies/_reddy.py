"""What two-layer networks learnt: accuracies on four tests, and four measures of the induction head."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

TESTS = ("train", "new_classes", "moved_labels", "in_weights")
"""As in training; classes never trained on; labels moved on by one; target not in the context."""
MEASURES = ("previous_token", "target_label", "same_label", "context_label", "loss")
"""See `Reddy.method`."""
DIALS = ("n_classes", "copies", "noise", "zipf")
_LEARNT = 0.9


class Reddy(Result):
    """Accuracies and progress measures by setting, seed and step."""

    kind: ClassVar[str] = "icl_reddy"
    references: ClassVar[tuple[str, ...]] = ("reddy2024mechanistic",)
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "accuracy": ("setting", "seed", "test", "step"),
        "progress": ("setting", "seed", "measure", "step"),
        **dict.fromkeys(DIALS, ("setting",)),
    }
    table: ClassVar[tuple[str, ...]] = ("accuracy",)
    method: ClassVar[str] = (
        "Two layers of attention (one head, no norm, residual) and a three-layer ReLU network, trained by "
        "SGD on the target's label alone. Tests: as in training; new classes (in-context learning); labels "
        "moved by one; target absent (in-weight learning). Measures, on the test with new classes: attention "
        "of labels to the item before them in layer 1; attention of the target to right labels in layer 2; "
        "mean attention to a right label less that to a wrong one; mean logit of labels in the context less "
        "that of others. The authors' numbers are in figures, and none is drawn."
    )

    @property
    def title(self) -> str:
        """What was trained."""
        return "Two-layer attention networks on items with labels"

    def emergence(self) -> pd.DataFrame:
        """Give for each network when it learns in context, how abruptly, and which measure leads.

        Returns:
            Dials and ``seed``; ``new_classes``, ``moved_labels``, ``in_weights`` at the end; ``learnt``
            whether accuracy on new classes passes .9; ``from_step`` and ``to_step`` between which it rises
            from a tenth to nine tenths of its way above a guess among the context's labels;
            ``half_accuracy`` and, for each measure, ``half_...``: the first step at which it passes half
            of its range. NaN where it never learns.
        """
        rows = []
        for i in range(self.data.sizes["setting"]):
            for seed in self.data["seed"].values:
                one = self.data.isel(setting=i).sel(seed=seed)
                curve = one["accuracy"].sel(test="new_classes")
                learnt = bool(curve.max() > _LEARNT)
                # Who names any label of the context is right this often.
                guess = float(one["copies"]) / self.provenance["n_pairs"]
                ends = {t: float(one["accuracy"].sel(test=t)[-1]) for t in TESTS[1:]}
                row = {name: float(one[name]) for name in DIALS} | {"seed": int(seed)} | ends
                row |= {"learnt": learnt, "from_step": _passes(curve, 0.1, learnt, guess)}
                row |= {"to_step": _passes(curve, 0.9, learnt, guess)}
                row["half_accuracy"] = _passes(curve, 0.5, learnt, guess)
                for name in MEASURES[:-1]:
                    row[f"half_{name}"] = _passes(one["progress"].sel(measure=name), 0.5, learnt)
                rows.append(row)
        return pd.DataFrame(rows)

    def tables(self) -> dict[str, pd.DataFrame]:
        """When each network learns in context."""
        return {"Emergence of in-context learning": self.emergence()}

    def finding(self) -> str:
        """How many networks learn in context, how abruptly, and what leads."""
        table = self.emergence()
        some: Any = table[table["learnt"]]
        last = int(self.data["step"][-1])
        if some.empty:
            best = float(self.data["accuracy"].sel(test="new_classes").max())
            return (
                f"None of {len(table)} networks learnt in context within {last} steps; the best accuracy on "
                f"new classes was {best:.2f}."
            )
        leads = int((some["half_target_label"] <= some["half_accuracy"]).sum())
        return (
            f"{len(some)} of {len(table)} networks learnt in context within {last:,} steps, new classes "
            f"going from a tenth to nine tenths of their way between steps {some['from_step'].median():,.0f} "
            f"and {some['to_step'].median():,.0f} (medians); attention to the right label led in {leads}."
        )

    def summary(self) -> dict[str, Any]:
        """Shares and medians over all networks."""
        table = self.emergence()
        some: Any = table[table["learnt"]]
        medians = {
            name: float(some[name].median()) for name in table if str(name).startswith("half_")
        }
        return super().summary() | {
            "networks": len(table), "learnt": len(some), "from_step": float(some["from_step"].median()),
            "to_step": float(some["to_step"].median()), **medians, "seconds": self.provenance["seconds"],
        }  # fmt: skip

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw tests and measures over steps; see `tvlens.plots.icl_reddy.reddy_curves`."""
        from tvlens.plots.icl_reddy import reddy_curves

        shown = self.data.isel(setting=self._shown())
        return reddy_curves(shown, **({"title": self.finding()} | channels))

    def _shown(self) -> int:
        """Choose the setting in which most networks learn in context, the first of them."""
        best = self.data["accuracy"].sel(test="new_classes").max("step")
        return int((best > _LEARNT).sum("seed").argmax("setting"))

    def figures(self) -> "dict[str, go.Figure]":
        """Curves, and where there are several settings what each ends with."""
        from tvlens.plots.icl_reddy import reddy_settings

        every = {"Tests and measures": self.plot()}
        if self.data.sizes["setting"] > 1:
            every["Settings"] = reddy_settings(self.emergence())
        return every


def _passes(curve: xr.DataArray, share: float, learnt: bool, guess: float = -np.inf) -> float:
    """First step at which a curve has gone this share of its way from its start, or a guess, to its top."""
    if not learnt:
        return np.nan
    values = curve.values
    start, top = max(float(values[0]), guess), float(values.max())
    return float(curve["step"].values[int((values >= start + share * (top - start)).argmax())])


def dataset(
    found: Float[Tensor, "member measure step"],
    *,
    settings: Sequence[tuple[Any, ...]],
    seeds: Sequence[int],
    steps: Sequence[int],
) -> xr.Dataset:
    """Label everything.

    Args:
        found: Accuracies, then measures, of every member.
        settings: Dials of every setting; members are settings by seeds.
        seeds: The seeds.
        steps: When it was measured.

    Returns:
        The data of a `Reddy`.
    """
    values = torch.unflatten(found, 0, (len(settings), len(seeds))).double().numpy()
    dials = {name: ("setting", [float(s[i]) for s in settings]) for i, name in enumerate(DIALS)}
    n = len(TESTS)
    return xr.Dataset(
        {"accuracy": (("setting", "seed", "test", "step"), values[:, :, :n]),
         "progress": (("setting", "seed", "measure", "step"), values[:, :, n:])},
        coords={"setting": np.arange(len(settings)), "seed": list(seeds), "test": list(TESTS),
                "measure": list(MEASURES), "step": list(steps), **dials},
    )  # fmt: skip
