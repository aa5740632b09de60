"""Random numbers that are functions of where they are used, not of what was drawn before.

A generator with a state must be saved, differs between devices, and gives an item other values when the
number of items changes. Here every item has a key made from (seed, split, index), and its numbers are a hash
of that key: item 7 of the training split is the same in a dataset of 64 and of a million, in an ensemble and
alone, on any device, and no item of an evaluation split shares its numbers with one that was trained on.

References:
    Steele et al. 2014, Fast splittable pseudorandom number generators (the mixing function).
"""

import hashlib
import math

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed number
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685
_BITS = 23  # with the half that is added, what a float32 can hold


def keys(seed: Int[Tensor, "..."], *parts: Int[Tensor, "..."] | int) -> Int[Tensor, "..."]:
    """Make keys from numbers that name a place: seeds, a split, an index, the field that is drawn.

    Args:
        seed: First number.
        *parts: More numbers, each of a shape that broadcasts.

    Returns:
        One key each, well mixed.

    Example:
        >>> one = keys(torch.tensor([0, 1]), 3, torch.tensor([7, 7]))
        >>> bool(one[0] != one[1])
        True
    """
    mixed = _mix(seed + _GOLDEN)
    for part in parts:
        step = (part + 1) * _GOLDEN
        mixed = _mix(mixed + (_signed(step) if isinstance(step, int) else step))
    return mixed


def number(name: str) -> int:
    """Give a name, of a split say, a number for `keys`.

    Args:
        name: Any text.

    Returns:
        A number of 56 bits, the same in every process.

    Example:
        >>> number("train") != number("test")
        True
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def uniforms(key: Int[Tensor, "*shape"], n: int) -> Float[Tensor, "*shape n"]:
    """Draw numbers between 0 and 1, both excluded.

    Args:
        key: One key for every row.
        n: How many each gives.

    Returns:
        The numbers, with a resolution of 2^-23.

    Example:
        >>> uniforms(torch.tensor([5]), 2).shape
        torch.Size([1, 2])
    """
    return torch.cat(_pairs(key, (n + 1) // 2), dim=-1)[..., :n]


def normals(key: Int[Tensor, "*shape"], n: int) -> Float[Tensor, "*shape n"]:
    """Draw standard normal numbers, by Box and Muller's method.

    Args:
        key: One key for every row.
        n: How many each gives.

    Returns:
        The numbers.

    Example:
        >>> bool(normals(torch.arange(9), 1000).std().sub(1).abs() < 0.05)
        True
    """
    u, v = _pairs(key, (n + 1) // 2)
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[..., :n]


def _pairs(
    key: Int[Tensor, "*shape"], n: int
) -> tuple[Float[Tensor, "*shape n"], Float[Tensor, "*shape n"]]:
    """Two uniform numbers of every hash."""
    # Keys are mixed already, so neighbours may lie side by side; a compiler can count in 32 bits here.
    mixed = _mix(rearrange(key, "... -> ... 1") + torch.arange(n, device=key.device))
    halves = [(mixed >> shift) & (2**_BITS - 1) for shift in (40, 8)]
    u, v = ((half.float() + 0.5) * 2.0**-_BITS for half in halves)
    return u, v


def _signed(x: int) -> int:
    """Wrap a number as 64-bit arithmetic does."""
    return (x + 2**63) % 2**64 - 2**63


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Splitmix64; an arithmetic shift is made a logical one by a mask."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Int[Tensor, "*shape"], by: int) -> Int[Tensor, "*shape"]:
    return (x >> by) & (2 ** (64 - by) - 1)


def generator(*parts: int | str) -> torch.Generator:
    """Make a generator whose seed is a hash of numbers and names.

    Args:
        *parts: What the stream is for.

    Returns:
        A generator on the CPU.

    Example:
        >>> generator(0, "weights").initial_seed() != generator(1, "weights").initial_seed()
        True
    """
    return torch.Generator().manual_seed(number(":".join(map(str, parts))))
