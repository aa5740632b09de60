"""Each family and setting is carried over exactly, or refused."""

from typing import Any

import pytest
import torch
import transformers

from tests import tiny
from tests.tiny import difference
from tvlens.models import UnsupportedModelError, load_model, supported_architectures


def small_llama(**settings: Any) -> Any:
    size = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size | heads | settings))
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@tiny.needs_hooked
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True cannot be turned"),
        ({"mlp_bias": True}, "mlp_bias=True cannot be turned"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type='dynamic'.*default, linear, llama3",
        ),
        ({"hidden_act": "mish"}, "act_fn=mish must be one of"),
    ],
)
def test_settings_that_cannot_be_expressed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(small_llama(**settings), tokenizer=tiny.tokenizer("gpt2"), device="cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"head_dim": 12},
        {"num_key_value_heads": 1},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        {"rope_theta": 500.0},
        {"rms_norm_eps": 0.1},
    ],
)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_settings_that_a_plain_llama_has_not(settings: dict[str, Any], kind: str) -> None:
    hf = small_llama(**settings)
    tokens = torch.arange(40)[None]
    # The control: the setting matters, so that equal logits mean it was carried over.
    if "head_dim" not in settings and "num_key_value_heads" not in settings:
        plain = small_llama()
        assert float((plain(tokens).logits - hf(tokens).logits).detach().abs().max()) > 1e-2
    model: Any = load_model(hf, tokenizer=tiny.tokenizer("gpt2"), device="cpu", backend=kind)
    assert difference(model, hf, tokens) <= 1e-4


def other_families() -> dict[str, Any]:
    t = transformers
    small: dict[str, Any] = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    gated = {**small, "intermediate_size": 48, "num_key_value_heads": 2}
    gemma = {**gated, "head_dim": 12}
    old: dict[str, Any] = {"vocab_size": 600, "n_embd": 32, "n_layer": 2, "n_head": 4}
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}
    return {
        "gpt2-odd": t.GPT2Config(
            **old, n_positions=64, n_inner=40, scale_attn_by_inverse_layer_idx=True
        ),
        "neox-sequential": t.GPTNeoXConfig(
            **small,
            intermediate_size=48,
            use_parallel_residual=False,
            rope_parameters={"rope_theta": 300.0, "partial_rotary_factor": 0.5},
        ),
        "mistral": t.MistralConfig(**gated, sliding_window=6),
        "qwen2-window": t.Qwen2Config(**gated, **window),
        "qwen3": t.Qwen3Config(**gated, head_dim=12),
        "gemma": t.GemmaConfig(**gemma),
        "gemma2": t.Gemma2Config(**gemma, **caps, sliding_window=6, query_pre_attn_scalar=7),
        "gptj": t.GPTJConfig(**old, n_positions=64, rotary_dim=4),
        "gpt-neo": t.GPTNeoConfig(
            vocab_size=600,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 1]],
            window_size=6,
        ),
        "opt": t.OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32),
        "phi": t.PhiConfig(**small, intermediate_size=128),
    }


