"""In-context learning that comes and goes: first on common classes, on rare ones later.

The model first learns to copy from its context, because that serves all classes at once. Every class then
teaches the weights by itself, as often as it is asked for; once the weights know it, copying, which errs
where the context is irrelevant, is given up for it. So times of loss differ as frequencies do.

References:
    Chan et al. 2025, arXiv:2410.23042, section 3; Singh et al. 2023, arXiv:2311.08360.
"""

import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from tvlens.icl.data import Setting, class_weights
from tvlens.icl.presets import at_least, settle
from tvlens.icl.probes import MEASURES, Probe
from tvlens.icl.studies import study
from tvlens.icl.studies._sweep import share_of
from tvlens.icl.theory import crossover
from tvlens.icl.training import Plan, on_grid, train
from tvlens.icl.transformer import Transformer
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"seeds": 2, "steps": 3000, "noise": 0.3, "n_sequences": 2**16, "weight_decay": 0.0,
              "points": 30, "n_items": 300, "label_scale": 3.0},
    "paper": {"seeds": 20, "steps": 100_000, "noise": 0.3, "n_sequences": 2**16, "weight_decay": 0.0,
              "points": 80, "n_items": 3000, "label_scale": 1.0},
}  # fmt: skip
GROUPS = ("high", "low")
_PROBES = tuple(
    [Probe(True, group, flipped=True) for group in GROUPS]
    + [Probe(False, group) for group in GROUPS]
    + [Probe(True, "novel")]
)
_DIMS = ("trained", "seed", "step", "probe")


