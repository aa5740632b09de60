"""Head scores and the ablation of induction heads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import tvlens as tv
from tests import tiny
from tests.cases import GRID
from tvlens.circuits import HeadScores, InductionTest, head_scores, induction_test, repeated_tokens
from tvlens.circuits import heads as heads_module
from tvlens.circuits.heads import KINDS, looked_at
from tvlens.engine import run
from tvlens.plots.heads import head_map

LENGTH, N = 10, 3
MODEL = ("llama", tiny.KINDS[0])


@pytest.fixture(scope="module")
def scores() -> HeadScores:
    return head_scores(tiny.model(*MODEL), n_prompts=N, length=LENGTH)


@pytest.fixture(scope="module")
def tested(scores: HeadScores) -> InductionTest:
    return induction_test(tiny.model(*MODEL), scores, n_heads=3, n_random=4, n_prompts=N)


def attentions(name: str, tokens: Tensor) -> Tensor:
    """Hugging Face's own attention weights: prompt layer head query key."""
    model = tiny.hf(name)
    kept = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return torch.stack(model(tokens, output_attentions=True).attentions, dim=1)
    finally:
        model.set_attn_implementation(kept)


def by_hand(weights: Tensor, kind: str) -> np.ndarray:
    """Layer head prompt, one weight at a time."""
    n, n_layers, n_heads, width, _ = weights.shape
    found = np.zeros((n_layers, n_heads, n))
    start = width - 2 * LENGTH
    for j in range(LENGTH):
        first, again = start + j, start + LENGTH + j
        place = {"previous": again - 1, "duplicate": first, "induction": first + 1}[kind]
        found += weights[:, :, :, again, place].permute(1, 2, 0).numpy() / LENGTH
    return found