def other_family(name: str, kind: str) -> tuple[Any, Any]:
    """A model of another family, as Hugging Face has it and as tvlens loads it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        hf = transformers.AutoModelForCausalLM.from_config(
            other_families()[name], attn_implementation="eager"
        )
        for parameter in hf.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
    hf.eval()
    tokenizer = tiny.tokenizer("llama" if name.startswith("gemma") else "gpt2")
    return hf, load_model(hf, tokenizer=tokenizer, device="cpu", backend=kind)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("name", sorted(other_families()))
def test_other_families(name: str, kind: str) -> None:
    hf, model = other_family(name, kind)
    assert type(hf).__name__ in supported_architectures()
    assert difference(model, hf, torch.arange(40)[None] + 5) <= 1e-4


def refused_configurations() -> dict[str, tuple[Any, str]]:
    t = transformers
    small: dict[str, Any] = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "intermediate_size": 48}
    kinds = ["chunked_attention", "full_attention"]
    ropes = {
        "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    }
    opt = t.OPTConfig(
        **{k: v for k, v in small.items() if k != "intermediate_size"},
        ffn_dim=48,
        word_embed_proj_dim=16,
    )
    return {
        "chunked": (t.Qwen2Config(**small, layer_types=kinds), "attention of type 'chunked_attent"),
        "neox": (t.GPTNeoXConfig(**small, attention_bias=False), "without attention biases"),
        "gemma3": (
            t.Gemma3TextConfig(**small, head_dim=8, num_key_value_heads=2, rope_parameters=ropes),
            "scaled rope in its sliding layers",
        ),
        "opt": (opt, "such as opt-350m"),
    }


@tiny.needs_hooked
@pytest.mark.parametrize("name", sorted(refused_configurations()))
def test_configurations_that_cannot_be_expressed(name: str) -> None:
    config, message = refused_configurations()[name]
    hf = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(hf, tokenizer=tiny.tokenizer("llama"), device="cpu")


@tiny.needs_hooked
def test_a_conversion_that_went_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvlens.models.hooked import config as hooked_config

    def forgetful(config: Any) -> dict[str, Any]:
        return hooked_config._gated(config) | {"rotary_base": 77.0}

    monkeypatch.setitem(hooked_config._FAMILIES, "Qwen2ForCausalLM", forgetful)
    with pytest.raises(UnsupportedModelError, match="gives other log-probabilities"):
        load_model(tiny.hf("qwen2"), tokenizer=tiny.tokenizer("qwen2"), device="cpu")


@tiny.needs_hooked
def test_weights_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvlens.models.hooked import config as hooked_config

    def narrow(config: Any) -> dict[str, Any]:
        return hooked_config._gated(config) | {"d_mlp": 7}

    monkeypatch.setitem(hooked_config._FAMILIES, "Qwen2ForCausalLM", narrow)
    with pytest.raises(UnsupportedModelError, match=r"not fit a HookedTransformer: size mismatch"):
        load_model(tiny.hf("qwen2"), tokenizer=tiny.tokenizer("qwen2"), device="cpu")


@tiny.needs_hooked
def test_norms_that_cannot_be_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.utilities import architectures

    monkeypatch.setattr(architectures, "POST_NORM_ARCHITECTURES", {"GPT2LMHeadModel"})
    with pytest.raises(UnsupportedModelError, match="cannot be folded: use processing='none'"):
        load_model(
            tiny.hf("gpt2"), tokenizer=tiny.tokenizer("gpt2"), device="cpu", processing="fold"
        )


@tiny.needs_hooked
def test_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvlens.models.hooked import config as hooked_config

    def ungrouped(config: Any) -> dict[str, Any]:
        return hooked_config._gated(config) | {"use_qk_norm": True}

    monkeypatch.setitem(hooked_config._FAMILIES, "Qwen2ForCausalLM", ungrouped)
    with pytest.raises(UnsupportedModelError, match=r"do not fit.*missing \['blocks.0.attn.k_norm"):
        load_model(tiny.hf("qwen2"), tokenizer=tiny.tokenizer("qwen2"), device="cpu")


@tiny.needs_hooked
@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("is_quantized", True, "is quantized"),
        ("_hf_peft_config_loaded", True, "merge the adapter"),
    ],
)
def test_models_that_are_not_plain(
    attribute: str, value: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = small_llama()
    monkeypatch.setattr(hf, attribute, value, raising=False)
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(hf, tokenizer=tiny.tokenizer("gpt2"), device="cpu")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_weights_that_are_not_in_memory(kind: str) -> None:
    hf = small_llama()
    hf.model.layers[0].to("meta")
    with pytest.raises(UnsupportedModelError, match="not in memory"):
        load_model(hf, tokenizer=tiny.tokenizer("gpt2"), device="cpu", backend=kind)
