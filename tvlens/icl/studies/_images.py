"""What transformers learnt from pictures, from the context and from the weights, beside the authors'."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr

from tvlens.icl.probes import MEASURES
from tvlens.icl.studies._authors import COMMON, RARE, RARE_KNOWN
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

DIMS = ("trained", "n_sequences", "seed", "step", "probe")
NOVEL = "relevant novel base"
AUTHORS: Mapping[str, Mapping[str, Mapping[int, float]]] = {
    "transformer": {
        RARE: {10_000: 0.50, 100_000: 0.65, 1_000_000: 0.98},
        COMMON: {10_000: 1.0, 100_000: 1.0, 1_000_000: 1.0},
        RARE_KNOWN: {10_000: 0.95, 100_000: 0.55, 1_000_000: 0.05},
    },
    "in-context": {
        RARE: {10_000: 0.32, 100_000: 0.32, 1_000_000: 0.43},
        COMMON: {10_000: 1.0, 100_000: 1.0, 1_000_000: 1.0},
        RARE_KNOWN: {10_000: 0.98, 1_000_000: 0.94},
    },
    "in-weight": {
        RARE: {10_000: 1.0, 100_000: 1.0, 1_000_000: 1.0},
        COMMON: {10_000: 1.0, 100_000: 1.0, 1_000_000: 1.0},
    },
}
"""Errors on Omniglot by training, probe and N, read off figures in the authors' notebooks by eye (about ±
.05).

