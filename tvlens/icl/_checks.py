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


def share(name: str, value: Any) -> Float[np.ndarray, "..."]:
    """Refuse what lies outside 0..1, and give the rest as an array."""
    found = np.asarray(value, float)
    outside = ~((found >= 0) & (found <= 1))
    if outside.any():
        raise ValueError(f"{name} must lie between 0 and 1; {found[outside].flat[0]} arrived.")
    return found
