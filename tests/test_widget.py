"""The panel: its numbers, what it refuses, what it is where it cannot run, and itself in JupyterLab."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch

import tvlens as tv
from tvlens.testing import tiny_model
from tvlens.widget import Explorer, State, _panel
from tvlens.widget._grid import static_grid
from tvlens.widget._panel import map_of, panel, shown_of

PROMPT, OTHER = "example:a->A\nexample:b->", "example:a->a\nexample:c->"


@pytest.fixture(scope="module")
def model() -> Any:
    return tv.load_model("toy", device="cpu")


@pytest.fixture
def explorer(model: Any) -> Explorer:
    return tv.explore(model, task="to_upper", layer=3)


def last(model: Any, explorer: Explorer, hooks: Any = ()) -> torch.Tensor:
    """What TransformerLens itself says next, with hooks of one's own."""
    tokens = explorer.scene.prompt.tokens
    return model.run_with_hooks(tokens, fwd_hooks=list(hooks))[0, -1].softmax(-1).detach()


def writes(layer: int, position: int, value: Any) -> Any:
    def hook(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        activation[:, position] = value(activation[:, position])
        return activation

    return (f"blocks.{layer}.hook_resid_post", hook)


def said(model: Any, explorer: Explorer, share: torch.Tensor) -> None:
    """The effect's words have these probabilities, and no other word has more."""
    ids = [i for word in explorer.effect.words for i in [vocabulary(model)[word]]]
    assert torch.allclose(explorer.effect.after, share[ids], atol=1e-5)
    least = torch.maximum(explorer.effect.before, explorer.effect.after).min()
    rest = share.clone()
    rest[ids] = 0
    assert rest.max() <= least + 1e-6


def vocabulary(model: Any) -> dict[str, int]:
    return {model.tokenizer.decode([i]): i for i in range(model.cfg.d_vocab)}


# Numbers


def test_nothing_written_changes_nothing(model: Any, explorer: Explorer) -> None:
    explorer.set(action="nothing")
    said(model, explorer, last(model, explorer))
    assert torch.equal(explorer.effect.before, explorer.effect.after)
    assert explorer.effect.distance == 0 and explorer.says().startswith("Nothing is changed")
    explorer.set(action="inject", strength=0.0)
    assert torch.allclose(explorer.effect.before, explorer.effect.after, atol=1e-5)
    assert explorer.effect.distance == 0


@pytest.mark.parametrize("layer", [0, 3, 5])
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_injecting_is_what_inject_does(
    model: Any, explorer: Explorer, layer: int, mode: str
) -> None:
    explorer.set(layer=layer, mode=mode)
    theta = explorer._task("to_upper").theta
    with tv.inject(model, theta, layer=layer, mode=mode):
        share = model(explorer.scene.prompt.tokens)[0, -1].softmax(-1).detach()
    said(model, explorer, share)
    answer = vocabulary(model)[explorer.state.answer]
    assert explorer.effect.answer_after == pytest.approx(float(share[answer]), abs=1e-5)


def test_the_vector_is_that_of_the_tasks_dev_prompts(model: Any, explorer: Explorer) -> None:
    dev = tv.build_prompts("to_upper", model, shots=4, n=8, split="dev", seed=0)
    wanted = tv.extract(model, dev).mean()
    assert torch.equal(explorer._task("to_upper").theta.values, wanted.values)
    test = tv.build_prompts("to_upper", model, shots=4, n=20, split="test", seed=0)
    assert explorer.state.prompt == test.zero_shot.text[0]
    explorer.set(shown="examples", example=2)
    assert explorer.state.prompt == test.regular.text[2]


@pytest.mark.parametrize("strength", [-1.0, 0.5, 2.0])
def test_strength_goes_from_the_state_towards_what_is_written(model: Any, strength: float) -> None:
    explorer = tv.explore(
        model, PROMPT, source=OTHER, action="patch", layer=2, position=5, strength=strength
    )
    _, cache = model.run_with_cache(OTHER)
    source = cache["resid_post", 2][0, 5].detach()
    share = last(model, explorer, [writes(2, 5, lambda own: own + strength * (source - own))])
    said(model, explorer, share)


def test_a_shorter_prompt_is_aligned_at_its_end(model: Any) -> None:
    explorer = tv.explore(model, PROMPT, source="example:c->", action="patch", layer=1, position=-2)
    _, cache = model.run_with_cache("example:c->")
    source = cache["resid_post", 1][0, -2].detach()
    said(model, explorer, last(model, explorer, [writes(1, -2, lambda own: source)]))
    assert "'c'" in explorer.says()


def test_the_map_is_the_logit_lens(model: Any, explorer: Explorer) -> None:
    lens = tv.logit_lens(model, explorer.state.prompt, k=6, tokens=explorer.state.answer).data
    here = lens.isel(lens=0, prompt=0)
    seen = explorer.scene.map
    assert (seen.top_id[..., 0].numpy() == here["top_id"].isel(rank=0).values).mean() > 0.95
    assert abs(seen.top_probability.numpy() - here["top_probability"].values).max() < 1e-5
    followed = here["log_probability"].isel(target=0)
    assert abs(seen.answer_probability.log().numpy() - followed.values).max() < 1e-3


def test_the_map_after_a_change_is_the_lens_of_the_changed_run(model: Any) -> None:
    explorer = tv.explore(
        model, PROMPT, answer="B", source=OTHER, action="patch", layer=2, position=5, map="after"
    )
    source = model.run_with_cache(OTHER)[1]["resid_post", 2][0, 5].detach()
    kept = {}

    def keep(activation: torch.Tensor, hook: Any) -> None:
        kept[hook.layer()] = activation[0].detach().clone()

    hooks = [writes(2, 5, lambda own: source)]
    hooks += [(f"blocks.{layer}.hook_resid_post", keep) for layer in range(6)]
    last(model, explorer, hooks)
    for layer in range(6):
        logits = model.unembed(model.ln_final(kept[layer][None]))[0].detach()
        best = logits.softmax(-1).topk(6).values
        found = explorer.effect.map.top_probability[layer]
        assert torch.allclose(found, best, atol=1e-5), layer
    below = explorer.effect.map.top_id[:2], explorer.effect.map.top_id[:, :5]
    assert torch.equal(below[0], explorer.scene.map.top_id[:2])
    assert torch.equal(below[1], explorer.scene.map.top_id[:, :5])
    assert not torch.equal(explorer.effect.map.top_id, explorer.scene.map.top_id)


def test_a_random_vector_is_as_long_and_does_not_do_it(model: Any, explorer: Explorer) -> None:
    with_theta = explorer.effect.answer_after
    explorer.set(vector="random, as long as to_upper")
    assert explorer.effect.answer_after < 0.3 < with_theta
    drawn, theta = explorer._vector(explorer.state.vector), explorer._vector("to_upper")
    assert torch.allclose(drawn.values.norm(dim=-1), theta.values.norm(dim=-1), rtol=1e-4)


def test_vectors_of_ones_own(model: Any) -> None:
    theta = tv.extract(model, tv.build_prompts("to_upper", model, n=4)).mean()
    explorer = tv.explore(
        model, PROMPT, vectors={"mine": theta}, action="inject", vector="mine", layer=2
    )
    assert explorer.choices["vector"][0] == "mine"
    with tv.inject(model, theta, layer=2):
        share = model(explorer.scene.prompt.tokens)[0, -1].softmax(-1).detach()
    said(model, explorer, share)


# What is chosen


def test_a_task_brings_its_prompt_and_a_prompt_of_ones_own_ends_it(explorer: Explorer) -> None:
    first = explorer.state
    explorer.set(example=1)
    assert explorer.state.prompt != first.prompt and explorer.state.answer != first.answer
    explorer.set(example=len(explorer._task("to_upper").query))
    assert explorer.state.example == 0
    explorer.set(task="next_letter")
    assert explorer.state.vector == "next_letter" and explorer.state.task == "next_letter"
    explorer.set(prompt=PROMPT)
    assert explorer.state.task == "" and explorer.state.prompt == PROMPT
    explorer.set(answer="")
    assert explorer.effect.answer_after != explorer.effect.answer_after


def test_long_prompts_are_cut_on_the_left(model: Any) -> None:
    explorer = tv.explore(model, "example:a->A\n" * 10 + "example:b->")
    shown = len(explorer.scene.tokens) - explorer.scene.first
    assert shown == 40 == explorer.scene.map.top_id.shape[1] < len(explorer.scene.tokens)
    explorer.set(position=0, action="inject", vector="to_upper", map="after")
    assert explorer.effect.map.top_id.shape[1] == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "unknown setting 'layers'. Nearest: layer"),
        ({"layer": 6}, "layer 6 .*6 layers"),
        ({"layer": "3"}, "layer must be of type int"),
        ({"layer": True}, "layer must be of type int"),
        ({"position": 99}, "position 99 asked for, but this prompt has 5 tokens: -5 to 4"),
        ({"action": "pach"}, "unknown action 'pach'. Nearest: patch"),
        ({"mode": "ad"}, "unknown mode 'ad'"),
        ({"strength": float("nan")}, "strength must be a finite number; nan arrived"),
        ({"task": "to_uper"}, "unknown task 'to_uper'. Nearest: .*to_upper"),
        ({"vector": "to_uper"}, "unknown vector 'to_uper'. Nearest: .*to_upper"),
        ({"prompt": ""}, "a prompt is needed"),
        ({"action": "patch", "source": ""}, "a patch needs another prompt"),
    ],
)
def test_refused(explorer: Explorer, changes: dict[str, Any], message: str) -> None:
    state = explorer.state
    with pytest.raises((ValueError, TypeError), match=message):
        explorer.set(**changes)
    assert explorer.state == state


