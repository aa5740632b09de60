"""What does theta depend on? Its spread over demonstrations, over dummy queries, and with more shots.

Theta(S) should know the task and nothing else. It is read while the model looks at a dummy query x', so what
it says of x' is noise, and so is what it says of these demonstrations rather than others. For each number of
shots theta is read from many sets of demonstrations, each with several dummy queries, and its variance is
split in two. With no shots at all there are no demonstrations to differ, so their part must be nothing: that
is the control.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import xarray as xr
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from tvlens.engine import run
from tvlens.experiments import experiment
from tvlens.experiments._dev import best_layer
from tvlens.extraction import dummy_requests
from tvlens.models import facts, load_model
from tvlens.prompts import build_prompts
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.results import Result
from tvlens.sites import check_layer
from tvlens.tasks import Task, as_task
from tvlens.templates import Template

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_RESAMPLES = 500
_DEV_SHOTS = 5


class Variance(Result):
    """How theta of one task varies, by shots and layer; contributions are kept for each set of shots."""

    kind: ClassVar[str] = "variance"
    references: ClassVar[tuple[str, ...]] = ("hendel2023context", "efron1979")
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "between": ("shots", "prompt", "layer"),
        "within": ("shots", "prompt", "layer"),
        "likeness": ("shots", "prompt", "layer"),
        "norm": ("shots", "layer"),
        "depth": ("layer",),
    }
    table: ClassVar[tuple[str, ...]] = ("between", "within", "likeness")
    method: ClassVar[str] = (
        "Theta is read at the last token of [S, x'] for many S and several x' for each S. Within: the "
        "variance over x' of one S. Between: the variance over S of the mean over x', less what x' leaves in "
        "that mean (within / number of dummy queries): the usual unbiased split of a nested design. "
        "Variances are summed over the residual stream's axes. Likeness: cosine of theta(S), averaged over "
        "x', with the mean theta of the most shots, itself left out. 95 % intervals draw the sets of "
        "demonstrations again. Control: with 0 shots there are no demonstrations to vary. In a task with few "
        "items large sets of demonstrations overlap, and vary less for that reason alone."
    )

    @property
    def title(self) -> str:
        """Task and model."""
        made = self.provenance
        return f"Variance of theta: {made['task']} on {made['model']}"

    def parts(self) -> xr.Dataset:
        """Split the variance of theta.

        Returns:
            By shots and layer, each with ``_low`` and ``_high``: demonstrations and dummy (variances,
            relative to the squared norm of the mean theta), share (that of the demonstrations in their
            sum), and likeness (cosine with the mean theta of the most shots).
        """
        data, n_dummy = self.data, self.provenance["n_dummy"]
        order = ("shots", "layer", "prompt")
        between, within, alike = (
            data[name].transpose(*order).values.astype(float)
            for name in ("between", "within", "likeness")
        )
        squared = data["norm"].transpose("shots", "layer").values.astype(float)[..., None] ** 2
        n = data.sizes["prompt"]
        rng = np.random.default_rng(self.provenance["seed"])
        # The first column is the sample itself, the others are drawn from it.
        drawn = np.vstack([np.arange(n), rng.integers(n, size=(_RESAMPLES, n))])
        b, w, likeness = (values[..., drawn].mean(axis=-1) for values in (between, within, alike))
        own = np.maximum(b - w / n_dummy, 0)
        share = own / np.maximum(own + w, np.finfo(float).tiny)
        found = {
            "demonstrations": own / squared,
            "dummy": w / squared,
            "share": share,
            "likeness": likeness,
        }
        table = {}
        for name, values in found.items():
            low, high = np.quantile(values[..., 1:], [0.025, 0.975], axis=-1)
            parts = zip(("", "_low", "_high"), (values[..., 0], low, high), strict=True)
            table |= {f"{name}{part}": (("shots", "layer"), v) for part, v in parts}
        coords = {name: data[name] for name in ("shots", "layer", "depth")}
        return xr.Dataset(table, coords=coords)

    def finding(self) -> str:
        """The result in one sentence."""
        s = self.summary()
        first = f", with 0 shots {s['share_none']:.2f}" if s["share_none"] is not None else ""
        return (
            f"At layer {s['layer']} demonstrations make {s['share']:.2f} of theta's variance and dummy "
            f"queries the rest ({s['shots']} shots{first}); theta of {s['fewest']} "
            f"{'shot' if s['fewest'] == 1 else 'shots'} has cosine {s['likeness_fewest']:.2f} with that of "
            f"{s['most']}, theta of {s['shots']} has {s['likeness']:.2f}."
        )

    def summary(self) -> dict[str, Any]:
        """Share of the demonstrations and likeness at one layer, for 5 shots or the nearest, and the ends."""
        made, table = self.provenance, self.parts().sel(layer=self.provenance["layer"])
        shots = [int(k) for k in table["shots"].values]
        shown = [k for k in shots if k > 0]
        middle = min(shown, key=lambda k: (abs(k - _DEV_SHOTS), k))
        one = table.sel(shots=middle)
        flat = {
            f"{name}{end}": float(one[f"{name}{end}"])
            for name in ("share", "likeness")
            for end in ("", "_low", "_high")
        }
        none = float(table["share"].sel(shots=0)) if 0 in shots else None
        return {
            "task": made["task"],
            "model": made["model"],
            "layer": made["layer"],
            "shots": middle,
            **flat,
            "share_none": none,
            "fewest": shown[0],
            "likeness_fewest": float(table["likeness"].sel(shots=shown[0])),
            "most": shots[-1],
            "n": self.data.sizes["prompt"],
            "seconds": made["seconds"],
        }

    def tables(self) -> "dict[str, pd.DataFrame]":
        """The split at one layer, by shots."""
        layer = self.provenance["layer"]
        parts = self.parts().sel(layer=layer).to_dataframe().drop(columns=["layer", "depth"])
        return {f"Layer {layer}, by number of demonstrations": parts}

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw both by layer, see `tvlens.plots.variance.variance_by_layer`."""
        from tvlens.plots.variance import variance_by_layer

        data = self.parts().assign_attrs(self.data.attrs | {"finding": self.finding()})
        return variance_by_layer(data, **channels)


