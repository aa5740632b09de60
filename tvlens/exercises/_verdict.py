"""What a check says of an answer: right or not yet, and why."""

import html
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """What a check says; true where the answer is right, so that ``assert check_...(answer)`` reads well.

    Attributes:
        right: Whether the answer is right.
        says: What to know about it: why it is right, or what to look at again, without giving it away.

    Example:
        >>> Verdict(False, "That is the norm of one state, not their mean.")
        Not yet. That is the norm of one state, not their mean.
    """

    right: bool
    says: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return f"{'Right' if self.right else 'Not yet'}. {self.says}"

    def _repr_html_(self) -> str:
        color, word = ("#00684d", "Right") if self.right else ("#a34700", "Not yet")
        return (
            f'<div style="border-left:4px solid {color};padding:6px 12px;margin:4px 0">'
            f'<b style="color:{color}">{word}.</b> {html.escape(self.says)}</div>'
        )


def right(says: str) -> Verdict:
    """The answer is right, and this is what it means."""
    return Verdict(True, says)


def not_yet(says: str) -> Verdict:
    """The answer is not right yet, and this is what to look at again."""
    return Verdict(False, says)