def test_explore_refuses(model: Any) -> None:
    prompts = tv.build_prompts("to_upper", model, n=4)
    with pytest.raises(ValueError, match="4 sets of demonstrations; take .mean()"):
        tv.explore(model, PROMPT, vectors={"mine": tv.extract(model, prompts)})
    with pytest.raises(ValueError, match="a prompt or a task is needed"):
        tv.explore(model, tasks=[])
    assert State().changed({"strength": 2}).strength == 2.0


# Where no panel runs


def test_the_still_picture_shows_the_same_and_runs_nothing() -> None:
    explorer = tv.explore(tiny_model(), "<script>x()</script>->", answer="<", tasks=[])
    page = static_grid(explorer, note="pip install 'tvlens[widgets]'")
    assert "<script" not in page and ">&lt;</th>" in page
    assert page.count("<tr>") == 2 + 1 + 1 + len(explorer.effect.words)
    assert "pip install &#x27;tvlens[widgets]&#x27;" in page
    for word, share in zip(explorer.effect.words, explorer.effect.after.tolist(), strict=True):
        assert f"{share:.3f}" in page and word


def test_without_anywidget_a_still_picture_says_what_to_install(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_panel, "find_spec", lambda name: None)
    shown = explorer._repr_mimebundle_()
    assert set(shown) == {"text/plain", "text/html"}
    assert "pip install &#x27;tvlens[widgets]&#x27;" in shown["text/html"]


