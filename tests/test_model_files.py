"""Models from folders, GGUF files and the hub, and names and paths that lead nowhere."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.tiny_gguf import GGUF, assert_same, write_gguf
from tvlens.models import (
    ModelUnavailableError,
    _files,
    _load,
    facts,
    load_model,
)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / GGUF
    write_gguf(path)
    return path


def save_folder(folder: Path, name: str = "llama") -> Path:
    tiny.hf(name).save_pretrained(folder)
    tiny.tokenizer(name).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_folder(name: str, kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_folder(tmp_path / "my-model", name)
    capfd.readouterr()
    model: Any = load_model(str(folder), device="cpu", backend=kind)
    assert capfd.readouterr() == ("", "")
    assert_same(model, name)
    found = facts(model)
    assert (found.name, found.source, found.weights_sha256) == ("my-model", "folder", None)
    text = "Paris is the capital"
    assert model.to_tokens(text)[0].tolist() == tiny.tokenizer(name)(text)["input_ids"]
    assert found.prepend_bos == facts(tiny.model(name)).prepend_bos


def test_a_tokenizer_that_was_given_comes_first(tmp_path: Path) -> None:
    tiny.hf("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="comes without a tokenizer: pass"):
        load_model(tmp_path, device="cpu")
    model: Any = load_model(tmp_path, tokenizer=tiny.tokenizer("gpt2"), device="cpu")
    assert not facts(model).prepend_bos


def test_a_model_read_from_a_folder_knows_its_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_folder(tmp_path / "home")
    hf = AutoModelForCausalLM.from_pretrained(folder)
    found = facts(load_model(hf, device="cpu"))
    assert (found.name, found.source, found.prepend_bos) == ("home", "memory", True)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no Hugging Face model folder.*config\.json"):
        load_model(tmp_path)


def test_folder_with_damaged_weights(tmp_path: Path) -> None:
    weights = save_folder(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"the model in .* cannot be read"):
        load_model(tmp_path)


def test_gguf(gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model: Any = load_model(gguf, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert_same(model)
    found = facts(model)
    assert (found.name, found.source) == ("tiny-llama", "gguf")
    assert found.weights_sha256 == hashlib.sha256(gguf.read_bytes()).hexdigest()
    # "smollm" in the file means that digits stand alone, and both spaces before them together.
    split = model.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in split] == ["a", "ĠĠ", "1", "2"]
    assert not found.prepend_bos


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5, 0.99])
def test_truncated_gguf(share: float, gguf: Path, tmp_path: Path) -> None:
    whole = gguf.read_bytes()
    cut = tmp_path / GGUF
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"tiny-llama\.gguf .* bytes\) cannot be read.*cut off"):
        load_model(cut, device="cpu")


def test_what_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ValueError, match="is no GGUF file"):
        load_model(tmp_path / "a.gguf")
    with pytest.raises(FileNotFoundError, match=r"no file .*b\.gguf"):
        load_model(tmp_path / "b.gguf")
    (tmp_path / "c.bin").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"c\.bin is a file, and no \.gguf"):
        load_model(tmp_path / "c.bin")


@pytest.mark.parametrize("path", ["/no/such/folder", "../nothing", "~/nothing-here", "a/b/c"])
def test_paths_that_do_not_exist(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no model at"):
        load_model(path)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("smolm2-135m", "smollm2-135m"), ("gemma-270m", "gemma3-270m"), ("gpt3", "gpt2")],
)
def test_unknown_names(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown model '{name}'.*{nearest}.*owner/model"):
        load_model(name)


def test_hub_id_without_the_hub() -> None:
    with pytest.raises(ModelUnavailableError, match=r"hf download nobody/nothing\."):
        load_model("nobody/nothing")


@pytest.mark.parametrize(
    ("given", "asked"), [("gpt2", "gpt2"), ("pythia-70m", "EleutherAI/pythia-70m")]
)
def test_short_names_of_the_hub(given: str, asked: str) -> None:
    with pytest.raises(ModelUnavailableError, match=rf"hf download {asked}\."):
        load_model(given)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def read(name: str, **options: Any) -> Any:
        seen.update(options, name=name)
        return copy.deepcopy(tiny.hf("qwen2"))

    monkeypatch.setattr(_files, "_read_model", read)
    # A copy: what is read from the hub is ours to change.
    own = copy.deepcopy(tiny.tokenizer("qwen2"))
    monkeypatch.setattr(_files, "_read_tokenizer", lambda *_, **__: own)
    model = load_model("someone/something", revision="v1", device="cpu", dtype="bfloat16")
    assert seen == {"name": "someone/something", "revision": "v1", "dtype": torch.bfloat16}
    found = facts(model)
    assert (found.source, found.name, found.revision) == ("hub", "someone/something", "v1")


@tiny.needs_hooked
def test_models_that_only_transformer_lens_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens import HookedTransformer

    with pytest.raises(ModelUnavailableError, match="hf download NeelNanda/GELU_2L512W"):
        load_model("gelu-2l", device="cpu")
    seen: dict[str, Any] = {}

    def read(name: str, **options: Any) -> Any:
        seen.update(options, name=name)
        print("Loaded pretrained model")
        return load_model(tiny.hf("gpt2"), tokenizer=tiny.tokenizer("gpt2"), device="cpu")

    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", read)
    model = load_model("gelu-2l", device="cpu")
    assert facts(model).source == "hub"
    assert facts(model).name.startswith("NeelNanda/")
    assert seen["hf_model"] is None
    # An architecture that only TransformerLens converts, of a name it knows.
    monkeypatch.setattr(_load, "supported_architectures", lambda: ())
    monkeypatch.setattr(_files, "_read_model", lambda *_, **__: tiny.hf("gpt2"))
    monkeypatch.setattr(_files, "_read_tokenizer", lambda *_, **__: tiny.tokenizer("gpt2"))
    model = load_model("EleutherAI/pythia-70m", device="cpu")
    assert seen["name"] == "EleutherAI/pythia-70m"
    assert seen["hf_model"] is tiny.hf("gpt2")


@tiny.needs_hooked
def test_the_right_loader_for_folding(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens import HookedTransformer

    from tvlens.models.hooked import convert

    monkeypatch.setattr(
        HookedTransformer, "from_pretrained", lambda *_, **__: torch.nn.Linear(1, 1)
    )
    settings: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    found = convert.from_transformer_lens("gelu-2l", processing="fold", **settings)
    assert isinstance(found, torch.nn.Linear)
