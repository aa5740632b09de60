"""The table of checks: what each is called, what it needs, what its failure means."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

STATES = ("passed", "failed", "skipped")


class NotApplicable(Exception):
    """Raised by a check that has nothing to say about this model; the text says why."""


@dataclass(frozen=True)
class Measured:
    """What a check found.

    Attributes:
        value: The number that was measured.
        tolerance: The largest number that passes; None where the check only reports.
        note: What else there is to say, in a few words.
    """

    value: float
    tolerance: float | None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the number is within the tolerance; NaN never is."""
        return self.tolerance is None or self.value <= self.tolerance


@dataclass(frozen=True)
class Check:
    """One entry of the table.

    Attributes:
        name: What users call it.
        what: What is measured, in a few words.
        means: What its failure means for the user, in one sentence.
        needs: Checks without which its number would mean nothing: it is skipped unless they passed.
        function: From a `Subject` to what was measured.
    """

    name: str
    what: str
    means: str
    needs: tuple[str, ...]
    function: Callable[[Any], Measured]


CHECKS: dict[str, Check] = {}
"""All checks, in the order in which they run."""


def check(
    name: str, *, what: str, means: str, needs: tuple[str, ...] = ()
) -> Callable[[Callable[[Any], Measured]], Callable[[Any], Measured]]:
    """Give a decorator that enters a function into the table and hands it back unchanged.

    Args:
        name: What users call the check.
        what: What is measured, in a few words.
        means: What its failure means, in one sentence.
        needs: Checks that must have passed before, and stand before it in the table.

    Returns:
        The decorator.

    Raises:
        ValueError: Another function has that name already, or it needs a check that is not there.

    Example:
        >>> @check("is_small", what="layers", means="It takes long.")
        ... def is_small(subject):
        ...     return Measured(subject.drive.n_layers, 8)
        >>> CHECKS.pop("is_small").what
        'layers'
    """

    def enter(function: Callable[[Any], Measured]) -> Callable[[Any], Measured]:
        known = CHECKS[name].function if name in CHECKS else function
        if (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(f"check {name!r} exists already, in {known.__module__}.")
        for other in needs:
            if other not in CHECKS:
                raise ValueError(f"check {name!r} needs {other!r}, which is not in the table yet.")
        CHECKS[name] = Check(name, what, means, needs, function)
        return function

    return enter
