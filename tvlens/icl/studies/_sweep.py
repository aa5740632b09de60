"""One dial of the data turned, over dataset sizes: the shape that most of the paper's experiments have."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from tvlens._errors import unknown
from tvlens.icl.data import Setting
from tvlens.icl.presets import at_least, settle, several
from tvlens.icl.probes import MEASURES
from tvlens.icl.studies._authors import ERRORS, RARE
from tvlens.icl.training import Plan, on_grid, train
from tvlens.icl.transformer import Transformer
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

TRAINED = {"transformer": None, "in-weight": 0.0, "in-context": 1.0}
"""What a model is trained on: the setting's own share of relevant sequences, none, or only those."""
_DIMS = ("value", "trained", "n_sequences", "seed", "step", "probe")


@dataclass(frozen=True, kw_only=True)
class Dial:
    """What a study turns.

    Args:
        name: The study's name.
        sets: The field of `Setting` that it sets.
        says: What the dial is, for titles.
        presets: Values, sizes (as powers of two), what models are trained on, seeds, steps, sequences for
            each probe, and the first scale of label embeddings, by preset.
        base: Other fields, where they are not the default.
    """

    name: str
    sets: str
    says: str
    presets: Mapping[str, Mapping[str, Any]]
    base: Mapping[str, Any] = field(default_factory=dict)