# Scores


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_scores_are_hugging_face_s_attention(name: str, kind: str) -> None:
    model = tiny.model(name, kind)
    found = head_scores(model, n_prompts=N, length=LENGTH, seed=3)
    weights = attentions(name, torch.from_numpy(found.data["tokens"].values))
    for each in KINDS:
        expected = by_hand(weights, each)
        assert np.abs(found.data["score"].sel(kind=each) - expected).max() < 1e-5, each
    # Random heads attend somewhere, and differently by kind, or the comparison shows nothing.
    assert float(found.data["score"].sel(kind="previous").max()) > 0.05
    assert not np.allclose(by_hand(weights, "duplicate"), by_hand(weights, "induction"), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_looks_at_one_place_has_one_score(kind: str) -> None:
    width = 1 + 2 * LENGTH
    pattern = torch.zeros(1, 2, width, 3, width)
    pattern[:, :, :, :, 0] = 1  # all heads rest on the first token
    for query in range(1 + LENGTH, width):
        place = {
            "previous": query - 1,
            "duplicate": query - LENGTH,
            "induction": query - LENGTH + 1,
        }
        pattern[0, 1, query, 2] = torch.eye(width)[place[kind]] * 0.75
    found = looked_at(pattern, length=LENGTH)
    expected = torch.zeros(3, 2, 3, 1)
    expected[list(KINDS).index(kind), 1, 2] = 0.75
    assert torch.allclose(found, expected)


def test_only_the_second_half_counts() -> None:
    width = 2 * LENGTH
    pattern = torch.zeros(1, 1, width, 1, width)
    for query in range(1, LENGTH):
        pattern[0, 0, query, 0, query - 1] = 1
    assert looked_at(pattern, length=LENGTH).abs().max() == 0


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_sequences_are_distinct_ordinary_tokens_said_twice(name: str) -> None:
    model, tokenizer = tiny.model(name, tiny.KINDS[0]), tiny.tokenizer(name)
    batch = repeated_tokens(model, n_prompts=5, length=LENGTH)
    bos = batch.tokens.shape[1] - 2 * LENGTH
    assert bos == int(tv.facts(model).prepend_bos and tokenizer.bos_token_id is not None)
    assert (batch.tokens[:, :bos] == (tokenizer.bos_token_id or 0)).all()
    once, twice = batch.tokens[:, bos:].chunk(2, dim=1)
    assert (once == twice).all() and all(len(set(row)) == LENGTH for row in once.tolist())
    assert not set(once.flatten().tolist()) & set(tokenizer.all_special_ids)
    assert int(once.max()) < len(tokenizer)
    again = repeated_tokens(model, n_prompts=5, length=LENGTH)
    assert (again.tokens == batch.tokens).all()
    assert (repeated_tokens(model, n_prompts=5, length=LENGTH, seed=1).tokens != batch.tokens).any()


@pytest.mark.parametrize("kept", [1, 2 * 4 * 4 * 21 * 21, 5 * 4 * 4 * 21 * 21])
def test_little_memory_changes_nothing(
    scores: HeadScores, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer of one sequence at a time, two layers, all layers of one sequence."""
    seen: list[tuple[int, ...]] = []

    def counted(model: Any, requests: Any, **limits: Any) -> Any:
        (output,) = run(model, requests, **limits)
        seen.append(tuple(output.activations[0].shape[1:3]))
        return [output]

    monkeypatch.setattr(heads_module, "_KEPT", kept)
    monkeypatch.setattr(heads_module, "run", counted)
    again = head_scores(tiny.model(*MODEL), n_prompts=N, length=LENGTH)
    assert np.abs(again.data["score"] - scores.data["score"]).max() < 1e-6
    layers = min(max(kept // (4 * 4 * 21 * 21), 1), 4)
    assert set(seen) == {(1, layers)} and len(seen) == N * 4 // layers


def test_means_and_the_best(scores: HeadScores) -> None:
    data = scores.data["score"].mean("prompt")
    means = scores.mean()
    assert np.abs(means["mean"] - data).max() < 1e-6
    assert (means["low"] <= means["mean"] + 1e-9).all() and (means["low"] < means["high"]).any()
    for kind in KINDS:
        best = scores.top(kind, 16)
        assert sorted(best["mean"], reverse=True) == best["mean"].tolist()
        first = best.iloc[0]
        at = {"layer": int(first["layer"]), "head": int(first["head"])}
        assert abs(float(data.sel(kind=kind, **at)) - float(data.sel(kind=kind).max())) < 1e-6
    assert f"{scores.top('induction', 1)['mean'][0]:.2f}" in scores.finding()
    single = head_scores(tiny.model(*MODEL), n_prompts=1, length=LENGTH, kinds=["induction"])
    assert bool(single.mean()["low"].isnull().all()) and "nan" not in single.finding()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ["inductive"]}, "unknown kind of head 'inductive'. Nearest: induction"),
        ({"kinds": []}, "each once"),
        ({"kinds": ["previous", "previous"]}, "each once"),
        ({"length": 2}, "length must be 3 to 127 in this model.*context is 256.*; 2 arrived"),
        ({"length": 128}, "; 128 arrived"),
        ({"n_prompts": 0}, "at least 1; 0 arrived"),
    ],
)
def test_what_cannot_be_scored(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_scores(tiny.model(*MODEL), **settings)


def test_heads_that_are_not_there(scores: HeadScores) -> None:
    with pytest.raises(ValueError, match="unknown kind of head 'nonsense'"):
        scores.top("nonsense")
    with pytest.raises(ValueError, match="17 heads asked for, but this model has 16"):
        scores.top("induction", 17)


# Ablation


def loss_by_hand(name: str, tokens: Tensor, edits: dict[tuple[int, int], Tensor]) -> np.ndarray:
    """Plain Hugging Face: heads replaced where they enter the output projection; loss by prompt."""
    model = tiny.hf(name)
    d_head = model.config.hidden_size // model.config.num_attention_heads

    def replace(layer: int) -> Any:
        def hook(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].clone()
            for (deep, head), value in edits.items():
                if deep == layer:
                    z[..., head * d_head : (head + 1) * d_head] = value
            return (z,)

        return hook

    blocks = model.model.layers
    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(replace(i))
        for i, block in enumerate(blocks)
    ]
    try:
        with torch.no_grad():
            log_p = model(tokens).logits.log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    targets = tokens[:, 1:]
    losses = -log_p[:, :-1].gather(2, targets[..., None])[..., 0]
    return losses[:, -(LENGTH - 1) :].mean(dim=1).numpy()


def z_by_hand(name: str, tokens: Tensor, layer: int, head: int) -> Tensor:
    """A head's output at each position, averaged over prompts."""
    kept = []
    model = tiny.hf(name)
    d_head = model.config.hidden_size // model.config.num_attention_heads
    module = model.model.layers[layer].self_attn.o_proj
    handle = module.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return kept[0][..., head * d_head : (head + 1) * d_head].mean(dim=0)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_losses_are_hugging_face_s(kind: str, ablation: str) -> None:
    name, model = "llama", tiny.model("llama", kind)
    scored = head_scores(model, n_prompts=N, length=LENGTH)
    found = induction_test(
        model, scored, n_heads=3, n_random=2, n_prompts=N, ablation=ablation, seed=5
    )
    tokens, other = (
        repeated_tokens(model, n_prompts=N, length=LENGTH, seed=[5, i]).tokens for i in (1, 2)
    )
    heads = np.stack([found.data["top_layer"], found.data["top_head"]], axis=1)[None]
    drawn = np.stack([found.data["random_layer"], found.data["random_head"]], axis=2)
    losses = [found.data["top"].values, *found.data["random"].values]
    assert np.abs(found.data["clean"] - loss_by_hand(name, tokens, {})).max() < 1e-4
    for chosen, expected in zip([*heads, *drawn], losses, strict=True):
        value = {
            (i, h): z_by_hand(name, other, i, h) if ablation == "mean" else torch.zeros(1)
            for i, h in chosen.tolist()
        }
        by_hand = loss_by_hand(name, tokens, value)
        assert np.abs(by_hand - expected).max() < 1e-4
        assert np.abs(by_hand - found.data["clean"].values).max() > 1e-3
    with torch.no_grad():
        log_p = tiny.hf(name)(tokens).logits.log_softmax(-1)
    start = tokens.shape[1] - 2 * LENGTH
    first = [
        -log_p[:, start + j - 1].gather(1, tokens[:, [start + j]])[:, 0] for j in range(1, LENGTH)
    ]
    assert np.abs(found.data["first"] - torch.stack(first).mean(dim=0).numpy()).max() < 1e-4


def test_random_heads_are_others(scores: HeadScores) -> None:
    model = tiny.model(*MODEL)
    found = induction_test(
        model, scores, n_heads=5, n_random=6, n_prompts=2, control="layer", seed=2
    )
    top = sorted(zip(found.data["top_layer"].values, found.data["top_head"].values, strict=True))
    best = scores.top("induction", 5)
    assert top == sorted(zip(best["layer"], best["head"], strict=True))
    for draw in range(6):
        layers, heads = (found.data[f"random_{part}"][draw].values for part in ("layer", "head"))
        drawn = list(zip(layers, heads, strict=True))
        assert not set(drawn) & set(top) and len(set(drawn)) == 5
        assert sorted(layers) == sorted(layer for layer, _ in top)
    other = induction_test(model, scores, n_heads=5, n_random=6, n_prompts=2, seed=3)
    assert (other.data["random_head"].values != found.data["random_head"].values).any()


def test_sequences_of_the_test_are_not_those_of_the_scores(scores: HeadScores) -> None:
    model = tiny.model(*MODEL)
    seen = {tuple(row) for row in scores.data["tokens"].values.tolist()}
    for i in (1, 2):
        fresh = repeated_tokens(model, n_prompts=N, length=LENGTH, seed=[0, i]).tokens.tolist()
        assert not seen & {tuple(row) for row in fresh}


def test_costs_and_their_intervals(tested: InductionTest) -> None:
    costs, data = tested.costs(), tested.data
    top, random = (
        float((data["top"] - data["clean"]).mean()),
        float((data["random"] - data["clean"]).mean()),
    )
    assert costs["top"][0] == pytest.approx(top) and costs["random"][0] == pytest.approx(random)
    assert costs["difference"][0] == pytest.approx(top - random)
    assert all(low <= mean <= high for mean, low, high in costs.values())
    assert tested.rank()[1] == 4
    # Draws of heads that differ much, on sequences that do not, still give a wide interval.
    made = data.assign(
        clean=data["clean"] * 0,
        top=data["top"] * 0 + 1,
        random=data["random"] * 0 + xr.DataArray([0.0, 0.0, 2.0, 2.0], dims="draw"),
    )
    mean, low, high = InductionTest(made).costs()["difference"]
    assert mean == 0 and low < -0.5 and high > 0.5 and InductionTest(made).rank() == (2, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ablation": "men"}, "unknown ablation 'men'. Nearest: mean"),
        ({"control": "layr"}, "unknown control 'layr'. Nearest: layer"),
        ({"kind": "inductin"}, "unknown kind of head 'inductin'"),
        ({"n_heads": 17}, "17 heads asked for"),
        ({"n_heads": 9}, "9 random heads .* has only 7 others"),
        ({"n_random": 0}, "at least 1; 0 arrived"),
    ],
)
def test_what_cannot_be_ablated(scores: HeadScores, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        induction_test(tiny.model(*MODEL), scores, **settings)


def test_scores_of_another_model(scores: HeadScores) -> None:
    from tvlens.testing import tiny_model

    with pytest.raises(ValueError, match="with 4 layers of 4 heads; .* with 2 layers of 4 heads"):
        induction_test(tiny_model(), scores)


# Results and figures


def test_results_are_kept_and_reported(
    scores: HeadScores, tested: InductionTest, tmp_path: Path
) -> None:
    for result in (scores, tested):
        again = tv.load(result.save(tmp_path / f"{result.kind}.nc"))
        assert type(again) is type(result) and again.finding() == result.finding()
        assert "olsson" in result.cite().lower() and result.summary()["model"]
        assert result.finding()[:30] in result._repr_html_()
    page = tv.report([scores, tested], tmp_path / "heads.html").read_text("utf-8")
    assert scores.title in page and tested.title in page


def test_the_map_has_a_button_for_each_kind(scores: HeadScores) -> None:
    fig = scores.plot(kind="previous")
    buttons = fig.layout.updatemenus[0]
    assert [each.label for each in buttons.buttons] == list(KINDS) and buttons.active == 0
    assert [trace.visible for trace in fig.data] == [True, False, False]
    shown = [button.args[0]["visible"] for button in buttons.buttons]
    assert np.array_equal(shown, np.eye(3))
    best = scores.top("previous", 1).iloc[0]
    cell = fig.data[0].customdata[int(best["layer"])][int(best["head"])]
    assert f"layer {best['layer']:.0f}, head {best['head']:.0f}" in cell
    assert f"{best['mean']:.3f}" in cell and f"{best['high']:.3f}" in cell
    assert np.abs(fig.data[0].z - scores.mean()["mean"].sel(kind="previous")).max() < 1e-9
    assert (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (0, 1)
    with pytest.raises(ValueError, match="unknown kind of head 'prev'. Nearest: previous"):
        head_map(scores.drawn(), kind="prev")
    assert not head_map(scores.drawn().sel(kind=["induction"])).layout.updatemenus


def test_the_costs_are_drawn(tested: InductionTest) -> None:
    fig = tested.plot()
    means = [trace for trace in fig.data if trace.name.endswith("mean")]
    costs = tested.costs()
    assert [trace.x[0] for trace in means] == [costs["top"][0], costs["random"][0]]
    assert means[1].x[0] + means[1].error_x.array[0] == pytest.approx(costs["random"][2])
    points = [trace for trace in fig.data if not trace.name.endswith("mean")]
    assert [len(trace.x) for trace in points] == [N, 4]
    assert "layer" in points[1].customdata[0] and tested.finding()[:20] in fig.layout.title.text


# A real model


@pytest.mark.slow
def test_induction_heads_of_a_real_model(smollm2: Any) -> None:
    found = head_scores(smollm2, n_prompts=8, length=32)
    induction = found.data["score"].sel(kind="induction").mean("prompt")
    assert float(induction.max()) > 0.5 and float(induction.median()) < 0.02
    previous = found.data["score"].sel(kind="previous").mean("prompt")
    assert float(previous.max()) > 0.5
    test = induction_test(smollm2, found, n_heads=8, n_random=5, n_prompts=8)
    costs = test.costs()
    assert costs["difference"][1] > 0.3 and costs["top"][1] > costs["random"][2]
    assert test.rank() == (0, 5)
    # It has learned induction: what was said before costs far less.
    assert float(test.data["clean"].mean()) < 0.3 * float(test.data["first"].mean())