@experiment("variance")
def variance(
    model: Any,
    task: Task | str,
    *,
    shots: Sequence[int] = (0, 1, 2, 5, 10, 20),
    n: int = 30,
    n_dummy: int = 4,
    layer: int | None = None,
    n_dev: int = 20,
    template: str | Template = "example",
    answers: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Variance:
    """Split theta's variance into what demonstrations and what dummy queries make, by shots and layer.

    Args:
        model: A TransformerLens model, or a name that `tvlens.load_model` knows.
        task: A task, or its name.
        shots: Numbers of demonstrations; 0 is the control.
        n: Sets of demonstrations for each.
        n_dummy: Dummy queries for each set.
        layer: The layer that the finding speaks of, negative from the end; by default the one at which theta
            answers most dev queries.
        n_dev: Dev prompts for that choice.
        template: How a demonstration is written, see `tvlens.Template`.
        answers: Which items are used, see `tvlens.build_prompts`.
        seed: Decides all prompts and the intervals.
        progress: Whether to show a progress bar.

    Returns:
        Contributions of each set of demonstrations, as a result that plots itself.

    Raises:
        ValueError: Unknown names, a task too small for the shots, no number of shots above 0, or fewer than
            two sets or dummy queries.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> found = variance(tiny_model(), "to_upper", shots=(0, 2), n=4, layer=1, progress=False)
        >>> dict(found.data["within"].sizes)
        {'shots': 2, 'prompt': 4, 'layer': 2}

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916, section 4.1.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    wanted = _checked(shots, n, n_dummy)
    model = load_model(model) if isinstance(model, str) else model
    task, known = as_task(task), facts(model)
    settings = {"template": template, "answers": answers, "seed": seed}
    fixed = check_layer(layer, known.n_layers) if layer is not None else None
    each: list[Float[Tensor, "prompt dummy layer d_model"]] = []
    about: dict[str, Any] = {}
    with tqdm(total=len(wanted) + (fixed is None), disable=not progress, leave=False) as bar:
        if fixed is None:
            some = settings | {"shots": min(_DEV_SHOTS, wanted[-1]), "n_dummy": 2}
            fixed, _ = best_layer(model, {task.name: task}, n_dev, some, bar)
        for k in wanted:
            bar.set_postfix_str(f"{k} shots")
            made = build_prompts(
                task, model, shots=k, n=n, n_dummy=n_dummy, split="test", **settings
            )
            read = run(model, dummy_requests(model, made))
            about = {k: v for k, v in made.facts.items() if k not in ("split", "constant", "shots")}
            each.append(torch.stack([out.activations[0][0] for out in read], dim=1).float().cpu())
            bar.update()
    data = _dataset(wanted, each)
    data.attrs[ATTRIBUTE] = encode(
        collect(
            kind=Variance.kind,
            **about,
            n=n,
            n_dev=n_dev,
            layer=fixed,
            model=known.name,
            n_layers=known.n_layers,
            model_facts=known.to_dict(),
            seconds=round(time.perf_counter() - started, 3),
        )
    )
    return Variance(data)


def _checked(shots: Sequence[int], n: int, n_dummy: int) -> list[int]:
    wanted = sorted({int(k) for k in shots})
    if not wanted or wanted[0] < 0 or wanted[-1] < 1:
        raise ValueError(f"shots are numbers from 0, one of them above 0; {tuple(shots)} arrived.")
    if n < 2 or n_dummy < 2:
        raise ValueError(
            f"a variance needs n >= 2 and n_dummy >= 2; n={n} and n_dummy={n_dummy} arrived."
        )
    return wanted


def _dataset(
    shots: Sequence[int], each: Sequence[Float[Tensor, "prompt dummy layer d_model"]]
) -> xr.Dataset:
    """What every set of demonstrations adds to both variances, and how like the many-shot theta it is."""
    rows: dict[str, list[np.ndarray]] = {n: [] for n in ("between", "within", "likeness", "norm")}
    n = len(each[0])
    total = reduce(each[-1], "prompt dummy layer d -> layer d", "mean") * n
    for k, values in zip(shots, each, strict=True):
        own = values.mean(dim=1)
        mean = own.mean(dim=0)
        # Of n sets, so that the mean over sets is the unbiased variance.
        rows["between"].append(((own - mean).square().sum(-1) * n / (n - 1)).numpy())
        rows["within"].append(values.var(dim=1).sum(-1).numpy())
        others = total - own if k == shots[-1] else total
        rows["likeness"].append(torch.cosine_similarity(own, others, dim=-1).numpy())
        rows["norm"].append(mean.norm(dim=-1).numpy())
    dims = ("shots", "prompt", "layer")
    n_layers = each[0].shape[2]
    return xr.Dataset(
        {
            name: (dims if name != "norm" else ("shots", "layer"), np.stack(values))
            for name, values in rows.items()
        },
        coords={
            "shots": list(shots),
            "layer": list(range(n_layers)),
            "depth": ("layer", np.arange(n_layers) / max(n_layers - 1, 1)),
        },
    )
