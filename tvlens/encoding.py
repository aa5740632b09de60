"""From text to tokens, and which tokens count as an answer.

Batches are padded on the left and say what every token is for. Answers are judged by their first token, as
Hendel et al. do, so this is also the place that knows where one token is not enough: an answer of several
tokens, two answers that begin alike, a tokenizer that keeps the space apart from its word.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tvlens.tasks import Task
from tvlens.templates import Role, Template


@dataclass(frozen=True, eq=False)
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

    @classmethod
    def of_ids(
        cls, ids: Int[Tensor, "prompt position"], text: Sequence[str] | None = None
    ) -> "TokenBatch":
        """Take token ids as they are: prompts of one length, of no particular roles."""
        real, roles = torch.ones_like(ids, dtype=torch.bool), torch.full_like(ids, int(Role.OTHER))
        return cls(tuple(text or [""] * len(ids)), ids, real, roles)

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.tokens, self.mask, self.roles)]
        if len(shapes[0]) != 2 or len(set(shapes)) > 1 or shapes[0][0] != len(self.text):
            raise ValueError(
                "a batch has tokens, mask and roles of one shape (prompt, position), and a text for each "
                f"prompt; {', '.join(map(str, shapes))} and {len(self.text)} texts arrived."
            )

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
        if not hasattr(model, "bos_token_id"):
            raise TypeError(
                f"a TransformerLens model or a tokenizer is needed; {type(model).__name__} arrived. "
                "Load one with tvlens.load_model('smollm2-135m')."
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
        every = self.tokenizer(list(text), add_special_tokens=False, return_offsets_mapping=True)
        each = zip(prompts, text, every["input_ids"], every["offset_mapping"], strict=True)
        coded = [self._with_roles(*one) for one in each]
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

    def _with_roles(
        self,
        pieces: list[tuple[str, Role]],
        text: str,
        ids: Sequence[int],
        spans: Sequence[tuple[int, int]],
    ) -> tuple[list[int], list[int]]:
        """Give a prompt's tokens their roles: that of their first character that is no white space."""
        by_char = [int(role) for piece, role in pieces for _ in piece]
        roles = []
        for start, end in spans:
            solid = next((i for i in range(start, end) if not text[i].isspace()), start)
            roles.append(by_char[min(solid, len(by_char) - 1)])
        ids = list(ids)
        if not ids:
            raise ValueError(f"the prompt {text!r} has no tokens.")
        if lost := self._lost(text, ids, spans):
            raise ValueError(
                f"the tokenizer has no token for {', '.join(map(repr, lost[:4]))} of the prompt "
                f"{text[:60]!r}: the model would read {self.tokenizer.unk_token!r} there. Write the prompt, "
                "or its template, in words that the model knows."
            )
        roles[-1] = int(Role.LAST)
        if self.bos is not None:
            return [self.bos, *ids], [int(Role.BOS), *roles]
        return ids, roles

    def _lost(self, text: str, ids: list[int], spans: Sequence[tuple[int, int]]) -> list[str]:
        """Pieces of a text that the tokenizer does not know, where its token for all such stands."""
        unk = self.tokenizer.unk_token_id
        pieces = dict.fromkeys(text[a:b] for i, (a, b) in zip(ids, spans, strict=True) if i == unk)
        # Some tokenizers call their end of text unknown, too, and texts may well spell it out.
        return [piece for piece in pieces if piece.strip() != self.tokenizer.unk_token]

    def foreign(self, texts: Sequence[str]) -> set[str]:
        """Those of several texts that the tokenizer does not have tokens for all of."""
        if self.tokenizer.unk_token_id is None or not texts:
            return set()
        coded = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
        each = zip(texts, coded["input_ids"], coded["offset_mapping"], strict=True)
        return {text for text, ids, spans in each if self._lost(text, ids, spans)}

    def is_blank(self, token: int) -> bool:
        """Say whether a token is mere white space."""
        return not self.tokenizer.decode([token]).strip()

    def continuation(self, prompt: str, answer: str) -> list[int]:
        """Token ids that an answer adds to a prompt, as the tokenizer writes them there.

        Where the tokenizer would join the prompt's end with the answer's start, so that no clean boundary
        exists, the answer is tokenised by itself.
        """
        return self.continuations(prompt, [answer])[answer]

    def continuations(self, prompt: str, answers: Sequence[str]) -> dict[str, list[int]]:
        """Token ids that each of several answers adds to a prompt, in one call of the tokenizer."""
        head, text = self.ids(prompt), [prompt + answer for answer in answers]
        every = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return {
            answer: whole[len(head) :] if whole[: len(head)] == head else self.ids(answer)
            for answer, whole in zip(answers, every, strict=True)
        }


