"""Score whole answers: what a model writes, and how likely it finds what it should write.

The first token of an answer tells little where answers are several tokens long: "in" begins Indonesian and
Indian, and whoever knows the letter need not know the word. Here the model goes on by itself, token by token,
until the text that follows an answer in the template; and the answers that are right are put into its mouth
to see how likely each token was. A task vector goes into the prompt's last token and nowhere else, so that
what comes after the first new token follows from that alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvlens._errors import whole
from tvlens.encoding import Encoder, TokenBatch
from tvlens.engine import Edit, FirstToken, Read, Request, run
from tvlens.models.runner import runner
from tvlens.prompts import Prompts
from tvlens.scoring import injection, of_queries, view_of
from tvlens.templates import Role, Template
from tvlens.vectors import TaskVector

# Tokens that may follow what was needed: the template's own, and one for an answer cut up otherwise.
_SPARE = 2
_LOGITS = 1 << 24  # that are held at once


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """Outcome of every prompt, judged by whole answers.

    Attributes:
        exact: Whether the text that the model writes is an accepted answer.
        begins: Whether it begins with one, as a word of its own: right, but for not stopping.
        first: Whether its first token counts as right, as in `tvlens.score`.
        stopped: Whether it came to an end by itself.
        log_prob: Log probability, in nats, of all tokens of the likeliest accepted answer, without what
            follows it: "Paris" counts also where "Parisian" would come.
        stop_log_prob: Log probability, in nats, of the template's next token after that answer.
        n_tokens: How many tokens that answer has.
        likeliest: That answer.
        text: What the model writes, up to the text that follows an answer, without white space around it.
        queries: The query of each prompt.
    """

    exact: Bool[Tensor, " prompt"]
    begins: Bool[Tensor, " prompt"]
    first: Bool[Tensor, " prompt"]
    stopped: Bool[Tensor, " prompt"]
    log_prob: Float[Tensor, " prompt"]
    stop_log_prob: Float[Tensor, " prompt"]
    n_tokens: Int[Tensor, " prompt"]
    likeliest: tuple[str, ...]
    text: tuple[str, ...]
    queries: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Share of prompts answered exactly."""
        return self.exact.float().mean().item()

    @property
    def mean_log_prob(self) -> Float[Tensor, " prompt"]:
        """Log probability of the likeliest accepted answer, in nats a token."""
        return self.log_prob / self.n_tokens

    def interval(self, *, level: float = 0.95) -> tuple[float, float]:
        """Wilson interval of the accuracy; prompts that ask the same query count as one."""
        return of_queries(self.accuracy, self.queries, level=level)


def score_answers(
    model: Any,
    prompts: Prompts,
    *,
    view: str = "regular",
    vector: TaskVector | None = None,
    layer: int | None = None,
    mode: str = "replace",
    scale: float = 1.0,
    max_new_tokens: int | None = None,
    memory: int | None = None,
) -> AnswerScores:
    """Let the model answer in full, with a task vector injected if one is given, and mark its answers.

    Decoding is greedy and ends at the template's text after an answer (a line break where that is all
    white space), at the tokenizer's EOS, or after ``max_new_tokens``. As with `tvlens.inject`, the vector is
    in the prompt's last token at every step and in no new one.

    Args:
        model: A TransformerLens model.
        prompts: The prompts.
        view: ``"regular"`` for [S, x], ``"zero_shot"`` for [x].
        vector: Injected if given: one set of demonstrations for all prompts, or one for each.
        layer: Where to inject; needed with a vector. Negative counts from the last layer.
        mode: ``"replace"`` or ``"add"``.
        scale: Factor on the vector.
        max_new_tokens: How many tokens are written at most; by default, for each prompt, two more than its
            longest accepted answer has.
        memory: Bytes that the engine's activations may take.

    Returns:
        Outcomes of all prompts.

    Raises:
        ValueError: As `tvlens.score`; a template in which nothing follows an answer; prompts too long for
            their answers to fit the context; less than one new token.
        TypeError: ``max_new_tokens`` is no whole number.

    Example:
        >>> import tvlens as tv
        >>> from tvlens.testing import tiny_model
        >>> model = tiny_model()
        >>> prompts = tv.build_prompts(tv.load_task("country_capital"), model, n=4)
        >>> bool((score_answers(model, prompts).log_prob < 0).all())
        True

    References:
        Hendel, Geva, Globerson 2023, arXiv:2310.15916, who score first tokens.
    """
    batch = view_of(prompts, view)
    cell = injection(model, vector, layer, mode=mode, scale=scale)
    writing = _Writing.of(prompts, model, max_new_tokens)
    writing.check(batch)
    forced = _forced(model, batch, writing, cell, memory)
    best = [max(row, key=lambda way: way.total) for row in forced]
    drafts = [max((way.draft for way in row), key=len) for row in forced]
    made = _generated(model, batch, writing, cell, drafts, memory)
    written = [writing.read(ids) for ids in made]
    text = [words for words, _ in written]
    accepted = list(zip(text, prompts.answers, strict=True))
    return AnswerScores(
        exact=torch.tensor([words in answers for words, answers in accepted]),
        begins=torch.tensor([any(_begins(words, y) for y in ys) for words, ys in accepted]),
        first=torch.tensor([m[0] in ok for m, ok in zip(made, prompts.answer_ids, strict=True)]),
        stopped=torch.tensor([ended for _, ended in written]),
        log_prob=torch.tensor([way.total for way in best]),
        stop_log_prob=torch.tensor([way.log_probs[-1] for way in best]),
        n_tokens=torch.tensor([len(way.ids) - 1 for way in best]),
        likeliest=tuple(way.answer for way in best),
        text=tuple(text),
        queries=prompts.queries,
    )


