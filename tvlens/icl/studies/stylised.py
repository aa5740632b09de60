"""The stylised model beside the transformer: does a gate decide as a transformer does, input by input?

The stylised model says outright how much of its in-weight part it takes. A transformer does not, but where
labels are moved its two ways of answering disagree, and the share of the remembered label among both,
alpha-hat, says how much it leans on its weights. Both are read on the same inputs.

How the stylised model is trained decides what its gate does. Where g, h and gate learn together, the gate
turns to the weights class by class, as the authors' figures show; where g and h are learnt first, the gate
takes g almost everywhere, because g knows the whole dataset by heart by then.

References:
    Chan et al. 2025, arXiv:2410.23042, section 4.
"""

import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from tvlens._errors import unknown
from tvlens.icl.data import Data, Items, Setting
from tvlens.icl.gated import Gated
from tvlens.icl.presets import settle, several
from tvlens.icl.probes import outcomes
from tvlens.icl.studies import study
from tvlens.icl.studies._authors import GATES
from tvlens.icl.training import Plan, Training, train
from tvlens.icl.transformer import Transformer
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.results import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"sizes": (6, 8, 10, 12, 14), "seeds": 2, "order": "together", "steps": 5000,
              "transformer_steps": 1000, "noise": 0.2, "length": 1, "lr": 1e-3, "n_items": 400,
              "label_scale": 2.0},
    "paper": {"sizes": (6, 8, 10, 12, 14, 16, 18, 20), "seeds": 5, "order": "together", "steps": 100_000,
              "transformer_steps": 100_000, "noise": 0.2, "length": 1, "lr": 3e-4, "n_items": 3000,
              "label_scale": 1.0},
}  # fmt: skip
ORDERS = ("together", "apart")
PROBES = tuple(
    f"{kind} {group}" for kind in ("relevant", "irrelevant") for group in ("high", "low")
)
_DIMS = ("n_sequences", "seed", "probe")
_SHARES = ("gate", "alpha", "gated_error", "transformer_error", "g_error", "h_error")


