"""Metrics, prompts and answers, statistics, the result and its heat map."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tvlens as tv
from tests import tiny
from tests.cases import make_batch
from tests.test_patching import ANSWERS, TOLERANCE, WRONG, pair
from tvlens import plots
from tvlens.encoding import Encoder
from tvlens.metrics import METRICS, Custom, Targets, WithTop, measure, metric_of
from tvlens.patching import Patching
from tvlens.patching.pairs import answer_ids, as_batch, token_labels
from tvlens.patching.statistics import bootstrap_ratio, correct, sign_flip

CLEAN, CORRUPTED = "Paris is the capital of", "Paris is the France of"


@pytest.fixture(scope="module")
def result() -> Patching:
    clean, corrupted = pair(n=4, width=8)
    return tv.patch(
        tiny.model("gpt2"), clean, corrupted, sites=["resid_pre", "mlp_out"], answers=[7, 11, 13, 17],
        wrong=5, top=2,
    )  # fmt: skip


# Metrics


def test_metrics_are_what_they_say() -> None:
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    answers, wrong = ((1,), (2, 3), (int(logits[2].argmax()),)), ((4, 5), (6,), (0,))
    reference = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    targets = Targets(3, answers, wrong, reference)
    found = {n: measure(m.readout(targets), logits) for n, m in METRICS.items()}
    p, q = logits.double().softmax(-1), reference.double().softmax(-1)
    for row in range(3):
        right, other = list(answers[row]), list(wrong[row])
        share = p[row, right].sum()
        expected = {
            "logit_difference": logits[row, right].mean() - logits[row, other].mean(),
            "log_probability": share.log(),
            "probability": share,
            "rank": float(min(sorted(p[row], reverse=True).index(p[row, i]) for i in right) + 1),
            "accuracy": float(p[row].argmax() in right),
            "kl": (q[row] * (q[row] / p[row]).log()).sum(),
        }
        for name, value in expected.items():
            assert abs(float(found[name][row]) - float(value)) < 1e-5, name
    assert found["accuracy"].tolist()[2] == 1 and found["rank"].tolist()[2] == 1
    assert measure(METRICS["kl"].readout(targets), reference).abs().max() < 1e-6


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_a_range_of_prompts(name: str) -> None:
    """The engine takes prompts in chunks, and rows of a chunk in any order."""
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    answers, wrong = tuple((i,) for i in range(5)), tuple((i + 5, 11) for i in range(5))
    readout = METRICS[name].readout(Targets(5, answers, wrong, logits.flip(0)))
    whole = measure(readout, logits)
    part = readout.rows(slice(2, 5))
    prompt = torch.tensor([2, 0, 1, 1])
    rows = logits[2:][prompt]
    rows = rows if part.columns is None else rows.gather(1, part.columns[prompt])
    assert (part(rows, prompt)["metric"] - whole[2:][prompt]).abs().max() < 1e-6
    top = WithTop(readout, 3).rows(slice(2, 5))(logits[2:][prompt], prompt)
    assert (top["metric"] - whole[2:][prompt]).abs().max() < 1e-6
    assert (top["top"][:, 0] == logits[2:][prompt].argmax(-1)).all()


@pytest.mark.parametrize("name", METRICS)
def test_any_metric_patches(name: str) -> None:
    model = tiny.model("llama")
    clean, corrupted = pair()
    options = {"answers": ANSWERS} if "answers" in METRICS[name].needs else {}
    options |= {"wrong": WRONG} if "wrong" in METRICS[name].needs else {}
    result = tv.patch(model, clean, corrupted, metric=name, layers=[0, 2], **options)
    assert result.metric == name and name.replace("_", " ") in result.finding()
    with torch.no_grad():
        logits = {run: model(t)[:, -1] for run, t in (("clean", clean), ("corrupted", corrupted))}
    targets = Targets(2, tuple((i,) for i in ANSWERS), tuple((i,) for i in WRONG), logits["clean"])
    for run in ("clean", "corrupted"):
        expected = measure(METRICS[name].readout(targets), logits[run])
        assert np.abs(result.data[run] - expected.numpy()).max() < TOLERANCE


def test_a_function_is_a_metric() -> None:
    clean, corrupted = pair(n=3)
    batch = [make_batch([6, 9, 4], shared=2, seed=seed) for seed in (0, 1)]
    seen: set[int] = set()

    def entropy(logits: Tensor, prompt: Tensor) -> Tensor:
        seen.update(prompt.tolist())
        return torch.distributions.Categorical(logits=logits).entropy()

    result = tv.patch(tiny.model("gpt2"), *batch, metric=entropy, layers=1)
    assert result.metric == "entropy" and seen == {0, 1, 2}
    with torch.no_grad():
        logits = tiny.model("gpt2")(batch[0].tokens[1:2])[:, -1]
    assert abs(float(result.data["clean"][1]) - float(entropy(logits, torch.tensor([0])))) < 1e-4
    with pytest.raises(
        ValueError, match=r"one number for each of \d+ rows, .* \(\d+, 640\) arrived"
    ):
        tv.patch(tiny.model("gpt2"), clean, corrupted, metric=lambda logits, prompt: logits)
    with pytest.raises(ValueError, match="float arrived"):
        tv.patch(tiny.model("gpt2"), clean, corrupted, metric=lambda logits, prompt: 1.0)


def test_metrics_by_name() -> None:
    with pytest.raises(ValueError, match="unknown metric 'logit_dif'. Nearest: logit_difference"):
        metric_of("logit_dif")
    with pytest.raises(TypeError, match="int arrived"):
        metric_of(3)  # type: ignore[arg-type]
    assert metric_of(Custom(lambda a, b: b, "mine")).name == "mine"
    for name, needed in (("kl", "reference run"), ("rank", "needs answers")):
        with pytest.raises(ValueError, match=needed):
            METRICS[name].readout(Targets(2))


# Prompts and answers


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_texts_are_encoded_as_everywhere(name: str) -> None:
    model = tiny.model(name)
    batch = as_batch(model, ["Paris is", "Rome"])
    encoder = Encoder.of(model)
    for row, text in enumerate(["Paris is", "Rome"]):
        ids = batch.tokens[row][batch.mask[row]].tolist()
        assert ids == ([encoder.bos] if encoder.bos is not None else []) + encoder.ids(text)
    assert as_batch(model, "Rome").text == ("Rome",) and as_batch(model, batch) is batch
    ids = torch.tensor([[5, 6, 7]])
    assert as_batch(model, ids).tokens.tolist() == [[5, 6, 7]] and as_batch(model, ids).mask.all()


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "clean holds no prompt"),
        (["a", 3], TypeError, "clean must be a text, a list of texts"),
        (torch.tensor([1, 2]), ValueError, r"\(2,\) arrived. Use ids\[None\] for one"),
        (torch.ones(1, 2), ValueError, "must be token ids of shape"),
        (
            torch.tensor([[1, 640]]),
            ValueError,
            "ids outside the model's 640 tokens: 1 to 640 arrived, 0 to 639 are there",
        ),
        (torch.ones(1, 300).long(), ValueError, "has 300 tokens, but the model's context is 256"),
    ],
)
def test_prompts_that_are_none(prompts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_batch(tiny.model("gpt2"), prompts, name="clean")


def test_unequal_pairs_are_shown_side_by_side() -> None:
    model = tiny.model("gpt2")
    with pytest.raises(ValueError) as error:
        tv.patch(model, [CLEAN, "Paris is in"], [CLEAN, "Paris is zz in"])
    lines = str(error.value).splitlines()
    assert lines[0].startswith("pair 1 has 3 clean and ") and "Choose words" in lines[0]
    assert lines[1].split() == ["position", "clean", "corrupted"]
    assert ["2", "'", "in'", "'", "z'", "<-", "they", "part"] in [line.split() for line in lines]
    assert lines[-1].split()[1] == "–" and len(lines) <= 7
    with pytest.raises(ValueError, match="2 clean and 1 corrupted prompts arrived"):
        tv.patch(model, ["a", "b"], ["a"])


def test_answers_are_first_tokens() -> None:
    model = tiny.model("gpt2")
    batch = as_batch(model, ["Paris is", "example:cat->"])

    def said(answers: Any) -> list[list[str]]:
        return [[model.tokenizer.decode([i]) for i in r] for r in answer_ids(model, batch, answers)]

    assert said(" the")[0] == said("the")[0] == [" the"]
    assert said([["in", " in"], "chat"])[0] == [" in"]  # the space between words is meant
    assert said(["in", "chat"])[1][0][0] == "c"  # none after an arrow
    assert answer_ids(model, batch, torch.tensor([4, 5])) == ((4,), (5,))
    assert answer_ids(model, batch, 9) == ((9,), (9,))
    assert answer_ids(model, batch, [[1, 2], 3]) == ((1, 2), (3,))
    for answers, message in (
        (["a"], "one for each of 2 prompts, or one for all; 1 arrived"),
        ([["a"], []], "has none for prompt 1"),
        (640, "640 is no token id of this model: 0 to 639"),
        ("", "begins with a token of mere white space|no tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            answer_ids(model, batch, answers)


def test_an_answer_that_begins_with_a_bare_space_tells_nothing() -> None:
    from tvlens.testing import tiny_model

    model = tiny_model()  # a token for each character
    batch = as_batch(model, "a b")
    assert [model.tokenizer.decode([i]) for i in answer_ids(model, batch, "c")[0]] == ["c"]
    with pytest.raises(ValueError, match="' c' begins with a token of mere white space here"):
        answer_ids(model, batch, " c")


def test_by_default_the_runs_say_what_is_right_and_wrong() -> None:
    model = tiny.model("gpt2")
    clean, corrupted = pair(n=6, seed=2)
    with torch.no_grad():
        right, wrong = (model(t)[:, -1].argmax(-1) for t in (clean, corrupted))
    keep = right != wrong
    assert keep.sum() >= 2
    result = tv.patch(model, clean[keep], corrupted[keep], layers=0)
    assert (result.data["clean"] >= 0).all() and (result.data["corrupted"] <= 0).all()
    same = clean[:1]
    with pytest.raises(
        ValueError, match="prompt 0: right and wrong answer both begin with the token"
    ):
        tv.patch(model, same, same)
    with pytest.raises(ValueError, match="metric 'kl' takes no answers; it takes reference"):
        tv.patch(model, clean, corrupted, metric="kl", answers=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "up"}, "unknown direction 'up'"),
        ({"sites": "head_z"}, "unknown site 'head_z'. Nearest: z."),
        ({"sites": "resid"}, "unknown site 'resid'. Nearest: resid_"),
        ({"sites": []}, "no site asked for"),
        ({"by": "token"}, "unknown axis 'token'"),
        ({"by": "head"}, "resid_pre has no heads; these sites have: z, q, k, v, pattern"),
        ({"heads": 0}, "resid_pre has no heads"),
        (
            {"sites": "k", "by": "head", "heads": [2]},
            "head 2 asked for, but of heads in this model 'k' has 2",
        ),
        ({"layers": 4}, "layer 4 asked for, but this model has 4 layers"),
        ({"positions": 7}, "position 7 asked for, but the longest prompt has 7 tokens: -7 to 6"),
        ({"positions": []}, "positions is empty"),
        ({"plan": "fast"}, "unknown plan 'fast'"),
    ],
)
def test_patching_refuses(options: dict[str, Any], message: str) -> None:
    clean, corrupted = pair()
    with pytest.raises(ValueError, match=message):
        tv.patch(tiny.model("llama"), clean, corrupted, **{"answers": 7, "wrong": 9} | options)


def test_a_site_that_the_model_lacks() -> None:
    clean, corrupted = pair()
    with pytest.raises(ValueError, match="no site 'resid_mid'; it has resid_pre, resid_post"):
        tv.patch(tiny.model("pythia"), clean, corrupted, sites=["resid_pre", "resid_mid"])


# Statistics


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=8), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_exact_tests_try_every_sign(values: list[float], seed: int) -> None:
    effects = np.array(values)[:, None]
    seen = abs(effects.sum())
    signs = itertools.product((1, -1), repeat=len(values))
    least = seen - 1e-9 * np.abs(effects).sum()
    count = sum(abs((np.array(s) * effects[:, 0]).sum()) >= least for s in signs)
    assert sign_flip(effects, seed=seed)[0] == pytest.approx(count / 2 ** len(values))


def test_drawn_signs_come_near_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    effects = np.random.default_rng(0).normal(0.5, 1, size=(10, 4))
    exact = sign_flip(effects)
    monkeypatch.setattr("tvlens.patching.statistics._ALL_SIGNS", 2)
    drawn = sign_flip(effects, seed=1)
    assert np.abs(drawn - exact).max() < 0.02 and (drawn > 0).all()
    assert not np.array_equal(drawn, sign_flip(effects, seed=2))


def test_corrections_by_hand() -> None:
    p, among = np.array([0.01, 0.04, 0.03, 0.9]), np.array([True, True, True, False])
    np.testing.assert_allclose(correct(p, among), [0.03, 0.06, 0.06, 0.9])
    np.testing.assert_allclose(correct(p, among, correction="bh"), [0.03, 0.04, 0.04, 0.9])
    np.testing.assert_allclose(correct(p, among, correction="none"), p)
    np.testing.assert_allclose(correct(p, ~among), [0.01, 0.04, 0.03, 0.9])
    with pytest.raises(
        ValueError, match="unknown correction 'bonferroni'. There are: bh, holm, none"
    ):
        correct(p, among, correction="bonferroni")


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(1, 1, size=(40, 300))
    low, high = bootstrap_ratio(values, np.ones_like(values), n_resamples=500)
    assert 0.89 < np.mean((low < 1) & (high > 1)) < 0.98
    one = bootstrap_ratio(values[:1], np.ones((1, 300)))
    assert np.isnan(one).all()
    for options, message in (
        ({"level": 1.5}, "level must lie"),
        ({"n_resamples": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            bootstrap_ratio(values, values, **options)


# The result


def test_means_effects_and_shares(result: Patching) -> None:
    data = result.data
    value, base = data["value"].values, data["corrupted"].values
    gap = data["clean"].values - base
    np.testing.assert_allclose(result.effect.values, value - base, atol=1e-6)
    np.testing.assert_allclose(result.normalized.values, (value - base) / gap, atol=1e-5)
    means = result.mean("effect")
    np.testing.assert_allclose(means["mean"].values, (value - base).mean(-1), atol=1e-5)
    assert (means["low"] <= means["mean"] + 1e-6).all() and (means["n"] == 4).all()
    # Of shares the ratio of means, so that a pair whose runs hardly differ does not dominate.
    shares = result.mean()["mean"].values
    np.testing.assert_allclose(shares, (value - base).mean(-1) / gap.mean(), atol=1e-4)
    with pytest.raises(ValueError, match="unknown variable 'effects'. Nearest: effect"):
        result.mean("effects")


def test_pairs_that_agree_have_no_share(result: Patching) -> None:
    data = result.data.copy()
    data["clean"] = data["clean"].copy(
        data=np.where(np.arange(4) == 1, data["corrupted"], data["clean"])
    )
    changed = Patching(data)
    assert changed.normalized.isel(prompt=1).isnull().all()
    assert changed.normalized.isel(prompt=[0, 2, 3]).notnull().all()
    assert (changed.mean()["n"] == 3).all() and changed.mean()["mean"].notnull().all()


def test_tests_are_paired_and_corrected(result: Patching) -> None:
    table = result.test()
    moved = (result.effect != 0).any("prompt")
    assert (table["p"].where(~moved, drop=True).fillna(1) == 1).all()
    assert float(table["p"].min()) >= 2**-3 and (table["p_corrected"] >= table["p"]).all()
    assert set(table.data_vars) == {"p", "p_corrected", "effect"}
    loose = result.test(correction="none")
    np.testing.assert_allclose(loose["p_corrected"], loose["p"])


def test_finding_names_the_strongest_cell_that_is_news(result: Patching) -> None:
    best = result.best("effect")
    effect = np.abs(result.effect.mean("prompt"))
    share = result.mean()["mean"]
    news = effect.where(np.abs(share - 1) >= 1e-4)
    assert float(news.max()) == pytest.approx(abs(best["mean"]), abs=1e-5)
    assert f"{float(result.data['clean'].mean()):.2f}" in result.finding()
    assert "over 4 prompts" in result.finding() and result.finding().endswith(".")
    summary = result.summary()
    assert summary["n_prompts"] == 4 and summary["normalized_low"] <= summary["normalized"]
    assert "token" not in summary


def test_finding_says_where_the_answer_is_carried() -> None:
    values = np.zeros((1, 4, 3, 1), "float32")
    values[0, :2, 1], values[0, 3:, 2] = 0.9, 0.8
    made = tv.patch(tiny.model("gpt2"), CLEAN, CORRUPTED, answers=5, wrong=9, positions=[0, 2, 3])
    shown = made.data.assign(
        clean=("prompt", [1.0]), corrupted=("prompt", [0.0]),
        value=(made.data["value"].dims, values),
    )  # fmt: skip
    assert (
        "recovers at least half of the logit difference at position 2 (␣the) in layers 0 to 1, and at "
        "position 3 (␣capital) in layers 3 to 3; the clean run has 1.00"
    ) in Patching(shown).finding()


def test_noise_destroys(result: Patching) -> None:
    clean, corrupted = pair(n=4, width=8)
    noisy = tv.patch(
        tiny.model("gpt2"), clean, corrupted, answers=[7, 11, 13, 17], wrong=5, direction="noise",
        sites="mlp_out",
    )  # fmt: skip
    best = noisy.best("normalized")
    assert f"destroys {1 - best['mean']:.2f} ({1 - best['high']:.2f} to" in noisy.finding()
    assert "Writing the corrupted mlp_out" in noisy.finding()
    assert noisy.base.equals(noisy.data["clean"])


def test_tokens_are_labelled_apart() -> None:
    model = tiny.model("gpt2")
    ids = torch.tensor([Encoder.of(model).ids(" the in the is the")])
    other = ids.clone()
    other[0, 1] = ids[0, 3]
    result = tv.patch(model, ids, other, answers=5, wrong=9)
    assert result.data["token"].values.tolist() == [
        "0:  the", "1:  in", "2:  the", "3:  is", "4:  the",
    ]  # fmt: skip
    differ = result.data["clean_token"] != result.data["corrupted_token"]
    assert differ.values.tolist() == [[False, True, False, False, False]]
    assert "␣in/␣is" in result.plot().layout.xaxis.ticktext[1]
    assert token_labels([["a"], ["b"], ["b"]], [0, -1]) == ["0: b…", "-1: b…"]


def test_likeliest_tokens_before_and_after(result: Patching) -> None:
    clean, _ = pair(n=4, width=8)
    model = tiny.model("gpt2")
    with torch.no_grad():
        best = model(clean)[:, -1].softmax(-1).topk(5)
    spoken = [[model.tokenizer.decode([i]) for i in row] for row in best.indices.tolist()]
    assert result.data["clean_top_token"].values.tolist() == spoken
    np.testing.assert_allclose(result.data["clean_top_probability"], best.values, atol=1e-4)
    whole = result.data.sel(site="resid_pre", layer=0, position=3)
    assert result.data["top_token"].dims[-1] == "rank_after" and whole["top_token"].shape == (4, 2)
    untouched = result.data["top_token"].sel(position=0, site="resid_pre", layer=2)
    assert (untouched.values == result.data["corrupted_top_token"].values[:, :2]).all()


@pytest.mark.slow
def test_results_are_saved_tabled_and_cited(result: Patching, tmp_path: Any) -> None:
    again = tv.load(result.save(tmp_path / "patching.nc"))
    assert isinstance(again, Patching) and again.finding() == result.finding()
    xr.testing.assert_equal(again.data, result.data)
    table = result.to_dataframe()
    assert len(table) == 2 * 4 * 8 * 4 and {"value", "effect", "normalized"} <= set(table)
    assert {"layer", "position", "token", "prompt", "answer", "wrong"} <= set(table)
    with pytest.raises(ValueError, match="unknown variable 'valu'. Nearest: value"):
        result.to_dataframe("valu")
    assert "2309.16042" in result.cite() and "tvlens" in result.cite()
    model = tiny.model("gpt2")
    traced = tv.trace(model, CLEAN, "Paris", samples=1, layers=0)
    assert "2202.05262" in traced.cite() and "2309.16042" not in traced.cite()
    assert "2211.00593" in tv.patch_paths(model, CLEAN, CORRUPTED, answers=5, wrong=9).cite()
    made = result.provenance
    assert made["plan"] and made["cells"] == 64 and made["cells_run"] < 64 and made["seconds"] > 0
    assert made["model_facts"] and made["metric"] == "logit_difference"
    page = tv.report([result, traced], tmp_path / "report.html").read_text("utf-8")
    assert result.finding().split(";")[0].split("(")[0] in page


# The heat map


def test_the_heat_map_shows_the_means(result: Patching) -> None:
    figure = result.plot()
    means = result.mean()["mean"]
    assert len(figure.data) == 2 and [t.visible for t in figure.data] == [True, False]
    for trace, site in zip(figure.data, ("resid_pre", "mlp_out"), strict=True):
        np.testing.assert_allclose(trace.z, means.sel(site=site).transpose("layer", "position"))
    assert [step.label for step in figure.layout.sliders[0].steps] == ["resid_pre", "mlp_out"]
    assert figure.layout.sliders[0].steps[1].args[0] == {"visible": [False, True]}
    axis = figure.layout.coloraxis
    assert axis.cmin < 0 < axis.cmax and figure.layout.meta["title"] == result.finding()
    hover = figure.data[1].customdata[2][4]
    cell = result.mean().sel(site="mlp_out", layer=2, position=4)
    for shown in ("mlp_out, layer 2, position 4", "normalised", "clean:", "corrupted:"):
        assert shown in hover
    assert f"{float(cell['mean']):.3f}".replace("-", "−") in hover


def test_white_is_no_effect_in_every_variable(result: Patching) -> None:
    def white(figure: Any) -> float:
        axis = figure.layout.coloraxis
        (place,) = [at for at, color in axis.colorscale if color == "#ffffff"]
        return axis.cmin + place * (axis.cmax - axis.cmin)

    assert white(result.plot()) == pytest.approx(0, abs=1e-6)
    assert white(result.plot(variable="effect")) == pytest.approx(0, abs=1e-6)
    base = float(result.data["corrupted"].mean())
    assert white(result.plot(variable="value")) == pytest.approx(base, abs=1e-5)
    clean, corrupted = pair()
    noisy = tv.patch(tiny.model("gpt2"), clean, corrupted, answers=7, wrong=9, direction="noise")
    assert white(noisy.plot()) == pytest.approx(1, abs=1e-6)


def test_a_menu_shows_each_prompt(result: Patching) -> None:
    figure = result.plot(prompts="each")
    (menu,) = figure.layout.updatemenus
    assert [button.label for button in menu.buttons] == ["mean", *(f"prompt {i}" for i in range(4))]
    one = result.normalized.sel(site="mlp_out").isel(prompt=2).transpose("layer", "position")
    np.testing.assert_allclose(menu.buttons[3].args[0]["z"][1], one, atol=1e-6)
    hover = menu.buttons[3].args[0]["customdata"][1][2][4]
    assert "after: " in hover and "(corrupted " in hover and " to " not in hover.split("<br>")[1]
    with pytest.raises(ValueError, match="unknown choice of prompts 'all'"):
        result.plot(prompts="all")


def test_other_axes_and_odd_tokens() -> None:
    model = tiny.model("gpt2")
    clean, corrupted = pair()
    heads = tv.patch(
        model,
        clean,
        corrupted,
        sites="z",
        by=("position", "head"),
        answers=7,
        wrong=9,
        layers=[1, 2],
    )
    figure = heads.plot()
    assert len(figure.data) == 4 and figure.layout.sliders[0].steps[1].label == "head 1"
    by_layer = heads.plot(x="position", y="head")
    assert len(by_layer.data) == 2 and by_layer.layout.sliders[0].steps[0].label == "layer 1"
    alone = tv.patch(
        model, clean, corrupted, sites="z", by=("position", "head"), answers=7, wrong=9, layers=1
    ).plot()
    assert len(alone.data) == 1 and alone.layout.yaxis.title.text == "head"
    layers = tv.patch(
        model, clean, corrupted, sites=["z", "v"], by="layer", answers=7, wrong=9
    ).plot()
    assert np.shape(layers.data[0].z) == (4, 2) and layers.layout.xaxis.ticktext == ("z", "v")
    data = heads.drawn().assign_coords(
        token=("position", [f"{p}: <b>$x$\n" for p in range(heads.data.sizes["position"])])
    )
    text = str(plots.patching_heatmap(data.drop_vars("clean_token")).to_dict())
    assert "<b>$x" not in text and "&lt;b&gt;&#36;x&#36;↵" in text
    for options, message in (
        ({"x": "token"}, "unknown dimension 'token'"),
        ({"x": "head", "y": "head"}, "x and y are both 'head'"),
    ):
        with pytest.raises(ValueError, match=message):
            heads.plot(**options)
    with pytest.raises(ValueError, match="the data has no 'mean'"):
        plots.patching_heatmap(heads.data)


def test_missing_positions_stay_empty_and_say_so() -> None:
    batch = [make_batch([6, 9], shared=2, seed=seed) for seed in (0, 1)]
    result = tv.patch(tiny.model("gpt2"), *batch, answers=7, wrong=9)
    figure = result.plot(prompts="each")
    assert np.isfinite(np.asarray(figure.data[0].z, float)).all()
    short = figure.layout.updatemenus[0].buttons[1].args[0]
    assert np.isnan(np.asarray(short["z"][0], float)[:, 6:]).all()
    assert "no prompt has this position" in short["customdata"][0][0][8]


def test_blurred_tokens_are_marked() -> None:
    result = tv.trace(tiny.model("gpt2"), CLEAN, "capital", samples=1)
    ticks = result.plot().layout.xaxis.ticktext
    marked = ["*" in tick for tick in ticks]
    assert marked == result.data["subject"].values[0].tolist() and any(marked) and not all(marked)


def test_single_precision_has_the_same_p() -> None:
    effects = np.random.default_rng(0).uniform(0.1, 3, (8, 200)).astype(np.float32)
    # All effects are of one sign, so no pattern but the one seen and its mirror reaches its sum.
    assert np.array_equal(sign_flip(effects), np.full(200, 2.0**-7))


@pytest.mark.parametrize("n", [14, 40])
def test_a_clear_effect_outlives_the_correction_for_many_cells(n: int) -> None:
    effects = 1 + 0.1 * np.random.default_rng(0).standard_normal((n, 900))
    p = sign_flip(effects)
    assert correct(p, np.ones(900, dtype=bool)).max() < (0.12 if n == 14 else 0.05)
    null = sign_flip(np.random.default_rng(1).standard_normal((n, 900)))
    assert 0.02 < (null < 0.05).mean() < 0.08
