"""What a task file, a token or a model is called shows as text in figures, cards, reports and pages."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import tvlens as tv
from tests.browser import browse
from tvlens.circuits import behaviour
from tvlens.circuits.contrast import Contrast
from tvlens.pages import page
from tvlens.reports import card, report
from tvlens.results import Result

pytestmark = pytest.mark.slow

HOSTILE = (
    "<script>window.pwned=1</script>",
    '"><img/src=x/onerror=window.pwned=2>',
    "</script><script>window.pwned=3</script>",
    "'><svg/onload=window.pwned=4>",
    '<a/href="javascript:window.pwned=5">LINK</a>',
    "<b>BOLD</b>",
    "a<br>zz",
    "&lt;i&gt;",
    "%{text}",
    "<extra></extra>",
    "[m](javascript:window.pwned=6)",
    "$x^2$",
)
WORDS = (
    *HOSTILE,
    *(f"{word}2" for word in HOSTILE),
    *"abcdefghijklmnop",
    "->",
    ";",
    "\n",
    "Q:",
    "A:",
    "→",
    "example:",
)
# None of these may stand in a string that Plotly or a browser reads as HTML.
MARKUP = re.compile(r"<(script|/script|img|svg|a/href|b>BOLD|/a>|extra></extra>|br>zz)|&lt;i&gt;")
TEMPLATE = "{x} -> {y} ; "


@cache
def hostile_model() -> Any:
    """A tiny model with hostile words for tokens, under a hostile name."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel({"<unk>": 0} | {w: i + 1 for i, w in enumerate(WORDS)}, unk_token="<unk>")
    )
    splits = [
        pre_tokenizers.Split(each, "isolated") for each in ("\n", "Q:", "A:", "→", "example:")
    ]
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), *splits])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<unk>")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(WORDS) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=256,
        )  # fmt: skip
        config._name_or_path = "m<b>BOLD<script>window.pwned=7<script>"
        return tv.load_model(LlamaForCausalLM(config).eval(), tokenizer=tokenizer, device="cpu")


def task_of(folder: Path, name: str, step: int) -> tv.Task:
    """A task from a file whose every text is hostile."""
    items = {x: WORDS[(i + step) % 24] for i, x in enumerate(WORDS[:24])}
    told = {"name": name, "description": HOSTILE[0], "source": HOSTILE[1], "items": items}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(told))
    return tv.Task.from_file(path)


def some(results: list[Result]) -> list[Result]:
    """One of most kinds: a report of all figures takes a browser half a minute."""
    kinds = ("LayerSweep", "Lens", "Projection", "Attribution", "Patching", "Circuit", "Conflict")
    return [next(r for r in results if type(r).__name__ == kind) for kind in kinds]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """A result of every kind that shows tokens, tasks or models."""
    model, folder = hostile_model(), tmp_path_factory.mktemp("tasks")
    one, two, three = (
        task_of(folder, name, step) for name, step in zip("pqr", (12, 5, 7), strict=True)
    )
    quiet: dict[str, Any] = {"template": TEMPLATE, "progress": False}
    small = {**quiet, "shots": 2, "n_dev": 4}
    clean, other = (" ".join([word, "->", "a", "->"]) for word in HOSTILE[:2])
    right: dict[str, Any] = {"answers": HOSTILE[3], "wrong": HOSTILE[4]}
    edges = tv.edge_scores(model, clean, other, **right)
    cut = tv.circuit(edges, n_edges=5)
    lens = tv.TunedLens.identity(model)
    prompts = tv.build_prompts(one, model, shots=2, n=4, template=TEMPLATE)
    patched = tv.patch(model, clean, other, **right)
    contrast = Contrast((clean,), (other,), (HOSTILE[3],), (HOSTILE[4],), HOSTILE[0])
    found: list[Any] = [
        behaviour(model, contrast),
        tv.layer_sweep(model, one, n_test=4, **small),
        tv.layer_sweep(model, two, n_test=4, **small),
        tv.suite([model], [one, two], n_test=4, **small),
        tv.compare(model, [one], n_test=4, methods=["hendel", "mean"], **small),
        tv.choices(model, [one], n_test=4, factors=["mode"], **small),
        tv.conflict(model, [one, two], n=4, min_queries=1, **small),
        tv.geometry(model, [one, two, three], n=4, **small),
        tv.variance(model, one, shots=[1, 2], n=4, n_dev=4, **quiet),
        tv.template_transfer(
            model, [one], templates=[TEMPLATE, "{x} -> <b>BOLD</b> {y} ; "], n_test=4, shots=2,
            n_dev=4, progress=False,
        ),
        tv.decodability(model, [one, two], n_vectors=4, n_test=4, **small),
        tv.whole_answers(model, [one], n_test=4, **small),
        tv.head_effects(model, one, shots=2, n_means=4, n_trials=2, template=TEMPLATE),
        tv.logit_lens(model, [clean, other], tokens=[HOSTILE[3], HOSTILE[4]]),
        tv.logit_lens(model, clean, lens=lens, compare=True),
        tv.project(model, tv.extract(model, prompts), labels=[HOSTILE[i % 12] for i in range(8)]),
        tv.attribute(model, [clean, other], by=("head", "position"), answers=[HOSTILE[3]] * 2,
                     wrong=[HOSTILE[4]] * 2),
        tv.attribute(model, clean, by="head", **right),
        tv.attribute_gradients(model, [clean, other], answers=[HOSTILE[3]] * 2, wrong=[HOSTILE[4]] * 2),
        tv.writers(model, prompts, layer=1),
        patched,
        tv.patch(model, clean, other, sites="z", **right),
        tv.attribution_patch(model, clean, other, **right),
        tv.agreement(tv.attribution_patch(model, clean, other, **right), patched),
        tv.patch_paths(model, clean, other, **right),
        tv.ablate(model, clean, answers=HOSTILE[3]),
        tv.trace(model, clean, HOSTILE[0], answers=HOSTILE[3], samples=2),
        tv.transfer(model, [one, two, three], n=4, n_fit=4, layer=1, **small),
        tv.head_scores(model, n_prompts=2, length=8),
        edges,
        cut,
        tv.faithfulness(model, cut, clean, other, **right),
    ]  # fmt: skip
    return found