class Stylised(Result):
    """The gate of the stylised model, and the transformer's index, on the same inputs."""

    kind = "icl_stylised"
    references = ("chan2025toward",)
    variables: ClassVar[dict[str, tuple[str, ...]]] = {
        **dict.fromkeys((*_SHARES, "agreement"), _DIMS),
        "temperature": _DIMS[:2],
    }
    table = (*_SHARES, "agreement")
    method = (
        "On every dataset a stylised model and a transformer were trained. The stylised model's gate sees "
        'inputs and no labels; g, h and gate learn together by the mixture\'s loss (order "together", as in '
        "the figures of the authors' end-to-end runs), or g and h first, each by its own loss, then the gate "
        'alone ("apart"). alpha-hat of the transformer is p(own) / (p(own) + p(moved)) on the same inputs '
        "with moved labels. Errors of both models are on moved labels, those of g and h on true ones. "
        "Agreement is Spearman's correlation over inputs."
    )

    @property
    def title(self) -> str:
        """What was compared."""
        asked = self.provenance
        return f"Stylised model, learnt {asked['order']}, and transformer, noise {asked['noise']:g}"

    def curves(self) -> pd.DataFrame:
        """Give means and standard errors over seeds, and the authors' gates where their figure is known.

        Returns:
            One row for each probe and size.
        """
        n = self.data.sizes["seed"]
        names = [*_SHARES, "agreement"]
        mean = self.data[names].mean("seed").to_dataframe()
        sem = (self.data[names].std("seed", ddof=1) / np.sqrt(n)).to_dataframe()
        frame: Any = mean.join(sem.add_suffix("_sem")).reset_index()
        theirs = {"noise": 0.2, "length": 1, "order": "together"}
        known = GATES if all(self.provenance[k] == v for k, v in theirs.items()) else {}
        frame["authors"] = [
            known.get(probe, {}).get(int(np.log2(size)), np.nan)
            for probe, size in frame[["probe", "n_sequences"]].itertuples(index=False)
        ]
        return frame

    def finding(self) -> str:
        """How gate and index grow with the dataset, and how far they agree."""
        frame = self.curves().set_index(["probe", "n_sequences"])
        sizes = self.data["n_sequences"].values
        said = []
        for group, name in (("high", "common"), ("low", "rare")):
            first, last = (frame.loc[(f"relevant {group}", size)] for size in (sizes[0], sizes[-1]))
            said.append(
                f"on {name} classes the gate goes from {first['gate']:.2f} to {last['gate']:.2f} and the "
                f"transformer's alpha-hat from {first['alpha']:.2f} to {last['alpha']:.2f}"
            )
        return (
            f"From N = {sizes[0]} to {sizes[-1]}, in relevant contexts, {'; '.join(said)}. Over inputs they "
            f"correlate by {float(self.data['agreement'].sel(probe=list(PROBES[:2])).mean()):.2f}."
        )

    def summary(self) -> dict[str, Any]:
        """Gates and indices at the largest dataset."""
        last = self.data.isel(n_sequences=-1).mean("seed")
        flat = {
            f"{name}_{probe.replace(' ', '_')}": float(last[name].sel(probe=probe))
            for name in ("gate", "alpha")
            for probe in PROBES
        }
        return super().summary() | flat | {"seconds": self.provenance["seconds"]}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Means over seeds, by probe and size."""
        frame = self.curves()[["probe", "n_sequences", *_SHARES, "agreement", "authors"]]
        return {
            "Means over seeds": frame.set_index("probe").rename(
                columns={"authors": "authors' gate"}
            )
        }

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw gate and index over N; see `tvlens.plots.icl_stylised.gate_and_index`."""
        from tvlens.plots.icl_stylised import gate_and_index

        return gate_and_index(self.curves(), **({"title": self.finding()} | channels))


