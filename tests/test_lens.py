"""The logit lens and projections against the model's own forward and plain products of weights."""

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import tvlens as tv
from tests import tiny
from tests.cases import GRID, KIND, ids_of, make_batch, model_of
from tvlens.lens import Lens, Projection, logit_lens, measures, project, reading
from tvlens.models.runner import runner
from tvlens.plots.theme import visible
from tvlens.sites import hook_name

TOLERANCE = 1e-4
TEXT = "Paris is the capital of"


def own_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """The model's own forward, one prompt at a time: position by vocabulary."""
    with torch.no_grad():
        return model(torch.tensor([ids]), prepend_bos=False)[0]


def own_resid(model: Any, ids: list[int], layer: int) -> torch.Tensor:
    """The residual after a block, through TransformerLens' own cache."""
    name = hook_name("resid_post", layer)
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([ids]), names_filter=[name])
    return cache[name][0]


# Against the model's own forward


@pytest.mark.parametrize("name, kind", GRID)
def test_the_last_layer_is_the_models_own_prediction(name: str, kind: str) -> None:
    model = tiny.model(name, kind)
    batch = make_batch([7, 4, 9])
    found = logit_lens(model, batch, k=4, tokens=[5, 40]).data.sel(lens="logit", layer=3)
    for row, length in enumerate((7, 4, 9)):
        logp = own_logits(model, ids_of(batch, row)).log_softmax(-1).double()
        best = logp.topk(4)
        here = found.isel(prompt=row, position=slice(length))
        assert here["top_id"].values.tolist() == best.indices.tolist()
        assert np.abs(here["top_probability"] - best.values.exp().numpy()).max() < TOLERANCE
        entropy = -(logp.exp() * logp).sum(-1)
        assert np.abs(here["entropy"] - entropy.numpy()).max() < TOLERANCE
        assert np.abs(here["log_probability"] - logp[:, [5, 40]].numpy()).max() < TOLERANCE
        ranks = (logp[:, None] > logp[:, [5, 40], None]).sum(-1) + 1
        assert here["target_rank"].values.tolist() == ranks.tolist()
        assert float(here["kl"].max()) == 0
        beyond = found.isel(prompt=row, position=slice(length, None))
        assert beyond["kl"].isnull().all() and (beyond["top_token"] == "").all()


@pytest.mark.parametrize("name, kind", GRID)
def test_an_early_layer_goes_through_the_last_norm_unembedding_and_soft_cap(
    name: str, kind: str
) -> None:
    model = tiny.model(name, kind)
    ids = ids_of(make_batch([6]), 0)
    found = logit_lens(model, torch.tensor([ids]), layers=1, k=640).data.isel(
        prompt=0, layer=0, lens=0
    )
    # The model's own last steps, run on the early residual in place of the late one.
    early, last = own_resid(model, ids, 1), hook_name("resid_post", 3)

    def write(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        return early[None].to(resid)

    with torch.no_grad():
        logits = model.run_with_hooks(
            torch.tensor([ids]), prepend_bos=False, fwd_hooks=[(last, write)]
        )[0]
    expected, final = logits.log_softmax(-1), own_logits(model, ids).log_softmax(-1)
    order = torch.from_numpy(found["top_id"].values)
    seen = np.log(found["top_probability"].values.astype(float))
    assert np.abs(seen - expected.gather(1, order).numpy()).max() < TOLERANCE
    kl = (final.exp() * (final - expected)).sum(-1)
    assert np.abs(found["kl"].values - kl.numpy()).max() < TOLERANCE and float(kl.min()) > 1e-3


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_other_sites_are_read_the_same_way(name: str) -> None:
    model = model_of(name)
    ids = ids_of(make_batch([5]), 0)
    post = logit_lens(model, torch.tensor([ids]), layers=[0, 1]).data
    pre = logit_lens(model, torch.tensor([ids]), layers=[1, 2], site="resid_pre").data
    for variable in ("kl", "entropy", "top_probability"):
        np.testing.assert_allclose(post[variable].values, pre[variable].values, atol=1e-5)
    mlp = logit_lens(model, torch.tensor([ids]), layers=[1], site="mlp_out").data
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([ids]))
    logits = runner(model).logits(cache[hook_name("mlp_out", 1)][0])
    assert (mlp["top_id"].values[0, 0, :, 0, 0] == logits.argmax(-1).numpy()).all()


