"""How sure is an effect? Intervals over prompts for every cell at once, and paired tests.

A heat map has hundreds of cells, and the largest of them is large by chance as well. Intervals come from
drawing the prompts again. Tests ask whether the effects could as well have had the other sign: where nothing
happened, a prompt's effect is as likely to be up as down, so all sign patterns are tried (or many of them),
and what comes out is corrected for the number of cells.
"""

import numpy as np
from jaxtyping import Bool, Float

from tvlens._errors import unknown

CORRECTIONS = ("holm", "bh", "none")
_ALL_SIGNS = 16  # prompts up to which every sign pattern is tried
# Patterns that are drawn: at least so many, and for each cell enough for Holm's correction of all cells.
_DRAWN, _DRAWN_A_CELL, _MOST_DRAWN = 9999, 40, 2**18
_AT_ONCE = 2**24  # numbers in one piece of work


def bootstrap_ratio(
    above: Float[np.ndarray, "prompt cell"],
    below: Float[np.ndarray, "prompt cell"],
    *,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Give percentile bootstrap intervals of a ratio of sums over prompts; with ones below, of a mean.

    Args:
        above: What is summed above the line; NaN where a prompt has no value.
        below: What is summed below the line.
        level: Confidence level between 0 and 1.
        n_resamples: How many draws.
        seed: Seed of the draws.

    Returns:
        Lower and upper ends; NaN where fewer than two prompts have a value.

    Raises:
        ValueError: The level is outside 0..1, or there are no draws.

    Example:
        >>> effects = np.array([[1.0], [2.0], [3.0], [4.0]])
        >>> low, high = bootstrap_ratio(effects, np.ones_like(effects))
        >>> bool(low[0] < 2.5 < high[0])
        True

    References:
        efron1979
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, e.g. 0.95, got {level!r}")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
    there = ~np.isnan(above)
    n = len(above)
    top, bottom = np.where(there, above, 0), np.where(there, below, 0)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(float)
    ends = np.full((2, above.shape[1]), np.nan)
    step = max(_AT_ONCE // n_resamples, 1)
    for begin in range(0, above.shape[1], step):
        some = slice(begin, begin + step)
        with np.errstate(invalid="ignore", divide="ignore"):
            draws = (weights @ top[:, some]) / (weights @ bottom[:, some])
        draws[~np.isfinite(draws)] = np.nan
        enough = (there[:, some].sum(axis=0) > 1) & ~np.isnan(draws).all(axis=0)
        if enough.any():
            ends[:, some][:, enough] = np.nanquantile(
                draws[:, enough], [(1 - level) / 2, (1 + level) / 2], axis=0
            )
    return ends[0], ends[1]


def sign_flip(effects: Float[np.ndarray, "prompt cell"], *, seed: int = 0) -> np.ndarray:
    """Test in every cell whether the mean effect is zero, by flipping the signs of whole prompts.

    Up to 16 prompts every sign pattern is tried, so that p is exact; above, at least 9999 are drawn, and 40
    for every cell that changed, so that a clear effect can outlive the correction for them.

    Args:
        effects: The change of each prompt; NaN where it has no value.
        seed: Seed of the drawn patterns.

    Returns:
        Two-sided p for each cell; 1 where all effects are zero. The least that is possible is 2^(1-n) for up
        to 16 prompts n, and above them 1 in the number of patterns.

    Example:
        >>> sign_flip(np.array([[1.0, 0.0]] * 5)).tolist()
        [0.0625, 1.0]

    References:
        fisher1935design
    """
    # In double precision: sums of single ones differ from the products below by more than ties may.
    effects = np.nan_to_num(np.asarray(effects, dtype=float), nan=0.0)
    n, changed = len(effects), effects.any(axis=0)
    some, p = effects[:, changed], np.ones(effects.shape[1])
    exact = n <= _ALL_SIGNS
    # Half of them: the other half has the same absolute sums.
    total = 2 ** (n - 1) if exact else min(max(_DRAWN, _DRAWN_A_CELL * some.shape[1]), _MOST_DRAWN)
    rng = np.random.default_rng(seed)
    # Rounding must not make a pattern that ties with the one seen look smaller.
    least = np.abs(some.sum(axis=0)) - 1e-9 * np.abs(some).sum(axis=0)
    count = np.zeros(some.shape[1])
    step = max(_AT_ONCE // max(some.shape[1], n), 1)
    for begin in range(0, total, step):
        size = min(step, total - begin)
        bits = (
            np.arange(begin, begin + size)[:, None] >> np.arange(n)
            if exact
            else rng.integers(0, 2, (size, n))
        )
        count += (np.abs((1.0 - 2.0 * (bits & 1)) @ some) >= least).sum(axis=0)
    p[changed] = count / total if exact else (count + 1) / (total + 1)
    return p


def correct(
    p: Float[np.ndarray, " cell"], among: Bool[np.ndarray, " cell"], *, correction: str = "holm"
) -> np.ndarray:
    """Correct p-values for how many cells were tested.

    Args:
        p: One for each cell.
        among: Which cells were tested; the others stay as they are and do not count.
        correction: ``"holm"`` bounds the chance of any false finding, ``"bh"`` the share of false ones among
            the findings, ``"none"`` nothing.

    Returns:
        Corrected p-values.

    Raises:
        ValueError: The correction is unknown.

    Example:
        >>> correct(np.array([0.01, 0.04, 1.0]), np.array([True, True, False])).tolist()
        [0.02, 0.04, 1.0]

    References:
        holm1979, benjamini1995
    """
    if correction not in CORRECTIONS:
        raise unknown("correction", correction, CORRECTIONS)
    fixed = p.copy()
    if correction == "none" or not among.any():
        return fixed
    tested = p[among]
    order = np.argsort(tested, kind="stable")
    m, rank = len(tested), np.arange(len(tested))
    if correction == "holm":
        sorted_p = np.maximum.accumulate(tested[order] * (m - rank))
    else:
        sorted_p = np.minimum.accumulate((tested[order] * m / (rank + 1))[::-1])[::-1]
    back = np.empty(m)
    back[order] = np.minimum(sorted_p, 1.0)
    fixed[among] = back
    return fixed
