"""From a Hugging Face configuration to a HookedTransformerConfig, one function a family.

TransformerLens has such a table of its own, but it knows most families by the names of released
models, so it cannot read a folder, a GGUF file or a model made a moment ago. Here every number
comes from the configuration at hand, and a setting that HookedTransformer cannot express is refused
rather than dropped: a dropped one gives plausible, wrong logits.
"""

import math
from collections.abc import Callable
from typing import Any

Fields = dict[str, Any]


class UnsupportedModelError(ValueError):
    """HookedTransformer cannot express this model."""


def hooked_config(hf_model: Any, *, dtype: Any, device: str) -> Any:
    """Build the HookedTransformerConfig of a Hugging Face causal language model.

    Args:
        hf_model: The Hugging Face model.
        dtype: The torch dtype the weights will have.
        device: The device the weights will be on.

    Returns:
        A `transformer_lens.HookedTransformerConfig` with raw weights in mind.

    Raises:
        UnsupportedModelError: The architecture, or one of its settings, cannot be expressed.
    """
    from transformer_lens import HookedTransformerConfig

    architecture = type(hf_model).__name__
    if architecture not in _FAMILIES:
        raise UnsupportedModelError(
            f"a {architecture} cannot be turned into a HookedTransformer. "
            f"Supported: {', '.join(supported_architectures())}."
        )
    fields = _FAMILIES[architecture](hf_model.config) | {
        "d_vocab": hf_model.get_input_embeddings().weight.shape[0],
        "d_vocab_out": hf_model.get_output_embeddings().weight.shape[0],
        "original_architecture": architecture,
        "init_weights": False,
        "tokenizer_name": None,
        "dtype": dtype,
        "device": device,
    }
    try:
        return HookedTransformerConfig(**fields)
    except AssertionError as error:
        raise UnsupportedModelError(f"{architecture}: {error}") from error


def supported_architectures() -> tuple[str, ...]:
    """List the Hugging Face classes that can be turned into a HookedTransformer."""
    return tuple(sorted(_FAMILIES))


def _refuse(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name, None):
            raise UnsupportedModelError(
                f"{config.model_type} with {name}={getattr(config, name)!r} cannot be turned into "
                f"a HookedTransformer, which has no such setting; with {name} off it can."
            )


def _rope(parameters: Fields, config: Any) -> Fields:
    kind = parameters.get("rope_type", "default")
    fields: Fields = {"rotary_base": parameters["rope_theta"]}
    if kind == "linear":
        fields["rotary_scaling_factor"] = parameters["factor"]
    elif kind == "llama3":
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": parameters["factor"],
            "NTK_by_parts_low_freq_factor": parameters["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": parameters["high_freq_factor"],
            "NTK_original_ctx_len": parameters["original_max_position_embeddings"],
        }
    elif kind != "default":
        raise UnsupportedModelError(
            f"{config.model_type} with rope_type={kind!r} cannot be turned into a "
            "HookedTransformer; with one of these it can: default, linear, llama3."
        )
    return fields


def _windows(config: Any) -> Fields:
    """Say which layers see only a window, from `layer_types` or one window for all layers."""
    n_layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or (
        ["sliding_attention" if window else "full_attention"] * n_layers
    )
    names = {"full_attention": "global", "sliding_attention": "local"}
    if other := sorted(set(kinds) - set(names)):
        raise UnsupportedModelError(
            f"{config.model_type} with attention of type {other[0]!r} cannot be turned into a "
            f"HookedTransformer. Supported: {', '.join(names)}."
        )
    if window is None or "sliding_attention" not in kinds:
        return {}
    return {
        "use_local_attn": True,
        "window_size": window,
        "attn_types": [names[kind] for kind in kinds],
    }


def _gpt(config: Any) -> Fields:
    """What GPT-2 and GPT-J call by the same names."""
    return {
        "d_model": config.n_embd,
        "d_head": config.n_embd // config.n_head,
        "n_heads": config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "n_layers": config.n_layer,
        "n_ctx": config.n_positions,
        "eps": config.layer_norm_epsilon,
        "act_fn": config.activation_function,
    }


def _gpt2(config: Any) -> Fields:
    _refuse(config, "add_cross_attention")
    return _gpt(config) | {
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "normalization_type": "LN",
    }


def _common(config: Any) -> Fields:
    """Everything that the families after GPT-2 name alike."""
    n_heads = config.num_attention_heads
    return {
        "d_model": config.hidden_size,
        "d_head": getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        "n_heads": n_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "act_fn": getattr(config, "hidden_activation", None) or config.hidden_act,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
    }


