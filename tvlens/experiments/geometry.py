"""Where do the thetas of many tasks lie? Clusters, distances between tasks, and a picture of them.

If theta is the task, then thetas from different demonstrations of one task should lie closer together than
thetas of different tasks, and related tasks should be neighbours. Both are measured in the full space, by
cosine distance: PCA, t-SNE and UMAP only draw, and a map of two dimensions can show clusters that are none.
The measures come with what they would be if the task's name meant nothing: labels shuffled over the vectors.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xarray as xr
from einops import rearrange, reduce
from jaxtyping import Float

from tvlens.experiments import experiment
from tvlens.experiments._clusters import (
    centroid_distances,
    cosine_distances,
    embed,
    nearest_centroid,
    nearest_shares,
    package_of,
    silhouettes,
)
from tvlens.experiments._dev import best_layer, resolved
from tvlens.extraction import extract
from tvlens.intervals import wilson
from tvlens.models import facts, load_model
from tvlens.prompts import build_prompts
from tvlens.provenance import ATTRIBUTE, collect, encode
from tvlens.results import Result
from tvlens.sites import check_layer
from tvlens.tasks import Task
from tvlens.templates import Template

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RELATED = (("fr_en", "es_en"), ("en_fr", "en_es"))
"""Pairs of tasks whose nearness the finding reports where both are there."""
_SHUFFLES = 20
_RESAMPLES = 500


class Geometry(Result):
    """Thetas of several tasks at one layer, and how they lie to each other."""

    kind: ClassVar[str] = "geometry"
    references: ClassVar[tuple[str, ...]] = (
        "hendel2023context",
        "rousseeuw1987silhouettes",
        "maaten2008tsne",
        "mcinnes2018umap",
    )
    variables: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "task": ("task",),
        "family": ("task",),
        "theta": ("task", "prompt", "d_model"),
        "embedding": ("task", "prompt", "axis"),
        "silhouette": ("task", "prompt"),
        "nearest": ("task", "prompt"),
        "shuffled": ("shuffle", "task", "prompt"),
        "demonstrations": ("task", "prompt"),
    }
    table: ClassVar[tuple[str, ...]] = ("silhouette", "nearest", "demonstrations")
    method: ClassVar[str] = (
        "Each vector is theta(S) of other demonstrations, at one layer. Distances are cosine distances, "
        "1 - cos, of the vectors as they are; no vector is compared with itself. A vector's silhouette is "
        "(b - a) / max(a, b), a being its mean distance to its task's other vectors and b to those of the "
        "nearest other task. Nearest centroid: each vector is left out of its own task's centroid, and given "
        "to the task whose centroid is nearest. Control: the same with labels shuffled over the vectors. The "
        "map is a picture; every number is of the full space."
    )

    @property
    def title(self) -> str:
        """How many tasks, the layer, and the model."""
        made = self.provenance
        return f"Geometry of theta: {self.data.sizes['task']} tasks on {made['model']}, layer {made['layer']}"

    def finding(self) -> str:
        """The result in one sentence."""
        s = self.summary()
        said = (
            f"Thetas of one task lie {s['within']:.3f} apart, of two tasks {s['between']:.3f} (cosine "
            f"distance); the nearest centroid is the own task's for {s['nearest']:.2f} of them (labels "
            f"shuffled {s['shuffled']:.2f}), silhouette {s['silhouette']:.2f}"
        )
        ranks = self.neighbours().set_index(["task", "other"])["rank"].to_dict()
        for a, b in RELATED:
            if (a, b) in ranks:
                to, back = ranks[a, b], ranks[b, a]
                adjacent = "adjacent" if to == back == 1 else "not adjacent"
                said += f"; {a} and {b} are {adjacent} (ranks {to} and {back})"
        return f"{said}."

    def neighbours(self) -> "pd.DataFrame":
        """Say how far the tasks' centroids are from each other.

        Returns:
            One row per ordered pair of tasks: task, other, distance (cosine), rank of the other among all
            tasks seen from the first (1 is the nearest), nearest_share (of 500 draws of the vectors with
            replacement, in how many the other is the nearest), and same_family.
        """
        import pandas as pd

        data = self.data
        names, families = data["task"].values.tolist(), data["family"].values.tolist()
        theta = data["theta"].values
        distances = centroid_distances(reduce(theta, "task prompt d -> task d", "mean"))
        shares = nearest_shares(theta, draws=_RESAMPLES, seed=self.provenance["seed"])
        ranks = distances.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") + 1
        rows = [
            {
                "task": names[i],
                "other": names[j],
                "distance": distances[i, j],
                "rank": int(ranks[i, j]),
                "nearest_share": shares[i, j],
                "same_family": families[i] == families[j],
            }
            for i in range(len(names))
            for j in range(len(names))
            if i != j
        ]
        return pd.DataFrame(rows)

    def pairwise(self) -> tuple[Float[np.ndarray, " within"], Float[np.ndarray, " between"]]:
        """Give the cosine distances of all pairs of vectors, of one task and of two.

        Returns:
            Distances within tasks, without those of vectors to themselves, and between tasks.
        """
        flat = rearrange(self.data["theta"].values, "task prompt d -> (task prompt) d")
        distances = cosine_distances(flat)
        of = np.repeat(np.arange(self.data.sizes["task"]), self.data.sizes["prompt"])
        once = np.triu(np.ones_like(distances, dtype=bool), k=1)
        same = of[:, None] == of[None, :]
        return distances[once & same], distances[once & ~same]

    def tasks(self) -> "pd.DataFrame":
        """Describe each task: its spread, silhouette, nearest-centroid accuracy and nearest task.

        Returns:
            One row per task: task, family, within (mean cosine distance), silhouette, nearest (share of
            vectors whose nearest centroid is the own one) with nearest_low and nearest_high, neighbour
            (the nearest other task) and neighbour_distance.
        """
        import pandas as pd

        data, near = self.data, self.neighbours()
        first = near[near["rank"] == 1].set_index("task")
        rows = []
        for i, name in enumerate(data["task"].values.tolist()):
            one, n = data.isel(task=i), data.sizes["prompt"]
            hits = int((one["nearest"] == name).sum())
            low, high = wilson(hits, n)
            distances = cosine_distances(one["theta"].values)
            rows.append(
                {
                    "task": name,
                    "family": one["family"].item(),
                    "within": distances[np.triu_indices(n, k=1)].mean(),
                    "silhouette": float(one["silhouette"].mean()),
                    "nearest": hits / n,
                    "nearest_low": low,
                    "nearest_high": high,
                    "neighbour": first.loc[name, "other"],
                    "neighbour_distance": first.loc[name, "distance"],
                }
            )
        return pd.DataFrame(rows)

    def summary(self) -> dict[str, Any]:
        """Distances, silhouette, nearest-centroid accuracy with its control, and nearest tasks by family."""
        data, made = self.data, self.provenance
        within, between = self.pairwise()
        n = data["nearest"].size
        hits = int((data["nearest"] == data["task"]).sum())
        low, high = wilson(hits, n)
        near: Any = self.neighbours()
        first, mates = near[near["rank"] == 1], near.groupby("task")["same_family"]
        # Only tasks that have another one of their family can have it as their neighbour.
        able = mates.any()
        chosen = first.set_index("task")["same_family"][able]
        return {
            "model": made["model"],
            "layer": made["layer"],
            "within": float(within.mean()),
            "between": float(between.mean()),
            "silhouette": float(data["silhouette"].mean()),
            "nearest": hits / n,
            "nearest_low": low,
            "nearest_high": high,
            "shuffled": float(data["shuffled"].mean()),
            "chance": 1 / data.sizes["task"],
            "family_neighbours": float(chosen.mean()) if len(chosen) else None,
            "family_chance": float(mates.mean()[able].mean()) if len(chosen) else None,
            "n_tasks": data.sizes["task"],
            "n_vectors": n,
            "seconds": made["seconds"],
        }

    def tables(self) -> "dict[str, pd.DataFrame]":
        """Each task with its neighbour, and the nearest pairs."""
        pairs = self.neighbours().sort_values("distance").drop_duplicates("distance")
        return {"Tasks": self.tasks(), "Nearest pairs": pairs.head(12)}

    def embedded(self, method: str, *, seed: int | None = None) -> "Geometry":
        """Draw the same vectors on another map; nothing is run on the model, and no number changes.

        Args:
            method: ``"pca"``, ``"tsne"`` or ``"umap"``.
            seed: Decides the map of t-SNE and UMAP; that of the prompts if not given.

        Returns:
            A new result.

        Raises:
            ValueError: An unknown method.
            ImportError: The method's package is not installed; the message holds the command.
        """
        made = self.provenance
        chosen = int(made["seed"] if seed is None else seed)
        theta = self.data["theta"].values
        data = self.data.assign(embedding=_embedding(theta, method, chosen))
        data.attrs = {ATTRIBUTE: encode(made | {"method": method, "method_seed": chosen})}
        return Geometry(data)

    def plot(self, **channels: Any) -> "go.Figure":
        """Draw the map, see `tvlens.plots.geometry.theta_map`."""
        from tvlens.plots.geometry import theta_map

        return theta_map(self._drawn(), **channels)

    def figures(self) -> "dict[str, go.Figure]":
        """The map, distances within and between tasks, and distances between centroids."""
        from tvlens.plots.geometry import centroid_map, distance_histogram, theta_map

        drawn, (within, between) = self._drawn(), self.pairwise()
        return {
            "Map of theta": theta_map(drawn),
            "Distances": distance_histogram(within, between, title=self.finding()),
            "Tasks": centroid_map(self.neighbours(), title=self.finding()),
        }

    def _drawn(self) -> xr.Dataset:
        return self.data.assign_attrs(finding=self.finding())


@experiment("geometry")
def geometry(
    model: Any,
    tasks: Sequence[Task | str],
    *,
    layer: int | None = None,
    shots: int = 4,
    n: int = 50,
    n_dev: int = 20,
    n_dummy: int = 2,
    method: str = "pca",
    template: str | Template = "example",
    answers: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Geometry:
    """Extract theta many times for each of several tasks, and measure how these vectors lie.

    Args:
        model: A TransformerLens model, or a name that `tvlens.load_model` knows.
        tasks: At least two tasks, or their names.
        layer: The layer of theta, negative from the end; by default the one at which theta answers most dev
            queries, on average over the tasks.
        shots: Demonstrations a vector, 4 as in Hendel et al.
        n: Vectors a task, each from demonstrations of its own.
        n_dev: Dev prompts a task for the choice of the layer.
        n_dummy: Dummy queries over which theta is averaged.
        method: The map: ``"pca"``, ``"tsne"`` or ``"umap"``. The last two need
            ``pip install "tvlens[geometry]"``.
        template: How a demonstration is written, see `tvlens.Template`.
        answers: Which items are used, see `tvlens.build_prompts`.
        seed: Decides all prompts, the shuffled labels, and the map of t-SNE and UMAP.
        progress: Whether to show a progress bar.

    Returns:
        All vectors with their measures, as a result that plots itself.

    Raises:
        ValueError: Unknown names, fewer than two tasks or vectors, or a layer outside the model.
        ImportError: The map's package is not installed.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> found = geometry(tiny_model(), ["to_upper", "next_letter"], n=5, layer=1, progress=False)
        >>> dict(found.data["embedding"].sizes)
        {'task': 2, 'prompt': 5, 'axis': 2}

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916, section 4.1.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    package_of(method)
    if n < 2:
        raise ValueError(f"n must be at least 2 vectors a task to compare, got {n}.")
    model = load_model(model) if isinstance(model, str) else model
    known, named = facts(model), resolved(tasks)
    if len(named) < 2:
        raise ValueError(f"geometry compares at least 2 tasks; {len(named)} arrived.")
    settings = {
        "shots": shots,
        "n_dummy": n_dummy,
        "template": template,
        "answers": answers,
        "seed": seed,
    }
    fixed = check_layer(layer, known.n_layers) if layer is not None else None
    steps = len(named) * (1 + (fixed is None))
    with tqdm(total=steps, disable=not progress, leave=False) as bar:
        chosen, dev = (
            (fixed, None) if fixed is not None else best_layer(model, named, n_dev, settings, bar)
        )
        theta, shown, about = [], [], {}
        for task in named.values():
            bar.set_postfix_str(f"{task.name}: theta")
            made = build_prompts(task, model, n=n, split="test", **settings)
            theta.append(extract(model, made, layers=[chosen]).values[:, 0].float().cpu().numpy())
            bare = zip(made.regular.text, made.zero_shot.text, strict=True)
            shown.append([whole.removesuffix(query) for whole, query in bare])
            about = {k: made.facts[k] for k in ("template", "bos", "shots", "n_dummy", "seed")}
            bar.update()
    data = _dataset(named, np.stack(theta), shown, method=method, seed=seed)
    data.attrs[ATTRIBUTE] = encode(
        collect(
            kind=Geometry.kind,
            task=", ".join(named),
            layer=chosen,
            dev_accuracy=dev,
            method=method,
            n=n,
            **about,
            answers=answers,
            model=known.name,
            n_layers=known.n_layers,
            model_facts=known.to_dict(),
            seconds=round(time.perf_counter() - started, 3),
        )
    )
    return Geometry(data)


