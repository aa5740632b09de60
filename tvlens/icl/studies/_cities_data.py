"""Names, cities, and the prompts about them.

Pairs come in groups of eight, half of them invented, as the authors' eight do; a name is shown the
cities of its own group, so that every question has eight candidates. Invented and real ones of our own
groups have equally many tokens. The authors' prompt is for a larger model; SmolLM2 does not answer it
with a city, so here the question ends where the city must follow.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources

import torch
from jaxtyping import Int
from torch import Tensor

from tvlens.encoding import Encoder, TokenBatch
from tvlens.templates import Role

GROUP = 8
QUESTION = "Where does {name} live? In the city of"
WORDINGS = {
    "same": "{name} lives in the city of {city}. ",
    "other": "{name} moved to {city} last year. ",
}
"""How a city is stated: in the question's words, so that copying is enough, and in others."""
Segments = list[tuple[str, Role]]


@dataclass(frozen=True)
class Pair:
    """One name with the city that is learnt by heart, or, in a control group, with one that never is."""

    name: str
    city: str
    kind: str
    group: int


@dataclass(frozen=True)
class Pairs:
    """Groups of pairs, trained ones first, and how a tokenizer writes them.

    Attributes:
        pairs: All pairs, group after group.
        origins: Where each group comes from: ``"authors"``, ``"own"`` or ``"control"``.
        encoder: The tokenizer.
    """

    pairs: tuple[Pair, ...]
    origins: tuple[str, ...]
    encoder: Encoder

    @classmethod
    def load(cls, encoder: Encoder, *, n_groups: int, n_controls: int) -> "Pairs":
        """Take the authors' group, and some of our own and of the control groups."""
        listed = packaged()
        asked = {"authors": 1, "own": n_groups, "control": n_controls}
        chosen: list[int] = []
        for origin, n in asked.items():
            there = [i for i, name in enumerate(listed["groups"]) if name == origin]
            if n > len(there):
                raise ValueError(
                    f"{n} groups of {origin} pairs were asked for; there are {len(there)}."
                )
            chosen += there[:n]
        pairs = tuple(
            Pair(name, city, kind, chosen.index(group))
            for at in chosen
            for name, city, kind, group in listed["pairs"]
            if group == at
        )
        return cls(pairs, tuple(listed["groups"][i] for i in chosen), encoder)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def trained(self) -> list[int]:
        """Pairs that are learnt."""
        return [i for i, pair in enumerate(self.pairs) if self.origins[pair.group] != "control"]

    @property
    def untouched(self) -> list[int]:
        """Pairs that are not."""
        return [i for i, pair in enumerate(self.pairs) if self.origins[pair.group] == "control"]

    def candidates(self, i: int) -> list[str]:
        """Give the eight cities of a pair's group."""
        start = self.pairs[i].group * GROUP
        return [pair.city for pair in self.pairs[start : start + GROUP]]

    @cached_property
    def answers(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of each pair's city, after the question."""
        question = QUESTION.format(name=self.pairs[0].name)
        found = self.encoder.continuations(question, [f" {pair.city}" for pair in self.pairs])
        return tuple(tuple(found[f" {pair.city}"]) for pair in self.pairs)

    def answer_sets(self, rows: Sequence[int]) -> list[tuple[tuple[int, ...], ...]]:
        """Give the candidates' tokens for each of these pairs."""
        starts = [self.pairs[i].group * GROUP for i in rows]
        return [self.answers[start : start + GROUP] for start in starts]

    def n_tokens(self, text: str) -> int:
        """How many tokens a word has behind a space."""
        return len(self.encoder.ids(f" {text}"))


@cache
def packaged() -> dict[str, list]:
    """Read the pairs that come with tvlens."""
    text = resources.files("tvlens.icl").joinpath("data_cities.json").read_text(encoding="utf-8")
    return json.loads(text)


def question(name: str) -> Segments:
    """Ask where someone lives, in pieces with their roles."""
    before, after = QUESTION.split("{name}")
    return [(before, Role.OTHER), (name, Role.QUERY), (after, Role.SEPARATOR)]


def told(name: str, city: str, wording: str = "same") -> Segments:
    """State where someone lives, and ask."""
    lives = WORDINGS[wording].split("{name}")[1]
    between, after = lives.split("{city}")
    stated = [
        (name, Role.DEMO_INPUT),
        (between, Role.OTHER),
        (city, Role.DEMO_OUTPUT),
        (after, Role.OTHER),
    ]
    return [*stated, *question(name)]


def prompts(
    encoder: Encoder, texts: Sequence[Segments], after: Sequence[Sequence[int]]
) -> TokenBatch:
    """Tokenise prompts, and put some tokens of an answer behind each."""
    asked = encoder.batch(texts)
    return asked if not any(after) else extended(asked, after)


def extended(batch: TokenBatch, after: Sequence[Sequence[int]]) -> TokenBatch:
    """Put tokens behind each prompt; the role ``LAST`` goes to the last of all."""
    width = max(int(n) + len(ids) for n, ids in zip(batch.lengths, after, strict=True))
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    roles = torch.full((len(batch), width), int(Role.PAD))
    for row, ids in enumerate(after):
        real = batch.mask[row]
        known = batch.roles[row][real].tolist()
        if ids:
            known = [*known[:-1], *[int(Role.SEPARATOR)] * len(ids), int(Role.LAST)]
        tokens[row, width - len(known) :] = torch.tensor([*batch.tokens[row][real].tolist(), *ids])
        roles[row, width - len(known) :] = torch.tensor(known)
    return TokenBatch(batch.text, tokens, roles != int(Role.PAD), roles)


@dataclass(frozen=True)
class Lesson:
    """Prompts with their answers behind them, and which tokens the loss is taken on.

    Attributes:
        batch: Prompts and answers.
        row: The prompt of each answer token.
        column: Where, in the padded batch, that token is predicted.
        target: The token.
    """

    batch: TokenBatch
    row: Int[Tensor, " token"]
    column: Int[Tensor, " token"]
    target: Int[Tensor, " token"]

    @classmethod
    def of(
        cls, encoder: Encoder, texts: Sequence[Segments], answers: Sequence[Sequence[int]]
    ) -> "Lesson":
        """Put answers behind prompts."""
        batch = extended(encoder.batch(texts), answers)
        width = batch.tokens.shape[1]
        places = [
            (row, width - len(ids) - 1 + k, token)
            for row, ids in enumerate(answers)
            for k, token in enumerate(ids)
        ]
        row, column, target = torch.tensor(places).unbind(1)
        return cls(batch, row, column, target)