def _neox(config: Any) -> Fields:
    if not config.attention_bias:
        raise UnsupportedModelError("gpt_neox without attention biases cannot be converted.")
    fields = _common(config) | _rope(config.rope_parameters, config)
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return fields | {
        "eps": config.layer_norm_eps,
        "rotary_dim": int(fields["d_head"] * share),
        "parallel_attn_mlp": config.use_parallel_residual,
        "normalization_type": "LN",
    }


def _gated(config: Any, rope: Fields | None = None) -> Fields:
    return (
        _common(config)
        | _rope(rope or config.rope_parameters, config)
        | _windows(config)
        | {
            "eps": config.rms_norm_eps,
            "n_key_value_heads": config.num_key_value_heads,
            "normalization_type": "RMS",
            "final_rms": True,
            "gated_mlp": True,
        }
    )


def _llama(config: Any) -> Fields:
    _refuse(config, "attention_bias", "mlp_bias")
    fields = _gated(config)
    if fields["n_key_value_heads"] == fields["n_heads"]:
        # TransformerLens' converters for Llama and Qwen3 write ungrouped weights in this case.
        fields["n_key_value_heads"] = None
    return fields


def _qwen3(config: Any) -> Fields:
    return _llama(config) | {"use_qk_norm": True}


def _gemma(config: Any) -> Fields:
    _refuse(config, "attention_bias", "use_bidirectional_attention")
    return _gated(config)


def _capped(config: Any) -> Fields:
    """Gemma 2 and 3: norms on both sides of a block, a fixed query scale, soft caps."""
    return {
        "use_normalization_before_and_after": True,
        "attn_scale": math.sqrt(config.query_pre_attn_scalar),
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
    }


def _gemma2(config: Any) -> Fields:
    return _gemma(config) | _capped(config)


def _gemma3(config: Any) -> Fields:
    _refuse(config, "attention_bias", "use_bidirectional_attention")
    ropes = config.rope_parameters
    local = _rope(ropes["sliding_attention"], config)
    if set(local) != {"rotary_base"}:
        raise UnsupportedModelError("gemma3 with scaled rope in its sliding layers is unsupported.")
    fields = _gated(config, ropes["full_attention"]) | _capped(config)
    return fields | {"use_qk_norm": True, "rotary_base_local": local["rotary_base"]}


def _gptj(config: Any) -> Fields:
    return _gpt(config) | {
        "positional_embedding_type": "rotary",
        "rotary_dim": config.rotary_dim,
        "rotary_adjacent_pairs": True,
        "parallel_attn_mlp": True,
        "normalization_type": "LN",
    }


def _gpt_neo(config: Any) -> Fields:
    return {
        "d_model": config.hidden_size,
        "d_head": config.hidden_size // config.num_heads,
        "n_heads": config.num_heads,
        "d_mlp": config.intermediate_size or 4 * config.hidden_size,
        "n_layers": config.num_layers,
        "n_ctx": config.max_position_embeddings,
        "eps": config.layer_norm_epsilon,
        "act_fn": config.activation_function,
        "attn_types": config.attention_layers,
        "window_size": config.window_size,
        "use_local_attn": True,
        "use_attn_scale": False,
        "normalization_type": "LN",
    }


def _opt(config: Any) -> Fields:
    if not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size:
        raise UnsupportedModelError(
            "an OPT model with norms after its blocks or a narrower embedding, such as opt-350m, "
            "cannot be turned into a HookedTransformer; the other sizes can."
        )
    return {
        "d_model": config.hidden_size,
        "d_head": config.hidden_size // config.num_attention_heads,
        "n_heads": config.num_attention_heads,
        "d_mlp": config.ffn_dim,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "act_fn": config.activation_function,
        "normalization_type": "LN",
    }


def _phi(config: Any) -> Fields:
    _refuse(config, "qk_layernorm")
    fields = _common(config) | _rope(config.rope_parameters, config)
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return fields | {
        "eps": config.layer_norm_eps,
        "rotary_dim": int(fields["d_head"] * share),
        "parallel_attn_mlp": True,
        "normalization_type": "LN",
    }


_FAMILIES: dict[str, Callable[[Any], Fields]] = {
    "GPT2LMHeadModel": _gpt2,
    "GPTJForCausalLM": _gptj,
    "GPTNeoForCausalLM": _gpt_neo,
    "GPTNeoXForCausalLM": _neox,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "GemmaForCausalLM": _gemma,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _gated,
    "OPTForCausalLM": _opt,
    "PhiForCausalLM": _phi,
    "Qwen2ForCausalLM": _gated,
    "Qwen3ForCausalLM": _qwen3,
}