class Sweep(Result):
    """Errors of trained models, by a dial of their data and by how many sequences there were."""

    kind = "icl_sweep"
    references = ("chan2025toward",)
    variables: ClassVar[dict[str, tuple[str, ...]]] = {
        **dict.fromkeys(MEASURES, _DIMS),
        "train_loss": _DIMS[:-1],
    }
    table = MEASURES
    method = (
        "For every cell of the grid one two-block transformer was trained by Adam on a dataset of N "
        "sequences, all cells as one ensemble. Probes are sequences that no training saw, with clean labels: "
        "relevant or irrelevant contexts, common or rare classes, true labels or labels moved on within "
        "their group. Relevant with moved labels is answered right only from the context, irrelevant with "
        "true labels only from the weights. Bands: the standard error over seeds, as the authors draw them."
    )

    @property
    def dial(self) -> str:
        """What was turned, in words."""
        return str(self.provenance["says"])

    @property
    def title(self) -> str:
        """The dial, and how long was trained, from which start."""
        asked, steps = self.provenance, int(self.data["step"][-1])
        start = f", label scale {asked['label_scale']:g}" if asked["label_scale"] != 1 else ""
        return f"In-context or in-weight: {self.dial}, {steps:,} steps{start}"

    def curves(self, measure: str = "error", *, step: int | None = None) -> pd.DataFrame:
        """Give means and standard errors over seeds.

        Args:
            measure: One of `tvlens.icl.probes.MEASURES`.
            step: After how many training steps; the last where None.

        Returns:
            One row for each value, kind of training, probe and size: ``mean``, ``sem``, and ``authors``, NaN
            where the authors' figure shows none.

        Raises:
            ValueError: There is no such measure or step.
        """
        if measure not in MEASURES:
            raise unknown("measure", measure, MEASURES)
        steps = self.data["step"].values.tolist()
        if step is not None and step not in steps:
            raise ValueError(f"models were measured after steps {steps}; {step} arrived.")
        array: Any = self.data[measure].isel(step=-1 if step is None else steps.index(step))
        n = array.sizes["seed"]
        mean = array.mean("seed").rename("mean").drop_vars("step")
        sem = (array.std("seed", ddof=1) / np.sqrt(n)).rename("sem").drop_vars("step")
        frame = xr.merge([mean, sem]).to_dataframe().reset_index()
        known = ERRORS.get(self.provenance["study"], {}) if measure == "error" else {}
        frame["authors"] = [
            known.get(v, {}).get(probe, {}).get(int(np.log2(size)), np.nan)
            if t == "transformer"
            else np.nan
            for v, t, probe, size in frame[["value", "trained", "probe", "n_sequences"]].itertuples(
                index=False
            )
        ]
        return frame

    def chance(self) -> list[float]:
        """Give the error of guessing, value by value."""
        asked = self.provenance
        made = [
            Setting(**asked["base"], **{asked["field"]: v})
            for v in self.data["value"].values.tolist()
        ]
        return [1 - 1 / setting.n_classes for setting in made]

    def least(self) -> pd.DataFrame:
        """Give for each value where on rare classes the context was used most, by the first training.

        Returns:
            By value: ``least`` error with moved labels, ``at`` how many sequences, ``last`` error at the
            largest size.
        """
        frame: Any = self.curves()
        trained = self.data["trained"].values
        shown = "transformer" if "transformer" in trained else trained[0]
        frame = frame[(frame["probe"] == RARE) & (frame["trained"] == shown)]
        rows = {}
        for value, one in frame.groupby("value", sort=False):
            best = one.loc[one["mean"].idxmin()]
            last = one.loc[one["n_sequences"].idxmax(), "mean"]
            rows[value] = {"least": best["mean"], "at": int(best["n_sequences"]), "last": last}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(self.provenance["field"])

    def finding(self) -> str:
        """Where on rare classes the context is used most, value by value."""
        said = [
            f"{value:g}: {row['least']:.2f} at N = {row['at']:.0f}, then {row['last']:.2f}"
            for value, row in self.least().iterrows()
        ]
        return (
            "Rare classes, moved labels: the least error by "
            f"{self.dial}, and the error at the largest N. {'; '.join(said)}."
        )

    def summary(self) -> dict[str, Any]:
        """The least error on rare classes, of the first value, and the size of the run."""
        first = self.least().iloc[0]
        sizes = self.data.sizes
        runs = sizes["value"] * sizes["trained"] * sizes["n_sequences"] * sizes["seed"]
        return super().summary() | {
            "study": self.provenance["study"], "least": float(first["least"]), "at": int(first["at"]),
            "last": float(first["last"]), "runs": int(runs), "steps": int(self.data["step"][-1]),
            "seconds": self.provenance["seconds"],
        }  # fmt: skip

    def tables(self) -> dict[str, pd.DataFrame]:
        """Errors after the last step, by value, training, probe and size."""
        frame = self.curves()
        wide = frame.pivot_table(
            index=["value", "trained", "probe"], columns="n_sequences", values="mean", sort=False
        )
        wide = wide.reset_index().rename(columns=str).set_index("value")
        return {"Error rates, means over seeds": wide.rename_axis(self.provenance["field"])}

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw error over N, one column for each value; see `tvlens.plots.icl_sweep.sweep_curves`."""
        from tvlens.plots.icl_sweep import sweep_curves

        measure = channels.pop("measure", "error")
        curves = self.curves(measure, step=channels.pop("step", None))
        chance = self.chance() if measure == "error" else None
        kept: dict[str, Any] = {
            "title": self.title, "dial": self.provenance["field"], "measure": measure, "chance": chance,
        }  # fmt: skip
        return sweep_curves(curves, **(kept | channels))


def sweep(
    dial: Dial,
    *,
    preset: str,
    seed: int,
    progress: bool,
    device: str | None,
    out: Path | None,
    **given: Any,
) -> Sweep:
    """Train every cell of a dial's grid, ensemble by ensemble.

    Args:
        dial: What is turned.
        preset: ``"quick"`` or ``"paper"``.
        seed: The first seed.
        progress: Whether to show progress bars.
        device: Where to train.
        out: Folder for the state of each ensemble; what is there goes on or is read back.
        **given: What replaces the preset's settings.

    Returns:
        The measures of every cell.
    """
    started = time.perf_counter()
    chosen = settle(dial.presets, preset, **given)
    values, sizes = several("values", chosen["values"]), several("sizes", chosen["sizes"])
    seeds = tuple(range(seed, seed + chosen["seeds"]))
    trained = several("trained", chosen["trained"])
    at_least(1, seeds=chosen["seeds"])
    for kind in trained:
        if dial.sets == "p_relevant" and TRAINED.get(kind) is not None:
            raise ValueError(
                f"p_relevant is what this study turns, and {kind!r} sets it too. Nearest: 'transformer'."
            )
    cells = list(product(values, trained, sizes, seeds))
    settings = [_setting(dial, *cell) for cell in cells]
    steps = chosen["steps"]
    at = sorted({max(1, round(steps * part)) for part in (0.01, 0.03, 0.1, 0.3, 0.5)})
    plan = Plan(steps=steps, at=tuple(at), n_items=chosen["n_items"])
    model = Transformer(label_scale=chosen["label_scale"])
    parts, seconds, used = [], 0.0, device
    for shape in dict.fromkeys(setting.shape for setting in settings):
        some = [setting for setting in settings if setting.shape == shape]
        path = (
            None
            if out is None
            else Path(out) / f"{dial.name}-{_mark(some, plan, model)}.safetensors"
        )
        done = train(
            some, plan, model=model, device=device, out=path, progress=progress, label=dial.name
        )
        seconds, used = seconds + done.seconds, done.data.device
        parts.append(done.measures)
    # The outermost axis is the value, and a shape belongs to values: parts follow one another.
    order = [i for shape in dict.fromkeys(s.shape for s in settings)
             for i, s in enumerate(settings) if s.shape == shape]  # fmt: skip
    flat: Any = xr.concat(parts, "member", join="override").isel(member=np.argsort(order))
    labels = {"value": list(values), "trained": list(trained), "n_sequences": [2**n for n in sizes],
              "seed": list(seeds)}  # fmt: skip
    data = on_grid(flat, labels).transpose(*_DIMS, missing_dims="ignore")
    note = collect(
        kind=Sweep.kind, study=dial.name, field=dial.sets, says=dial.says, preset=preset,
        seed=seed, seeds=len(seeds), batch=plan.batch, lr=plan.lr, model=repr(model),
        base=dict(dial.base), device=str(used), steps=steps, n_items=plan.n_items,
        label_scale=model.label_scale, train_seconds=round(seconds, 1),
        seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Sweep(data.assign_attrs({ATTRIBUTE: encode(note)}))


def share_of(trained: str, *, usual: float) -> float:
    """Give the share of relevant sequences that a kind of training has.

    Args:
        trained: One of `TRAINED`.
        usual: The setting's own.

    Returns:
        The share.

    Raises:
        ValueError: There is no such kind.

    Example:
        >>> share_of("transformer", usual=0.9), share_of("in-weight", usual=0.9)
        (0.9, 0.0)
    """
    if trained not in TRAINED:
        raise unknown("kind of training", trained, TRAINED)
    share = TRAINED[trained]
    return usual if share is None else share


def _setting(dial: Dial, value: Any, trained: str, size: int, seed: int) -> Setting:
    made = Setting(**dial.base, n_sequences=2**size, seed=seed)
    made = replace(made, **{dial.sets: value})
    return replace(made, p_relevant=share_of(trained, usual=made.p_relevant))


def _mark(settings: Sequence[Setting], plan: Plan, model: Any) -> str:
    """A short name for a state's file, so that other settings get another file."""
    parts: list[Any] = [[s.to_dict() for s in settings], repr(plan), repr(model)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]
