"""How sure is an accuracy? Intervals for shares, and for any statistic of the prompts.

An accuracy over 50 prompts is uncertain by up to 14 points either way, more than most differences
between layers. Wilson's interval asks which true rates would make the observed share unsurprising:
it stays inside 0..1 and is honest at 0 of n and n of n, where the textbook interval has no width.
The bootstrap does the same for statistics that are no share, such as the ratio of two accuracies,
by drawing the prompts again.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any, overload

import numpy as np
import xarray as xr
from jaxtyping import Float, Shaped
from numpy.typing import ArrayLike

from tvlens._errors import unknown


@overload
def wilson(successes: float, n: float, *, level: float = 0.95) -> tuple[float, float]: ...
@overload
def wilson(
    successes: np.ndarray | Sequence[float], n: ArrayLike, *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]: ...
def wilson(successes: Any, n: Any, *, level: float = 0.95) -> tuple[Any, Any]:
    """Give Wilson's score interval of a share.

    Args:
        successes: How many succeeded; a number or an array.
        n: Out of how many; broadcasts against ``successes``.
        level: Confidence level between 0 and 1.

    Returns:
        Lower and upper end, each of the broadcast shape (plain floats for numbers). NaN where n is
        0.

    Raises:
        ValueError: ``successes`` lies outside 0..n, or ``level`` outside 0..1.

    Example:
        >>> low, high = wilson(9, 10)
        >>> f"{low:.3f} {high:.3f}"
        '0.596 0.982'

    References:
        Wilson 1927, Probable inference, the law of succession, and statistical inference
        [wilson1927].
    """
    count, total = np.broadcast_arrays(np.asarray(successes, float), np.asarray(n, float))
    if not np.all((count >= 0) & (count <= total)):
        raise ValueError(f"successes must lie between 0 and n, got {successes!r} of {n!r}")
    z2 = _quantile(level) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        share = count / total
        centre = (share + z2 / (2 * total)) / (1 + z2 / total)
        spread = np.sqrt(z2 * (share * (1 - share) + z2 / (4 * total)) / total) / (1 + z2 / total)
    # Rounding must not push an end past 0, 1 or the share itself.
    low, high = np.clip(centre - spread, 0, share), np.clip(centre + spread, share, 1)
    return (low, high) if low.ndim else (float(low), float(high))


def bootstrap(
    values: ArrayLike,
    *,
    statistic: Callable[[np.ndarray], Any] | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Give a percentile bootstrap interval: draw the prompts again, with replacement, many times.

    Args:
        values: Per-prompt values, shape ``prompt`` or ``prompt ...``; whole rows are drawn, so
            columns stay paired.
        statistic: From such an array to a number or an array; the mean over prompts if not given.
        level: Confidence level between 0 and 1.
        n_resamples: How many draws.
        seed: Seed of the draws.

    Returns:
        Lower and upper end, each of the shape the statistic returns.

    Raises:
        ValueError: There is no prompt, a value is NaN, or ``level`` lies outside 0..1.

    Example:
        How much of regular accuracy does the vector reach? Columns: hypothesis, regular.

        >>> outcomes = np.array([[1, 1], [0, 1], [1, 1], [1, 0]] * 25)
        >>> low, high = bootstrap(outcomes, statistic=lambda v: v[:, 0].mean() / v[:, 1].mean())
        >>> bool(low < 1 < high)
        True

    References:
        Efron 1979, Bootstrap methods: another look at the jackknife [efron1979].
    """
    rows = np.asarray(values, float)
    if rows.ndim == 0 or not len(rows):
        raise ValueError(f"values need a prompt axis with at least one entry, got {rows.shape}")
    if np.isnan(rows).any():
        raise ValueError("values hold NaN; drop the prompts that have no outcome first")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    _quantile(level)
    statistic = statistic or (lambda sample: sample.mean(axis=0))
    rng = np.random.default_rng(seed)
    draws = np.array(
        [statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(n_resamples)]
    )
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return (low, high) if np.ndim(low) else (float(low), float(high))


def over_tasks(
    outcomes: Float[np.ndarray, "seed task prompt run"],
    queries: Shaped[np.ndarray, "seed task prompt"],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " run"], Float[np.ndarray, " run"]]:
    """Give an interval of each run's mean over tasks, for the same tasks with other draws.

    It is that of `differences_over_tasks`, but for runs that are always right or never: there no draw
    differs, and Wilson's interval takes its place. It counts each query of a task once, in however many
    seeds it is asked.

    Args:
        outcomes: 1 for right and 0 for wrong; NaN for "does not exist". An array with any value outside 0..1
            holds differences, and is left to the bootstrap alone.
        queries: What each prompt asks.
        level: Confidence level between 0 and 1.
        n_resamples: How many draws.
        seed: Seed of the draws.

    Returns:
        Lower and upper end of each run's mean.

    Example:
        >>> outcomes = np.array([1.0, 1.0, 0.0, 1.0] * 25).reshape(1, 1, 100, 1)
        >>> low, high = over_tasks(outcomes, np.arange(100).reshape(1, 1, 100))
        >>> bool(low < 0.75 < high)
        True
        >>> low, high = over_tasks(np.ones((1, 1, 100, 1)), np.arange(100).reshape(1, 1, 100))
        >>> print(low.round(3), high)
        [0.963] [1.]
    """
    low, high = differences_over_tasks(
        outcomes, queries, level=level, n_resamples=n_resamples, seed=seed
    )
    sided = _one_sided(outcomes, queries, level=level)
    low, high = np.where(np.isnan(sided), (low, high), sided)
    return low, high


