"""The stylized model: a predictor that reads labels off its weights, one that copies them, and a gate.

The in-weight predictor g knows the query alone and counts the labels it has seen with it. The in-context
predictor h knows nothing but the context: it copies the labels of its items, those of items like the query
above all, and needs no training. The model predicts alpha g + (1 - alpha) h. Losses are natural logarithms.
"""

from math import lgamma

import numpy as np
from einops import einsum
from jaxtyping import Float, Int, Num

from tvlens._errors import needs, unknown, whole
from tvlens.icl._checks import check_classes, check_smoothing, share

Number = int | float | np.number | Num[np.ndarray, "..."]
"""A number, or an array of any shape."""
NOISES = ("shift", "uniform")
"""What noise does to a label: it becomes the next one (as in the paper's data), or any other one."""


def kt(counts: Num[np.ndarray, "*batch classes"]) -> Float[np.ndarray, "*batch classes"]:
    """Predict labels in weights: Krichevsky and Trofimov's estimator, which adds half a count to each class.

    Args:
        counts: How often each class was seen with this query.

    Returns:
        Probabilities of the classes.

    Raises:
        ValueError: Fewer than two classes, or a negative count.

    Example:
        >>> print(kt(np.array([3, 0])))
        [0.875 0.125]

    References:
        Krichevsky and Trofimov 1981, The performance of universal encoding [krichevsky1981performance];
        Chan et al. 2025, arXiv:2410.23042.
    """
    needs("counts", counts, np.ndarray, "an array (..., classes)")
    check_classes(counts.shape[-1])
    if (counts < 0).any():
        raise ValueError(f"counts must not be negative; {counts.min()} arrived.")
    half = counts + 0.5
    return half / half.sum(axis=-1, keepdims=True)


def in_context(
    labels: Int[np.ndarray, "*batch length"],
    similarity: Num[np.ndarray, "*batch length"],
    *,
    n_classes: int,
    epsilon: float = 1e-3,
    theta: float = 0.0,
) -> Float[np.ndarray, "*batch classes"]:
    """Predict labels in context: those of the context's items, weighed by a softmax of their similarity.

    Args:
        labels: The items' labels, from 0.
        similarity: How similar each item is to the query.
        n_classes: How many classes there are.
        epsilon: The least probability of any class, at most 1 / n_classes.
        theta: Logarithm of the temperature that divides similarities. (The authors' code takes the
            exponential of the temperature once more, so that it never falls below 1.)

    Returns:
        Probabilities of the classes.

    Raises:
        ValueError: A label is no class, or epsilon is out of range.

    Example:
        >>> labels, similarity = np.array([0, 1]), np.array([1.0, -1.0])
        >>> print(in_context(labels, similarity, n_classes=2).round(3))
        [0.88 0.12]
        >>> print(in_context(labels, similarity, n_classes=2, theta=-2.0).round(3))
        [0.999 0.001]

    References:
        Chan et al. 2025, arXiv:2410.23042.
    """
    check_smoothing(epsilon, n_classes)
    if labels.size and not 0 <= labels.min() <= labels.max() < n_classes:
        raise ValueError(
            f"labels go from 0 to {n_classes - 1} with n_classes = {n_classes}; "
            f"{labels.min()} to {labels.max()} arrived."
        )
    scaled = similarity / np.exp(theta)
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    said = einsum(weights, np.eye(n_classes)[labels], "... length, ... length c -> ... c")
    return (1 - epsilon * n_classes) * said + epsilon


def mixture(
    alpha: Number,
    g: Float[np.ndarray, "*batch classes"],
    h: Float[np.ndarray, "*batch classes"],
) -> Float[np.ndarray, "*batch classes"]:
    """Mix the two predictors: alpha g + (1 - alpha) h.

    Args:
        alpha: The gate, 1 for in-weight alone; a number, or one for each row.
        g: The in-weight predictor's probabilities.
        h: The in-context predictor's.

    Returns:
        The model's probabilities.

    Raises:
        ValueError: A gate lies outside 0..1.

    Example:
        >>> print(mixture(0.25, np.array([1.0, 0.0]), np.array([0.2, 0.8])))
        [0.4 0.6]
    """
    gate = share("alpha", alpha)
    return gate[..., np.newaxis] * g + (1 - gate[..., np.newaxis]) * h


