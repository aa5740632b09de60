"""Checks of the tokenizer: BOS, what comes back from tokens, one-token answers, the vocabulary."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from tvlens.checking.subject import TEXTS, Subject
from tvlens.checking.table import Measured, NotApplicable, check
from tvlens.encoding import Encoder, first_tokens, settle
from tvlens.tasks import PAPER_TASKS, Task, load_task
from tvlens.templates import Template

_ITEMS = 40  # of each task
_OTHER = (
    "naïve café, Straße",
    "Ελλάδα и Россия",
    "日本語の文",
    "שלום עולם",
    "مرحبا بالعالم",
    "🎉 👩🏽‍🔬 🇫🇷",
    "e\u0301 and é",
    "“quoted” – and … so on",
    "one\ttab\nand\n\nlines",
)


@check(
    "vocabulary",
    what="token ids of the tokenizer for which the model has no row",
    means="The tokenizer is another model's, or tokens were added without resizing: such prompts crash.",
)
def vocabulary(subject: Subject) -> Measured:
    """Compare the tokenizer's ids with the rows of the embedding."""
    tokenizer, d_vocab = subject.encoder.tokenizer, int(subject.model.cfg.d_vocab)
    ids = set(tokenizer.get_vocab().values())
    beyond, spare = sum(i >= d_vocab for i in ids), d_vocab - sum(i < d_vocab for i in ids)
    note = f"{len(ids)} tokens, {d_vocab} rows"
    return Measured(float(beyond), 0.0, note + f": {spare} are padding" * (spare > 0))


@check(
    "bos",
    what="disagreements on what a prompt begins with",
    means="Prompts begin with two BOS, or without the one that the model was trained with.",
)
def bos(subject: Subject) -> Measured:
    """Compare how tvlens, TransformerLens and the tokenizer itself begin a prompt."""
    encoder, text = subject.encoder, TEXTS[0]
    tokenizer, bos = encoder.tokenizer, encoder.tokenizer.bos_token_id
    if not subject.spoken:
        raise NotApplicable("the tokenizer does not know the words of the prompts")
    batch, row = subject.batch, 0
    ours = batch.tokens[row][batch.mask[row]].tolist()
    theirs, raw = subject.model.to_tokens(text)[0].tolist(), tokenizer(text)["input_ids"]
    expected = int(encoder.bos is not None)
    wrong = []
    for who, ids in (("tvlens", ours), ("to_tokens", theirs)):
        if _leading(ids, bos) != expected:
            wrong.append(f"{who} gives {_leading(ids, bos)} BOS where the model wants {expected}")
    if _leading(raw, bos) and encoder.bos is None:
        wrong.append("the tokenizer adds BOS, the model's default_prepend_bos says no")
    if not wrong and ours != theirs:
        wrong.append("to_tokens gives other tokens than tvlens")
    note = "; ".join(wrong) or ("prompts begin with BOS" if expected else "prompts have no BOS")
    return Measured(float(len(wrong)), 0.0, note)


def _leading(ids: Sequence[int], bos: int | None) -> int:
    """How many BOS a prompt begins with."""
    return next((i for i, token in enumerate(ids) if token != bos), len(ids))


@check(
    "round_trip",
    what="words of the tasks that come back from their tokens as other words",
    means="The tokenizer changes the text (case, accents): prompts do not say what their task says.",
)
def round_trip(subject: Subject) -> Measured:
    """Encode and decode the items of the paper's tasks, with and without a leading space, and more."""
    words = [
        space + word
        for name in PAPER_TASKS
        for pair in load_task(name).pairs[:_ITEMS]
        for word in pair
        for space in ("", " ")
    ]
    found, other = _trip(subject.encoder, words), _trip(subject.encoder, _OTHER)
    said = [f"{len(set(words))} words"]
    said += [f"{a!r} becomes {b!r}" for a, b in found.changed[:1]]
    said += [f"{found.spaced} lose or gain white space"] * (found.spaced > 0)
    said += [f"{found.unknown} have unknown tokens"] * (found.unknown > 0)
    lost = other.unknown + len(other.changed)
    said += [f"{lost} of {len(_OTHER)} texts in other scripts are lossy"] * (lost > 0)
    return Measured(float(len(found.changed)), 0.0, "; ".join(said))


@dataclass(frozen=True)
class _Trip:
    """What came back of some texts."""

    changed: list[tuple[str, str]]
    spaced: int
    unknown: int


def _trip(encoder: Encoder, texts: Sequence[str]) -> _Trip:
    tokenizer = encoder.tokenizer
    texts = list(dict.fromkeys(texts))
    coded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    unk = tokenizer.unk_token_id
    changed, spaced, unknown = [], 0, 0
    for text, ids in zip(texts, coded, strict=True):
        if unk is not None and unk in ids:
            unknown += 1
            continue
        back = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        wanted, got = (unicodedata.normalize("NFC", each) for each in (text, back))
        if "".join(wanted.split()) != "".join(got.split()):
            changed.append((text, back))
        elif wanted != got:
            spaced += 1
    return _Trip(changed, spaced, unknown)


@check(
    "one_token",
    what="tasks of the paper, of 18, in which no answer is a single token",
    means="No task can be judged by its first token here; use score_answers, which marks whole answers.",
)
def one_token(subject: Subject) -> Measured:
    """Count single-token answers of the paper's tasks, in the template that suits the tokenizer."""
    shares, unk = [], subject.encoder.tokenizer.unk_token_id
    for name in PAPER_TASKS:
        task = load_task(name)
        some = dict(list(task.answers.items())[: 4 * _ITEMS])
        task = Task(task.name, task.family, some, spaced=task.spaced)
        known = first_tokens(task, settle(task, Template(), subject.encoder), subject.encoder)
        shares.append(sum(known.ids[x][0] != unk for x in known.one_token) / len(task))
    none = sum(share == 0 for share in shares)
    mean = sum(shares) / len(shares)
    return Measured(
        float(none), len(shares) - 1.0, f"{mean:.0%} of answers are one token, on average"
    )