@dataclass(frozen=True)
class FirstTokens:
    """What first-token scoring can and cannot tell apart in one task.

    Attributes:
        ids: For each input, the tokens that count as right, the canonical answer's first. A whole answer
            in one token counts with and without its leading space, as the paper strips white space.
        one_token: Inputs whose canonical answer is a single token.
        blank: Inputs whose canonical answer begins with a token of mere white space, which tells nothing.
        unknown: Inputs that have no tokens of their own, or whose canonical answer has none.
        ambiguous_share: Share of inputs whose canonical first token also begins a different answer.
        ambiguous: Those first tokens, with the answers they begin.
        constant: The one token that, said to every input, would be right most often.
    """

    ids: dict[str, tuple[int, ...]]
    one_token: tuple[str, ...]
    blank: tuple[str, ...]
    unknown: tuple[str, ...]
    ambiguous_share: float
    ambiguous: dict[str, list[str]]
    constant: int


_found: WeakKeyDictionary[Any, dict[Any, FirstTokens]] = WeakKeyDictionary()
_FOUND = 64  # kept for each tokenizer: seeds and splits of one task ask for the same again


def first_tokens(task: Task, template: Template, encoder: Encoder) -> FirstTokens:
    """Find the tokens that count as right, and report where one token is not enough to tell.

    Args:
        task: The task.
        template: What stands before the answer, settled (see `settle`).
        encoder: The tokenizer.

    Returns:
        The accepted first tokens of every input, and how ambiguous they are.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> import tvlens as tv
        >>> encoder = Encoder.of(tiny_model())
        >>> len(first_tokens(tv.load_task("to_upper"), Template(), encoder).one_token)
        26
    """
    known = _found.setdefault(encoder.tokenizer, {})
    key = (task.fingerprint, template, len(encoder.tokenizer))
    if key not in known:
        while len(known) >= _FOUND:
            known.pop(next(iter(known)))
        known[key] = _first_tokens(task, template, encoder)
    return known[key]


def _first_tokens(task: Task, template: Template, encoder: Encoder) -> FirstTokens:
    prompt, lead = template.query(task.inputs[0])
    spaces = (lead, "" if lead else " ")
    written = {
        space + a: None for those in task.answers.values() for a in those for space in spaces
    }
    tokens = encoder.continuations(prompt, [*written])
    foreign = encoder.foreign(
        [*dict.fromkeys([*task.inputs, *(y for ys in task.answers.values() for y in ys)])]
    )
    ids = {}
    for x, answers in task.answers.items():
        # Only the canonical answer may count by its first piece. Of other answers and of the other
        # spacing that piece is often a letter or two, and right for almost anything.
        known = [a for a in answers if a == answers[0] or a not in foreign]
        whole = [tokens[space + a] for a in known for space in spaces]
        ids[x] = tuple(dict.fromkeys([whole[0][0], *(t[0] for t in whole if len(t) == 1)]))
    canonical = {x: tokens[lead + y] for x, y in task.pairs}
    blank = {i: encoder.is_blank(i) for i in {t[0] for t in canonical.values()}}
    begins: dict[int, dict[str, None]] = {}
    for x, y in task.pairs:
        begins.setdefault(canonical[x][0], {})[y] = None
    shared = {first: list(answers) for first, answers in begins.items() if len(answers) > 1}
    return FirstTokens(
        ids=ids,
        one_token=tuple(x for x in task.inputs if len(canonical[x]) == 1),
        blank=tuple(x for x in task.inputs if blank[canonical[x][0]]),
        unknown=tuple(x for x, y in task.pairs if x in foreign or y in foreign),
        ambiguous_share=sum(t[0] in shared for t in canonical.values()) / len(task),
        ambiguous={encoder.tokenizer.decode([f]): answers for f, answers in shared.items()},
        constant=Counter(i for those in ids.values() for i in those).most_common(1)[0][0],
    )


def settle(task: Task, template: Template, encoder: Encoder) -> Template:
    """Decide on white space for a task and a tokenizer, and write the decision into the template.

    Args:
        task: The task; letters and lists get no leading space by themselves.
        template: The template as it was asked for.
        encoder: The tokenizer.

    Returns:
        The same template with spacing ``"always"`` or ``"never"``, and the white space before the answer
        in the prompt if this tokenizer writes it as a token of its own before most of the answers.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> import tvlens as tv
        >>> settle(tv.load_task("to_upper"), Template(), Encoder.of(tiny_model())).spacing
        'never'
    """
    if template.spacing == "auto":
        spaced = replace(template, spacing="always")
        bare = replace(template, spacing="never")
        if task.spaced:
            one = {t: len(first_tokens(task, t, encoder).one_token) for t in (spaced, bare)}
            # No one-token answer with a space: this tokenizer keeps the space apart from its word.
            template = spaced if one[spaced] > 0 and one[spaced] >= 0.7 * one[bare] else bare
        else:
            template = bare
    if len(first_tokens(task, template, encoder).blank) > len(task) / 2:
        return replace(template, lead="prompt")
    return template