def test_a_panel_carries_its_still_picture(explorer: Explorer) -> None:
    data, _ = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert "still picture" in data["text/html"] and "to_upper" in data["text/plain"]


# The panel without a browser


def test_the_panel_answers_what_is_asked(explorer: Explorer) -> None:
    widget = panel(explorer)
    explorer._panel = widget
    widget.asked = {"id": 1, "changes": {"layer": 2, "strength": 0.5}}
    assert widget.shown["id"] == 1 and widget.shown["error"] == ""
    assert widget.shown["state"]["layer"] == explorer.state.layer == 2
    assert widget.shown["after"] == shown_of(explorer)["after"]
    widget.asked = {"id": 2, "changes": {"task": "nothing like it"}}
    assert widget.shown["id"] == 2 and "unknown task" in widget.shown["error"]
    assert widget.shown["state"]["layer"] == 2
    old = widget.map
    explorer.set(map="after", layer=0)
    assert widget.map != old and widget.map == map_of(explorer)
    assert widget.shown["state"]["map"] == "after" and widget.shown["error"] == ""
    json.dumps([widget.shown, widget.map, widget.choices], allow_nan=False)


# The panel in JupyterLab


CELL = "import tvlens as tv\nexplorer = tv.explore(tv.load_model('toy'), task='to_upper', layer=2)\nexplorer"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """Address of a notebook in a JupyterLab of its own."""
    pytest.importorskip("jupyterlab")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(notebook, tmp_path / "panel.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    settings = [
        "--no-browser", f"--port={port}", "--ServerApp.token=", "--ServerApp.password=",
        "--ServerApp.allow_root=True", f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *settings],
        env={**os.environ, **{name: str(tmp_path / name.lower()) for name in places}},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/lab/tree/panel.ipynb"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