@pytest.mark.parametrize("name, kind", GRID)
def test_pieces_change_nothing(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny.model(name, kind), make_batch([6, 3, 8, 8, 5])
    whole = logit_lens(model, batch, tokens=7)
    monkeypatch.setattr(measures, "_ROWS", {"cpu": 3})
    monkeypatch.setattr(reading, "_MEMORY", 1)  # one prompt at a time
    parts = logit_lens(model, batch, tokens=7)
    small = logit_lens(model, batch, tokens=7, memory=2**20)
    for other in (parts, small):
        for variable in ("kl", "entropy", "top_probability", "log_probability", "target_rank"):
            np.testing.assert_allclose(other.data[variable], whole.data[variable], atol=1e-5)
        assert (other.data["top_token"] == whole.data["top_token"]).all()


@pytest.mark.parametrize("plan", ["plain", "suffix", "growing"])
def test_positions_of_prompts_of_unequal_lengths(plan: str) -> None:
    model, batch = model_of("llama"), make_batch([6, 3, 8])
    whole = logit_lens(model, batch)
    chosen = logit_lens(model, batch, positions=[-1, 4, 0, 2, 5], plan=plan)
    assert chosen.data["position"].values.tolist() == [-1, 4, 0, 2, 5]
    assert chosen.provenance["plan"] == plan
    for row, length in enumerate((6, 3, 8)):
        for place in (-1, 4, 0, 2, 5):
            one = chosen.data.isel(prompt=row).sel(position=place)
            at = length + place if place < 0 else place
            if at >= length:
                assert one["kl"].isnull().all() and (one["prompt_token"] == "").all()
                continue
            same = whole.data.isel(prompt=row).sel(position=at)
            np.testing.assert_allclose(one["kl"], same["kl"], atol=TOLERANCE)
            assert (one["top_token"] == same["top_token"]).all()
    few = logit_lens(model, batch, positions=[0, 2], plan=plan).data
    np.testing.assert_allclose(few["kl"], whole.data["kl"].sel(position=[0, 2]), atol=TOLERANCE)


def test_precision_of_the_model_is_kept() -> None:
    from tvlens import load_model

    half = load_model(
        tiny.hf("llama"), tokenizer=tiny.tokenizer("llama"), device="cpu", dtype=torch.bfloat16
    )
    one = logit_lens(half, TEXT).data
    assert float(one["kl"].sel(layer=3).max()) == 0
    np.testing.assert_allclose(
        one["entropy"], logit_lens(tiny.model("llama"), TEXT).data["entropy"], atol=0.1
    )


# What was asked for


def test_followed_tokens_are_those_of_the_prompt() -> None:
    model = model_of("gpt2")
    same = logit_lens(model, [TEXT, "Rome is in"], tokens=[" the", 7])
    assert same.data["target"].values.tolist() == [" the", model.tokenizer.decode([7])]
    own = logit_lens(model, [TEXT, "Rome is in"], tokens=[[" the"], [7]])
    assert own.data["target"].values.tolist() == [" the…"]
    for row in (0, 1):
        left = own.data["log_probability"].isel(prompt=row, target=0)
        np.testing.assert_array_equal(
            left, same.data["log_probability"].isel(prompt=row, target=row)
        )
    twice = logit_lens(model, TEXT, tokens=[" the", " the"])
    assert len(set(twice.data["target"].values)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 4}, "layer 4 asked for, but this model has 4 layers"),
        ({"layers": []}, "layers is empty"),
        ({"positions": 99}, "position 99 asked for, but the longest prompt has"),
        ({"positions": []}, "positions is empty"),
        ({"k": 0}, "k = 0 tokens asked for; this model has 640"),
        ({"k": 641}, "k = 641 tokens asked for"),
        ({"tokens": 640}, "tokens: 640 is no token id of this model: 0 to 639"),
        ({"tokens": [-1]}, "tokens: -1 is no token id"),
        ({"tokens": [["a"], ["b"]]}, "one list for each of 1 prompts"),
        ({"tokens": []}, "one list for each of 1 prompts"),
        (
            {"site": "z"},
            "width d_model: resid_pre, resid_mid, resid_post, attn_out, mlp_out; not 'z'",
        ),
        ({"site": "resid"}, "unknown site 'resid'. Nearest: resid_"),
        ({"compare": True}, "compare=True needs a tuned lens"),
    ],
)
def test_a_lens_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logit_lens(model_of("gpt2"), TEXT, **options)