@dataclass(frozen=True)
class _Way:
    """One way to write one accepted answer, and how the model takes it.

    Attributes:
        answer: The answer.
        ids: Its tokens and, at the end, the template's token after it.
        log_probs: Log probability of each.
        greedy: The token the model would have written in the place of each.
    """

    answer: str
    ids: list[int]
    log_probs: tuple[float, ...] = ()
    greedy: tuple[int, ...] = ()

    @property
    def total(self) -> float:
        return sum(self.log_probs[:-1])

    @property
    def draft(self) -> list[int]:
        """What greedy decoding is known to write: up to the first token where the two differ."""
        pairs = zip(self.ids, self.greedy, strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.ids) - 1)
        return list(self.greedy[: same + 1])


@dataclass(frozen=True)
class _Writing:
    """How answers are written and where they end."""

    encoder: Encoder
    stop: str
    ways: tuple[tuple[_Way, ...], ...]
    limits: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Prompts, model: Any, most: int | None) -> "_Writing":
        if most is not None and whole("max_new_tokens", most) < 1:
            raise ValueError(f"max_new_tokens must be at least 1; {most} arrived.")
        made, encoder = prompts.facts, Encoder.of(model)
        template = Template(made["template"], spacing=made["spacing"], lead=made["lead"])
        pairs = zip(prompts.queries, prompts.answers, strict=True)
        ways = tuple(_ways(template, encoder, x, ys) for x, ys in pairs)
        limits = [most or max(len(way.ids) - 1 for way in row) + _SPARE for row in ways]
        return cls(encoder, _stop(template), ways, tuple(limits))

    def check(self, batch: TokenBatch) -> None:
        """Refuse prompts after which there is no room for the answers."""
        forced = max(len(way.ids) - 1 for row in self.ways for way in row)
        most, n_ctx = int(batch.lengths.max()), self.encoder.n_ctx
        needed = most + max(forced, *self.limits)
        if n_ctx is not None and needed > n_ctx:
            raise ValueError(
                f"a prompt of {most} tokens and {needed - most} for its answer make {needed}, but the "
                f"model's context is {n_ctx}. Use fewer shots or a smaller max_new_tokens."
            )

    def read(self, ids: list[int]) -> tuple[str, bool]:
        """Give the text up to the stop, and whether there was one."""
        eos = self.encoder.tokenizer.eos_token_id
        ended = eos is not None and ids[-1:] == [eos]
        text = self.encoder.tokenizer.decode(ids[:-1] if ended else ids)
        answer, stop, _ = text.partition(self.stop)
        return answer.strip(), ended or bool(stop)

    def cut(self, ids: list[int], limit: int) -> tuple[list[int], bool]:
        """Give the tokens up to where writing ends, and whether it does."""
        for n in range(1, min(len(ids), limit) + 1):
            if n == limit or self.read(ids[:n])[1]:
                return ids[:n], True
        return ids, False


def _stop(template: Template) -> str:
    """The text by which an answer is known to be over."""
    before, _, after = template.pieces
    text = after or before
    # A mere space tells nothing: answers begin with one, and some have several words.
    if not text.strip() and "\n" not in text:
        raise ValueError(
            f"nothing follows an answer in the template {template.demo!r}, so that its end cannot be "
            "told. End it with a line break: '{x}->{y}\\n'."
        )
    # An answer has no line break, but the tokenizer may well write the two of a blank line apart.
    return text.rstrip() or "\n"


def _ways(
    template: Template, encoder: Encoder, x: str, answers: tuple[str, ...]
) -> tuple[_Way, ...]:
    """All ways to write the accepted answers: with the template's white space before them, and the other."""
    prompt, lead = template.query(x)
    before, _, after = template.pieces
    found: dict[tuple[int, ...], _Way] = {}
    for answer in answers:
        for space in (lead, "" if lead else " "):
            ids = encoder.continuation(prompt, space + answer)
            stop = encoder.continuation(prompt + space + answer, after + before)
            found.setdefault(tuple(ids), _Way(answer, [*ids, stop[0]]))
    return tuple(found.values())


