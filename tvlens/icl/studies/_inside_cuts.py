"""Cutting a transformer in two: what is left of its answer without the context, and without the query.

Attention weights from the query are held as they are in the untouched run, so that a cut takes away what is
read, and not the choice of what to read. Then either the context's label is no longer read, and what remains
speaks from the weights: g. Or the query itself is replaced by the mean over queries, and what remains
speaks from the context, with the weights that the query chose: h.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, LastLogits, Read, Request, run

RUNS = {
    "f": "untouched",
    "g": "the query sees itself alone",
    "g: label zero": "weight of the label token zero",
    "g: label renormalised": "weight of the label token zero, the others scaled to sum to 1",
    "g: label mean": "values of the label token replaced by their mean over training prompts",
    "h": "the query's input replaced by the mean over training queries",
    "h: no MLP": "the same, and both MLPs at the query give their mean over training prompts",
    "neither": "the cuts of g and of h",
    "wrong token": "weight of the context's input zero, the others scaled to sum to 1",
}
"""What is cut in each run; attention weights from the query are the untouched run's but for that."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What untouched runs held at the query, by prompt.

    Attributes:
        logits: Of the labels.
        pattern: Attention weights from the query.
        values: Values of the label tokens.
        query: The residual before the first block.
        mlp: What MLPs gave.
    """

    logits: Float[Tensor, "prompt label"]
    pattern: Float[Tensor, "prompt layer head key"]
    values: Float[Tensor, "prompt layer position head d_head"]
    query: Float[Tensor, "prompt d_model"]
    mlp: Float[Tensor, "prompt layer d_model"]


def observe(model: Any, tokens: Int[Tensor, "prompt position"]) -> Seen:
    """Run prompts untouched, and keep what cuts are made of.

    Args:
        model: What `tvlens.icl.export` gave.
        tokens: Prompts x1, y1, ..., xL, yL, x.

    Returns:
        Activations at the query.
    """
    layers = tuple(range(model.cfg.n_layers))
    reads = (
        Read("pattern", layers),
        Read("v", layers, None),
        Read("resid_pre", (0,)),
        Read("mlp_out", layers),
    )
    (output,) = run(model, [Request(TokenBatch.of_ids(tokens), reads=reads, readout=LastLogits())])
    pattern, values, query, mlp = (kept[0] for kept in output.activations)
    return Seen(output.values["logits"][0], pattern, values, query[:, 0], mlp)


def cuts(seen: Seen, usual: Seen) -> dict[str, tuple[Edit, ...]]:
    """Write out the edits of every run of `RUNS`.

    Args:
        seen: The prompts' untouched runs.
        usual: Those of prompts as training has them, for means.

    Returns:
        Edits by run.

    Raises:
        ValueError: The prompts are of another length than those of training.
    """
    n = seen.pattern.shape[-1]
    if usual.pattern.shape[-1] != n:
        raise ValueError(
            f"means are taken over prompts of {n} tokens; prompts of {usual.pattern.shape[-1]} arrived."
        )
    labels, inputs = list(range(1, n - 1, 2)), list(range(0, n - 1, 2))
    layers = range(seen.pattern.shape[1])

    def weights(without: list[int], *, whole: bool = True) -> tuple[Edit, ...]:
        kept = seen.pattern.clone()
        kept[..., without] = 0
        if whole:
            # Where everything went to what is cut, nothing is left to scale.
            kept = kept / kept.sum(dim=-1, keepdim=True).clamp(min=1e-12)
        return tuple(Edit("pattern", layer, kept[:, layer]) for layer in layers)

    held, alone = weights([], whole=False), weights(labels + inputs)
    values = rearrange(usual.values.mean(dim=0), "layer position head d -> layer position 1 head d")
    mean = tuple(Edit("v", layer, values[layer, at], at) for layer in layers for at in labels)
    query = (Edit("resid_pre", 0, usual.query.mean(dim=0, keepdim=True)),)
    mlp = tuple(
        Edit("mlp_out", layer, usual.mlp[:, layer].mean(dim=0, keepdim=True)) for layer in layers
    )
    return {
        "f": (),
        "g": alone,
        "g: label zero": weights(labels, whole=False),
        "g: label renormalised": weights(labels),
        "g: label mean": held + mean,
        "h": held + query,
        "h: no MLP": held + query + mlp,
        "neither": alone + query,
        "wrong token": weights(inputs),
    }


def answers(
    model: Any, tokens: Int[Tensor, "prompt position"], usual: Int[Tensor, "row position"]
) -> Mapping[str, Float[Tensor, "prompt label"]]:
    """Run prompts with each cut.

    Args:
        model: What `tvlens.icl.export` gave.
        tokens: Prompts x1, y1, ..., xL, yL, x.
        usual: Prompts as training has them, for means.

    Returns:
        Log-probabilities in nats, by run of `RUNS`.
    """
    seen = observe(model, tokens)
    edits = cuts(seen, observe(model, usual))
    request = Request(TokenBatch.of_ids(tokens), cells=tuple(edits.values()), readout=LastLogits())
    (output,) = run(model, [request])
    said = output.values["logits"].double().log_softmax(dim=-1)
    return dict(zip(edits, said, strict=True))
