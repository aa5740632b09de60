"""The check that a converted model is the model: its logits beside Hugging Face's, on a few tokens.

A conversion that forgets a setting still runs and still looks plausible, so every conversion is
compared with the original while both are in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.models.hooked.config import UnsupportedModelError

# Of the spread of the log-probabilities: rounding stays far below, a wrong setting far above.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.2}
_N_TOKENS = 32


def verify_logits(hf_model: Any, model: Any, *, processed: bool) -> None:
    """Compare a converted model with its original on a few tokens.

    Args:
        hf_model: The Hugging Face model.
        model: The HookedTransformer made from it.
        processed: Whether the weights were processed, which moves all logits by a constant.

    Raises:
        UnsupportedModelError: Their log-probabilities differ by more than rounding.
    """
    length = min(_N_TOKENS, model.cfg.n_ctx)
    tokens = (torch.arange(length)[None] * 7 + 11) % model.cfg.d_vocab
    with torch.no_grad():
        with _as_eager(hf_model):
            logits = hf_model(input_ids=tokens.to(hf_model.device)).logits
        wanted = logits.float().cpu().log_softmax(-1)
        found = model(tokens.to(model.cfg.device), prepend_bos=False).float().cpu().log_softmax(-1)
    tolerance = max(_TOLERANCE.get(dtype, 0.2) for dtype in (logits.dtype, model.cfg.dtype))
    difference = _difference(found, wanted)
    if not difference <= tolerance:
        how = "folded " if processed else ""
        raise UnsupportedModelError(
            f"the {how}HookedTransformer made from this {type(hf_model).__name__} gives other "
            f"log-probabilities than the original: they differ by {difference:.1e} of their "
            f"spread, where {tolerance:.0e} is allowed. HookedTransformer lacks one of the model's "
            "settings, or the model is no plain causal language model."
        )


def _difference(
    found: Float[Tensor, "row position d_vocab"], wanted: Float[Tensor, "row position d_vocab"]
) -> float:
    spread = wanted.std(-1).mean().clamp_min(1e-6)
    return float((found - wanted).abs().max() / spread)


@contextmanager
def _as_eager(hf_model: Any) -> Iterator[None]:
    """Run with plain attention and no dropout, and put everything back."""
    # The fused kernels leave out soft caps, which the plain implementation and ours have.
    attention = hf_model.config._attn_implementation
    training = [module for module in hf_model.modules() if module.training]
    hf_model.config._attn_implementation = "eager"
    hf_model.eval()
    try:
        yield
    finally:
        hf_model.config._attn_implementation = attention
        for module in training:
            module.training = True