# The result


@pytest.fixture(scope="module")
def result() -> Lens:
    return logit_lens(model_of("gpt2"), [TEXT, "Rome is in"], tokens=" the")


def test_settled_is_the_layer_from_which_the_prediction_stands(result: Lens) -> None:
    data = result.data.copy()
    first = data["top_token"].values.copy()
    final = data["final_top_token"].values
    # Position 0: right at 0, wrong at 1, right from 2 on; position 1: wrong at the top; 2: always right.
    first[0, :, 0, 0, 0] = [final[0, 0, 0], "no", final[0, 0, 0], final[0, 0, 0]]
    first[0, :, 1, 0, 0] = [final[1, 0, 0]] * 3 + ["no"]
    first[0, :, 2, 0, 0] = final[2, 0, 0]
    changed = Lens(data.assign(top_token=(data["top_token"].dims, first)))
    layers = changed.settled().isel(prompt=0).values
    assert layers[0] == 2 and np.isnan(layers[1]) and layers[2] == 0
    backwards = Lens(changed.data.isel(layer=slice(None, None, -1)))
    np.testing.assert_array_equal(backwards.settled(), changed.settled())
    with pytest.raises(ValueError, match="unknown lens 'tuned'. There are: logit"):
        result.settled("tuned")


def test_findings_and_means(result: Lens) -> None:
    n = int(result.data["kl"].isel(lens=0, layer=0).notnull().sum())
    assert f"At the median of {n} positions in 2 prompts the" in result.finding()
    one = logit_lens(model_of("gpt2"), TEXT)
    last = str(one.data["final_top_token"].values[-1, 0, 0])
    place = f"At position {int(one.data['position'][-1])} (␣of) the model's prediction "
    assert one.finding().startswith(place + visible(last))
    assert f"{float(one.data['kl'].mean()):.2f} nats." in one.finding()
    alone = logit_lens(model_of("gpt2"), TEXT, layers=2).finding()
    assert alone.startswith("At layer 2, the mean KL")
    means = result.by_layer("kl")
    kl = result.data["kl"].mean("position").mean("prompt")
    np.testing.assert_allclose(means["mean"], kl, atol=1e-6)
    assert (means["low"] <= means["mean"] + 1e-6).all() and means["high"].notnull().all()
    assert one.by_layer("entropy")["low"].isnull().all()
    assert result.by_layer("target_rank")["mean"].sizes["target"] == 1
    with pytest.raises(ValueError, match="unknown variable 'ranks'"):
        result.by_layer("ranks")
    assert result.summary()["n_prompts"] == 2


def test_results_are_saved_tabled_and_cited(result: Lens, tmp_path: Any) -> None:
    again = tv.load(result.save(tmp_path / "lens.nc"))
    assert isinstance(again, Lens) and again.finding() == result.finding()
    xr.testing.assert_equal(again.data, result.data)
    table = result.to_dataframe()
    assert {"layer", "position", "prompt", "token", "top_token", "entropy", "kl"} <= set(table)
    assert len(table) == 4 * result.data.sizes["position"] * 2
    assert {"target", "log_probability"} <= set(result.to_dataframe("log_probability"))
    assert "2303.08112" in result.cite() and "logit lens" in result.cite()
    page = tv.report([result], tmp_path / "report.html").read_text("utf-8")
    assert "kl by layer" in page or "KL" in page


