"""Vectors read out through the unembedding: where a task's unseen answers stand, and what stands on top."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from einops import repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tvlens.experiments._unseen import HALVES, PARTS, Half, Words
from tvlens.lens.tuned import TunedLens
from tvlens.models.runner import runner
from tvlens.prompts import Prompts
from tvlens.vectors import TaskVector

PLACES = 100  # tokens kept of each projection, as in the paper


def advantages(
    rank: Shaped[np.ndarray, "layer token"],
    positives: Bool[np.ndarray, " token"],
    negatives: Bool[np.ndarray, " token"],
) -> Float[np.ndarray, "positive layer"]:
    """Give for each positive token the share of negative ones that it is ranked above; their mean is the AUC.

    Args:
        rank: Ranks of tokens, 0 being the highest.
        positives: Which tokens should stand high.
        negatives: Which should not.

    Returns:
        Shares; equal ranks count half. Without negatives NaN.

    Example:
        >>> rank = np.array([[0, 3, 1, 2]])
        >>> good = np.array([True, True, False, False])
        >>> advantages(rank, good, ~good).ravel().tolist()
        [1.0, 0.0]
    """
    if not negatives.any():
        return np.full((int(positives.sum()), len(rank)), np.nan)
    mine, other = rank[:, positives][:, :, None], rank[:, negatives][:, None, :]
    return ((mine < other).mean(axis=-1) + 0.5 * (mine == other).mean(axis=-1)).T


def answers_above(
    rank: Int[np.ndarray, "half layer token"],
    asked: Bool[np.ndarray, "half token"],
    foreign: Bool[np.ndarray, " token"],
    shown: Bool[np.ndarray, "half token"],
) -> Float[np.ndarray, "answer layer"]:
    """Give the `advantages` of what both halves ask for; their mean over answers is the AUC.

    Args:
        rank: Ranks of tokens under the vector of each half.
        asked: The answers asked for.
        foreign: Tokens that are to stand below them.
        shown: Tokens that the vector's own prompts hold; they count nowhere.

    Returns:
        The shares, those of the first half first.

    Example:
        >>> rank = np.array([[[0, 1, 2, 3]], [[3, 2, 1, 0]]])
        >>> asked = np.array([[True, False, False, False], [False, True, False, False]])
        >>> foreign, nothing = np.array([False, False, True, True]), np.zeros((2, 4), dtype=bool)
        >>> answers_above(rank, asked, foreign, nothing).ravel().tolist()
        [1.0, 0.0]
    """
    halves = zip(rank, asked, shown, strict=True)
    return np.concatenate([advantages(r, a & ~s, foreign & ~s) for r, a, s in halves])


def read_out(
    model: Any,
    made: Mapping[str, tuple[Sequence[Half], Words]],
    thetas: Mapping[str, Sequence[TaskVector]],
    *,
    lens: TunedLens | None,
    k: int,
    n_random: int,
    seed: int,
) -> dict[str, Any]:
    """Rank every asked answer under every theta and random direction, and see what stands on top.

    Args:
        model: A TransformerLens model.
        made: By task its halves and words.
        thetas: By task the mean theta of each half.
        lens: What translates vectors before they are read out, if anything.
        k: How many top tokens are searched for answers and words of a task.
        n_random: How many random directions.
        seed: Decides them.

    Returns:
        What `tvlens.experiments.decodability.Decodability` holds about words, by variable.
    """
    asked = [half.asked[p] for halves, _ in made.values() for half in halves for p in PARTS]
    ids = list(dict.fromkeys(some[0] for prompts in asked for some in prompts.answer_ids))
    shown = [[_seen(half.shown) for half in halves] for halves, _ in made.values()]
    found: dict[str, Any] = {
        "token": [model.tokenizer.decode([t]) for t in ids],
        "shown": np.array([[[t in seen for t in ids] for seen in both] for both in shown]),
        "member": np.array([[t in words.answers for t in ids] for _, words in made.values()]),
        "asked": np.array(
            [
                [[_has(half.asked[p], ids) for p in PARTS] for half in halves]
                for halves, _ in made.values()
            ]
        ),
    }
    belong = [words.answers | words.labels for _, words in made.values()]
    found |= _of_thetas(model, thetas, ids, shown, belong, lens=lens, k=k)
    rank, best = _of_noise(model, thetas, ids, lens=lens, k=k, n=n_random, seed=seed)
    found["auc"] = _areas(found["rank"], found)
    found["auc_random"] = np.stack([_own_areas(each, found) for each in rank])
    found["share_random"] = np.stack(
        [
            np.mean([_within(best, there - seen).mean(axis=0) for seen in both], axis=0)
            for there, both in zip(belong, shown, strict=True)
        ]
    ).astype("float32")
    return found


def _of_thetas(
    model: Any,
    thetas: Mapping[str, Sequence[TaskVector]],
    ids: Sequence[int],
    shown: Sequence[Sequence[frozenset[int]]],
    belong: Sequence[frozenset[int]],
    *,
    lens: TunedLens | None,
    k: int,
) -> dict[str, Any]:
    """Ranks under every theta, each task's share of its top tokens, and these tokens in words."""
    rank, share, top = [], [], []
    for both, seen in zip(thetas.values(), shown, strict=True):
        rows = [_logits(model, theta.values[0], lens) for theta in both]
        rank.append([_ranks(each, ids) for each in rows])
        shares = []
        for each, hidden in zip(rows, seen, strict=True):
            # Tokens that theta's own prompts hold are no evidence, and do not count.
            free = each.index_fill(1, torch.tensor(sorted(hidden)), -torch.inf).topk(k, dim=-1)
            shares.append([_within(free.indices, there - hidden) for there in belong])
        share.append(np.mean(shares, axis=0))
        mean = torch.stack([theta.values[0] for theta in both]).mean(dim=0)
        best = _logits(model, mean, lens).topk(min(PLACES, int(model.cfg.d_vocab)), dim=-1)
        top.append([[model.tokenizer.decode([t]) for t in row] for row in best.indices.tolist()])
    return {
        "rank": np.array(rank),
        "share": np.array(share, dtype="float32"),
        "top_token": np.array(top, dtype=object),
    }