def differences_over_tasks(
    outcomes: Float[np.ndarray, "seed task prompt run"],
    queries: Shaped[np.ndarray, "seed task prompt"],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " run"], Float[np.ndarray, " run"]]:
    """Give a bootstrap interval of each difference's mean over tasks, for the same tasks with other draws.

    Seeds are drawn again, and within each task and seed its distinct queries; prompts with one query
    stand or fall together. The tasks are what the mean is about, and stay. Drawing at two levels is
    cautious: where seeds make no difference, n of them give an interval sqrt(2 - 1 / n) times too wide.

    Args:
        outcomes: Differences of outcomes; NaN for "does not exist".
        queries: What each prompt asks.
        level: Confidence level between 0 and 1.
        n_resamples: How many draws.
        seed: Seed of the draws.

    Returns:
        Lower and upper end of each mean; no width where all differences are the same.

    Example:
        >>> gains = np.array([1.0, 0.0, -1.0, 1.0] * 25).reshape(1, 1, 100, 1)
        >>> low, high = differences_over_tasks(gains, np.arange(100).reshape(1, 1, 100))
        >>> bool(0 < low < 0.25 < high)
        True
    """
    _quantile(level)
    rng, draws = np.random.default_rng(seed), []
    for of_seed, asked_in_seed in zip(outcomes, queries, strict=True):
        each = np.zeros((n_resamples, outcomes.shape[-1]))
        for right, asked in zip(of_seed, asked_in_seed, strict=True):
            _, which = np.unique(asked.astype(str), return_inverse=True)
            belongs = np.eye(which.max() + 1)[which]
            n = belongs.shape[1]
            weights = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples) @ belongs.T
            there = ~np.isnan(right)
            with np.errstate(invalid="ignore"):
                shares = (weights @ np.where(there, right, 0)) / (weights @ there)
            each += shares / len(of_seed)
        draws.append(each)
    drawn = rng.integers(0, len(draws), (n_resamples, len(draws)))
    # A seed that is drawn twice must not bring the same queries twice.
    within = rng.integers(0, n_resamples, drawn.shape)
    means = np.stack(draws)[drawn, within].mean(axis=1)
    low, high = np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _one_sided(
    outcomes: Float[np.ndarray, "seed task prompt run"],
    queries: Shaped[np.ndarray, "seed task prompt"],
    *,
    level: float,
) -> Float[np.ndarray, "end run"]:
    """Wilson's interval of runs that are always right or never; NaN for the others, and for differences."""
    ends = np.full((2, outcomes.shape[-1]), np.nan)
    if np.nanmin(outcomes, initial=0) < 0 or np.nanmax(outcomes, initial=1) > 1:
        return ends
    there = ~np.isnan(outcomes)
    for run in range(outcomes.shape[-1]):
        known = there[..., run]
        values = np.unique(outcomes[..., run][known])
        if values.tolist() in ([0], [1]):
            tasks = (queries[:, task][known[:, task]] for task in range(queries.shape[1]))
            n = sum(len(set(asked.tolist())) for asked in tasks)
            ends[:, run] = wilson(float(values[0]) * n, n, level=level)
    return ends


def accuracy(
    data: xr.Dataset, variable: str, *, split: str = "test", level: float = 0.95
) -> xr.Dataset:
    """Turn per-prompt outcomes into accuracies with Wilson intervals.

    Args:
        data: Outcomes with a dimension ``prompt`` and its coordinate ``split``; where there is a
            coordinate ``query``, intervals count distinct queries.
        variable: Which outcomes, e.g. ``"hypothesis"``: 1 or True for right, NaN for "does not
            exist".
        split: ``"dev"``, ``"test"``, or ``"all"`` prompts.
        level: Confidence level between 0 and 1.

    Returns:
        ``accuracy, low, high`` and ``n`` over the variable's other dimensions.

    Raises:
        ValueError: The variable or the split does not exist.

    Example:
        >>> data = xr.Dataset(
        ...     {"regular": ("prompt", [True, True, False])},
        ...     coords={"split": ("prompt", ["dev", "test", "test"])},
        ... )
        >>> float(accuracy(data, "regular")["accuracy"])
        0.5
    """
    if variable not in data.data_vars:
        raise unknown("variable", variable, map(str, data.data_vars))
    outcomes = data[variable].astype(float)
    if split != "all":
        splits = sorted({str(name) for name in data["split"].values})
        if split not in splits:
            raise unknown("split", split, [*splits, "all"])
        outcomes = outcomes.isel(prompt=data["split"].values == split)
    n = outcomes.count("prompt")
    rate = outcomes.sum("prompt") / n.where(n > 0)
    # Prompts that ask the same query are no independent evidence: a task of 26 letters has at most
    # 13 test queries, however often each is asked. Counting queries is cautious where demonstrations vary.
    queries = len(set(outcomes["query"].values)) if "query" in outcomes.coords else len(outcomes)
    independent = np.minimum(n.values, queries)
    right = np.where(n.values > 0, rate.values, 0) * independent
    low, high = wilson(right, independent, level=level)
    ends = {"low": (n.dims, low), "high": (n.dims, high)}
    return xr.Dataset({"accuracy": rate, "n": n}).assign(ends)


def _quantile(level: float) -> float:
    """Two-sided standard normal quantile of a confidence level."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, e.g. 0.95, got {level!r}")
    return NormalDist().inv_cdf((1 + level) / 2)
