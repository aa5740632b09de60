"""Gradients are those of Hugging Face's own graph, and integrated gradients are complete."""

from typing import Any

import numpy as np
import pytest
import torch

import tvlens as tv
from tests import tiny
from tests.cases import GRID
from tvlens.attribution import Gradients, attribute_gradients
from tvlens.attribution.path import integrate
from tvlens.patching.pairs import as_batch

PROMPTS = ["example:cat->CAT dog->", "one two three"]
TARGETS: dict[str, Any] = {"answers": [17, 30], "wrong": [18, 31]}
INTEGRATED: dict[str, Any] = {**TARGETS, "method": "integrated_gradients"}


def difference(logits: torch.Tensor, row: int) -> torch.Tensor:
    return logits[TARGETS["answers"][row]] - logits[TARGETS["wrong"][row]]


@pytest.mark.parametrize(("name", "kind"), GRID)
@pytest.mark.slow
def test_integrated_gradients_are_complete(name: str, kind: str) -> None:
    found = attribute_gradients(tiny.model(name, kind), PROMPTS, **INTEGRATED)
    gap = (found.data["value"] - found.data["baseline"]).values
    assert (np.abs(gap) > 0.05).all()
    summed = found.data["attribution"].sum("position").values
    np.testing.assert_allclose(summed + found.data["residual"].values, gap, atol=1e-5)
    np.testing.assert_allclose(summed, gap, rtol=0.01)
    assert float(found.completeness.max()) <= 0.01
    assert found.data["attribution"].dims == ("position", "prompt")


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("by", ["layer", "head"])
def test_layers_and_heads_are_complete_each(by: str, kind: str) -> None:
    model = tiny.model("gemma3", kind)
    found = attribute_gradients(model, PROMPTS, by=by, layers=[1, -1], **INTEGRATED)
    assert found.data["layer"].values.tolist() == [1, 3]
    assert found.completeness.dims == ("layer", "prompt")
    assert float(found.completeness.max()) <= 0.01
    if by == "layer":
        # The whole stream is exchanged, so each layer accounts for the same change.
        changes = (found.data["value"] - found.data["baseline"]).transpose("layer", "prompt").values
        np.testing.assert_allclose(*changes, rtol=1e-3)
    else:
        assert found.data["attribution"].sizes["head"] == 4


def test_few_steps_miss_more() -> None:
    model = tiny.model("qwen2")
    few = attribute_gradients(model, PROMPTS, **INTEGRATED, steps=4)
    assert float(few.completeness.max()) > 0.05 and few.provenance["steps"] == 3