@study("stylised")
def stylised(
    *,
    preset: str = "quick",
    seed: int = 0,
    progress: bool = True,
    device: str | None = None,
    out: Path | None = None,
    sizes: Any = None,
    seeds: int | None = None,
    order: str | None = None,
    steps: int | None = None,
    transformer_steps: int | None = None,
    noise: float | None = None,
    length: int | None = None,
    lr: float | None = None,
    n_items: int | None = None,
    label_scale: float | None = None,
) -> Stylised:
    """Train the stylised model and the transformer on the same data, and compare what they lean on.

    Args:
        preset: ``"quick"`` for two CPU cores; ``"paper"``: what the authors ran.
        seed: The first seed.
        progress: Whether to show progress bars.
        device: Where to train; the first GPU where there is one, else the CPU, where None.
        out: Folder for states; a run that was stopped goes on from it.
        sizes: Sequences in the dataset, as powers of two; None, here and below, for what the preset says.
        seeds: How many seeds.
        order: ``"together"``: g, h and gate learn at once; ``"apart"``: g and h first, then the gate.
        steps: Training steps of the stylised model, of each stage where there are two.
        transformer_steps: Training steps of the transformer.
        noise: Input noise.
        length: Pairs in the context.
        lr: Learning rate.
        n_items: Inputs for each probe.
        label_scale: Factor on the transformer's first label embeddings.

    Returns:
        Gates, indices and errors, as a result that draws itself.

    Raises:
        ValueError: Settings that contradict each other, or a state of another run.

    References:
        Chan et al. 2025, arXiv:2410.23042, section 4.
    """
    started = time.perf_counter()
    chosen = settle(
        PRESETS, preset, sizes=sizes, seeds=seeds, order=order, steps=steps,
        transformer_steps=transformer_steps, noise=noise, length=length, lr=lr, n_items=n_items,
        label_scale=label_scale,
    )  # fmt: skip
    if chosen["order"] not in ORDERS:
        raise unknown("order", chosen["order"], ORDERS)
    several_sizes = several("sizes", chosen["sizes"])
    every = tuple(range(seed, seed + chosen["seeds"]))
    settings = [
        Setting(n_sequences=2**n, seed=s, noise=chosen["noise"], length=chosen["length"])
        for n, s in product(several_sizes, every)
    ]
    how: dict[str, Any] = {"device": device, "progress": progress}

    def stage(name: str, model: Any, steps: int, start: Any = None) -> Training:
        path = None if out is None else Path(out) / f"stylised-{name}.safetensors"
        plan = Plan(steps=steps, lr=chosen["lr"], probes=())
        return train(settings, plan, model=model, start=start, out=path, label=name, **how)

    if chosen["order"] == "together":
        gated = stage("together", Gated(), chosen["steps"])
    else:
        parts = stage("parts", Gated(stage="parts"), chosen["steps"])
        gated = stage("gate", Gated(stage="gate"), chosen["steps"], parts.weights)
    transformer = Transformer(label_scale=chosen["label_scale"])
    whole = stage("transformer", transformer, chosen["transformer_steps"])
    found = _compare(gated, whole, n_items=chosen["n_items"])
    shape = (len(several_sizes), len(every), len(PROBES))
    variables = {name: (_DIMS, values.reshape(shape)) for name, values in found.items()}
    theta = gated.weights["h.theta"].exp().cpu().numpy()
    coords = {
        "n_sequences": [2**n for n in several_sizes],
        "seed": list(every),
        "probe": list(PROBES),
    }
    data = xr.Dataset({**variables, "temperature": (_DIMS[:2], theta.reshape(shape[:2]))}, coords)
    note = collect(
        kind=Stylised.kind, study="stylised", preset=preset, seed=seed, **chosen,
        device=str(gated.data.device), seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip
    return Stylised(data.assign_attrs({ATTRIBUTE: encode(note)}))


def _compare(gated: Training, whole: Training, *, n_items: int) -> dict[str, np.ndarray]:
    """Read both models on the same inputs, probe by probe."""
    rows = [_probe(gated, whole, probe, n_items) for probe in PROBES]
    return {name: np.stack([row[name] for row in rows], axis=-1) for name in rows[0]}


def _probe(gated: Training, whole: Training, probe: str, n_items: int) -> dict[str, np.ndarray]:
    kind, group = probe.split()
    data: Data = gated.data
    index = torch.arange(n_items, device=data.device)
    index = repeat(index, "item -> member item", member=len(data.settings))
    how: dict[str, Any] = {"relevant": kind == "relevant", "group": group}
    with torch.no_grad():
        true = data.items(f"stylised {probe}", index, **how)
        moved = data.items(f"stylised {probe}", index, flipped=True, **how)
        parts = gated.model.parts(gated.weights, true)
        answers = whole.model.log_probs(whole.weights, moved)
        mixed = gated.model.log_probs(gated.weights, moved)
        wrong, _, alpha, _ = outcomes(answers, moved, conflict=True)
        found = {
            "gate": parts.gate.mean(dim=1), "alpha": alpha.mean(dim=1),
            "gated_error": _error(mixed, moved), "transformer_error": wrong.mean(dim=1),
            "g_error": _error(parts.g, true), "h_error": _error(parts.h, true),
            "agreement": _spearman(parts.gate, alpha),
        }  # fmt: skip
    return {name: values.cpu().numpy() for name, values in found.items()}


def _error(log_probs: Float[Tensor, "member item label"], items: Items) -> Float[Tensor, " member"]:
    return outcomes(log_probs, items, conflict=False)[0].mean(dim=1)


def _spearman(a: Tensor, b: Tensor) -> Float[Tensor, " member"]:
    """Correlation of ranks over items; NaN where one does not vary."""
    ranks = [pd.DataFrame(x.T.cpu().numpy()).rank() for x in (a, b)]
    return torch.tensor(ranks[0].corrwith(ranks[1]).to_numpy())
