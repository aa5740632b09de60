"""Rank correlations over demonstration sets, and intervals of means over tasks.

Every number comes as many draws of itself: the first is what was measured, the others come from drawing
pools, and sets within them, again with replacement. A mean over tasks draws the tasks again, too.
"""

import numpy as np
import pandas as pd
from einops import rearrange
from jaxtyping import Float

RESAMPLES = 1000
_ENDS = (0.025, 0.975)


def ranked(values: Float[np.ndarray, "draw set"]) -> Float[np.ndarray, "draw set"]:
    """Give ranks along the last axis; equal values share the mean of theirs."""
    return pd.DataFrame(values).rank(axis=1).to_numpy()


def rank_correlation(
    x: Float[np.ndarray, "draw set"], y: Float[np.ndarray, "draw set"]
) -> Float[np.ndarray, " draw"]:
    """Give Spearman's rank correlation, draw by draw.

    Args:
        x: One value of each set.
        y: Another.

    Returns:
        From -1 to 1; NaN where either is the same for all sets.

    Example:
        >>> rank_correlation(np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 8.0, 9.0]]))
        array([1.])
    """
    return _correlated(ranked(x), ranked(y))


def _correlated(
    x: Float[np.ndarray, "draw set"], y: Float[np.ndarray, "draw set"]
) -> Float[np.ndarray, " draw"]:
    """Give Pearson's correlation, draw by draw."""
    a, b = (values - values.mean(axis=1, keepdims=True) for values in (x, y))
    size = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return np.where(size > 0, (a * b).sum(axis=1) / np.where(size > 0, size, 1.0), np.nan)


def partial_correlation(
    x: Float[np.ndarray, " set"], y: Float[np.ndarray, " set"], z: Float[np.ndarray, " set"]
) -> float:
    """Give the rank correlation of x and y that z does not explain.

    Args:
        x: One value of each set.
        y: Another.
        z: What is held fixed.

    Returns:
        The partial correlation; that of x and y itself where z is the same for all sets.

    Example:
        >>> x = np.array([1.0, 2.0, 3.0, 4.0])
        >>> partial_correlation(x, x, np.zeros(4))
        1.0
    """
    xy, xz, yz = (float(rank_correlation(a[None], b[None])[0]) for a, b in ((x, y), (x, z), (y, z)))
    if np.isnan(xz) or np.isnan(yz):
        return xy
    rest = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / rest**0.5 if rest > 1e-12 else float("nan")


def correlation_draws(
    x: Float[np.ndarray, "pool set"], y: Float[np.ndarray, "pool set"], rng: np.random.Generator
) -> Float[np.ndarray, " draw"]:
    """Give a rank correlation, and those of other draws: pools are drawn again, and sets within each."""
    n, each = x.shape
    pools = rearrange(rng.integers(n, size=(RESAMPLES, n)), "draw pool -> draw pool 1")
    sets = rng.integers(each, size=(RESAMPLES, n, each))
    rows = rearrange(pools * each + sets, "draw pool set -> draw (pool set)")
    rows = np.vstack([np.arange(n * each), rows])
    return rank_correlation(x.ravel()[rows], y.ravel()[rows])


def permuted_draws(
    x: Float[np.ndarray, "pool set"], y: Float[np.ndarray, "pool set"], rng: np.random.Generator
) -> Float[np.ndarray, " draw"]:
    """Give rank correlations after x was dealt to the sets at random: the control."""
    # Ranks go with their values, so that nothing need be ranked again.
    a, b = (
        np.tile(ranked(rearrange(values, "pool set -> 1 (pool set)")), (RESAMPLES, 1))
        for values in (x, y)
    )
    return _correlated(rng.permuted(a, axis=1), b)


def mean_draws(
    values: Float[np.ndarray, " pool"], rng: np.random.Generator
) -> Float[np.ndarray, " draw"]:
    """Give a mean over pools, and those of the same pools drawn again."""
    n = len(values)
    return values[np.vstack([np.arange(n), rng.integers(n, size=(RESAMPLES, n))])].mean(axis=1)


def interval(draws: Float[np.ndarray, " draw"]) -> tuple[float, float, float]:
    """Give the number itself and the ends of its 95 % interval; NaN where it does not exist."""
    if np.isnan(draws[0]):
        return float("nan"), float("nan"), float("nan")
    low, high = np.nanquantile(draws[1:], _ENDS)
    return float(draws[0]), float(low), float(high)


def over_tasks(
    draws: Float[np.ndarray, "task draw"], rng: np.random.Generator
) -> tuple[float, float, float]:
    """Give a mean over tasks with the ends of its 95 % interval.

    Drawing at two levels is cautious: what varies within a task is counted in the tasks' own spread, too.

    Args:
        draws: Draws of each task; the first is what was measured.
        rng: Where random numbers come from.

    Returns:
        The mean, and its ends; tasks in which the number does not exist are left out.

    Example:
        >>> over_tasks(np.ones((3, 11)), np.random.default_rng(0))
        (1.0, 1.0, 1.0)
    """
    draws = draws[~np.isnan(draws[:, 0])]
    if not len(draws):
        return float("nan"), float("nan"), float("nan")
    n, again = len(draws), draws[:, 1:]
    tasks = rng.integers(n, size=(RESAMPLES, n))
    each = again[tasks, rng.integers(again.shape[1], size=tasks.shape)]
    # A task drawn again may be one whose accuracies are all the same, and which then has no correlation.
    there = ~np.isnan(each)
    means = np.where(there, each, 0).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    low, high = np.quantile(means[there.any(axis=1)], _ENDS)
    return float(draws[:, 0].mean()), float(low), float(high)