@pytest.mark.browser
def test_the_panel_in_jupyterlab(lab: str, tmp_path: Path) -> None:
    drive = pytest.importorskip("playwright.sync_api")
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("needs a browser on the PATH: chromium, chromium-browser or google-chrome")
    with drive.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1300, "height": 1000})
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(lab, wait_until="domcontentloaded")
        page.locator(".jp-CodeCell").first.click(timeout=120_000)
        page.keyboard.press("Shift+Enter")
        root = page.locator(".tvlens")
        page.wait_for_selector(".tvlens td", timeout=120_000)
        assert page.locator(".tvlens td").count() == 6 * 5
        assert "layer" in root.inner_text() and "to_upper" in page.locator(".says").inner_text()

        def after(act: Any) -> str:
            """Do something, wait for the kernel's answer, and give what is said."""
            before = root.get_attribute("data-answered")
            act()
            page.wait_for_function(
                "old => { const t = document.querySelector('.tvlens');"
                " return t.dataset.answered !== old && t.getAttribute('aria-busy') === 'false'; }",
                arg=before,
            )
            return page.locator(".says").inner_text()

        setting = lambda name: page.locator(f".tvlens [data-setting={name}]")  # noqa: E731
        explorer = tv.explore(tv.load_model("toy"), task="to_upper", layer=2)

        def same(text: str, **changes: Any) -> None:
            explorer.set(**changes)
            assert text == explorer.says()
            shown = page.locator(".tvlens .share").first.inner_text()
            pair = explorer.effect.before[0].item(), explorer.effect.after[0].item()
            assert shown == "{:.2f} → {:.2f}".format(*pair)

        same(after(lambda: setting("layer").fill("4")), layer=4)
        same(after(lambda: setting("strength").fill("0.5")), strength=0.5)
        cell = page.locator('.tvlens td[data-layer="1"][data-position="2"]')
        same(after(lambda: cell.click()), layer=1, position=2)
        assert "here" in (cell.get_attribute("class") or "")
        same(after(lambda: page.keyboard.press("ArrowUp")), layer=2)
        same(after(lambda: setting("map").select_option("after")), map="after")
        same(after(lambda: setting("vector").select_option("next_letter")), vector="next_letter")
        setting("prompt").fill("example:a->A\nexample:c->")
        same(
            after(lambda: page.keyboard.press("Control+Enter")), prompt="example:a->A\nexample:c->"
        )
        same(after(lambda: setting("action").select_option("patch")), action="patch")
        same(
            after(lambda: setting("task").select_option("to_upper")),
            task="to_upper",
            example=0,
            action="inject",
        )
        setting("answer").fill("")
        assert after(lambda: page.keyboard.press("Enter")).endswith("'.")
        setting("prompt").fill("a " * 600)
        after(lambda: page.keyboard.press("Control+Enter"))
        assert "tokens" in page.locator(".tvlens .error").inner_text()
        # Dragging asks once at a time, and ends where the slider stands.
        setting("layer").evaluate(
            "e => { for (let i = 0; i <= 5; i++) { e.value = i; e.dispatchEvent(new Event('input')); } }"
        )
        page.wait_for_function(
            "document.querySelector('.says').textContent.includes('after block 5')"
        )
        assert wrong == []
        page.screenshot(path=str(tmp_path / "panel.png"))
        chromium.close()
