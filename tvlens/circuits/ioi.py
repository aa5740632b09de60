"""Indirect object identification: "Mary and John went out. John gave a drink to" ... Mary.

Two names, one of them said again, and the answer is the other. To get it right, a model must notice which
name is a duplicate, and take the one that is not: the work of the first circuit that was found in a language
model that works for a living (Wang et al. 2022). Names come in both orders, so that neither "the first
name" nor "the last" is a way to the answer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tvlens._errors import unknown
from tvlens.circuits.contrast import Contrast
from tvlens.encoding import Encoder

NAMES = (
    "Mary", "John", "Tom", "James", "Dan", "Martin", "Amy", "Anna", "Anne", "Sarah", "Laura",
    "Alice", "Emma", "Kate", "Jane", "Lucy", "Rose", "Ruth", "Paul", "Peter", "Mark", "David",
    "Michael", "Robert", "George", "Henry", "Frank", "Jack", "Adam", "Simon", "Scott", "Kevin",
    "Brian", "Eric", "Jason", "Steven", "Andrew", "Richard", "Joseph", "Charles", "Daniel",
    "Thomas", "William", "Maria", "Lisa", "Susan", "Linda", "Karen", "Helen", "Rachel", "Rebecca",
    "Jessica", "Jennifer", "Michelle", "Elizabeth",
)  # fmt: skip
PLACES = (
    "store", "park", "school", "office", "station", "garden", "house", "museum", "beach", "market",
)  # fmt: skip
OBJECTS = (
    "book", "drink", "ring", "letter", "ticket", "basket", "cake", "pen", "key", "map",
)  # fmt: skip
# {one} and {two} come in either order; {subject} is one of them, said again.
TEMPLATES = (
    "When {one} and {two} went to the {place}, {subject} gave a {object} to",
    "Then, {one} and {two} had a long talk at the {place}. Afterwards {subject} handed a {object} to",
    "After {one} and {two} met at the {place}, {subject} decided to give a {object} to",
    "Yesterday {one} and {two} were at the {place}, and {subject} passed a {object} to",
    "While {one} and {two} were working at the {place}, {subject} offered a {object} to",
    "Friends {one} and {two} found a {object} at the {place}. In the end {subject} gave it to",
)
ORDERS = ("ABBA", "BABA")
CORRUPTIONS = ("swap", "abc")


def ioi_prompts(
    model: Any,
    *,
    n: int = 32,
    corrupted: str = "swap",
    order: str | None = None,
    template: int | None = None,
    names: Sequence[str] = NAMES,
    seed: int = 0,
) -> Contrast:
    """Make pairs of prompts in which a model must find the indirect object.

    Args:
        model: A model, or a tokenizer: only names that are one token in the middle of a sentence are used.
        n: How many pairs.
        corrupted: How the other prompt differs. ``"swap"``: the name that is said again is the other one,
            so that right and wrong change places. ``"abc"``: all three names are others, each said once,
            so that neither answer is in the prompt.
        order: ``"ABBA"`` (the indirect object comes first) or ``"BABA"``; in turn by default.
        template: Number of the one template, so that all prompts have the same words at the same
            positions; drawn by default.
        names: Names to draw from.
        seed: Seed of the draws.

    Returns:
        The pairs, ready for ``tv.patch(model, **pairs)``, with labels ``order, template, io, subject``.

    Raises:
        ValueError: An unknown name, no such template, or too few names are single tokens.
        TypeError: There is no tokenizer.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> pairs = ioi_prompts(tiny_model(), n=2, names="ABCDE", template=0)
        >>> pairs.clean[0].startswith("When"), len(pairs)
        (True, 2)

    References:
        Wang et al. 2022, arXiv:2211.00593; Zhang, Nanda 2024, arXiv:2309.16042.
    """
    if corrupted not in CORRUPTIONS:
        raise unknown("corruption", corrupted, CORRUPTIONS)
    if order is not None and order not in ORDERS:
        raise unknown("order", order, ORDERS)
    if template is not None and not 0 <= template < len(TEMPLATES):
        raise ValueError(
            f"template {template} asked for; there are {len(TEMPLATES)}: 0 to {len(TEMPLATES) - 1}."
        )
    if n < 1:
        raise ValueError(f"n must be at least 1; {n} arrived.")
    encoder = Encoder.of(model)
    usable = single_tokens(encoder, names)
    needed = 5 if corrupted == "abc" else 2
    if len(usable) < needed:
        raise ValueError(
            f"{needed} names of a single token are needed; {len(usable)} of {len(names)} are, under this "
            f"tokenizer: {', '.join(usable) or 'none'}. Give others as names=."
        )
    rng = np.random.default_rng(seed)
    rows = [
        _pair(rng, usable, corrupted, order or ORDERS[i % 2], template, encoder) for i in range(n)
    ]
    columns = {key: tuple(row[key] for row in rows) for key in rows[0]}
    named = {key: columns.pop(key) for key in ("order", "template", "io", "subject")}
    return Contrast(**columns, name="ioi", labels=named)


def _pair(
    rng: np.random.Generator,
    names: tuple[str, ...],
    corrupted: str,
    order: str,
    template: int | None,
    encoder: Encoder,
) -> dict[str, Any]:
    """One pair, its answers and its labels."""
    number = int(rng.integers(len(TEMPLATES))) if template is None else template
    io, subject, *others = (names[i] for i in rng.choice(len(names), min(5, len(names)), False))
    words = {
        "place": PLACES[rng.integers(len(PLACES))],
        "object": OBJECTS[rng.integers(len(OBJECTS))],
    }
    one, two = (io, subject) if order == "ABBA" else (subject, io)
    changed = {"one": one, "two": two, "subject": io}
    if corrupted == "abc":
        changed = dict(zip(("one", "two", "subject"), others, strict=True))
    written = TEMPLATES[number] + (" " if _apart(encoder, io) else "")
    space = "" if written.endswith(" ") else " "
    return {
        "clean": written.format(one=one, two=two, subject=subject, **words),
        "corrupted": written.format(**changed, **words),
        "answers": space + io,
        "wrong": space + subject,
        "order": order,
        "template": number,
        "io": io,
        "subject": subject,
    }


def single_tokens(model: Any, words: Sequence[str]) -> tuple[str, ...]:
    """Keep the words that a tokenizer writes as one token in the middle of a sentence.

    Args:
        model: A model, a tokenizer, or an `tvlens.encoding.Encoder`.
        words: The words, without spaces; doubles are dropped.

    Returns:
        Those that are one token, with the space before them or beside it.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> single_tokens(tiny_model(), ["A", "Mary"])
        ('A',)
    """
    encoder = model if isinstance(model, Encoder) else Encoder.of(model)
    kept = dict.fromkeys(w for w in words if len(_inside(encoder, w)) - _apart(encoder, w) == 1)
    return tuple(kept)


def _inside(encoder: Encoder, word: str) -> list[int]:
    """Tokens of a word within a sentence, with the space before it."""
    return encoder.continuation("They saw", " " + word)


def _apart(encoder: Encoder, word: str) -> bool:
    """Whether the tokenizer writes the space before a word as a token of its own."""
    ids = _inside(encoder, word)
    return len(ids) > 1 and encoder.is_blank(ids[0])