def label_distribution(
    n_classes: int, label_noise: float = 0.0, *, noise: str = "shift"
) -> Float[np.ndarray, " classes"]:
    """Say how labels of one class fall, the true one first.

    Args:
        n_classes: How many classes there are.
        label_noise: Share of labels that are wrong.
        noise: Wrong labels are all the next class (``"shift"``), or any other one (``"uniform"``).

    Returns:
        Probabilities of the labels.

    Raises:
        ValueError: Fewer than two classes, a share outside 0..1, or an unknown noise.

    Example:
        >>> print(label_distribution(4, 0.3), label_distribution(4, 0.3, noise="uniform"))
        [0.7 0.3 0.  0. ] [0.7 0.1 0.1 0.1]
    """
    check_classes(n_classes)
    share("label_noise", label_noise)
    if noise not in NOISES:
        raise unknown("noise", noise, NOISES)
    wrong = np.eye(n_classes)[1] if noise == "shift" else np.ones(n_classes) / (n_classes - 1)
    found = label_noise * wrong
    found[0] = 1 - label_noise
    return found


def bayes_risk(n_classes: int, label_noise: float = 0.0, *, noise: str = "shift") -> float:
    """Give the least loss that any predictor of noisy labels can have: their entropy.

    Args:
        n_classes: How many classes there are.
        label_noise: Share of labels that are wrong.
        noise: As in `label_distribution`.

    Returns:
        The entropy.

    Example:
        >>> round(bayes_risk(10, 0.05), 4), round(bayes_risk(10, 0.05, noise="uniform"), 4)
        (0.1985, 0.3084)
    """
    found = label_distribution(n_classes, label_noise, noise=noise)
    there = found[found > 0]
    return float(-(there * np.log(there)).sum() + 0.0)


def kt_excess(n: int, probabilities: Float[np.ndarray, " classes"]) -> float:
    """Compute exactly how far `kt` is above the Bayes risk after n samples, on average over samples.

    It is (C - 1) / (2 n) to first order: half a unit of 1 / n for each class but one, whether the class is
    common or never comes. A class that comes about once in n samples costs a little less.

    Args:
        n: How many samples were counted.
        probabilities: How labels fall.

    Returns:
        The expected excess.

    Raises:
        ValueError: Probabilities that do not sum to 1, or n below 0.

    Example:
        >>> excess = kt_excess(1000, label_distribution(10, 0.05))
        >>> round(excess * 2 * 1000 / 9, 3)
        0.997
    """
    if whole("n", n) < 0:
        raise ValueError(f"n must be 0 or more; {n} arrived.")
    check_classes(len(probabilities))
    if (probabilities < 0).any() or not np.isclose(probabilities.sum(), 1):
        raise ValueError(f"probabilities must sum to 1; {probabilities.sum():.6g} arrived.")
    if n == 0:
        there = probabilities[probabilities > 0]
        return float(np.log(len(probabilities)) + (there * np.log(there)).sum())
    # log(n + C / 2) + E[log p - log(k + 1/2)], with what cancels taken out: all of it is of order 1 / n.
    values, times = np.unique(probabilities[probabilities > 0], return_counts=True)
    means = [classes * p * _mean_log_ratio(n, p) for p, classes in zip(values, times, strict=True)]
    return float(np.log1p(len(probabilities) / 2 / n) - sum(means))


def kt_regret(n: int, probabilities: Float[np.ndarray, " classes"]) -> Float[np.ndarray, " sample"]:
    """Compute what `kt` pays above the Bayes risk in sum over 1, 2, ... n samples, on average.

    Args:
        n: How many samples.
        probabilities: How labels fall.

    Returns:
        The sums: (C - 1) / 2 log(n) and a constant. From sample 64 on the excess is interpolated.

    Raises:
        ValueError: As `kt_excess`; n below 1.

    Example:
        >>> paid = kt_regret(1000, label_distribution(10, 0.05))
        >>> print((paid[[0, 99, 999]] - 4.5 * np.log([1, 100, 1000])).round(2))
        [ 2.1  -3.36 -3.44]
    """
    if whole("n", n) < 1:
        raise ValueError(f"n must be 1 or more; {n} arrived.")
    few = min(n, 64)
    excess = [kt_excess(i, probabilities) for i in range(few)]
    later = np.arange(few, n)
    if len(later):
        at = np.unique(np.geomspace(few, n, 60).round().astype(int))
        units = [i * kt_excess(int(i), probabilities) for i in at]
        excess = np.concatenate([excess, np.interp(np.log(later), np.log(at), units) / later])
    return np.cumsum(excess)


def _mean_log_ratio(n: int, p: float) -> float:
    """Mean of log((k + 1/2) / (n p)) for k of the binomial distribution."""
    spread = 12 * np.sqrt(n * p * (1 - p)) + 30
    k = np.arange(max(0, int(n * p - spread)), min(n, int(n * p + spread)) + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = np.where(k < n, (n - k) * np.log1p(-p), 0.0)
    log_chance = k * np.log(p) + rest - _log_factorial(k) - _log_factorial(n - k)
    chance = np.exp(log_chance - log_chance.max())
    return float((chance * np.log((k + 0.5) / (n * p))).sum() / chance.sum())


_log_factorial = np.vectorize(lambda k: lgamma(k + 1), otypes=[float])