def test_the_heat_map_writes_the_likeliest_token(result: Lens) -> None:
    figure = result.plot(prompt=1)
    (trace,) = figure.data
    width = int((result.data["prompt_token"].values[1] != "").sum())
    assert np.shape(trace.z) == (4, width) and figure.layout.meta["title"] == result.finding()
    here = result.data.isel(prompt=1, position=slice(width), lens=0, rank=0)
    np.testing.assert_allclose(trace.z, here["top_probability"].transpose("layer", "position"))
    words = [[word.removeprefix("<b>").removesuffix("</b>") for word in row] for row in trace.text]
    shown = here["top_token"].transpose("layer", "position").values
    label = tv.plots.token_label
    assert words == [[label(t, limit=10) for t in row] for row in shown]
    assert all(word.startswith("<b>") for word in trace.text[3])
    hover = trace.customdata[2][1]
    for part in ("layer 2, position 1", "entropy", "KL", "in the end", "rank", "log p"):
        assert part in hover
    menu = figure.layout.updatemenus[0]
    assert [b.label for b in menu.buttons] == ["probability", "entropy", "KL to the end", "log p"]
    np.testing.assert_allclose(
        menu.buttons[2].args[0]["z"][0],
        result.data["kl"].isel(prompt=1, lens=0, position=slice(width)),
    )
    assert menu.buttons[2].args[1]["coloraxis"]["cmin"] == 0
    assert result.plot(value="kl").layout.updatemenus[0].active == 2
    for options, message in (
        ({"prompt": 2}, "prompt 2 asked for; the data has 2: 0 to 1"),
        ({"value": "kll"}, "unknown value 'kll'. Nearest: kl"),
        ({"lens": "tuned"}, "unknown lens 'tuned'"),
    ):
        with pytest.raises(ValueError, match=message):
            result.plot(**options)


def test_lines_by_layer(result: Lens) -> None:
    figure = result.plot_by_layer("entropy")
    band, line = figure.data
    np.testing.assert_allclose(line.y, result.by_layer("entropy")["mean"].values[0])
    assert len(band.x) == 8 and "entropy" in figure.layout.yaxis.title.text
    assert result.plot_by_layer("target_rank").layout.yaxis.type == "log"
    assert list(result.figures()) == ["main", "kl by layer"]


# Projections