Pixel noise .1, two pairs in the context, 3 seeds. Their "held-out" exemplar is a random one of all 20."""
_AUTHORS = (0.1 / 1603, 1623)  # share of draws of each of their rare classes; classes


class ImageSweep(Result):
    """Errors of transformers on pictures, by kind of training and size of the dataset."""

    kind: ClassVar[str] = "icl_images"
    references: ClassVar[tuple[str, ...]] = ("chan2025toward", "lake2015human")
    variables: ClassVar[dict[str, tuple[str, ...]]] = {
        **dict.fromkeys(MEASURES, DIMS),
        "train_loss": DIMS[:-1],
        "sheet": ("class", "exemplar", "height", "width"),
        "nearest": ("of",),
    }
    table: ClassVar[tuple[str, ...]] = MEASURES
    method: ClassVar[str] = (
        "Pictures became vectors of length 1 once: random filters, then a linear map fitted on "
        "training exemplars of the classes that are trained on (the authors train a ResNet "
        "along). Every model is a two-block transformer, trained by Adam at a constant rate (the "
        "authors': warm-up, then inverse square root); all are one ensemble. Training shows some "
        "exemplars of every class (the authors': one, with pixel noise), every probe shows "
        "others. Relevant with moved labels is answered right only from the context, irrelevant "
        "with true labels only from the weights, novel classes only from the context. Bands are "
        "standard errors over seeds. Exemplars of query and context are drawn independently, so that the "
        "query's own picture is now and then in a relevant context, and more often in probes, which draw "
        "from fewer exemplars, than in training. The authors' numbers are read off their notebooks' figures, "
        "about ± .05."
    )

    @property
    def title(self) -> str:
        """The pictures and their number."""
        note = self.provenance
        return f"{note['n_high']} common and {note['n_low']} rare classes of {note['source']}"

    def curves(self, measure: str = "error", *, step: int | None = None) -> pd.DataFrame:
        """Give means and standard errors over seeds.

        Args:
            measure: One of `tvlens.icl.probes.MEASURES`.
            step: After how many training steps; the last where None.

        Returns:
            ``trained, probe, n_sequences``; ``seen``, how often a dataset asks for a rare class, in the
            mean; ``mean`` and ``sem``.
        """
        one = self.data[measure]
        one = (one.isel(step=-1) if step is None else one.sel(step=step)).drop_vars("step")
        sem = (one.std("seed", ddof=1) / np.sqrt(one.sizes["seed"])).rename("sem")
        frame = xr.merge([one.mean("seed").rename("mean"), sem]).to_dataframe().reset_index()
        asked = self.provenance
        share = (1 - asked["p_high"]) / asked["n_low"]
        return frame.assign(
            seen=_seen(frame["n_sequences"], share, asked["n_high"] + asked["n_low"])
        )

    def authors(self) -> pd.DataFrame:
        """Give the authors' errors on Omniglot.

        Returns:
            ``trained, probe, n_sequences, seen, mean``, read off figures.
        """
        rows = [
            {
                "trained": trained,
                "probe": probe,
                "n_sequences": n,
                "seen": _seen(n, *_AUTHORS),
                "mean": error,
            }
            for trained, probes in AUTHORS.items()
            for probe, errors in probes.items()
            for n, error in errors.items()
        ]
        return pd.DataFrame(rows)

    def errors(self, probe: str = RARE, trained: str = "transformer") -> dict[int, float]:
        """Give a training's mean error on a probe by size of the dataset.

        Args:
            probe: Name of the probe.
            trained: Kind of training.

        Returns:
            Errors by N.
        """
        one = self.data["error"].sel(trained=trained, probe=probe).isel(step=-1).mean("seed")
        return dict(zip(one["n_sequences"].values.tolist(), one.values.tolist(), strict=True))

    def tables(self) -> dict[str, pd.DataFrame]:
        """Errors after the last step, ours and the authors'."""
        tables = {}
        for name, frame in (
            ("Error rates", self.curves()),
            ("The authors' (read off figures)", self.authors()),
        ):
            wide = frame.pivot_table(
                index=["trained", "probe"], columns="n_sequences", values="mean", sort=False
            )
            tables[name] = wide.reset_index().rename(columns=str)
        return tables

    def finding(self) -> str:
        """Errors on rare classes over N, from the context and from the weights."""
        main = str(self.data["trained"].values[0])
        moved, known = self.errors(RARE, main), self.errors(RARE_KNOWN, main)
        sizes = " → ".join(f"{n:,}" for n in moved)
        return (
            f"Rare classes, {main}: error with moved labels {_path(moved)}, with true labels and no help "
            f"from the context {_path(known)}, as N goes {sizes}."
        )

    def summary(self) -> dict[str, Any]:
        """Errors on rare classes, and how well features tell classes."""
        main = str(self.data["trained"].values[0])
        moved = {f"moved, N = {n:,}": float(v) for n, v in self.errors(RARE, main).items()}
        return super().summary() | moved | {
            "nearest prototype, held out": float(self.data["nearest"].sel(of="seen")),
            "steps": int(self.data["step"][-1]), "seconds": self.provenance["seconds"],
        }  # fmt: skip

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw errors over N; see `tvlens.plots.icl_images.image_errors`."""
        from tvlens.plots.icl_images import image_errors

        measure, step = channels.pop("measure", "error"), channels.pop("step", None)
        curves = self.curves(measure, step=step)
        authors = self.authors() if measure == "error" else None
        settings: dict[str, Any] = {"title": self.finding(), "authors": authors, "measure": measure}
        return image_errors(curves, **(settings | channels))

    def figures(self) -> "dict[str, go.Figure]":
        """Errors over N, errors over steps, and pictures of some classes."""
        from tvlens.plots.icl_images import image_steps, picture_sheet

        error = self.data["error"].mean("seed")
        return {
            "Error over N": self.plot(),
            "Over steps": image_steps(error.isel(trained=0)),
            "Pictures": picture_sheet(self.data["sheet"]),
        }


def _path(errors: Mapping[int, float]) -> str:
    return " → ".join(f"{value:.2f}" for value in errors.values())


def _seen(n: Any, share: float, classes: int) -> Any:
    """How often a dataset of n sequences asks for a class in the mean: once by force, then by chance."""
    return 1 + (n - classes) * share
