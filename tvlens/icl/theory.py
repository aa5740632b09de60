"""What the theory of the stylized model says, in numbers: two losses, and where they cross.

The in-weight predictor's loss falls to the Bayes risk like (C - 1) / (2 N_x), N_x being how often the query
was seen. The in-context predictor needs no training, but k items of other classes, and labels that are
noise, hold its loss above a floor for ever. So the context serves until N_x*, where the losses cross; rare
classes reach their N_x* late; and where the floor is no higher than the Bayes risk, there is none.
"""

from math import comb

import numpy as np
from jaxtyping import Float, Int

from tvlens._errors import unknown, whole
from tvlens.icl._checks import check_smoothing
from tvlens.icl.predictors import Number, bayes_risk, label_distribution

FORMS = ("cumulative", "instantaneous")
"""Loss averaged over the first N samples (what a learner has paid), or after them (what it pays next)."""


def in_weight_bound(
    n: Number,
    n_classes: int,
    *,
    label_noise: float = 0.0,
    noise: str = "shift",
    form: str = "cumulative",
    constant: float = 0.0,
) -> Float[np.ndarray, "..."]:
    """Give the in-weight predictor's loss once it has seen a query n times.

    Args:
        n: How often the query was seen, from 1.
        n_classes: How many classes there are.
        label_noise: Share of labels that are wrong.
        noise: As in `label_distribution`.
        form: ``"cumulative"``: the mean loss over the first n samples, (C - 1) / 2 log(n) / n above the Bayes
            risk. That is the paper's, and what a gate that adds up losses sees. ``"instantaneous"``: the
            loss after n samples, (C - 1) / (2 n) above it.
        constant: Of the term constant / n that the theorem leaves open; the paper draws plus and minus 4096.

    Returns:
        The loss, of the shape of n; never below the Bayes risk.

    Raises:
        ValueError: n below 1, fewer than two classes, a share outside 0..1, or an unknown name.

    Example:
        >>> print(in_weight_bound(np.array([10, 1000]), 10, label_noise=0.05).round(3))
        [1.235 0.23 ]
        >>> print(in_weight_bound(np.array([10, 1000]), 10, label_noise=0.05, form="instantaneous").round(3))
        [0.649 0.203]

    References:
        Chan et al. 2025, arXiv:2410.23042.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    samples = np.asarray(n, float)
    if not (samples >= 1).all():
        raise ValueError(f"n counts samples from 1; {np.nanmin(samples):g} arrived.")
    risk = bayes_risk(n_classes, label_noise, noise=noise)
    growth = np.log(samples) if form == "cumulative" else 1.0
    excess = ((n_classes - 1) / 2 * growth + constant) / samples
    return np.asarray(risk + np.maximum(excess, 0.0))


def in_context_bounds(
    length: int,
    n_irrelevant: int | Int[np.ndarray, "..."],
    n_classes: int,
    epsilon: float,
    b: float,
    *,
    label_noise: float = 0.0,
    noise: str = "shift",
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Give the interval that holds the in-context predictor's loss, however much it has learned.

    The label's probability is p = (1 - eps C) s + eps, s being the weight of the items that bear it. No
    weight is more than exp(2 sqrt(b)) times another one, and -log p >= 1 - p: the lower end. Where items
    with the label are at least as similar to the query as the others, s >= (L - k) / L: the upper end. With
    k = L nothing bears the label, and the loss is log(1 / eps).

    Args:
        length: L, how many items the context holds.
        n_irrelevant: k, how many of them bear another label than the query; a number or several.
        n_classes: C, how many classes there are.
        epsilon: The least probability of any class.
        b: Similarities lie within plus and minus sqrt(b) (after division by the temperature).
        label_noise: Where it is not 0, k counts items of another class, and the labels of the other L - k and
            of the query are each wrong with this probability; the ends are means over them. (An irrelevant
            item is taken never to become right by noise.)
        noise: As in `label_distribution`.

    Returns:
        Lower and upper end, each of the shape of n_irrelevant.

    Raises:
        ValueError: More irrelevant items than items, fewer than two classes, epsilon above 1 / C, or a share
            outside 0..1.

    Example:
        >>> low, high = in_context_bounds(8, np.array([0, 1, 8]), 10, 1e-3, 1.0)
        >>> print(low.round(3), high.round(3))
        [0.009 0.028 6.908] [0.009 0.142 6.908]

    References:
        Chan et al. 2025, arXiv:2410.23042.
    """
    k = np.asarray(n_irrelevant)
    check_smoothing(epsilon, n_classes)
    if whole("length", length) < 1:
        raise ValueError(f"a context holds at least 1 item; length = {length} arrived.")
    if (k < 0).any() or (k > length).any():
        raise ValueError(
            f"0 to {length} items can be irrelevant with length = {length}; "
            f"n_irrelevant = {k.max() if (k > length).any() else k.min()} arrived."
        )
    if not b >= 0:
        raise ValueError(f"b bounds squared similarities, so b >= 0; {b} arrived.")
    weight = np.exp(2 * np.sqrt(b))
    wrong = np.arange(length + 1)
    most = 1 - epsilon * n_classes
    low = most * wrong / (wrong + (length - wrong) * weight) + epsilon * (n_classes - 1)
    high = -np.log(most * (length - wrong) / length + epsilon)
    low[-1] = high[-1]
    falls = label_distribution(n_classes, label_noise, noise=noise)
    chance = sum(
        share * _wrong_labels(length, float(match))
        for share, match in ((falls[0], falls[0]), (1 - falls[0], falls[1]))
    )
    return np.asarray((chance @ low)[k]), np.asarray((chance @ high)[k])


