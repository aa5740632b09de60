"""A task: a mapping from inputs to accepted answers, e.g. ``France -> Paris``.

In-context learning is shown a few pairs of such a mapping and must answer for a new input. A `Task`
holds the pairs and nothing of the prompt: templates, sampling and scoring come later. It also knows
how uneven its answers are, because a vector that always says the commonest answer scores its share
without having read the query.
"""

import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tvlens.tasks.files import read_task_file, slug

_SLUG = re.compile(r"[a-z][a-z0-9_]*")
# 5 demonstrations, 2 dummy queries and 1 query, all different: what a default prompt takes.
PROMPT_ITEMS = 8


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """An immutable mapping from each input to its accepted answers, with its origin.

    Args:
        name: Lower-case letters, digits and ``_``, starting with a letter.
        family: What kind of task it is, e.g. ``"knowledge"``.
        answers: Input -> accepted answers; the first one is canonical and stands in demonstrations.
        description: One sentence.
        source: Where the pairs come from.
        licence: The licence of the pairs.
        spaced: Whether the items are words that take a leading space in running text; False for
            single letters and lists.

    Raises:
        ValueError: The name is no slug, there are fewer than 2 items, or an input or answer is
            empty, padded with white space, contains a line break, or is accepted twice.
        TypeError: An input or an answer is no string, or the answers of an input are no tuple.

    Example:
        >>> task = Task("opposite", "custom", {"hot": ("cold", "cool"), "up": ("down",)})
        >>> task.pairs
        (('hot', 'cold'), ('up', 'down'))

    References:
        Hendel, Geva, Globerson 2023, arXiv 2310.15916 (the 18 tasks).
    """

    name: str
    family: str
    answers: Mapping[str, tuple[str, ...]]
    _: KW_ONLY
    description: str = ""
    source: str = ""
    licence: str = ""
    spaced: bool = True

    def __post_init__(self) -> None:
        _check_slug(self.name, "name of a task")
        _check_slug(self.family, f"family of task {self.name!r}")
        _check_answers(self.name, self.answers)
        # A copy behind a read-only view: neither the caller's dict nor ours can change it any more.
        object.__setattr__(self, "answers", MappingProxyType(dict(self.answers)))

    def __len__(self) -> int:
        return len(self.answers)

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Task) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.name, self.fingerprint))

    def __repr__(self) -> str:
        (x, y), *_ = self.pairs
        return f"Task({self.name!r}, {self.family!r}, {len(self)} items, {x} -> {y})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only view cannot be copied or sent to another process; its dict can.
        return _rebuild, (self._fields(),)

    @property
    def inputs(self) -> tuple[str, ...]:
        """All inputs, in the task's own order."""
        return tuple(self.answers)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """All (input, canonical answer) pairs, in the task's own order."""
        return tuple((x, ys[0]) for x, ys in self.answers.items())

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of the SHA-256 of what decides a prompt: items, order, and spacing."""
        content = {"items": [[x, *ys] for x, ys in self.answers.items()], "spaced": self.spaced}
        canonical = json.dumps(content, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def class_counts(self) -> dict[str, int]:
        """Count the items of each canonical answer, commonest first.

        Returns:
            Canonical answer -> number of inputs; ties keep the task's order.
        """
        return dict(Counter(y for _, y in self.pairs).most_common())

    def majority(self) -> tuple[str, float]:
        """Name the commonest canonical answer and its share of the items.

        Returns:
            The answer and its share in (0, 1]: the accuracy of always giving it.
        """
        answer, count = next(iter(self.class_counts().items()))
        return answer, count / len(self)

    def effective_classes(self) -> float:
        """Compute the exponential of the entropy of the canonical answers.

        Returns:
            A number of classes: k for k equally common answers, less where some are commoner.
        """
        shares = [count / len(self) for count in self.class_counts().values()]
        return math.exp(-math.fsum(p * math.log(p) for p in shares))

    def balanced(self, per_class: int | None = None, *, seed: int = 0) -> "Task":
        """Keep equally many items of every canonical answer.

        Args:
            per_class: Items per answer; answers with fewer are left out. Default: as many as the
                rarest answer has, so that none is left out.
            seed: Decides which items stay.

        Returns:
            A task named ``<name>_balanced``, its items in this task's order.

        Raises:
            ValueError: `per_class` is below 1, or so large that fewer than two answers are left.

        Example:
            >>> from tvlens import load_task
            >>> set(load_task("location_continent").balanced(20).class_counts().values())
            {20}
        """
        counts = self.class_counts()
        wanted = min(counts.values()) if per_class is None else per_class
        kept = [answer for answer, count in counts.items() if count >= wanted]
        if wanted < 1 or len(kept) < 2:
            sizes = ", ".join(f"{answer} {count}" for answer, count in list(counts.items())[:4])
            second = sorted(counts.values())[-2] if len(counts) > 1 else 0
            allowed = f"valid: 1 to {second}" if second else "it has only one answer"
            raise ValueError(
                f"task {self.name!r} cannot be balanced with {wanted} items per answer; {allowed} "
                f"(its commonest answers: {sizes})."
            )
        rng = random.Random(seed)
        chosen: set[str] = set()
        for answer in kept:
            members = [x for x, y in self.pairs if y == answer]
            chosen.update(shuffled(members, rng)[:wanted])
        return Task(
            f"{self.name}_balanced",
            self.family,
            {x: ys for x, ys in self.answers.items() if x in chosen},
            description=f"{self.description} {wanted} items of each answer.".strip(),
            source=self.source,
            licence=self.licence,
            spaced=self.spaced,
        )

    def inverse(self, name: str, *, description: str = "") -> "Task":
        """Turn the mapping round, merging the inputs that share an answer.

        The canonical answers become the inputs. Each accepts every old input that accepts it, those
        for which it is canonical first: from ``grand -> big, tall`` and ``gros -> fat, big`` comes
        ``big -> grand, gros``.

        Args:
            name: The name of the new task.
            description: One sentence.

        Returns:
            The inverse task, in the order in which its inputs first appear here.

        Example:
            >>> task = Task("fr", "custom", {"grand": ("big", "tall"), "gros": ("fat", "big")})
            >>> dict(task.inverse("en").answers)
            {'big': ('grand', 'gros'), 'fat': ('gros',)}
        """
        canonical: dict[str, list[str]] = {}
        for x, y in self.pairs:
            canonical.setdefault(y, []).append(x)
        for x, ys in self.answers.items():
            for y in ys[1:]:
                if y in canonical:
                    canonical[y].append(x)
        return Task(
            name,
            self.family,
            {y: tuple(xs) for y, xs in canonical.items()},
            description=description,
            source=self.source,
            licence=self.licence,
            spaced=self.spaced,
        )

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        family: str = "custom",
        spaced: bool | None = None,
    ) -> "Task":
        """Read a task from a JSON or CSV file in UTF-8.

        JSON is ``{"input": "output"}`` or ``{"input": ["accepted", ...]}``, or the form of tvlens'
        own data files, where this mapping is called ``items`` and stands next to ``name``,
        ``family``, ``description``, ``source``, ``licence`` and ``spaced``. CSV has two columns,
        input and output, with or without the header ``input,output``; white space round a cell is
        dropped.

        Args:
            path: The file; its suffix says which format.
            name: The task's name; default: the one in the file, or the file's own.
            family: The task's family; a family in the file stands in for the default.
            spaced: As in `Task`; default: what the file says, or True.

        Returns:
            The task.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The suffix is unknown, the text is not UTF-8 or not in the format, an input
                appears twice, something is no string or empty, or there are fewer than 2 items.

        Example:
            >>> task = Task.from_file("capitals.csv")  # doctest: +SKIP
        """
        path = Path(path).expanduser()
        items, header = read_task_file(path)
        texts = {key: header.get(key, "") for key in ("description", "source", "licence")}
        try:
            return cls(
                header.get("name", slug(path.stem)) if name is None else name,
                header.get("family", family) if family == "custom" else family,
                items,
                spaced=header.get("spaced", True) if spaced is None else spaced,
                **texts,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _fields(self) -> dict[str, Any]:
        names = ("name", "family", "description", "source", "licence", "spaced")
        return {**{name: getattr(self, name) for name in names}, "answers": dict(self.answers)}

    def _key(self) -> tuple[Any, ...]:
        fields = self._fields()
        # Two mappings are equal in any order, but the order decides which items a seed draws.
        fields["answers"] = tuple(self.answers.items())
        return tuple(fields.values())


def shuffled(items: list[str], rng: random.Random) -> list[str]:
    """Shuffle a copy using ``rng.random()`` alone, whose sequence Python keeps between versions."""
    items = list(items)
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        items[last], items[other] = items[other], items[last]
    return items


def _rebuild(fields: dict[str, Any]) -> Task:
    return Task(**fields)


def _check_slug(text: object, what: str) -> None:
    if not isinstance(text, str) or not _SLUG.fullmatch(text):
        offer = slug(str(text))
        raise ValueError(
            f"the {what} must be lower-case letters, digits and '_', starting with a letter; "
            f"got {text!r}. Valid would be {offer!r}."
        )


def _check_answers(name: str, answers: object) -> None:
    if not isinstance(answers, Mapping):
        raise TypeError(
            f"task {name!r} needs a mapping from input to a tuple of accepted answers, e.g. "
            f"{{'France': ('Paris',)}}; got {type(answers).__name__}."
        )
    for x, ys in answers.items():
        _check_text(name, "an input", x)
        if not isinstance(ys, tuple):
            raise TypeError(
                f"task {name!r}: the answers of {x!r} must be a tuple, e.g. ('Paris',); "
                f"got {type(ys).__name__} {ys!r}."
            )
        if not ys:
            raise ValueError(f"task {name!r}: {x!r} has no answer; give at least one.")
        for y in ys:
            _check_text(name, f"an answer of {x!r}", y)
        if len(dict.fromkeys(ys)) < len(ys):
            raise ValueError(f"task {name!r}: {x!r} accepts an answer twice: {', '.join(ys)}.")
    if len(answers) < 2:
        raise ValueError(
            f"task {name!r} has {len(answers)} item{'' if len(answers) == 1 else 's'}; at least 2 "
            f"are needed, and a default prompt (5 demonstrations, 2 dummy queries, 1 query) takes "
            f"{PROMPT_ITEMS}."
        )


def _check_text(name: str, what: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(
            f"task {name!r}: {what} must be a string; got {type(text).__name__} {text!r}."
        )
    problem = ""
    if not text.strip():
        problem = "is empty"
    elif text != text.strip():
        problem = "starts or ends with white space (the template adds spaces)"
    elif len(text.splitlines()) > 1:
        problem = "contains a line break (which would end the demonstration)"
    elif any("\ud800" <= char <= "\udfff" for char in text):
        problem = "is not valid Unicode (it has half a surrogate pair)"
    if problem:
        raise ValueError(f"task {name!r}: {what} {problem}: {text!r}.")