def _embedding(
    theta: Float[np.ndarray, "task prompt d_model"], method: str, seed: int
) -> tuple[tuple[str, str, str], np.ndarray, dict[str, Any]]:
    """The map as a variable, with the axes' share of variance where it has one."""
    flat = rearrange(theta, "task prompt d -> (task prompt) d")
    places, shares = embed(flat, method=method, seed=seed)
    grid = rearrange(places, "(task prompt) plane -> task prompt plane", task=len(theta))
    about = {"method": method} | ({"explained": shares.tolist()} if shares is not None else {})
    return ("task", "prompt", "axis"), grid.astype("float32"), about


def _dataset(
    named: Mapping[str, Task],
    theta: Float[np.ndarray, "task prompt d_model"],
    shown: Sequence[Sequence[str]],
    *,
    method: str,
    seed: int,
) -> xr.Dataset:
    """Measure and label everything."""
    n_tasks, n = theta.shape[:2]
    flat = rearrange(theta, "task prompt d -> (task prompt) d")
    of = np.repeat(np.arange(n_tasks), n)
    names = np.array(list(named), object)
    rng = np.random.default_rng(seed)
    shuffled = []
    for _ in range(_SHUFFLES):
        labels = rng.permutation(of)
        shuffled.append(nearest_centroid(flat, labels) == labels)
    grid = ("task", "prompt")
    return xr.Dataset(
        {
            "theta": ((*grid, "d_model"), theta.astype("float32")),
            "embedding": _embedding(theta, method, seed),
            "silhouette": (grid, silhouettes(cosine_distances(flat), of).reshape(n_tasks, n)),
            "nearest": (grid, names[nearest_centroid(flat, of)].reshape(n_tasks, n)),
            "shuffled": (("shuffle", *grid), np.reshape(shuffled, (_SHUFFLES, n_tasks, n))),
            "demonstrations": (grid, np.array(shown, object)),
        },
        coords={
            "task": list(named),
            "family": ("task", [task.family for task in named.values()]),
        },
    )
