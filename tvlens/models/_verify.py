"""The check that a converted model is the model: its logits beside Hugging Face's, on a few tokens.

A conversion that forgets a setting still runs and still looks plausible, so every conversion is
compared with the original. A HookedTransformer is compared while both are in memory; a bridge takes the
original apart, so what the original says is noted before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.models.hooked.config import UnsupportedModelError

# Of the spread of the log-probabilities: rounding stays far below, a wrong setting far above. In half
# precision single tokens of a whole vocabulary may be far off, so there the mean square counts.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.1}
_N_TOKENS = 32


@dataclass(frozen=True)
class Original:
    """What a Hugging Face model says of a few tokens.

    Attributes:
        architecture: Its class.
        tokens: The tokens.
        log_probs: Its log-probabilities after each of them.
        dtype: The type it computed them in.
    """

    architecture: str
    tokens: Int[Tensor, "row position"]
    log_probs: Float[Tensor, "row position d_vocab"]
    dtype: torch.dtype


def refuse_unread(hf_model: Any) -> None:
    """Refuse a model some of whose weights are elsewhere than in memory.

    Args:
        hf_model: The Hugging Face model.

    Raises:
        UnsupportedModelError: Some are.
    """
    if any(parameter.is_meta for parameter in hf_model.parameters()):
        raise UnsupportedModelError(
            "some of the model's weights are not in memory: load it without offloading, onto devices "
            "that hold all of it."
        )


def note_original(hf_model: Any) -> Original:
    """Run a Hugging Face model on a few tokens and leave it as it was.

    Args:
        hf_model: The Hugging Face model.

    Returns:
        What it says of them.
    """
    config = hf_model.config.get_text_config(decoder=True)
    length = min(_N_TOKENS, getattr(config, "max_position_embeddings", None) or _N_TOKENS)
    d_vocab = hf_model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(length)[None] * 7 + 11) % d_vocab
    with torch.no_grad(), _as_eager(hf_model):
        logits = hf_model(input_ids=tokens.to(hf_model.device)).logits
    log_probs = logits.float().cpu().log_softmax(-1)
    return Original(type(hf_model).__name__, tokens, log_probs, logits.dtype)


def verify_logits(hf_model: Any, model: Any, *, processed: bool) -> None:
    """Compare a HookedTransformer with its original on a few tokens.

    Args:
        hf_model: The Hugging Face model.
        model: The HookedTransformer made from it.
        processed: Whether the weights were processed, which moves all logits by a constant.

    Raises:
        UnsupportedModelError: Their log-probabilities differ by more than rounding.
    """
    original = note_original(hf_model)
    with torch.no_grad():
        logits = model(original.tokens.to(model.cfg.device), prepend_bos=False)
    compare(original, logits, kind="HookedTransformer", dtype=model.cfg.dtype, processed=processed)


def verify_bridge(original: Original, model: Any, *, processed: bool) -> None:
    """Compare a bridge, read out as tvlens does it, with what was noted of its original.

    Args:
        original: What the original said.
        model: The TransformerBridge.
        processed: Whether the weights were processed, which moves all logits by a constant.

    Raises:
        UnsupportedModelError: Their log-probabilities differ by more than rounding.
    """
    from tvlens.models.bridge.run import BridgeRunner

    runner = BridgeRunner(model)
    tokens = original.tokens.to(runner.device)
    with torch.no_grad():
        resid = runner.whole(tokens, torch.ones_like(tokens), [])
        logits = runner.logits(resid.flatten(0, 1)).unflatten(0, tokens.shape)
    compare(original, logits, kind="TransformerBridge", dtype=runner.dtype, processed=processed)


def compare(
    original: Original,
    logits: Float[Tensor, "row position d_vocab"],
    *,
    kind: str,
    dtype: torch.dtype,
    processed: bool,
) -> None:
    """Refuse a model whose log-probabilities are not its original's.

    Args:
        original: What the original said.
        logits: What the new model says of the same tokens.
        kind: The new model's class.
        dtype: The type of its weights.
        processed: Whether they were processed.

    Raises:
        UnsupportedModelError: The log-probabilities differ by more than rounding.
    """
    found = logits.float().cpu().log_softmax(-1)
    numbers = (original.dtype, dtype)
    tolerance = max(_TOLERANCE.get(number, 0.1) for number in numbers)
    half = any(number.itemsize < 4 for number in numbers)
    difference = _difference(found, original.log_probs, mean=half)
    if not difference <= tolerance:
        how = "folded " if processed else ""
        raise UnsupportedModelError(
            f"the {how}{kind} made from this {original.architecture} gives other "
            f"log-probabilities than the original: they differ by {difference:.1e} of their "
            f"spread, where {tolerance:.0e} is allowed. {kind} lacks one of the model's "
            "settings, or the model is no plain causal language model."
        )


def _difference(
    found: Float[Tensor, "row position d_vocab"],
    wanted: Float[Tensor, "row position d_vocab"],
    *,
    mean: bool,
) -> float:
    """The largest difference, or the root of the mean square, as a share of the spread."""
    spread, apart = wanted.std(-1).mean().clamp_min(1e-6), found - wanted
    return float((apart.square().mean().sqrt() if mean else apart.abs().max()) / spread)


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
