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
    near = get_close_matches(str(asked), choices, n=3, cutoff=0.5)
    if near:
        offer = f"Nearest: {', '.join(near)}."
    elif len(choices) <= 12:
        offer = f"There are: {', '.join(choices)}."
    else:
        offer = f"There are {len(choices)}, e.g. {', '.join(choices[:6])}."
    return ValueError(f"unknown {kind} {str(asked)!r}. {offer}{' ' + hint if hint else ''}")


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
        said = repr(value)
        said = said if len(said) <= 40 else f"{said[:39]}…"
        raise TypeError(
            f"{name} must be a whole number; {said} ({type(value).__name__}) arrived."
        ) from None
