"""Few-shot prompts: text, tokens, and what every token is for.

A prompt is the demonstrations S followed by a query x. The task vector theta(S) is read while the model
looks at another, dummy query x', so that theta cannot contain x. One `Prompts` holds all the views an
experiment needs, row by row over the same S: the regular prompt [S, x], the dummy prompts [S, x'], and the
zero-shot prompt [x]. Everything follows from an explicit seed; no order ever comes from a set.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.tasks import Task

SPLITS = ("dev", "test")


class Role(IntEnum):
    """What a token is for."""

    PAD = -1
    OTHER = 0
    BOS = 1
    DEMO_INPUT = 2
    DEMO_OUTPUT = 3
    SEPARATOR = 4
    QUERY = 5
    LAST = 6


@dataclass(frozen=True)
class Template:
    r"""How one demonstration is written; the query is the same text cut before ``{y}``.

    Attributes:
        demo: Text with one ``{x}`` and, after it, one ``{y}``.
        spacing: Whether inputs and outputs get a leading space where the template has none. ``"auto"``
            follows paper A: a space for natural-language tasks, where that leaves at least 70 % as many
            one-token answers as writing no space.

    Example:
        >>> Template("{x} => {y}\n").query("high")
        ('high =>', ' ')
    """

    demo: str = "example:{x}->{y}\n"
    spacing: str = "auto"

    def __post_init__(self) -> None:
        at_x, at_y = self.demo.find("{x}"), self.demo.find("{y}")
        if self.demo.count("{x}") != 1 or self.demo.count("{y}") != 1 or at_x > at_y:
            raise ValueError(
                f"a template needs one {{x}} and, after it, one {{y}}; {self.demo!r} arrived. "
                "Example: 'Q: {x}\\nA: {y}\\n'."
            )
        if self.spacing not in ("auto", "always", "never"):
            raise unknown("spacing", self.spacing, ("auto", "always", "never"))

    @property
    def pieces(self) -> tuple[str, str, str]:
        """The text before ``{x}``, between ``{x}`` and ``{y}``, and after ``{y}``."""
        before, rest = self.demo.split("{x}")
        between, after = rest.split("{y}")
        return before, between, after

    def query(self, x: str, *, space: bool = False) -> tuple[str, str]:
        """Write the query, and say what white space the answer starts with.

        Args:
            x: The query.
            space: Whether words get a leading space.

        Returns:
            The prompt text, which never ends in white space, and the answer's leading white space:
            tokenizers join a space with the word after it, so it belongs to the answer.
        """
        before, between, _ = self.pieces
        whole = _spaced(between, space)
        cut = whole.rstrip()
        return f"{_spaced(before, space)}{x}{cut}", whole[len(cut) :]

    def segments(self, x: str, y: str, *, space: bool = False) -> list[tuple[str, Role]]:
        """Write one demonstration as pieces of text with their roles."""
        before, between, after = self.pieces
        return [
            (_spaced(before, space), Role.OTHER),
            (x, Role.DEMO_INPUT),
            (_spaced(between, space), Role.SEPARATOR),
            (y, Role.DEMO_OUTPUT),
            (after, Role.OTHER),
        ]


TEMPLATES: dict[str, Template] = {
    "example": Template(),
    "arrow": Template("{x}→{y}\n"),
    "qa": Template("Q: {x}\nA: {y}\n\n"),
}
DEFAULT_TEMPLATE = "example"


def get_template(template: str | Template) -> Template:
    r"""Resolve a built-in template's name, or a template written out with ``{x}`` and ``{y}``.

    Args:
        template: ``"example"``, ``"arrow"``, ``"qa"``, a text with ``{x}`` and ``{y}``, or a Template.

    Returns:
        The Template.

    Raises:
        ValueError: Neither a known name nor a text with both fields.

    Example:
        >>> get_template("arrow").demo
        '{x}→{y}\n'
    """
    if isinstance(template, Template):
        return template
    if template in TEMPLATES:
        return TEMPLATES[template]
    if "{" in template:
        return Template(template.replace("\\n", "\n"))
    raise unknown("template", template, TEMPLATES, hint="Or write one out: 'Q: {x}\\nA: {y}\\n'.")


@dataclass(frozen=True)
class TokenBatch:
    """Prompts of mixed lengths as one left-padded batch.

    Attributes:
        text: The prompts, without any BOS.
        tokens: Token ids; pads on the left.
        mask: True where a token is real.
        roles: A `Role` for every token.
    """

    text: tuple[str, ...]
    tokens: Int[Tensor, "prompt position"]
    mask: Bool[Tensor, "prompt position"]
    roles: Int[Tensor, "prompt position"]

    def __len__(self) -> int:
        return len(self.text)

    @property
    def lengths(self) -> Int[Tensor, " prompt"]:
        """Number of real tokens of each prompt."""
        return self.mask.sum(dim=1)

    def rows(self, rows: slice) -> "TokenBatch":
        """Take a range of prompts, with no more padding than they need."""
        keep = self.mask[rows].any(dim=0)
        return TokenBatch(
            self.text[rows],
            self.tokens[rows][:, keep],
            self.mask[rows][:, keep],
            self.roles[rows][:, keep],
        )


@dataclass(frozen=True)
class Prompts:
    """One batch of few-shot prompts in every view that a task-vector experiment needs.

    Row i of every view belongs to the same demonstrations S and the same query x.

    Attributes:
        regular: [S, x], the ordinary in-context prompt.
        dummies: [S, x'] for each dummy query x'.
        zero_shot: [x], with no demonstrations.
        queries: x.
        answers: The accepted answers of each x; the first is canonical.
        answer_ids: Token ids that count as right for each x: the first tokens of its accepted answers.
        facts: How the prompts were made: task, template, spacing, shots, split, seed, BOS, and how often
            an answer is one token or shares its first token with a different answer.
    """

    regular: TokenBatch
    dummies: tuple[TokenBatch, ...]
    zero_shot: TokenBatch
    queries: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    answer_ids: tuple[tuple[int, ...], ...]
    facts: dict[str, Any] = field(compare=False)

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def text(self) -> tuple[str, ...]:
        """The regular prompts, [S, x], as text without BOS."""
        return self.regular.text

    @property
    def tokens(self) -> Int[Tensor, "prompt position"]:
        """The regular prompts, [S, x], as left-padded token ids."""
        return self.regular.tokens


def build_prompts(
    task: Task,
    model: Any,
    *,
    shots: int = 5,
    n: int = 50,
    n_dummy: int = 2,
    template: str | Template = DEFAULT_TEMPLATE,
    split: str = "dev",
    seed: int = 0,
) -> Prompts:
    """Make few-shot prompts of a task.

    Half of the task's items can be queried in the dev split and the other half in the test split, so the
    two never share a query. Demonstrations come from all items but the query; dummy queries are neither
    the query nor among the demonstrations.

    Args:
        task: The task.
        model: A model (its tokenizer, BOS rule and context length are used) or a bare tokenizer.
        shots: Demonstrations a prompt.
        n: Number of prompts. Where a split has fewer items they are queried again, evenly, with other
            demonstrations.
        n_dummy: Dummy queries a prompt.
        template: A Template, a built-in name, or a text with ``{x}`` and ``{y}``.
        split: ``"dev"`` or ``"test"``.
        seed: Decides the split, the queries, the demonstrations and the dummy queries.

    Returns:
        The prompts, all views.

    Raises:
        ValueError: Too few items for the shots, an unknown split, or a prompt longer than the context.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> prompts = tv.build_prompts(tv.load_task("to_upper"), tiny_model(), shots=2, n=4)
        >>> len(prompts.text), len(prompts.dummies)
        (4, 2)

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916, section 3.
    """
    template = get_template(template)
    encoder = Encoder.of(model)
    space = uses_space(task, template, encoder)
    drawn = _draw(task, shots=shots, n=n, n_dummy=n_dummy, split=split, seed=seed)

    def batch(rows: Sequence[tuple[tuple[str, ...], str]]) -> TokenBatch:
        return encoder.batch([_segments(task, template, demos, x, space) for demos, x in rows])

    firsts = first_tokens(task, template, encoder, space=space)
    queries = tuple(x for _, x, _ in drawn)
    return Prompts(
        regular=batch([(demos, x) for demos, x, _ in drawn]),
        dummies=tuple(batch([(demos, d[j]) for demos, _, d in drawn]) for j in range(n_dummy)),
        zero_shot=batch([((), x) for _, x, _ in drawn]),
        queries=queries,
        answers=tuple(task.answers[x] for x in queries),
        answer_ids=tuple(firsts.ids[x] for x in queries),
        facts={
            "task": task.name,
            "family": task.family,
            "task_fingerprint": task.fingerprint,
            "template": template.demo,
            "space": space,
            "bos": encoder.bos is not None,
            "shots": shots,
            "n_dummy": n_dummy,
            "split": split,
            "seed": seed,
            "one_token_share": firsts.one_token_share,
            "ambiguous_share": firsts.ambiguous_share,
            "ambiguous": firsts.ambiguous,
            "constant": firsts.constant,
        },
    )


def _draw(
    task: Task, *, shots: int, n: int, n_dummy: int, split: str, seed: int
) -> list[tuple[tuple[str, ...], str, tuple[str, ...]]]:
    """Draw (demonstrations, query, dummy queries) for each prompt."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if shots < 0 or n < 1 or n_dummy < 0:
        raise ValueError(
            f"shots >= 0, n >= 1 and n_dummy >= 0 are valid; shots={shots}, n={n}, "
            f"n_dummy={n_dummy} arrived."
        )
    needed = shots + 1 + n_dummy
    if len(task) < max(needed, 2):
        raise ValueError(
            f"task {task.name!r} has {len(task)} items, but {shots} shots + 1 query + {n_dummy} dummy "
            f"queries need {max(needed, 2)}. Ask for at most {max(len(task) - 1 - n_dummy, 0)} shots."
        )
    items = list(task.inputs)
    random.Random(f"{seed}:{task.name}:split").shuffle(items)
    half = math.ceil(len(items) / 2)
    pool = items[:half] if split == "dev" else items[half:]
    rng = random.Random(f"{seed}:{task.name}:{split}")
    queries: list[str] = []
    while len(queries) < n:
        queries += rng.sample(pool, len(pool))
    drawn = []
    for x in queries[:n]:
        others = [item for item in items if item != x]
        picked = rng.sample(others, shots + n_dummy)
        drawn.append((tuple(picked[:shots]), x, tuple(picked[shots:])))
    return drawn


def _spaced(text: str, space: bool) -> str:
    """Add the leading space of the word that follows, unless the template already has white space."""
    return text + " " if space and not text[-1:].isspace() else text


def _segments(
    task: Task, template: Template, demos: tuple[str, ...], x: str, space: bool
) -> list[tuple[str, Role]]:
    """Write a whole prompt as pieces of text with their roles."""
    pieces = [
        piece
        for demo in demos
        for piece in template.segments(demo, task.answers[demo][0], space=space)
    ]
    before, between, _ = template.pieces
    return [
        *pieces,
        (_spaced(before, space), Role.OTHER),
        (x, Role.QUERY),
        (between.rstrip(), Role.SEPARATOR),
    ]


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with its BOS rule and context length made explicit.

    Attributes:
        tokenizer: A fast Hugging Face tokenizer.
        bos: The id put before every prompt, or None.
        n_ctx: The longest prompt the model takes, in tokens; None if unknown.
    """

    tokenizer: Any
    bos: int | None
    n_ctx: int | None = None

    @classmethod
    def of(cls, model: Any) -> "Encoder":
        """Take the tokenizer of a model, or a bare tokenizer, which then decides on BOS itself."""
        tokenizer = getattr(model, "tokenizer", None)
        if hasattr(model, "cfg") and tokenizer is not None:
            from tvlens.models import facts

            known = facts(model)
            return cls(
                tokenizer, tokenizer.bos_token_id if known.prepend_bos else None, known.n_ctx
            )
        if hasattr(model, "cfg"):
            raise ValueError(
                "this model has no tokenizer, so no prompts can be built for it. "
                "Load it with load_model(model, tokenizer=...)."
            )
        bos = model.bos_token_id
        adds = bos is not None and model("x")["input_ids"][:1] == [bos]
        return cls(model, bos if adds else None)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, with neither BOS nor EOS."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def batch(self, prompts: Sequence[list[tuple[str, Role]]]) -> TokenBatch:
        """Tokenise prompts given as pieces with roles, and pad them on the left."""
        text = tuple("".join(piece for piece, _ in pieces) for pieces in prompts)
        coded = [self._with_roles(pieces) for pieces in prompts]
        width = max(len(ids) for ids, _ in coded)
        if self.n_ctx is not None and width > self.n_ctx:
            longest = max(range(len(coded)), key=lambda i: len(coded[i][0]))
            raise ValueError(
                f"a prompt has {width} tokens, but the model's context is {self.n_ctx}. "
                f"Use fewer shots or shorter items; it begins {text[longest][:60]!r}."
            )
        pad = self.tokenizer.pad_token_id or 0
        tokens = torch.full((len(coded), width), pad, dtype=torch.long)
        roles = torch.full((len(coded), width), int(Role.PAD), dtype=torch.long)
        for row, (ids, role) in enumerate(coded):
            tokens[row, width - len(ids) :] = torch.tensor(ids)
            roles[row, width - len(ids) :] = torch.tensor(role)
        return TokenBatch(text, tokens, roles != int(Role.PAD), roles)

    def _with_roles(self, pieces: list[tuple[str, Role]]) -> tuple[list[int], list[int]]:
        """Tokenise one prompt; a token has the role of its first character that is no white space."""
        text = "".join(piece for piece, _ in pieces)
        by_char = [int(role) for piece, role in pieces for _ in piece]
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        roles = []
        for start, end in coded["offset_mapping"]:
            solid = next((i for i in range(start, end) if not text[i].isspace()), start)
            roles.append(by_char[min(solid, len(by_char) - 1)])
        ids = list(coded["input_ids"])
        if not ids:
            raise ValueError(f"the prompt {text!r} has no tokens.")
        roles[-1] = int(Role.LAST)
        if self.bos is not None:
            return [self.bos, *ids], [int(Role.BOS), *roles]
        return ids, roles

    def continuation(self, prompt: str, answer: str) -> list[int]:
        """Token ids that an answer adds to a prompt, as the tokenizer writes them there.

        Where the tokenizer would join the prompt's end with the answer's start, so that no clean boundary
        exists, the answer is tokenised by itself.
        """
        head, whole = self.ids(prompt), self.ids(prompt + answer)
        return whole[len(head) :] if whole[: len(head)] == head else self.ids(answer)


@dataclass(frozen=True)
class FirstTokens:
    """What first-token scoring can and cannot tell apart in one task.

    Attributes:
        ids: For each input, the first tokens of its accepted answers, canonical first. Each answer counts
            with and without a leading space, as paper A strips white space before it compares.
        one_token_share: Share of inputs whose canonical answer is a single token.
        ambiguous_share: Share of inputs whose canonical first token also begins a different answer.
        ambiguous: Those first tokens, with the answers they begin.
        constant: The one token that, said to every input, would be right most often.
    """

    ids: dict[str, tuple[int, ...]]
    one_token_share: float
    ambiguous_share: float
    ambiguous: dict[str, list[str]]
    constant: int


def first_tokens(task: Task, template: Template, encoder: Encoder, *, space: bool) -> FirstTokens:
    """Find the tokens that count as right, and report where one token is not enough to tell.

    Args:
        task: The task.
        template: Decides what stands before the answer.
        encoder: The tokenizer.
        space: Whether answers are written with a leading space.

    Returns:
        The accepted first tokens of every input, and how ambiguous they are.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> import tvlens as tv
        >>> encoder = Encoder.of(tiny_model())
        >>> first_tokens(tv.load_task("to_upper"), Template(), encoder, space=False).one_token_share
        1.0
    """
    cache: dict[str, list[int]] = {}
    prompt, lead = template.query(task.inputs[0], space=space)

    def tokens(written: str) -> list[int]:
        if written not in cache:
            cache[written] = encoder.continuation(prompt, written)
        return cache[written]

    def blank(token: int) -> bool:
        return not encoder.tokenizer.decode([token]).strip()

    ids: dict[str, tuple[int, ...]] = {}
    begins: dict[int, list[str]] = {}
    canonical: dict[str, list[int]] = {}
    for x in task.inputs:
        written = [lead + a for a in task.answers[x]] + [
            (" " if not lead else "") + a for a in task.answers[x]
        ]
        firsts = dict.fromkeys(tokens(w)[0] for w in written)
        # Where a tokenizer writes the space as a token of its own, that token answers nothing.
        ids[x] = tuple(i for i in firsts if not blank(i)) or tuple(firsts)
        canonical[x] = tokens(written[0])
        known = begins.setdefault(canonical[x][0], [])
        if task.answers[x][0] not in known:
            known.append(task.answers[x][0])
    shared = {first: answers for first, answers in begins.items() if len(answers) > 1}
    return FirstTokens(
        ids=ids,
        one_token_share=sum(len(t) == 1 for t in canonical.values()) / len(task),
        ambiguous_share=sum(t[0] in shared for t in canonical.values()) / len(task),
        ambiguous={encoder.tokenizer.decode([f]): answers for f, answers in shared.items()},
        constant=Counter(i for accepted in ids.values() for i in accepted).most_common(1)[0][0],
    )


def uses_space(task: Task, template: Template, encoder: Encoder) -> bool:
    """Decide whether words get a leading space, as paper A's code does.

    Args:
        task: The task; letters and lists never get one.
        template: Its spacing rule, and what stands before the answer.
        encoder: The tokenizer.

    Returns:
        True where a space is written.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> import tvlens as tv
        >>> uses_space(tv.load_task("to_upper"), Template(), Encoder.of(tiny_model()))
        False
    """
    if template.spacing != "auto":
        return template.spacing == "always"
    if not task.spaced:
        return False
    one_token = {}
    for space in (False, True):
        prompt, lead = template.query(task.inputs[0], space=space)
        written = [encoder.continuation(prompt, lead + y) for _, y in task.pairs]
        one_token[space] = sum(len(tokens) == 1 for tokens in written)
    if one_token[True] == 0:
        return False  # this tokenizer keeps a space apart from its word
    return one_token[True] >= 0.7 * one_token[False]
