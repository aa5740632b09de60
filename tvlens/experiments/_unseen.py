"""A task's answers in two halves: one is shown, the other one is asked for.

No first token that counts as right for an item of one half, by its first answer or by any other, counts as
right in the other half.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvlens.encoding import Encoder, first_tokens, settle
from tvlens.prompts import Prompts, build_prompts, usable_items
from tvlens.tasks import Task
from tvlens.templates import Template, get_template

PARTS = ("dev", "test")
HALVES = 2


@dataclass(frozen=True)
class Half:
    """One half of a task's answers: what theta is made from, and bare queries of the other half."""

    shown: Prompts
    asked: Mapping[str, Prompts]


@dataclass(frozen=True)
class Words:
    """A task's tokens: whatever may begin one of its answers, and words that name it."""

    answers: frozenset[int]
    labels: frozenset[int]


@dataclass(frozen=True)
class Settings:
    """What is the same for all tasks."""

    shots: int
    n_vectors: int
    n_dev: int
    n_test: int
    n_dummy: int
    template: str | Template
    answers: str
    seed: int

    def halves(self, model: Any, task: Task) -> list[Half]:
        """Cut a task's answers in two: one half is in what is shown, the other in what is asked for."""
        settled = settle(task, get_template(self.template), Encoder.of(model))
        items = usable_items(task, model, template=settled, answers=self.answers)
        first = first_tokens(task, settled, Encoder.of(model)).ids
        sides = _cut({x: first[x] for x in items}, f"{self.seed}:{task.name}:halves")
        needed, found = self.shots + 1 + self.n_dummy, min(map(len, sides))
        if found < max(needed, 2):
            raise ValueError(
                f"task {task.name!r} has {found} usable items in the smaller half of its answers, but "
                f"{self.shots} shots + 1 query + {self.n_dummy} dummy queries need {needed}. Ask for fewer "
                "shots, or leave this task out. (Items that accept the same first token stay together.)"
            )
        parts = [replace(task, answers={x: task.answers[x] for x in side}) for side in sides]
        how: dict[str, Any] = {"template": settled, "answers": "any", "seed": self.seed}
        made = []
        for i, own in enumerate(parts):
            shown = build_prompts(
                own, model, shots=self.shots, n=self.n_vectors, n_dummy=self.n_dummy, **how
            )
            queries = list(sides[1 - i])
            random.Random(f"{self.seed}:{task.name}:asked:{i}").shuffle(queries)
            cut = (len(queries) + 1) // 2
            lots = {"dev": queries[:cut][: self.n_dev], "test": queries[cut:][: self.n_test]}
            bare: dict[str, Any] = {"shots": 0, "n_dummy": 0, **how}
            asked = {
                part: build_prompts(parts[1 - i], model, queries=lot, **bare)
                for part, lot in lots.items()
            }
            made.append(Half(shown, asked))
        return made

    def words(self, model: Any, task: Task, labels: Sequence[str]) -> Words:
        """Find a task's tokens."""
        encoder = Encoder.of(model)
        settled = settle(task, get_template(self.template), encoder)
        ids = first_tokens(task, settled, encoder).ids.values()
        forms = [form for w in labels for form in (w.lower(), w.capitalize())]
        coded = [encoder.continuation("x", space + form) for form in forms for space in ("", " ")]
        single = [tokens[0] for tokens in coded if len(tokens) == 1]
        return Words(frozenset(i for some in ids for i in some), frozenset(single))


def _cut(first: Mapping[str, Sequence[int]], stream: str) -> tuple[list[str], list[str]]:
    """Cut items in two halves of about equal size, such that no token is accepted in both."""
    groups: list[tuple[set[int], list[str]]] = []
    for x, tokens in first.items():
        # Items that share a token, be it through a third one, stay together.
        shared = [group for group in groups if group[0] & {*tokens}]
        groups = [group for group in groups if not any(group is one for one in shared)]
        groups.append(
            (
                {*tokens}.union(*(ids for ids, _ in shared)),
                [*(y for _, own in shared for y in own), x],
            )
        )
    order = [own for _, own in groups]
    random.Random(stream).shuffle(order)
    halves: tuple[list[str], list[str]] = ([], [])
    for group in sorted(order, key=len, reverse=True):
        min(halves, key=len).extend(group)
    place = {x: i for i, x in enumerate(first)}
    for half in halves:
        half.sort(key=place.__getitem__)
    return halves


def naming(task: Task) -> list[str]:
    """The longer words of a task's name and description."""
    text = f"{task.name.replace('_', ' ')} {task.description}"
    plain = "".join(c if c.isalpha() else " " for c in text).lower().split()
    return list(dict.fromkeys(word for word in plain if len(word) >= 4))
