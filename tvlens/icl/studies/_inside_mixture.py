"""Is an answer f a mixture of g and h? The weight that fits best, and what it leaves unexplained.

A gate would give alpha g + (1 - alpha) h. A residual stream adds logits, which would multiply g and h. Both
are fitted, and held against what needs no circuit: g or h alone, and the g and h of other prompts.
"""

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float

from tvlens.icl.studies._inside_cuts import RUNS

FITS = {
    "mixture": "alpha g + (1 - alpha) h, alpha of each prompt by maximum likelihood",
    "least squares": "the same, alpha by least squares",
    "one alpha": "the same, one alpha for all prompts of a probe, by maximum likelihood",
    "log-linear": "g^alpha h^(1 - alpha), scaled to sum to 1, alpha of each prompt by maximum likelihood",
    "sum of logits": "logits of g and of h added, those of neither subtracted; nothing is fitted",
    "one of the two": "g or h, whichever is likelier",
    "shuffled": "mixture of the g of another prompt and the h of a third",
}
"""How f is put together from g and h."""
CUTS = tuple(product(*([run for run in RUNS if run[0] == which] for which in "gh")))
"""Pairs of a run that stands for g and one that stands for h."""
_HALVINGS = 40


def mixture_weight(
    f: Float[np.ndarray, "*probe prompt label"],
    g: Float[np.ndarray, "*probe prompt label"],
    h: Float[np.ndarray, "*probe prompt label"],
    *,
    shared: bool = False,
) -> Float[np.ndarray, "*probe prompt"]:
    """Find the alpha at which f's labels are likeliest under alpha g + (1 - alpha) h.

    Args:
        f: Probabilities to be explained.
        g: Those that alpha weighs.
        h: The others.
        shared: Whether all prompts of a probe have the same alpha.

    Returns:
        Alpha, between 0 and 1; 0.5 where g and h are the same.

    Example:
        >>> g, h = np.array([[0.9, 0.1]]), np.array([[0.2, 0.8]])
        >>> mixture_weight(0.3 * g + 0.7 * h, g, h).round(6).tolist()
        [0.3]
    """
    return _root(lambda a: (f * (g - h) / (a * g + (1 - a) * h)).sum(-1), f.shape[:-1], shared)


def least_squares_weight(
    f: Float[np.ndarray, "*probe prompt label"],
    g: Float[np.ndarray, "*probe prompt label"],
    h: Float[np.ndarray, "*probe prompt label"],
) -> Float[np.ndarray, "*probe prompt"]:
    """Find the alpha between 0 and 1 at which alpha g + (1 - alpha) h is nearest to f.

    Args:
        f: Probabilities to be explained.
        g: Those that alpha weighs.
        h: The others.

    Returns:
        Alpha; 0.5 where g and h are the same.

    Example:
        >>> g, h = np.array([[0.9, 0.1]]), np.array([[0.2, 0.8]])
        >>> least_squares_weight(0.3 * g + 0.7 * h, g, h).round(6).tolist()
        [0.3]
    """
    apart = ((g - h) ** 2).sum(-1)
    found = ((f - h) * (g - h)).sum(-1) / np.where(apart > 0, apart, 1)
    return np.where(apart > 0, np.clip(found, 0, 1), 0.5)


def log_linear_weight(
    f: Float[np.ndarray, "*probe prompt label"],
    g: Float[np.ndarray, "*probe prompt label"],
    h: Float[np.ndarray, "*probe prompt label"],
) -> Float[np.ndarray, "*probe prompt"]:
    """Find the alpha at which f's labels are likeliest under g^alpha h^(1 - alpha), scaled to sum to 1.

    Args:
        f: Probabilities to be explained.
        g: Those that alpha weighs.
        h: The others.

    Returns:
        Alpha, between 0 and 1; 0.5 where g and h are the same.

    Example:
        >>> g, h = np.array([[0.8, 0.2]]), np.array([[0.2, 0.8]])
        >>> log_linear_weight(np.array([[0.5, 0.5]]), g, h).round(6).tolist()
        [0.5]
    """
    ratio = np.log(g) - np.log(h)
    return _root(lambda a: ((f - _geometric(a, g, h)) * ratio).sum(-1), f.shape[:-1], False)


def _geometric(alpha: Any, g: Any, h: Any) -> Any:
    said = alpha * np.log(g) + (1 - alpha) * np.log(h)
    return _normal(said)


