"""A few logits after a few tokens: by them a model is known, whatever it is called."""

from collections.abc import Sequence
from typing import Any

import torch

from tvlens.encoding import TokenBatch
from tvlens.engine import run
from tvlens.engine.readout import TokenLogits
from tvlens.engine.request import Request

SAME = 0.1
"""Probes that differ by less, as a share of their spread, are of one model."""
_LOGITS = 64


def probe(model: Any) -> list[float]:
    """Read some logits that hardly any other model has.

    Args:
        model: A TransformerLens model.

    Returns:
        Logits of 64 tokens after six others, all spread over the vocabulary.

    Example:
        >>> from tvlens.testing import tiny_model
        >>> len(probe(tiny_model()))
        64
    """
    d_vocab = int(model.cfg.d_vocab)
    tokens = torch.linspace(0, d_vocab - 1, 6).long()[None]
    columns = torch.linspace(0, d_vocab - 1, min(_LOGITS, d_vocab)).long()[None]
    (output,) = run(model, [Request(TokenBatch.of_ids(tokens), readout=TokenLogits(columns))])
    return output.values["logits"].flatten().float().cpu().tolist()


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Say how far two probes are from each other, as a share of the first one's spread.

    Args:
        one: A probe.
        other: Another one; infinitely far if it is of another length.

    Returns:
        The share; below `SAME` they are of one model.

    Example:
        >>> apart([0.0, 1.0], [0.0, 1.0])
        0.0
    """
    if len(one) != len(other):
        return float("inf")
    mine, theirs = torch.tensor(one), torch.tensor(other)
    return float((mine - theirs).norm() / (mine - mine.mean()).norm())