def weights(name: str, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Unembedding, its bias, embedding and its scale, off the Hugging Face model."""
    hf = tiny.hf(name)
    head, embedding = hf.get_output_embeddings(), hf.get_input_embeddings()
    bias = torch.zeros(640) if head.bias is None else head.bias.detach()
    scale = 8.0 if name == "gemma3" else 1.0  # sqrt(d_model)
    return head.weight.detach(), bias, embedding.weight.detach(), scale


@pytest.mark.parametrize("name, kind", GRID)
def test_projections_are_products_of_weights(name: str, kind: str) -> None:
    model = tiny.model(name, kind)
    vectors = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    unembed, _, embed, scale = weights(name, kind)
    for expected, options in (
        (vectors @ unembed.T, {"norm": False}),
        (vectors @ embed.T * scale, {"transposed": True}),
        (runner(model).logits(vectors).detach(), {}),
    ):
        data = project(model, vectors, k=5, **options).data
        for end, largest in (("top", True), ("bottom", False)):
            best = expected.topk(5, largest=largest)
            assert data[f"{end}_id"].values.tolist() == best.indices.tolist()
            np.testing.assert_allclose(data[f"{end}_value"], best.values, atol=TOLERANCE, rtol=1e-4)
        np.testing.assert_allclose(data["mean"], expected.mean(-1), atol=TOLERANCE)
        np.testing.assert_allclose(data["spread"], expected.std(-1), atol=TOLERANCE, rtol=1e-4)
        assert ("top_probability" in data) == (not options)
    words = project(model, vectors, k=2).data
    assert words["top_token"].values[0, 0] == model.tokenizer.decode([int(words["top_id"][0, 0])])


@pytest.mark.parametrize("name, kind", GRID)
def test_a_last_residual_projects_to_the_prediction(name: str, kind: str) -> None:
    model = tiny.model(name, kind)
    ids = ids_of(make_batch([6]), 0)
    data = project(model, own_resid(model, ids, 3), k=3).data
    best = own_logits(model, ids).softmax(-1).topk(3)
    assert data["top_id"].values.tolist() == best.indices.tolist()
    np.testing.assert_allclose(data["top_probability"], best.values, atol=TOLERANCE)


def test_task_vectors_and_head_outputs() -> None:
    model = model_of("gpt2")
    prompts = tv.build_prompts(tv.load_task("to_upper"), model, shots=2, n=3)
    theta = tv.extract(model, prompts, layers=[1, 3])
    whole = project(model, theta)
    assert whole.data["label"].values.tolist()[:3] == [
        "layer 1, prompt 0", "layer 3, prompt 0", "layer 1, prompt 1",
    ]  # fmt: skip
    mean = project(model, theta.mean(), labels=["early", "late"])
    assert mean.data["label"].values.tolist() == ["early", "late"] and "to_upper" in mean.title
    by_hand = project(model, theta.mean().at(3))
    np.testing.assert_allclose(by_hand.data["top_value"][0], mean.data["top_value"][1], atol=1e-5)
    # What a head writes where it attends to a token: the embedding through OV.
    ov = (model.W_E[:5] @ model.W_V[2, 1] @ model.W_O[2, 1]).detach()
    assert project(model, ov, norm=False).data.sizes["row"] == 5
    assert project(model, ov.reshape(5, 1, 64)).data["label"].values[3] == "row 3, 0"
    assert project(model, ov[0]).data["label"].values.tolist() == ["the vector"]


def test_projections_are_drawn_saved_and_cited(tmp_path: Any) -> None:
    model = model_of("llama")
    vectors = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    found = project(model, vectors, k=8)
    again = tv.load(found.save(tmp_path / "projection.nc"))
    assert isinstance(again, Projection) and again.finding() == found.finding()
    figure = found.plot(ranks=3)
    (trace,) = figure.data
    data = found.data
    z = (data["top_value"][:, 0] - data["mean"]) / data["spread"]
    np.testing.assert_allclose(np.asarray(trace.z)[:, 0], z, atol=1e-5)
    low = (data["bottom_value"][:, 0] - data["mean"]) / data["spread"]
    np.testing.assert_allclose(np.asarray(trace.z)[:, -1], low, atol=1e-5)
    assert np.shape(trace.text) == (4, 7) and figure.layout.meta["title"] == found.finding()
    assert "promotes" in found.finding() and "suppresses" in found.finding()
    assert "excited most by" in project(model, vectors, transposed=True).finding()
    assert "2209.02535" in found.cite() and len(found.to_dataframe()) == 32


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        (torch.zeros(3, 63), {}, r"width 64 in this model .* shape \(3, 63\) arrived"),
        (torch.zeros(0, 64), {}, r"shape \(0, 64\) arrived"),
        (torch.full((64,), torch.nan), {}, "hold NaN or infinity"),
        (torch.zeros(64), {"k": 700}, "k = 700 tokens asked for"),
        (torch.zeros(64), {"labels": ["a", "b"]}, "labels needs one for each of 1 rows; 2 arrived"),
        (torch.zeros(64), {"transposed": True, "norm": True}, "Leave norm out"),
    ],
)
def test_a_projection_refuses(vectors: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        project(model_of("gpt2"), vectors, **options)


def test_a_task_vector_of_another_model_is_refused() -> None:
    from tvlens.testing import tiny_model

    other = tiny_model()
    theta = tv.extract(other, tv.build_prompts(tv.load_task("to_upper"), other, n=2))
    with pytest.raises(ValueError, match="this vector has width 32"):
        project(model_of("gpt2"), theta)


# Against TransformerLens 4


@pytest.mark.skipif(tiny.HAS_HOOKED, reason="TransformerLens 3.9 has no logit lens")
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_equals_transformer_lens(name: str) -> None:
    from transformer_lens.tools.analysis import logit_lens as theirs

    model = tiny.model(name, KIND)
    tokens = torch.tensor([ids_of(make_batch([7]), 0)])
    # Theirs reads what enters each block, and what leaves the last one.
    places = [("resid_pre", layer) for layer in range(4)] + [("resid_post", 3)]
    ours = [
        logit_lens(model, tokens, site=site, layers=layer, tokens=[9, 33]).data.isel(
            lens=0, prompt=0, layer=0
        )
        for site, layer in places
    ]
    found = theirs(model, tokens, targets=[9, 33], positions=None, return_type="log_probs")
    assert found.labels == ["0_pre", "1_pre", "2_pre", "3_pre", "final_post"]
    for i, mine in enumerate(ours):
        logp = found.values[i, 0].detach()
        np.testing.assert_allclose(mine["log_probability"], logp, atol=TOLERANCE)
        np.testing.assert_allclose(
            mine["entropy"], found.readout.entropy[i, 0].detach(), atol=TOLERANCE
        )
        ranks = found.readout.target_ranks[i, 0] + 1
        np.testing.assert_array_equal(mine["target_rank"], ranks)