def _of_noise(
    model: Any,
    thetas: Mapping[str, Sequence[TaskVector]],
    ids: Sequence[int],
    *,
    lens: TunedLens | None,
    k: int,
    n: int,
    seed: int,
) -> tuple[Int[np.ndarray, "draw layer token"], Int[Tensor, "draw layer k"]]:
    """Ranks and top tokens of random directions, the same at all layers and as long as theta is there."""
    every = torch.stack([theta.values[0].float() for both in thetas.values() for theta in both])
    norms = every.norm(dim=-1).mean(dim=0).cpu()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, every.shape[-1], generator=generator)
    drawn = drawn / drawn.norm(dim=-1, keepdim=True)
    rank, best = [], []
    for direction in drawn:
        rows = norms[:, None] * repeat(direction, "d_model -> layer d_model", layer=len(norms))
        logits = _logits(model, rows, lens)
        rank.append(_ranks(logits, ids))
        best.append(logits.topk(k, dim=-1).indices)
    return np.array(rank), torch.stack(best)


@torch.no_grad()
def _logits(
    model: Any, rows: Float[Tensor, "layer d_model"], lens: TunedLens | None
) -> Float[Tensor, "layer d_vocab"]:
    """Read a vector of each layer out through the final norm and the unembedding."""
    drive = runner(model)
    rows = rows.to(drive.device, drive.dtype)
    if lens is not None:
        rows = torch.cat([lens.translate(row[None], layer) for layer, row in enumerate(rows)])
    return drive.logits(rows).float().cpu()


def _ranks(
    logits: Float[Tensor, "layer d_vocab"], ids: Sequence[int]
) -> Int[np.ndarray, "layer token"]:
    """How many tokens of the vocabulary stand above each of these."""
    ordered = logits.sort(dim=-1).values
    here = logits[:, torch.tensor(list(ids))].contiguous()
    return (logits.shape[1] - torch.searchsorted(ordered, here, right=True)).int().numpy()


def _within(best: Int[Tensor, "*row k"], tokens: frozenset[int]) -> Float[np.ndarray, "*row"]:
    """Share of the top tokens that are among some others."""
    return (
        torch.isin(best, torch.tensor(sorted(tokens), dtype=torch.long))
        .float()
        .mean(dim=-1)
        .numpy()
    )


def _seen(shown: Prompts) -> frozenset[int]:
    """All tokens of the prompts that theta is made from."""
    return frozenset(int(t) for batch in shown.dummies for t in batch.tokens[batch.mask].unique())


def _has(asked: Prompts, ids: Sequence[int]) -> list[bool]:
    firsts = {some[0] for some in asked.answer_ids}
    return [t in firsts for t in ids]


def _areas(
    rank: Int[np.ndarray, "task half layer token"], found: Mapping[str, Any]
) -> Float[np.ndarray, "task other layer part"]:
    """AUC of every task's unseen answers under every task's theta; the diagonal is a theta's own."""
    n, _, layers, _ = rank.shape
    area = np.full((n, n, layers, len(PARTS)), np.nan)
    for i in range(n):
        for j in range(n):
            # What theta's own task answers is no fair rival for the answers of another task.
            own = found["member"][i] if i != j else np.zeros_like(found["member"][i])
            area[i, j] = _area(
                rank[i], found["shown"][i], found["asked"][j], ~found["member"][j] & ~own
            )
    return area


def _own_areas(
    rank: Int[np.ndarray, "layer token"], found: Mapping[str, Any]
) -> Float[np.ndarray, "task layer part"]:
    """The same for a vector that belongs to no task; what each task's own prompts hold is left out."""
    both, n = np.stack([rank] * HALVES), len(found["member"])
    return np.stack(
        [_area(both, found["shown"][j], found["asked"][j], ~found["member"][j]) for j in range(n)]
    )


def _area(
    rank: Int[np.ndarray, "half layer token"],
    shown: Bool[np.ndarray, "half token"],
    asked: Bool[np.ndarray, "half part token"],
    foreign: Bool[np.ndarray, " token"],
) -> Float[np.ndarray, "layer part"]:
    area = np.full((rank.shape[1], len(PARTS)), np.nan)
    for p in range(len(PARTS)):
        rows = answers_above(rank, asked[:, p], foreign, shown)
        if len(rows):
            area[:, p] = rows.mean(axis=0)
    return area