def crossover(
    in_context_loss: Number,
    n_classes: int,
    *,
    label_noise: float = 0.0,
    noise: str = "shift",
    form: str = "cumulative",
) -> Float[np.ndarray, "..."]:
    """Find N_x*: from how many samples of a query on its in-weight loss is the lower one.

    A class that makes up the share P of queries reaches it after N_x* / P sequences.

    Args:
        in_context_loss: The in-context predictor's loss, e.g. an end of `in_context_bounds`.
        n_classes: How many classes there are.
        label_noise: Share of labels that are wrong.
        noise: As in `label_distribution`.
        form: As in `in_weight_bound`.

    Returns:
        Where `in_weight_bound` falls below the loss for good, not rounded; 1 where it always lies below,
        infinity where it never does: the in-context loss is no higher than the Bayes risk.

    Raises:
        ValueError: A loss that is negative or no number, or what `in_weight_bound` refuses.

    Example:
        >>> print(crossover(np.array([0.1, 0.5, 5.0]), 10, label_noise=0.05).round(1))
        [ inf 61.5  1. ]

    References:
        Chan et al. 2025, arXiv:2410.23042.
    """
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    loss = np.asarray(in_context_loss, float)
    if not (loss >= 0).all():
        raise ValueError(f"a loss is 0 or more; {loss.min()} arrived.")
    gap = np.asarray(loss - bayes_risk(n_classes, label_noise, noise=noise))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.asarray((n_classes - 1) / (2 * gap))
        if form == "cumulative":
            found = _log_over_n(np.asarray(1 / found))
    return np.asarray(np.where(gap > 0, np.maximum(found, 1.0), np.inf))


def _log_over_n(value: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Solve log(n) / n = value for the n above e, by bisection on log(n); 1 where value is above 1 / e."""
    # t = log(n) solves t - log(t) = -log(value), which grows from 1 at t = 1.
    target = -np.log(np.clip(value, np.finfo(float).tiny, np.exp(-1)))
    low, high = np.ones_like(target), 2 * target + 2
    for _ in range(64):
        middle = (low + high) / 2
        below = middle - np.log(middle) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    with np.errstate(over="ignore"):
        return np.where(value < np.exp(-1), np.exp(high), 1.0)


def _wrong_labels(length: int, match: float) -> Float[np.ndarray, "irrelevant wrong"]:
    """Probability that so many items bear another label than the query, by how many are irrelevant.

    Each of the others bears it with probability ``match``.
    """
    chance = np.zeros((length + 1, length + 1))
    for k in range(length + 1):
        for right in range(length - k + 1):
            ways = comb(length - k, right)
            chance[k, length - right] = ways * match**right * (1 - match) ** (length - k - right)
    return chance
