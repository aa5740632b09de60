"""Measures and maps of labelled points, on the cosine distance, in NumPy."""

import importlib
from typing import Any

import numpy as np
from einops import reduce
from jaxtyping import Float, Int

from tvlens._errors import unknown

EMBEDDINGS = ("pca", "tsne", "umap")
_PACKAGES = {"tsne": ("sklearn.manifold", "scikit-learn"), "umap": ("umap", "umap-learn")}


def cosine_distances(
    points: Float[np.ndarray, "point d_model"],
) -> Float[np.ndarray, "point point"]:
    """Give 1 - cos of all pairs; zero between a point and itself.

    Args:
        points: The points.

    Returns:
        Distances, 0 to 2; a point at the origin is at distance 1 from all others.

    Example:
        >>> cosine_distances(np.array([[1.0, 0], [0, 2], [-3, 0]])).round(6).tolist()
        [[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.0]]
    """
    unit = _unit(points)
    distances = np.clip(1 - unit @ unit.T, 0, 2)
    np.fill_diagonal(distances, 0)
    return distances


def centroid_distances(
    centroids: Float[np.ndarray, "task d_model"],
) -> Float[np.ndarray, "task task"]:
    """Give cosine distances between centroids; infinite to themselves: none is its own neighbour."""
    distances = cosine_distances(centroids)
    np.fill_diagonal(distances, np.inf)
    return distances


def nearest_shares(
    points: Float[np.ndarray, "task prompt d_model"], *, draws: int, seed: int
) -> Float[np.ndarray, "task task"]:
    """Say how sure it is which centroid is nearest to which: draw each cluster's points again.

    Args:
        points: Points of each cluster.
        draws: How many times points are drawn, with replacement.
        seed: Decides the draws.

    Returns:
        Share of draws in which the column's centroid is the nearest to the row's.
    """
    rng = np.random.default_rng(seed)
    wins = np.zeros((len(points), len(points)))
    for _ in range(draws):
        drawn = rng.integers(points.shape[1], size=points.shape[:2])
        means = np.stack([rows[at].mean(axis=0) for rows, at in zip(points, drawn, strict=True)])
        wins[np.arange(len(points)), centroid_distances(means).argmin(axis=1)] += 1
    return wins / draws


def silhouettes(
    distances: Float[np.ndarray, "point point"], labels: Int[np.ndarray, " point"]
) -> Float[np.ndarray, " point"]:
    """Give each point's silhouette, as Rousseeuw defines it.

    Args:
        distances: Of all pairs, zero on the diagonal.
        labels: 0, 1, ...; at least two of them.

    Returns:
        -1 to 1; 0 for a point that is alone in its cluster.

    Example:
        >>> far = np.abs(np.subtract.outer([0.0, 1, 10, 11], [0.0, 1, 10, 11]))
        >>> silhouettes(far, np.array([0, 0, 1, 1])).round(3).tolist()
        [0.905, 0.895, 0.895, 0.905]

    References:
        Rousseeuw 1987 [rousseeuw1987silhouettes].
    """
    member = labels[:, None] == np.arange(labels.max() + 1)
    sizes = member.sum(axis=0)
    sums = distances @ member
    own = np.take_along_axis(sums, labels[:, None], axis=1)[:, 0]
    alone = sizes[labels] < 2
    a = own / np.maximum(sizes[labels] - 1, 1)
    b = reduce(np.where(member, np.inf, sums / sizes), "point task -> point", "min")
    longest = np.maximum(np.maximum(a, b), np.finfo(float).tiny)
    return np.where(alone, 0.0, (b - a) / longest)


def nearest_centroid(
    points: Float[np.ndarray, "point d_model"], labels: Int[np.ndarray, " point"]
) -> Int[np.ndarray, " point"]:
    """Give each point to the cluster whose centroid is nearest by cosine, leaving it out of its own.

    Args:
        points: The points.
        labels: 0, 1, ...; at least two points of each.

    Returns:
        The label of the nearest centroid.
    """
    clusters = np.arange(labels.max() + 1)
    sums = np.stack([points[labels == k].sum(axis=0) for k in clusters])
    units = _unit(points)
    cosines = units @ _unit(sums).T
    own = np.einsum("pd,pd->p", units, _unit(sums[labels] - points))
    np.put_along_axis(cosines, labels[:, None], own[:, None], axis=1)
    return cosines.argmax(axis=1)


def embed(
    points: Float[np.ndarray, "point d_model"], *, method: str, seed: int
) -> tuple[Float[np.ndarray, "point 2"], Float[np.ndarray, " 2"] | None]:
    """Place points on a plane.

    Args:
        points: The points.
        method: ``"pca"``, ``"tsne"`` or ``"umap"``; the last two by cosine distance.
        seed: Decides the maps of t-SNE and UMAP.

    Returns:
        The places, and for PCA the share of the variance along each axis.

    Raises:
        ValueError: An unknown method.
        ImportError: The package is not installed; the message holds the command.
    """
    package = package_of(method)
    if method == "pca":
        return _pca(points)
    if method == "tsne":
        # As many neighbours as by default, but fewer than a third of the points.
        perplexity = min(30.0, (len(points) - 1) / 3)
        made = package.TSNE(
            n_components=2, metric="cosine", init="pca", perplexity=perplexity, random_state=seed
        )
    else:
        made = package.UMAP(
            n_components=2, metric="cosine", n_neighbors=min(15, len(points) - 1),
            random_state=seed, n_jobs=1,
        )  # fmt: skip
    return np.asarray(made.fit_transform(points), float), None


def _pca(
    points: Float[np.ndarray, "point d_model"],
) -> tuple[Float[np.ndarray, "point 2"], Float[np.ndarray, " 2"]]:
    centred = points.astype(float) - points.mean(axis=0, dtype=float)
    left, singular, axes = np.linalg.svd(centred, full_matrices=False)
    # The sign of an axis is arbitrary: its largest weight points up.
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)[:, 0]
    places = (left * singular * np.sign(largest))[:, :2]
    total = max(float((singular**2).sum()), np.finfo(float).tiny)
    missing = 2 - places.shape[1]  # fewer points than axes
    places = np.pad(places, ((0, 0), (0, missing)))
    return places, np.pad((singular**2)[:2] / total, (0, missing))


def package_of(method: str) -> Any:
    """Import what a map needs, so that one finds out before anything has run.

    Args:
        method: As in `embed`.

    Returns:
        The module; None where NumPy is enough.

    Raises:
        ValueError: An unknown method.
        ImportError: The package is not installed; the message holds the command.
    """
    if method not in EMBEDDINGS:
        raise unknown("method", method, EMBEDDINGS)
    if method == "pca":
        return None
    module, package = _PACKAGES[method]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"method={method!r} needs {package}, which is not installed. Install it with: "
            'pip install "tvlens[geometry]"  (method="pca" needs nothing more.)'
        ) from error


def _unit(points: Float[np.ndarray, "point d_model"]) -> Float[np.ndarray, "point d_model"]:
    norms = np.linalg.norm(points.astype(float), axis=-1, keepdims=True)
    return points / np.maximum(norms, np.finfo(float).tiny)
