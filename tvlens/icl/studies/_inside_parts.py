"""Who says the context's label, and where does it act: direct attribution, and patching of a moved label."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.attribution import attribute
from tvlens.patching import patch

SITES = ("resid_pre", "q", "k", "v", "pattern", "attn_out", "mlp_out")
PARTS = (
    "label token, block 0", "label token, block 1", "context input, block 0", "context input, block 1",
    "query token, block 0", "query token, block 1", "query's embedding", "MLP 0", "MLP 1", "biases",
)  # fmt: skip
"""What writes the logits at the query: attention, by the token that it reads, and the query's own path."""
_TOKENS = ("context input", "label token", "query token")


def direct(
    model: Any,
    tokens: Int[Tensor, "prompt position"],
    *,
    shown: Int[Tensor, " prompt"],
    own: Int[Tensor, " prompt"],
) -> Float[np.ndarray, "part prompt"]:
    """Split what the model says for the context's label and against the query's own one.

    Args:
        model: What `tvlens.icl.export` gave, of two blocks.
        tokens: Prompts x1, y1, x.
        shown: Labels that contexts show.
        own: Labels of the queries' classes in training.

    Returns:
        Logits by `PARTS`; they add up to the difference of the two labels' logits.
    """
    found = attribute(
        model, tokens, answers=shown.tolist(), wrong=own.tolist(), by=("head", "position")
    ).data
    said = {
        f"{token}, block {layer}": found["attention"]
        .sel(layer=layer, position=position)
        .sum("head")
        for position, token in enumerate(_TOKENS)
        for layer in found["layer"].values
    }
    said |= {f"MLP {layer}": found["mlp"].sel(layer=layer) for layer in found["layer"].values}
    said["query's embedding"] = found["embedding"] + found["positional_embedding"]
    said["biases"] = (
        found["attention_bias"].sum("layer") + found["final_norm_bias"] + found["unembedding_bias"]
    )
    return np.stack([said[part].values for part in PARTS])


def moved_label(
    model: Any,
    base: Int[Tensor, "prompt position"],
    flipped: Int[Tensor, "prompt position"],
) -> tuple[Float[np.ndarray, "site layer place prompt"], Float[np.ndarray, " prompt"]]:
    """Write what the context's label moved on changes into the run with the true label, place by place.

    Args:
        model: What `tvlens.icl.export` gave.
        base: Prompts x1, y1, x.
        flipped: The same prompts with another y1.

    Returns:
        By how much the moved label's logit rises against the true one's where one place alone is
        exchanged, at label token and query; and where the whole prompt is.
    """
    found = patch(
        model, base, flipped, answers=base[:, 1].tolist(), wrong=flipped[:, 1].tolist(),
        sites=SITES, by=("layer", "position"), positions=(1, 2), direction="noise",
    ).data  # fmt: skip
    rise = (found["clean"] - found["value"]).transpose("site", "layer", "position", "prompt")
    return rise.values, (found["clean"] - found["corrupted"]).values
