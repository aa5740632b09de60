"""From a Hugging Face model to a TransformerBridge around it.

TransformerLens' own loader wants a tokenizer that it can load again by name, and goes to the hub for it.
Here the bridge is built around the model, and tokenizer and BOS rule are set as for a HookedTransformer.
"""

import copy
from typing import Any

import torch

from tvlens.models._tokens import PreparedTokenizer
from tvlens.models._verify import note_original, refuse_unread, verify_bridge
from tvlens.models.hooked.config import UnsupportedModelError


def from_huggingface(
    hf_model: Any,
    tokenizer: PreparedTokenizer,
    *,
    name: str,
    device: str | None,
    dtype: torch.dtype,
    processing: str = "none",
    share: bool = False,
    verify: bool = True,
) -> Any:
    """Build a TransformerBridge around a Hugging Face causal language model.

    Args:
        hf_model: The Hugging Face model; it is left as it is unless `share`.
        tokenizer: The tokenizer, ready for TransformerLens.
        name: The name the new model goes by.
        device: Where to put the weights; None where they have been put already.
        dtype: The dtype of the weights.
        processing: ``"none"``, or ``"fold"`` for TransformerLens' compatibility mode.
        share: Whether the bridge may be built around this very object, because nobody else holds it.
        verify: Whether to compare logits on a few tokens before handing the model over.

    Returns:
        A TransformerBridge in evaluation mode.

    Raises:
        UnsupportedModelError: The bridge cannot express the model, or gives other logits.
    """
    refuse_unread(hf_model)
    original = note_original(hf_model) if verify else None
    # A bridge puts its own parts into the model it wraps.
    own = hf_model if share else copy.deepcopy(hf_model)
    own.set_attn_implementation("eager")
    _place(own.eval(), device, dtype)
    model = _build(own, name)
    if processing == "fold":
        _fold(model)
    _set_tokenizer(model, tokenizer)
    if original is not None:
        verify_bridge(original, model, processed=processing != "none")
    return model


def is_bridge(model: Any) -> bool:
    """Say whether a model is a TransformerBridge."""
    from transformer_lens.model_bridge import TransformerBridge

    return isinstance(model, TransformerBridge)


def processing_of(model: Any) -> str:
    """Say which weight processing a TransformerBridge carries: ``"none"`` or ``"fold"``."""
    return "fold" if getattr(model, "_weights_processed", False) else "none"


def _place(hf_model: Any, device: str | None, dtype: torch.dtype) -> None:
    """Put a model on its device, and its weights into their type."""
    if device is not None:
        hf_model.to(device)
    if getattr(hf_model, "is_quantized", False):
        return
    for parameter in hf_model.parameters():
        # Buffers stay: Hugging Face keeps the frequencies of rotary positions in full precision.
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _build(hf_model: Any, name: str) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    from tvlens.models._files import first_line, quiet

    architecture = type(hf_model).__name__
    try:
        with quiet():
            model: Any = build_bridge_from_module(
                hf_model, architecture, hf_config=hf_model.config, model_name=name
            )
    except Exception as error:
        raise UnsupportedModelError(
            f"a {architecture} cannot be wrapped in a TransformerBridge: {first_line(error)}"
        ) from error
    model.cfg.d_vocab = hf_model.get_input_embeddings().weight.shape[0]
    model.cfg.d_vocab_out = hf_model.get_output_embeddings().weight.shape[0]
    return model


def _fold(model: Any) -> None:
    """Process the weights as TransformerLens does by default, or say that it cannot."""
    from tvlens.models._files import first_line, quiet

    architecture = type(model.original_model).__name__
    if not getattr(model.adapter, "supports_fold_ln", True):
        raise UnsupportedModelError(
            f"the norms of a {architecture} cannot be folded: use processing='none'."
        )
    # A soft cap on the logits is not indifferent to a constant added to all of them.
    centre = not (getattr(model.cfg, "output_logits_soft_cap", None) or 0) > 0
    try:
        with quiet():
            model.enable_compatibility_mode(disable_warnings=True, center_unembed=centre)
    except Exception as error:
        raise UnsupportedModelError(
            f"TransformerLens cannot fold the weights of a {architecture} in a TransformerBridge "
            f"({first_line(error)}): use processing='none'."
        ) from error


def _set_tokenizer(model: Any, tokenizer: PreparedTokenizer) -> None:
    """Set the tokenizer as it is; only a second assignment makes the bridge load it again."""
    model.tokenizer = tokenizer.tokenizer
    cfg, own = model.cfg, tokenizer.tokenizer
    cfg.default_prepend_bos = tokenizer.prepend_bos
    cfg.tokenizer_prepends_bos = tokenizer.prepends_itself
    ids = own("x")["input_ids"]
    cfg.tokenizer_appends_eos = len(ids) > 1 and ids[-1] == own.eos_token_id
