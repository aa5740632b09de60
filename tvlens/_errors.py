"""Errors that say what was asked, what arrived, and the nearest valid choice."""

from collections.abc import Iterable
from difflib import get_close_matches


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
