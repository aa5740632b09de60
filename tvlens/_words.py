"""Numbers and lists as sentences write them."""

from collections.abc import Sequence


def fixed(value: float, digits: int = 2, *, sign: bool = False) -> str:
    """Write a number with so many digits, and a zero without a minus sign.

    Args:
        value: The number.
        digits: Digits after the point.
        sign: Whether a plus sign is written.

    Returns:
        The text.

    Example:
        >>> fixed(-0.001), fixed(1.5, sign=True)
        ('0.00', '+1.50')
    """
    rounded = round(float(value), digits) + 0.0  # turns -0.0 into 0.0
    return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}"


def listed(items: Sequence[str]) -> str:
    """Write a list with commas and "and".

    Args:
        items: Its items.

    Returns:
        The text.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    return " and ".join([", ".join(items[:-1])] * (len(items) > 1) + list(items[-1:]))
