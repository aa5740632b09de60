"""What is kept of a distribution over the vocabulary: a few numbers instead of all of it.

Rows are taken a few at a time, so that a whole table of rows by vocabulary never exists.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.models.runner import Runner

# Rows at a time on a CPU: pieces that stay in its cache. A GPU waits for each launch instead.
_ROWS = {"cpu": 16}
_ROWS_ELSEWHERE = 512
# Tables of this many rows by vocabulary are alive at once while a piece is measured.
_TABLES = 6


@dataclass(frozen=True, eq=False)
class Measured:
    """What is kept of some rows' distributions.

    Attributes:
        top_id: Likeliest tokens, best first.
        top_probability: Their probabilities.
        entropy: Entropy in nats.
        kl: Divergence from the final distribution, KL(final || this one), in nats.
        log_probability: Of the tokens that are followed, in nats.
        rank: Theirs; 1 is the likeliest token of all.
    """

    top_id: Int[Tensor, "row rank"]
    top_probability: Float[Tensor, "row rank"]
    entropy: Float[Tensor, " row"]
    kl: Float[Tensor, " row"]
    log_probability: Float[Tensor, "row target"]
    rank: Int[Tensor, "row target"]


def log_probabilities(
    drive: Runner, resid: Float[Tensor, "row d_model"]
) -> Float[Tensor, "row d_vocab"]:
    """Read residuals out: final norm, unembedding, soft cap; at least in single precision.

    Args:
        drive: The model.
        resid: Residuals.

    Returns:
        Log probabilities in nats.
    """
    logits = drive.logits(resid.to(drive.dtype))
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def pieces(
    drive: Runner, n_rows: int, d_vocab: int, *, memory: int | None = None
) -> Iterator[slice]:
    """Cut rows into pieces whose distributions fit into memory.

    Args:
        drive: The model.
        n_rows: How many rows there are.
        d_vocab: Number of tokens.
        memory: Bytes that a piece may take.

    Yields:
        Ranges of rows.
    """
    size = _ROWS.get(drive.device.type, _ROWS_ELSEWHERE)
    if memory is not None:
        size = min(size, max(1, memory // (4 * _TABLES * d_vocab)))
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def measured(
    logp: Float[Tensor, "row d_vocab"],
    final: Float[Tensor, "row d_vocab"],
    targets: Int[Tensor, "row target"],
    *,
    k: int,
) -> Measured:
    """Reduce the distributions of some rows.

    Args:
        logp: Their log probabilities.
        final: The log probabilities that they are compared with.
        targets: Tokens that are followed.
        k: How many of the likeliest tokens are kept.

    Returns:
        What is kept.
    """
    share = logp.exp()
    best, ids = logp.topk(k, dim=-1)
    followed = logp.gather(1, targets)
    above = [(logp > one[:, None]).sum(dim=-1) for one in followed.unbind(dim=1)]
    return Measured(
        top_id=ids,
        top_probability=best.exp(),
        entropy=-(share * logp).sum(dim=-1),
        # Never below zero but for rounding.
        kl=(final.exp() * (final - logp)).sum(dim=-1).clamp(min=0),
        log_probability=followed,
        rank=1 + torch.stack(above, dim=1) if above else targets,
    )


def joined(parts: list[Measured]) -> Measured:
    """Put pieces together again, on the CPU.

    Args:
        parts: Pieces in the order of their rows.

    Returns:
        All rows.
    """
    names = [field.name for field in fields(Measured)]
    return Measured(
        **{name: torch.cat([getattr(part, name).cpu() for part in parts]) for name in names}
    )
