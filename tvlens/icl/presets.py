"""Settings of a study: what a preset says, changed by what the user says."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvlens._errors import unknown, whole


def settle(presets: Mapping[str, Mapping[str, Any]], preset: str, **given: Any) -> dict[str, Any]:
    """Take a preset's settings, and put those of the user in their place.

    Args:
        presets: Settings by the preset's name; all have the same ones.
        preset: Which.
        **given: The user's; None keeps the preset's.

    Returns:
        The settings, each as the preset orders them.

    Raises:
        ValueError: There is no such preset.
        TypeError: A setting is text where the preset has a number, or the other way round.

    Example:
        >>> settle({"quick": {"steps": 10, "lr": 1.0}}, "quick", steps=20)
        {'steps': 20, 'lr': 1.0}
    """
    if preset not in presets:
        raise unknown("preset", preset, presets)
    for name, value in presets[preset].items():
        if given.get(name) is not None:
            _check_like(name, given[name], value)
    return {name: value if given.get(name) is None else given[name]
            for name, value in presets[preset].items()}  # fmt: skip


def _check_like(name: str, given: Any, usual: Any) -> None:
    """Refuse what is of another kind than the preset's value: text, one number, or several of them."""
    many = isinstance(usual, tuple)
    parts = several(name, given) if many else (given,)
    text = isinstance(usual[0] if many else usual, str)
    for part in parts:
        if isinstance(part, str) != text or isinstance(part, list | tuple | dict):
            kind = ("text" if text else "a number") + (
                ", or a list as [1,2]" if many and not text else ""
            )
            raise TypeError(f"{name} must be {kind}; {part!r} ({type(part).__name__}) arrived.")


def at_least(least: int, **numbers_given: Any) -> None:
    """Refuse what is no whole number, or a smaller one.

    Args:
        least: The smallest that is valid.
        **numbers_given: The numbers, by name.

    Raises:
        ValueError: One is smaller.
        TypeError: One is no whole number.

    Example:
        >>> at_least(1, seeds=0)
        Traceback (most recent call last):
        ValueError: seeds must be at least 1; 0 arrived.
    """
    for name, value in numbers_given.items():
        if whole(name, value) < least:
            raise ValueError(f"{name} must be at least {least}; {value} arrived.")


def within(low: int | float, high: int | float, **numbers_given: Any) -> None:
    """Refuse what is no number of an interval, its ends being in it.

    Args:
        low: The smallest that is valid.
        high: The largest that is valid; infinity where there is none.
        **numbers_given: The numbers, by name.

    Raises:
        ValueError: One lies outside, or is NaN.
        TypeError: One is no number.

    Example:
        >>> within(0, 1, p_bursty=1.2)
        Traceback (most recent call last):
        ValueError: p_bursty must lie in 0 to 1; 1.2 arrived. Nearest: 1.
    """
    for name, value in numbers_given.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"{name} must be a number; {value!r} ({type(value).__name__}) arrived.")
        if not low <= value <= high:
            span = f"lie in {low} to {high}" if high != float("inf") else f"be at least {low}"
            near = f" Nearest: {low if value < low else high}." if value == value else ""
            raise ValueError(f"{name} must {span}; {value} arrived.{near}")


def several(name: str, given: Any) -> tuple[Any, ...]:
    """Turn one value or several into a tuple without repeats.

    Args:
        name: What they are called.
        given: The value or values.

    Returns:
        The values in the order in which they first came.

    Raises:
        ValueError: There is none.

    Example:
        >>> several("alphas", 0.1), several("alphas", [0.1, 0.0, 0.1])
        ((0.1,), (0.1, 0.0))
    """
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    many = listed or hasattr(given, "tolist")
    values = tuple(dict.fromkeys(given if many else [given]))
    if not values:
        raise ValueError(f"{name} needs at least one value; none arrived.")
    return values