def test_points_go_where_the_line_is_rough() -> None:
    places = torch.tensor([0.371, 0.82])
    asked: list[torch.Tensor] = []

    def jump(at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(at)
        far = 300 * (at - places)
        share = torch.tensor([0.25, 0.75])
        return far.tanh(), (300 / far.cosh() ** 2)[..., None] * share

    found, points = integrate(jump, 2, steps=64)
    torch.testing.assert_close(found.float(), torch.tensor([[0.5, 1.5]] * 2), rtol=0.005, atol=0)
    assert 48 < points <= 64 and points == sum(map(len, asked))
    near = (torch.cat(asked) - places).abs() < 0.05
    assert (near.sum(dim=0) > points / 2).all()
    # Evenly spread, as many points miss most of it.
    even = torch.linspace(0, 1, 65)[:, None]
    assert abs(float(torch.trapezoid(jump(even)[1].sum(-1)[:, 0], even[:, 0])) - 2) > 0.2
    asked.clear()
    line, points = integrate(lambda at: (3 * at, 3 * torch.ones_like(at)[..., None]), 1, steps=64)
    assert points == 17 and float(line) == pytest.approx(3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.slow
def test_integrated_gradients_are_the_mean_of_hugging_faces(name: str) -> None:
    model, hf = tiny.model(name), tiny.hf(name)
    found = attribute_gradients(
        model, PROMPTS[0], answers=17, wrong=18, method="integrated_gradients"
    )
    words = hf.get_input_embeddings()
    # Words that the tokenizer lacks have an embedding, too.
    with torch.no_grad():
        end = words(as_batch(model, PROMPTS[0]).tokens)
        start = words.weight.mean(dim=0)
    n, total = 400, torch.zeros_like(end)
    for step in range(n):
        # The midpoint rule, crowded towards the baseline: another rule than ours.
        share = ((step + 0.5) / n) ** 2
        at = (start + share * (end - start)).requires_grad_()
        (slope,) = torch.autograd.grad(difference(hf(inputs_embeds=at).logits[0, -1], 0), at)
        total += slope * 2 * (step + 0.5) / n / n
    expected = ((end - start) * total).sum(dim=-1)[0]
    mine = found.to_tensor("attribution")[:, 0]
    torch.testing.assert_close(mine, expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gradient_times_activation_is_hugging_faces(kind: str) -> None:
    model, hf = tiny.model("llama", kind), tiny.hf("llama")
    tokens = as_batch(model, PROMPTS[0]).tokens
    out = hf(tokens, output_hidden_states=True)
    score = difference(out.logits[0, -1], 0)
    streams = out.hidden_states[:-1]  # the last one is normed
    slopes = torch.autograd.grad(score, streams)
    expected = torch.stack(
        [(h * g).sum(dim=-1)[0].detach() for h, g in zip(streams, slopes, strict=True)]
    )
    token = attribute_gradients(model, PROMPTS[0], answers=17, wrong=18)
    torch.testing.assert_close(
        token.to_tensor("attribution")[:, 0], expected[0], rtol=1e-3, atol=1e-4
    )
    layer = attribute_gradients(model, PROMPTS[0], answers=17, wrong=18, by="layer")
    torch.testing.assert_close(
        layer.to_tensor("attribution")[:-1, :, 0], expected[1:], rtol=1e-3, atol=1e-4
    )
    assert float(layer.data["value"][0]) == pytest.approx(score.item(), abs=1e-4)


def test_heads_are_slopes_of_what_they_say() -> None:
    model, hf = tiny.model("gpt2"), tiny.hf("gpt2")
    tokens = as_batch(model, PROMPTS[0]).tokens
    kept: list[torch.Tensor] = []
    handle = hf.transformer.h[2].attn.c_proj.register_forward_pre_hook(
        lambda module, args: kept.append(args[0])
    )
    try:
        score = difference(hf(tokens).logits[0, -1], 0)
    finally:
        handle.remove()
    (slope,) = torch.autograd.grad(score, kept[0])
    expected = (kept[0] * slope)[0].unflatten(-1, (4, 16)).sum(dim=-1).detach()
    found = attribute_gradients(model, PROMPTS[0], answers=17, wrong=18, by="head", layers=2)
    mine = found.to_tensor("attribution")[0, :, :, 0]
    torch.testing.assert_close(mine, expected.T, rtol=1e-3, atol=1e-5)


def test_prompts_do_not_disturb_each_other() -> None:
    model = tiny.model("qwen2")
    both = attribute_gradients(model, PROMPTS, **INTEGRATED, steps=8).data["attribution"]
    for row, prompt in enumerate(PROMPTS):
        targets = {name: ids[row] for name, ids in TARGETS.items()}
        one = attribute_gradients(model, prompt, **targets, method="integrated_gradients", steps=8)
        mine = both.isel(prompt=row).dropna("position")
        np.testing.assert_allclose(mine, one.data["attribution"][:, 0], rtol=1e-3, atol=1e-4)
    assert both.isnull().any()  # positions that the shorter one lacks


@pytest.mark.slow
def test_pieces_of_the_way_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    whole = attribute_gradients(model, PROMPTS, **INTEGRATED, steps=6).data["attribution"]
    monkeypatch.setattr("tvlens.attribution.gradients._STEPS_BYTES", 1)
    pieces = attribute_gradients(model, PROMPTS, **INTEGRATED, steps=6, memory=1).data[
        "attribution"
    ]
    np.testing.assert_allclose(pieces, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_baselines() -> None:
    model, hf = tiny.model("gpt2"), tiny.hf("gpt2")
    words = hf.transformer.wte.weight.detach()
    given = attribute_gradients(model, PROMPTS, **INTEGRATED, steps=8, baseline=words.mean(dim=0))
    mean = attribute_gradients(model, PROMPTS, **INTEGRATED, steps=8, baseline="mean")
    np.testing.assert_allclose(given.data["attribution"], mean.data["attribution"], atol=1e-4)
    tokens = as_batch(model, PROMPTS[1]).tokens
    with torch.no_grad():
        at = words.mean(dim=0).expand(1, tokens.shape[1], -1)
        expected = difference(hf(inputs_embeds=at).logits[0, -1], 1)
    assert float(mean.data["baseline"][1]) == pytest.approx(float(expected), abs=1e-4)
    word = attribute_gradients(model, PROMPTS, **INTEGRATED, steps=8, baseline=25)
    same = attribute_gradients(model, PROMPTS, **INTEGRATED, steps=8, baseline=words[25])
    np.testing.assert_allclose(word.data["attribution"], same.data["attribution"], atol=1e-4)
    zero = attribute_gradients(model, PROMPTS, **INTEGRATED, baseline="zero")
    assert float(zero.completeness.max()) <= 0.01
    assert abs(float(zero.data["baseline"][0] - mean.data["baseline"][0])) > 1e-3


def test_a_metric_of_ones_own() -> None:
    model = tiny.model("llama")

    def gap(logits: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        right, wrong = (torch.tensor(TARGETS[name])[prompt] for name in ("answers", "wrong"))
        rows = torch.arange(len(logits))
        return logits[rows, right] - logits[rows, wrong]

    own = attribute_gradients(model, PROMPTS, metric=gap)
    usual = attribute_gradients(model, PROMPTS, **TARGETS)
    np.testing.assert_allclose(
        own.data["attribution"], usual.data["attribution"], rtol=1e-3, atol=1e-4
    )
    assert own.metric == "gap"
    walked = attribute_gradients(model, PROMPTS, metric=gap, method="integrated_gradients", steps=4)
    other = attribute_gradients(model, PROMPTS, **INTEGRATED, steps=4)
    np.testing.assert_allclose(
        walked.data["attribution"], other.data["attribution"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "integrated"}, r"unknown method 'integrated'.*integrated_gradients"),
        ({"by": "tokens"}, r"unknown by 'tokens'.*token"),
        ({"by": "layer", "layers": 4}, r"layer 4 asked for.*0 to 3"),
        ({"layers": 1}, "tokens have no layers"),
        ({"steps": 2}, "steps must be at least 3"),
        ({"method": "integrated_gradients", "baseline": 640}, "640 is no token id.*0 to 639"),
        ({"baseline": "mean"}, "compares with zero"),
        ({"method": "integrated_gradients", "baseline": "nil"}, "unknown baseline 'nil'"),
        ({"method": "integrated_gradients", "baseline": torch.zeros(3)}, r"width 64; shape \(3,\)"),
        ({"metric": "rank", "answers": 17}, "'rank' has no gradient"),
        ({"metric": "kl"}, "kl is least, and so flat.*integrated_gradients"),
        ({"metric": lambda logits, prompt: logits}, r"one number for each of 1 rows.*\(1, 640\)"),
        ({"answers": 17, "wrong": 17}, "both begin with the token"),
    ],
)  # fmt: skip
def test_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute_gradients(tiny.model("llama"), PROMPTS, **settings)


def test_results_say_save_and_cite(tmp_path: Any) -> None:
    found = attribute_gradients(tiny.model("gpt2"), PROMPTS, **INTEGRATED, steps=17)
    best = found.best()
    means = found.data["attribution"].mean("prompt")
    assert best["mean"] == pytest.approx(float(means[int(np.abs(means.values).argmax())]))
    assert (
        f"osition {best['position']}" in found.finding() and "attributions miss" in found.finding()
    )
    assert found.summary()["completeness_error"] == float(found.completeness.max())
    assert "sundararajan2017axiomatic" in found.cite()
    back = tv.load(found.save(tmp_path / "g.nc"))
    assert type(back).__name__ == "Gradients" and back.finding() == found.finding()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.slow
def test_a_way_from_zeros_says_what_it_misses(name: str) -> None:
    found = attribute_gradients(tiny.model(name), PROMPTS, **INTEGRATED, baseline="zero")
    assert np.isfinite(found.data["residual"]).all()
    assert np.isfinite(found.data["attribution"].isel(prompt=0)).all()
    assert f"{float(found.completeness.max()):.1%}" in found.finding()


@pytest.mark.slow
def test_smollm2_is_complete(smollm2: Any) -> None:
    found = attribute_gradients(
        smollm2, "The capital of France is", answers=" Paris", wrong=" London",
        method="integrated_gradients", steps=128,
    )  # fmt: skip
    assert float(found.completeness.max()) <= 0.05


def test_a_rough_guess_is_not_said_to_account_for_anything() -> None:
    model = tiny.model("gpt2")
    rough = attribute_gradients(model, PROMPTS[:1], answers=17, wrong=18)
    assert float(rough.completeness.max()) > 0.1
    said = rough.finding()
    assert said.startswith("Gradient x activation gives position") and "accounts for" not in said
    assert 'use method="integrated_gradients"' in said and "at most" not in said
    several = attribute_gradients(model, PROMPTS, answers=17, wrong=18)
    assert "at most" in several.finding()
    few = attribute_gradients(
        model, PROMPTS[:1], answers=17, wrong=18, method="integrated_gradients", steps=3
    )
    missed = Gradients(few.data.assign(residual=0.5 * (few.data["value"] - few.data["baseline"])))
    assert missed.finding().startswith("Integrated gradients give position")
    assert "take more steps" in missed.finding() and "accounts for" not in missed.finding()
    none = Gradients(few.data.assign(residual=0 * few.data["value"]))
    assert "accounts for" in none.finding() and "take more steps" not in none.finding()