def strings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a figure that Plotly draws, with where it stands."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("meta", "legendgroup"):  # escaped by reports; never drawn
                yield from strings(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner, f"{path}[]")
    elif isinstance(value, str):
        yield path, value


def test_no_figure_holds_markup(results: list[Result]) -> None:
    bad, seen = [], 0
    for result in results:
        for name, figure in result.figures().items():
            for path, text in strings(json.loads(str(figure.to_json()))):
                seen += "pwned" in text or "BOLD" in text
                if MARKUP.search(text.removesuffix("<extra></extra>")):
                    bad.append((type(result).__name__, name, path, text[:160]))
    assert not bad, bad[:10]
    assert seen > 100


@pytest.fixture(scope="module")
def written(results: list[Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "r.html"
    return report(some(results), path, title=HOSTILE[0])


def test_reports_cards_and_pages_hold_no_markup(results: list[Result], written: Path) -> None:
    text, results = written.read_text(encoding="utf-8"), some(results)
    cards = "".join(map(card, results))
    pages = "".join(page(result) for result in results)
    for name, made in (("report", text), ("cards", cards), ("page", pages)):
        assert "&lt;script" in made or "\\u003cscript" in made or "&amp;lt;" in made, name
        found = re.search(r"<script>window.pwned|<img/src|<svg/onload|<a/href|<b>BOLD", made)
        assert found is None, (name, made[max(found.start() - 200, 0) : found.end() + 100])
    assert "[m](javascript" not in pages


WATCH = """<script>
const said = () => { document.title = "pwned: " + window.pwned; };
const hover = async () => {
  for (const box of document.querySelectorAll(".js-plotly-plot"))
    for (let i = 0; i < 4; i++) {
      try { Plotly.Fx.hover(box, [{ curveNumber: 0, pointNumber: i }, ]); } catch (error) {}
      try { Plotly.Fx.hover(box, [{ curveNumber: 0, pointNumber: [0, i] }]); } catch (error) {}
    }
  said();
};
addEventListener("load", () => { setInterval(hover, 2000); said(); });
</script></body>"""


@pytest.mark.browser
def test_nothing_of_it_runs_in_a_browser(written: Path, tmp_path: Path) -> None:
    path, text = tmp_path / "r.html", written.read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    path.write_text(text.replace("</body>", WATCH), encoding="utf-8")
    dom, console = browse(path, tmp_path / "profile", width=1200)
    assert "<title>pwned: undefined</title>" in dom, re.search("<title>.*?</title>", dom)
    assert "&lt;b&gt;BOLD&lt;/b&gt;" in dom and "LINK" in dom
    assert not [line for line in console if "WARN: Unrecognized subplot" not in line]
    assert not re.search(r"<img src=\"?x|<svg[^>]*onload|javascript:window\.pwned=5\"[^&]", dom)
    assert not re.search(r"font-weight: ?bold[^>]*>BOLD", dom)
    # The watcher can tell: what is injected raw does run.
    raw = tmp_path / "raw.html"
    raw.write_text(f"<html><head><title></title></head><body>{HOSTILE[0]}{WATCH}</html>")
    assert "<title>pwned: 1</title>" in browse(raw, tmp_path / "profile2", width=1200)[0]
