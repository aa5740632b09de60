"""Settings that the theory cannot take, refused in one way."""

from typing import Any

import numpy as np
from jaxtyping import Float

from tvlens._errors import whole


def check_classes(n_classes: int) -> None:
    """Refuse fewer than two classes."""
    if whole("n_classes", n_classes) < 2:
        raise ValueError(f"at least 2 classes are needed; n_classes = {n_classes} arrived.")


def check_smoothing(epsilon: float, n_classes: int) -> None:
    """Refuse a least probability that all classes cannot have."""
    check_classes(n_classes)
    if not 0 < epsilon <= 1 / n_classes:
        raise ValueError(
            f"epsilon is the least probability of each of {n_classes} classes, so above 0 and at most "
            f"1 / {n_classes} = {1 / n_classes:.4g}; {epsilon} arrived."
        )


def check_others(setting: Any, most: float) -> None:
    """Refuse one class with all draws where a context must hold another.

    Args:
        setting: What has ``p_high``, ``n_high``, ``n_low``, ``p_relevant``, ``n_relevant`` and ``length``.
        most: The largest share of draws that a class has.
    """
    asked = setting.n_relevant
    needed = setting.p_relevant < 1 or (asked is not None and asked < setting.length)
    if needed and most == 1:
        raise ValueError(
            f"one class has all draws (p_high = {setting.p_high}, n_high = {setting.n_high}, n_low = "
            f"{setting.n_low}), so no other class can stand in a context; ask for p_relevant = 1, without "
            "n_relevant."
        )


def share(name: str, value: Any) -> Float[np.ndarray, "..."]:
    """Refuse what lies outside 0..1, and give the rest as an array."""
    found = np.asarray(value, float)
    outside = ~((found >= 0) & (found <= 1))
    if outside.any():
        raise ValueError(f"{name} must lie between 0 and 1; {found[outside].flat[0]} arrived.")
    return found
