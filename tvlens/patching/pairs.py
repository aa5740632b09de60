"""Prompts that are compared token by token, and the answers they are measured by.

Patching exchanges what stands at the same position of two runs, so a pair must have equally many tokens, or
the exchange means something else than it says. Answers are judged by their first token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tvlens._errors import unknown
from tvlens.encoding import Encoder, TokenBatch
from tvlens.metrics import Ids
from tvlens.templates import Role

Prompts = str | Sequence[str] | Tensor | TokenBatch
Answers = str | int | Sequence[Any] | Tensor
# The run that is changed, and the run whose activations are written into it.
DIRECTIONS = {"denoise": ("corrupted", "clean"), "noise": ("clean", "corrupted")}
_AROUND = 2  # tokens shown before the place where two prompts part


def as_batch(model: Any, prompts: Any, *, name: str = "prompts") -> TokenBatch:
    """Turn prompts as people write them into a batch.

    Args:
        model: The model whose tokenizer and BOS rule are used.
        prompts: A text, a list of texts, token ids ``prompt position`` (taken as they are, BOS included or
            not), or a batch.
        name: What the prompts are called in errors.

    Returns:
        The batch.

    Raises:
        ValueError: There are no prompts, a prompt is longer than the context, or an id is no token.
        TypeError: They are of another type.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> as_batch(tiny_model(), ["a->A", "b->"]).lengths.tolist()
        [4, 3]
    """
    if isinstance(prompts, TokenBatch):
        return prompts
    if isinstance(prompts, Tensor):
        return _from_ids(model, prompts, name)
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"{name} must be a text, a list of texts, token ids as a tensor (prompt position), or a "
            f"TokenBatch; {type(prompts).__name__} arrived."
        )
    if not texts:
        raise ValueError(f"{name} holds no prompt.")
    return Encoder.of(model).batch([[(text, Role.OTHER)] for text in texts])


def _from_ids(model: Any, ids: Tensor, name: str) -> TokenBatch:
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"{name} as a tensor must be token ids of shape (prompt, position); {ids.dtype} of shape "
            f"{tuple(ids.shape)} arrived." + (" Use ids[None] for one." if ids.ndim == 1 else "")
        )
    size, longest = model.cfg.d_vocab, getattr(model.cfg, "n_ctx", None)
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise ValueError(
            f"{name} holds ids outside the model's {size} tokens: {int(ids.min())} to {int(ids.max())} "
            f"arrived, 0 to {size - 1} are there."
        )
    if longest is not None and ids.shape[1] > longest:
        raise ValueError(f"{name} has {ids.shape[1]} tokens, but the model's context is {longest}.")
    ids = ids.long().cpu()
    tokenizer = getattr(model, "tokenizer", None)
    text = [tokenizer.decode(row, skip_special_tokens=True) if tokenizer else "" for row in ids]
    return TokenBatch.of_ids(ids, text)


def real_tokens(batch: TokenBatch) -> list[list[int]]:
    """Token ids of each prompt, without padding.

    Args:
        batch: The prompts.

    Returns:
        A list for each prompt.
    """
    rows = zip(batch.tokens.tolist(), batch.mask.tolist(), strict=True)
    return [[t for t, real in zip(*row, strict=True) if real] for row in rows]


def spelled(model: Any, ids: Sequence[int]) -> list[str]:
    """Write tokens one by one.

    Args:
        model: The model; without a tokenizer, ids are written.
        ids: Token ids.

    Returns:
        A text for each.
    """
    tokenizer = getattr(model, "tokenizer", None)
    return [tokenizer.decode([i]) if tokenizer is not None else str(i) for i in ids]


def token_labels(spelled: Sequence[Sequence[str]], positions: Sequence[int]) -> list[str]:
    """Label positions by their tokens, so that no two labels are the same.

    Args:
        spelled: Tokens of each prompt.
        positions: Positions, negative ones from each prompt's end.

    Returns:
        A label such as ``"12: the"``; where prompts have several tokens there, the commonest and ``…``.

    Example:
        >>> token_labels([["a", "b"], ["a", "c"]], [0, 1, -1])
        ['0: a', '1: b…', '-1: b…']
    """
    labels = []
    for position in positions:
        there = [row[position] for row in spelled if -len(row) <= position < len(row)]
        counts = {token: there.count(token) for token in dict.fromkeys(there)}
        first = max(counts, key=lambda token: counts[token]) if counts else ""
        labels.append(f"{position}: {first}" + "…" * (len(counts) > 1))
    return labels


def paired(
    model: Any, clean: Any, corrupted: Any, *, direction: str
) -> tuple[dict[str, TokenBatch], str, str]:
    """Encode pairs and settle which run is changed by what the other says.

    Args:
        model: The model.
        clean: Clean prompts.
        corrupted: Corrupted prompts.
        direction: ``"denoise"`` or ``"noise"``.

    Returns:
        The prompts by name of the run, the run that is changed, and the run whose activations are written.

    Raises:
        ValueError: The direction is unknown, or a pair has unequal lengths.
    """
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, DIRECTIONS)
    batches = {
        "clean": as_batch(model, clean, name="clean"),
        "corrupted": as_batch(model, corrupted, name="corrupted"),
    }
    check_pairs(model, batches["clean"], batches["corrupted"])
    changed, written = DIRECTIONS[direction]
    return batches, changed, written


def check_pairs(model: Any, clean: TokenBatch, corrupted: TokenBatch) -> None:
    """Refuse pairs that cannot be compared position by position.

    Args:
        model: The model, to write tokens.
        clean: Clean prompts.
        corrupted: Corrupted prompts, in the same order.

    Raises:
        ValueError: There are more of one kind, or a pair has unequal lengths; it shows where they part.
    """
    if len(clean) != len(corrupted):
        raise ValueError(
            f"patching needs pairs; {len(clean)} clean and {len(corrupted)} corrupted prompts arrived."
        )
    pairs = zip(real_tokens(clean), real_tokens(corrupted), strict=True)
    for number, (one, other) in enumerate(pairs):
        if len(one) != len(other):
            raise ValueError(_unequal(model, number, one, other))


def _unequal(model: Any, number: int, one: list[int], other: list[int]) -> str:
    shortest = min(len(one), len(other))
    parts = next((i for i in range(shortest) if one[i] != other[i]), shortest)
    first, last = max(parts - _AROUND, 0), min(parts + _AROUND + 2, max(len(one), len(other)))
    left, right = (
        [repr(text) for text in spelled(model, ids[first:last])] + ["–"] * (last - first)
        for ids in (one, other)
    )
    lines = [f"  {'position':<10}{'clean':<18}corrupted"]
    lines += [
        f"  {first + i:<10}{left[i]:<18}{right[i]}" + ("   <- they part" * (first + i == parts))
        for i in range(last - first)
    ]
    return (
        f"pair {number} has {len(one)} clean and {len(other)} corrupted tokens, so their positions do "
        "not correspond. Choose words of equally many tokens:\n" + "\n".join(lines)
    )


def differences(clean: TokenBatch, corrupted: TokenBatch) -> Bool[np.ndarray, "prompt position"]:
    """Say where the tokens of pairs differ.

    Args:
        clean: Clean prompts.
        corrupted: Corrupted prompts of the same lengths.

    Returns:
        True where they differ, from each prompt's first token on; False beyond its end.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> one, other = (as_batch(tiny_model(), text) for text in ("cat", "cut"))
        >>> differences(one, other).tolist()
        [[False, True, False]]
    """
    pairs = list(zip(real_tokens(clean), real_tokens(corrupted), strict=True))
    found = np.zeros((len(pairs), max(len(one) for one, _ in pairs)), dtype=bool)
    for row, (one, other) in enumerate(pairs):
        found[row, : len(one)] = np.array(one) != np.array(other)
    return found


def answer_ids(model: Any, batch: TokenBatch, answers: Answers, *, name: str = "answers") -> Ids:
    """Turn answers into the tokens that are measured: the first of each.

    Args:
        model: The model whose tokenizer is used.
        batch: The prompts that are answered.
        answers: One for all prompts (a text or a token id), or a list with one for each prompt; where a
            prompt has several, a list within the list. Where a prompt ends in a letter or digit and the
            answer begins with one, a space is put between them, unless the tokenizer writes it as a token of
            its own.
        name: What the answers are called in errors.

    Returns:
        Token ids for each prompt.

    Raises:
        ValueError: There are fewer or more answers than prompts, an answer has no token of its own, or an
            id is no token.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> model = tiny_model()
        >>> ids = answer_ids(model, as_batch(model, ["a->", "b->"]), ["A", ["B", "b"]])
        >>> [[model.tokenizer.decode([i]) for i in row] for row in ids]
        [['A'], ['B', 'b']]
    """
    if isinstance(answers, Tensor):
        answers = answers.tolist()
    if isinstance(answers, str | int):
        answers = [answers] * len(batch)
    if len(answers) != len(batch):
        raise ValueError(
            f"{name} needs one for each of {len(batch)} prompts, or one for all; {len(answers)} arrived. "
            "Several for one prompt are a list within the list: [['Paris', 'paris']]."
        )
    rows = []
    for row, given in enumerate(answers):
        several = [given] if isinstance(given, str | int) else list(given)
        if not several:
            raise ValueError(f"{name} has none for prompt {row}.")
        found = (_first_token(model, batch.text[row], each, name) for each in several)
        rows.append(tuple(dict.fromkeys(found)))
    return tuple(rows)


def _first_token(model: Any, prompt: str, answer: str | int, name: str) -> int:
    if isinstance(answer, int):
        # A model may read more tokens than it says.
        said = getattr(model.cfg, "d_vocab_out", -1)
        size = said if isinstance(said, int) and said > 0 else model.cfg.d_vocab
        if not 0 <= answer < size:
            raise ValueError(f"{name}: {answer} is no token id of this model: 0 to {size - 1}.")
        return answer
    encoder = Encoder.of(model)
    if encoder.foreign([answer]):
        raise ValueError(
            f"{name}: the tokenizer has no token for all of {answer!r}. Choose a word that the model knows, "
            "or give a token id."
        )
    # "is" and "Paris" would be glued to one word: a space is meant.
    if prompt[-1:].isalnum() and answer[:1].isalnum():
        spaced = encoder.continuation(prompt, " " + answer)
        if spaced and not encoder.is_blank(spaced[0]):
            return spaced[0]
    ids = encoder.continuation(prompt, answer)
    if not ids or (encoder.is_blank(ids[0]) and answer.strip()):
        raise ValueError(
            f"{name}: {answer!r} begins with a token of mere white space here, which tells nothing. "
            "Put the space at the end of the prompt, or give a token id."
        )
    return ids[0]


def distinct(model: Any, answers: Ids, wrong: Ids) -> None:
    """Refuse answers that cannot be told from wrong ones.

    Args:
        model: The model, to write tokens.
        answers: Right token ids of each prompt.
        wrong: Wrong token ids of each prompt.

    Raises:
        ValueError: A prompt's right and wrong answers begin with the same token.
    """
    for row, (right, other) in enumerate(zip(answers, wrong, strict=True)):
        for i in right:
            if i in other:
                raise ValueError(
                    f"prompt {row}: right and wrong answer both begin with the token "
                    f"{spelled(model, [i])[0]!r}, so nothing is measured. Give others, as answers= and "
                    "wrong=."
                )


def lengths_of(batch: TokenBatch) -> Int[np.ndarray, " prompt"]:
    """Number of tokens of each prompt, as an array.

    Args:
        batch: The prompts.

    Returns:
        The lengths.
    """
    return batch.lengths.cpu().numpy()