def _forced(
    model: Any,
    batch: TokenBatch,
    writing: _Writing,
    cell: tuple[Edit, ...],
    memory: int | None,
) -> list[list[_Way]]:
    """Say how likely each token of each accepted answer is, all answers of a prompt in one run."""
    last, rows = runner(model).n_layers - 1, range(len(batch))
    longest = max(len(way.ids) - 1 for row in writing.ways for way in row)
    # Causality: what stands behind an answer changes nothing in it, so all can be equally long.
    reads = tuple(Read("resid_post", (last,), place) for place in range(-1 - longest, 0))
    after, requests = torch.full((len(batch),), longest), []
    for number in range(max(map(len, writing.ways))):
        tried = [row[number % len(row)].ids for row in writing.ways]
        added = [[*ids[:-1], *ids[-1:] * (longest + 1 - len(ids))] for ids in tried]
        request = Request(_extended(batch, rows, added), cells=(_moved(cell, after),), reads=reads)
        requests.append(request)
    outputs = run(model, requests, memory=memory)
    seen = [torch.stack([kept[0, :, 0] for kept in each.activations], dim=1) for each in outputs]
    asked = [(i, j) for i, row in enumerate(writing.ways) for j in range(len(row))]
    tokens = [writing.ways[i][j].ids for i, j in asked]
    resid = torch.cat([seen[j][i, : len(ids)] for (i, j), ids in zip(asked, tokens, strict=True)])
    found = _likelihoods(model, resid, [token for ids in tokens for token in ids])
    known: list[list[_Way]] = [[] for _ in rows]
    for (i, j), ids in zip(asked, tokens, strict=True):
        pairs = [next(found) for _ in ids]
        log_probs, greedy = zip(*pairs, strict=True)
        known[i].append(replace(writing.ways[i][j], log_probs=log_probs, greedy=greedy))
    return known


@torch.no_grad()
def _likelihoods(
    model: Any, resid: Float[Tensor, "row d_model"], tokens: Sequence[int]
) -> Iterator[tuple[float, int]]:
    """For rows of final residuals and a token each: its log probability, and the likeliest token."""
    step = max(1, _LOGITS // model.cfg.d_vocab)
    found: list[tuple[float, int]] = []
    for start in range(0, len(tokens), step):
        logits = runner(model).logits(resid[start : start + step])
        readout = FirstToken(tuple((token,) for token in tokens[start : start + step]))
        values = readout(logits, torch.arange(len(logits), device=logits.device))
        pairs = zip(values["answer_log_prob"].tolist(), values["predicted"].tolist(), strict=True)
        found += pairs
    return iter(found)


def _generated(
    model: Any,
    batch: TokenBatch,
    writing: _Writing,
    cell: tuple[Edit, ...],
    drafts: Sequence[list[int]],
    memory: int | None,
) -> list[list[int]]:
    """Go on, one token at a time, from what is known of greedy decoding, until every answer has ended."""
    made = [writing.cut(ids, n) for ids, n in zip(drafts, writing.limits, strict=True)]
    while rows := [i for i, (_, over) in enumerate(made) if not over]:
        added = [made[i][0] for i in rows]
        after = torch.tensor([len(ids) for ids in added])
        ours = [
            replace(edit, values=edit.given[rows] if len(edit.given) > 1 else edit.given)
            for edit in cell
        ]
        readout = FirstToken(((0,),) * len(rows))
        request = Request(_extended(batch, rows, added), (_moved(ours, after),), readout=readout)
        (output,) = run(model, [request], memory=memory)
        for i, token in zip(rows, output.values["predicted"][0].tolist(), strict=True):
            made[i] = writing.cut([*made[i][0], token], writing.limits[i])
    return [ids for ids, _ in made]


def _extended(batch: TokenBatch, rows: Sequence[int], added: Sequence[list[int]]) -> TokenBatch:
    """Some prompts of a batch, each with more tokens after its last."""
    whole_rows = [
        [*batch.tokens[i][batch.mask[i]].tolist(), *ids] for i, ids in zip(rows, added, strict=True)
    ]
    width = max(map(len, whole_rows))
    mask = torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in whole_rows])
    tokens = torch.zeros(mask.shape, dtype=torch.long)
    tokens[mask] = torch.tensor([token for ids in whole_rows for token in ids])
    roles = torch.where(mask, int(Role.OTHER), int(Role.PAD))
    return TokenBatch(tuple(batch.text[i] for i in rows), tokens, mask, roles)


def _moved(cell: Sequence[Edit], after: Int[Tensor, " prompt"]) -> tuple[Edit, ...]:
    """Edits of the prompts' last tokens, after which so many more have come."""
    return tuple(
        replace(edit, position=-1 - n, where=after == n)
        for edit in cell
        for n in after.unique().tolist()
    )


def _begins(text: str, answer: str) -> bool:
    """Whether a text begins with an answer and not with a longer word."""
    return text.startswith(answer) and not text[len(answer) :][:1].isalnum()
