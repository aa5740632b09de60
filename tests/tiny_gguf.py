"""The tiny Llama as a GGUF file, as llama.cpp would write it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import tiny

GGUF = "tiny-llama.gguf"
TOKENS = torch.arange(3, 30)[None]


def write_gguf(path: Path) -> None:
    """Write the tiny Llama, with a byte-level tokenizer."""
    from gguf import GGUFWriter

    hf, config = tiny.hf("llama"), tiny.hf("llama").config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, config.vocab_size)
    for key, tensor in _llama_cpp_tensors(hf).items():
        writer.add_tensor(key, np.ascontiguousarray(tensor.detach().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, size: int) -> None:
    core = json.loads(tiny.tokenizer("gpt2").backend_tokenizer.to_str())["model"]
    tokens = sorted(core["vocab"], key=core["vocab"].__getitem__)
    special = len(tokens)
    tokens += ["<s>", "</s>"] + [f"unused{i}" for i in range(size - special - 2)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in core["merges"]])
    writer.add_bos_token_id(special)
    writer.add_eos_token_id(special + 1)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


def _llama_cpp_tensors(hf: Any) -> dict[str, torch.Tensor]:
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    state, config = hf.state_dict(), hf.config
    out = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        for theirs, ours in names.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            if ours in heads:
                # llama.cpp keeps the two halves of a rotary pair side by side.
                half = weight.unflatten(0, (heads[ours], 2, -1))
                weight = half.transpose(1, 2).flatten(0, 2)
            out[f"blk.{layer}.{ours}.weight"] = weight
    return out


def assert_same(model: Any, name: str = "llama") -> None:
    with torch.no_grad():
        assert float((model(TOKENS) - tiny.hf(name)(TOKENS).logits).abs().max()) <= 1e-4