def _normal(logits: Any) -> Any:
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def _root(slope: Callable[[Any], Any], shape: tuple[int, ...], shared: bool) -> Any:
    """Halve the stretch in which a falling slope changes its sign; an end where it does not."""

    def at(alpha: Any) -> Any:
        found = slope(alpha[..., None])
        return np.broadcast_to(found.sum(-1, keepdims=True), shape) if shared else found

    low, high = np.zeros(shape), np.ones(shape)
    ends = at(low), at(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        rising = at(middle) > 0
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    found = np.where(ends[1] >= 0, 1.0, np.where(ends[0] <= 0, 0.0, (low + high) / 2))
    return np.where((ends[0] == 0) & (ends[1] == 0), 0.5, found)


def distance(
    f: Float[np.ndarray, "*probe prompt label"], other: Float[np.ndarray, "*probe prompt label"]
) -> Float[np.ndarray, "*probe prompt"]:
    """Give the total variation between two distributions: the share of probability that must be moved.

    Args:
        f: Probabilities.
        other: Others.

    Returns:
        Distances, 0 to 1.

    Example:
        >>> distance(np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])).round(6).item()
        0.4
    """
    return np.abs(f - other).sum(-1) / 2


def fits(
    f: Float[np.ndarray, "*probe prompt label"],
    g: Float[np.ndarray, "*probe prompt label"],
    h: Float[np.ndarray, "*probe prompt label"],
    neither: Float[np.ndarray, "*probe prompt label"],
    *,
    seed: int = 0,
) -> tuple[Float[np.ndarray, "fit *probe prompt"], Float[np.ndarray, "fit *probe prompt"]]:
    """Put f together from g and h in every way of `FITS`.

    Args:
        f: Probabilities of the untouched run.
        g: Those of the run without the context.
        h: Those of the run without the query.
        neither: Those of the run without both.
        seed: Decides whose g and h are taken where they are shuffled.

    Returns:
        Alpha, NaN where a way has none, and the total variation between f and what was put together.
    """

    def mixed(alpha: Any, one: Any = g, other: Any = h) -> Any:
        return alpha[..., None] * one + (1 - alpha[..., None]) * other

    # Along a random cycle, the next prompt and the one after it: three different ones.
    cycle = np.random.default_rng(seed).permutation(f.shape[-2])
    away = [np.empty_like(cycle) for _ in range(2)]
    for by, others in enumerate(away, start=1):
        others[cycle] = np.roll(cycle, by)
    g_other, h_other = g[..., away[0], :], h[..., away[1], :]
    likelier = (f * (np.log(g) - np.log(h))).sum(-1) >= 0
    alphas = {
        "mixture": mixture_weight(f, g, h),
        "least squares": least_squares_weight(f, g, h),
        "one alpha": mixture_weight(f, g, h, shared=True),
        "log-linear": log_linear_weight(f, g, h),
        "sum of logits": np.full(f.shape[:-1], np.nan),
        "one of the two": likelier.astype(float),
        "shuffled": mixture_weight(f, g_other, h_other),
    }
    made = {
        name: mixed(alphas[name])
        for name in ("mixture", "least squares", "one alpha", "one of the two")
    }
    made["log-linear"] = _geometric(alphas["log-linear"][..., None], g, h)
    made["sum of logits"] = _normal(np.log(g) + np.log(h) - np.log(neither))
    made["shuffled"] = mixed(alphas["shuffled"], g_other, h_other)
    return np.stack([alphas[k] for k in FITS]), np.stack([distance(f, made[k]) for k in FITS])


def residual_by_cut(
    shares: Mapping[str, Float[np.ndarray, "*probe prompt label"]],
) -> Float[np.ndarray, "*probe cut"]:
    """Say what the mixture leaves unexplained where g and h are cut out in other ways.

    Args:
        shares: Probabilities by run; ``"f"``, and runs whose names begin with ``"g"`` and ``"h"``.

    Returns:
        Mean total variation between f and the mixture, by `CUTS`.
    """
    found = []
    for g, h in CUTS:
        alpha = mixture_weight(shares["f"], shares[g], shares[h])[..., None]
        found.append(distance(shares["f"], alpha * shares[g] + (1 - alpha) * shares[h]).mean(-1))
    return np.stack(found, axis=-1)