class Transience(Result):
    """Errors of models over their training."""

    kind = "icl_transience"
    references = ("chan2025toward", "singh2023transient")
    variables: ClassVar[dict[str, tuple[str, ...]]] = {
        **dict.fromkeys(MEASURES, _DIMS),
        "train_loss": _DIMS[:-1],
        "seen": ("step", "group"),
    }
    table = MEASURES
    method = (
        "Transformers were trained as one ensemble and probed as they learnt. Error with moved labels on "
        "relevant contexts is 0 for a model that copies and 1 for one that recalls. Copying is given up "
        "where that error, averaged over seeds, last passes 1/2 on its way up. Two crossovers are beside it: "
        "from where an in-weight predictor pays less than the best copier, which knows how frequent classes "
        "are and not whether a context is relevant. Predicted: the closed form N_x*, (C - 1) / 2 over that "
        "loss, for a table that knows a query without noise; measured: where models that saw no relevant "
        "context first pay less. Networks that learn from noisy inputs need many more queries than a table."
    )

    @property
    def title(self) -> str:
        """What was trained, and with which noise."""
        return f"In-context learning over training, noise {self.provenance['noise']:g}"

    def curve(
        self, group: str, *, trained: str = "transformer", measure: str = "error"
    ) -> xr.DataArray:
        """Give a measure with moved labels on relevant contexts, by seed and step.

        Args:
            group: ``"high"`` or ``"low"``.
            trained: As in `tvlens.icl.studies.noise`.
            measure: One of `tvlens.icl.probes.MEASURES`.

        Returns:
            The measure.
        """
        return self.data[measure].sel(trained=trained, probe=f"relevant {group} flipped")

    def times(self) -> pd.DataFrame:
        """Say when each group learns to copy and when it gives it up, in steps and in queries of a class.

        Returns:
            By group: ``least`` error and the step ``at`` it, ``half`` where the error last passes 1/2
            (infinite if never), ``half_seen`` queries of one of its classes by then, ``last`` error,
            ``predicted`` and ``measured`` steps of the crossover.
        """
        rows = {}
        for i, group in enumerate(GROUPS):
            mean = self.curve(group).mean("seed").values
            step = self.data["step"].values
            best = int(mean.argmin())
            half = _last_rise(step[best:], mean[best:])
            share = float(self.data["seen"].isel(group=i, step=-1)) / float(step[-1])
            rows[group] = {
                "least": mean[best], "at": step[best], "half": half, "half_seen": half * share,
                "last": mean[-1], "predicted": self._predicted(group) / share,
                "measured": self._measured(group),
            }  # fmt: skip
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("group")

    def floor(self, group: str) -> float:
        """Give what the best copier that cannot tell relevant contexts from others pays on a group.

        Args:
            group: ``"high"`` or ``"low"``.

        Returns:
            Mean loss on queries of the group in nats: it knows the context's label, and how frequent classes
            and relevant contexts are.
        """
        p = self.provenance["p_relevant"]
        prior = class_weights(Setting(p_relevant=p)).double().numpy()
        # Rows: the query's class; columns: the label in its context, its own where that is relevant.
        elsewhere = prior * (1 - np.eye(len(prior))) / (1 - prior[:, None])
        shown = p * np.eye(len(prior)) + (1 - p) * elsewhere
        joint = prior[:, None] * shown
        with np.errstate(divide="ignore", invalid="ignore"):
            paid = np.where(joint > 0, -shown * np.log(joint / joint.sum(0)), 0).sum(1)
        return float(paid[0 if group == "high" else -1])

    def _predicted(self, group: str) -> float:
        return float(crossover(self.floor(group), self.provenance["classes"], form="instantaneous"))

    def _measured(self, group: str) -> float:
        loss = (
            self.data["loss"]
            .sel(trained="in-weight", probe=f"irrelevant {group} base")
            .mean("seed")
        )
        below = np.flatnonzero(loss.values < self.floor(group))
        return float(loss["step"].values[below[0]]) if len(below) else np.inf

    def finding(self) -> str:
        """When copying comes and goes, and the ratio of the times."""
        high, low = (row for _, row in self.times().iterrows())
        if not np.isfinite([high["half"], low["half"]]).all():
            which = " and ".join(
                name for name, row in (("common", high), ("rare", low)) if np.isinf(row["half"])
            )
            return (
                f"On {which} classes copying does not come and go within these steps: the least error with "
                f"moved labels is {high['least']:.2f} (common) and {low['least']:.2f} (rare), at last "
                f"{high['last']:.2f} and {low['last']:.2f}."
            )
        return (
            f"Copying is best at step {high['at']:.0f} on common classes (error {high['least']:.2f}) and at "
            f"{low['at']:.0f} on rare ones ({low['least']:.2f}); it is given up at steps {high['half']:.0f} "
            f"and {low['half']:.0f}, a ratio of {low['half'] / high['half']:.1f} where frequencies differ by "
            f"{self._frequencies():.0f}."
        )

    def _frequencies(self) -> float:
        last = self.data["seen"].isel(step=-1)
        return float(last.sel(group="high") / last.sel(group="low"))

    def summary(self) -> dict[str, Any]:
        """Times of both groups and their ratio."""
        times = self.times()
        flat = {
            f"{g}_{name}": float(times.loc[g, name])
            for g in GROUPS
            for name in ("least", "half", "last")
        }
        ratio = flat["low_half"] / flat["high_half"]
        return super().summary() | flat | {
            "ratio": ratio, "frequency_ratio": self._frequencies(), "seconds": self.provenance["seconds"]
        }  # fmt: skip

    def tables(self) -> dict[str, pd.DataFrame]:
        """When copying comes and goes."""
        return {"When copying comes and goes": self.times()}

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw errors over steps; see `tvlens.plots.icl_transience.transience_curves`."""
        from tvlens.plots.icl_transience import transience_curves

        chance = 1 - 1 / self.provenance["classes"]
        return transience_curves(
            self.data, self.times(), **({"title": self.finding(), "chance": chance} | channels)
        )


@study("transience")
def transience(
    *,
    preset: str = "quick",
    seed: int = 0,
    progress: bool = True,
    device: str | None = None,
    out: Path | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    noise: float | None = None,
    n_sequences: int | None = None,
    weight_decay: float | None = None,
    points: int | None = None,
    n_items: int | None = None,
    label_scale: float | None = None,
) -> Transience:
    """Train transformers and watch in-context learning come and go.

    Args:
        preset: ``"quick"`` for two CPU cores; ``"paper"``: more seeds, 100,000 steps.
        seed: The first seed.
        progress: Whether to show a progress bar.
        device: Where to train; the first GPU where there is one, else the CPU, where None.
        out: Folder for the state; a run that was stopped goes on from it.
        seeds: How many seeds; None, here and below, for what the preset says.
        steps: Training steps.
        noise: Input noise.
        n_sequences: Sequences in the dataset.
        weight_decay: Decoupled weight decay, which may keep in-context learning alive.
        points: At how many steps models are probed, evenly spaced in their logarithm.
        n_items: Sequences for each probe.
        label_scale: Factor on the first label embeddings, see `tvlens.icl.Transformer`.

    Returns:
        Errors over steps, with predicted and measured crossovers, as a result that draws itself.

    Raises:
        ValueError: Settings that contradict each other, or a state of another run.

    References:
        Chan et al. 2025, arXiv:2410.23042; Singh et al. 2023, arXiv:2311.08360.
    """
    started = time.perf_counter()
    chosen = settle(
        PRESETS, preset, seeds=seeds, steps=steps, noise=noise, n_sequences=n_sequences,
        weight_decay=weight_decay, points=points, n_items=n_items, label_scale=label_scale,
    )  # fmt: skip
    at_least(1, seeds=chosen["seeds"], points=chosen["points"], steps=chosen["steps"])
    every = tuple(range(seed, seed + chosen["seeds"]))
    base = Setting(noise=chosen["noise"], n_sequences=chosen["n_sequences"])
    kinds = ("transformer", "in-weight")
    settings = [
        Setting(noise=base.noise, n_sequences=base.n_sequences, seed=s,
                p_relevant=share_of(kind, usual=base.p_relevant))
        for kind, s in product(kinds, every)
    ]  # fmt: skip
    at = np.unique(
        np.geomspace(min(10, chosen["steps"]), chosen["steps"], chosen["points"]).astype(int)
    )
    plan = Plan(
        steps=chosen["steps"], at=tuple(map(int, at)), n_items=chosen["n_items"], probes=_PROBES,
        weight_decay=chosen["weight_decay"],
    )  # fmt: skip
    path = None if out is None else Path(out) / "transience.safetensors"
    done = train(
        settings,
        plan,
        model=Transformer(label_scale=chosen["label_scale"]),
        device=device,
        out=path,
        progress=progress,
        label="transience",
    )
    grid = on_grid(done.measures, {"trained": kinds, "seed": every}).transpose(*_DIMS, ...)
    seen = done.measures["seen"].isel(member=0).values
    data = grid.assign_coords(group=list(GROUPS)).assign(seen=(("step", "group"), seen))
    note = collect(
        kind=Transience.kind, study="transience", preset=preset, seed=seed, **chosen,
        p_relevant=base.p_relevant, classes=base.n_classes, batch=plan.batch, lr=plan.lr,
        model=repr(done.model), device=str(done.data.device),
        train_seconds=round(done.seconds, 1), seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Transience(data.assign_attrs({ATTRIBUTE: encode(note)}))


def _last_rise(step: np.ndarray, error: np.ndarray) -> float:
    """Where a curve last passes 1/2 upwards, between logged steps by its logarithm."""
    below = np.flatnonzero(error < 0.5)
    if not len(below) or below[-1] == len(error) - 1:
        return np.inf
    i = below[-1]
    part = (0.5 - error[i]) / (error[i + 1] - error[i])
    return float(np.exp(np.log(step[i]) + part * (np.log(step[i + 1]) - np.log(step[i]))))
