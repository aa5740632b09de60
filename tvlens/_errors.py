"""Errors that say what was asked, what arrived, and the nearest valid choice."""

import operator
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def unknown(kind: str, asked: object, choices: Iterable[str], *, hint: str = "") -> ValueError:
    """Build the error for a name that does not exist.

    Args:
        kind: What the name was meant to be, e.g. ``"task"``.
        asked: The name that was given.
        choices: All valid names.
        hint: One more sentence, appended.

    Returns:
        A ValueError that offers the nearest names, or all of them where they are few.

    Example:
        >>> unknown("task", "to_uper", ["to_upper", "to_lower"])
        ValueError("unknown task 'to_uper'. Nearest: to_upper, to_lower.")
    """
    choices = sorted(map(str, choices))
    said = _brief(str(asked))
    near = get_close_matches(said, choices, n=3, cutoff=0.5)
    if near:
        offer = f"Nearest: {', '.join(map(_brief, near))}."
    elif len(choices) <= 12:
        offer = f"There are: {', '.join(map(_brief, choices)) or 'none'}."
    else:
        offer = f"There are {len(choices)}, e.g. {', '.join(map(_brief, choices[:6]))}."
    return ValueError(f"unknown {kind} {said!r}. {offer}{' ' + hint if hint else ''}")


def whole(name: str, value: Any) -> int:
    """Refuse what is no whole number.

    Args:
        name: What the number is called.
        value: The number, of Python or numpy.

    Returns:
        The same as an int.

    Raises:
        TypeError: It is a text, a fraction, a list or anything else.

    Example:
        >>> whole("layer", "3")
        Traceback (most recent call last):
        TypeError: layer must be a whole number; '3' (str) arrived.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a whole number; {_brief(repr(value), 40)} ({type(value).__name__}) arrived."
        ) from None


def needs(name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    """Refuse what is of another type.

    Args:
        name: What the value is called.
        value: The value.
        kind: Its type, or several.
        wanted: What it must be, and who gives one.

    Raises:
        TypeError: It is of another type.

    Example:
        >>> needs("k", "3", int, "a number")
        Traceback (most recent call last):
        TypeError: k must be a number; '3' (str) arrived.
    """
    if not isinstance(value, kind):
        said = _brief(" ".join(repr(value).split()), 40)
        raise TypeError(f"{name} must be {wanted}; {said} ({type(value).__name__}) arrived.")


def _brief(text: str, most: int = 80) -> str:
    """Cut a text that would bury the message."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def each_once(seeds: Any) -> list[int]:
    """Give seeds as a list, each once.

    Args:
        seeds: One whole number, or several.

    Returns:
        The list.

    Raises:
        TypeError: One is no whole number.
        ValueError: One is there twice.

    Example:
        >>> each_once(3)
        [3]
    """
    several = list(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, str) else [seeds]
    numbers = [whole("a seed", seed) for seed in several]
    large = [seed for seed in numbers if abs(seed) >= 2**63]
    if large:
        raise ValueError(f"a seed must lie between -2^63 and 2^63; {large[0]} arrived.")
    twice = sorted({seed for seed in numbers if numbers.count(seed) > 1})
    if twice:
        raise ValueError(f"each seed once; given more than once: {', '.join(map(str, twice))}.")
    return numbers
