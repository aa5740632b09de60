"""Inside a transformer: no cut is f, exchanging everything is the other run, and g knows no context."""

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import tvlens as tv
from tvlens.encoding import TokenBatch
from tvlens.engine import Edit, LastLogits, Request, run
from tvlens.icl import Plan, Probe, Setting, Training, Transformer, as_tokens, export, train
from tvlens.icl.probes import PROBES
from tvlens.icl.studies import get
from tvlens.icl.studies._inside import Inside
from tvlens.icl.studies._inside_cuts import RUNS, answers, cuts, observe
from tvlens.icl.studies._inside_mixture import (
    FITS,
    distance,
    fits,
    log_linear_weight,
    mixture_weight,
)
from tvlens.icl.studies._inside_parts import PARTS, SITES, direct, moved_label
from tvlens.icl.studies.inside import inside, probe_items
from tvlens.plots.icl_inside import inside_curves, inside_effects, inside_parts
from tvlens.results import Result

pytestmark = pytest.mark.slow

N = 12


@pytest.fixture(scope="module")
def training() -> Training:
    """Copying is learnt within 300 steps where labels are loud."""
    plan = Plan(steps=300, probes=(Probe(True, "low", flipped=True),), n_items=1)
    return train(
        [Setting(noise=0.3, seed=3)],
        plan,
        model=Transformer(label_scale=2.0),
        device="cpu",
        progress=False,
    )


@pytest.fixture(scope="module")
def opened(training: Training) -> tuple[Any, Any, Any]:
    """A model, its items, and all prompts: those of probes, then the usual ones."""
    items = probe_items(training.data, N)
    inputs, tokens = as_tokens(items, member=0, n_classes=10)
    return export(training, inputs), items, tokens


@pytest.fixture(scope="module")
def found() -> Inside:
    return inside(seeds=2, steps=60, checkpoints=(30, 60), n_prompts=8, progress=False)


def rows(probe: str) -> slice:
    at = list(PROBES).index(probe)
    return slice(at * N, (at + 1) * N)


def test_true_and_moved_labels_show_the_same_inputs(opened: Any) -> None:
    _, items, _ = opened
    base, flipped = (rows(f"relevant low {labels}") for labels in ("base", "flipped"))
    assert torch.equal(items.inputs[:, base], items.inputs[:, flipped])
    assert (items.labels[:, base] != items.labels[:, flipped]).all()
    assert torch.equal(items.own[:, base], items.target[:, base])


@pytest.mark.parametrize("plan", ["plain", "suffix", "growing"])
def test_no_cut_is_the_model(opened: Any, plan: str) -> None:
    """Writing back what was read, at every place that cuts touch, changes nothing."""
    model, _, tokens = opened
    seen = observe(model, tokens[:N])
    edits = (
        Edit("resid_pre", 0, seen.query),
        *(Edit("pattern", layer, seen.pattern[:, layer]) for layer in (0, 1)),
        *(Edit("v", layer, seen.values[:, layer, 1], 1) for layer in (0, 1)),
        *(Edit("mlp_out", layer, seen.mlp[:, layer]) for layer in (0, 1)),
    )
    asked = Request(TokenBatch.of_ids(tokens[:N]), cells=((), edits), readout=LastLogits())
    (output,) = run(model, [asked], plan=plan)
    own = model(tokens[:N])[:, -1].detach()
    for logits in output.values["logits"]:
        torch.testing.assert_close(logits, own, atol=1e-5, rtol=0)


def test_cuts_are_those_of_plain_hooks(opened: Any) -> None:
    """g, h and the wrong token once more, with TransformerLens' own hooks."""
    model, _, tokens = opened
    some, usual = tokens[:N], tokens[10 * N :]
    said = answers(model, some, usual)
    assert list(said) == list(RUNS)
    _, cache = model.run_with_cache(some)
    _, other = model.run_with_cache(usual)
    mean = other["blocks.0.hook_resid_pre"][:, -1].mean(0)

    def keep(without: list[int]) -> Any:
        def hook(pattern: Any, hook: Any) -> Any:
            pattern = pattern.clone()
            row = cache[hook.name][:, :, -1].clone()
            row[..., without] = 0
            pattern[:, :, -1] = row / row.sum(-1, keepdim=True)
            return pattern

        return hook

    def query(resid: Any, hook: Any) -> Any:
        resid = resid.clone()
        resid[:, -1] = mean
        return resid

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in (0, 1)]
    for name, without, change in (
        ("g", [0, 1], []), ("g: label renormalised", [1], []), ("wrong token", [0], []),
        ("h", [], [("blocks.0.hook_resid_pre", query)]),
        ("neither", [0, 1], [("blocks.0.hook_resid_pre", query)]),
    ):  # fmt: skip
        hooks = [(hook_name, keep(without)) for hook_name in names] + change
        logits = model.run_with_hooks(some, fwd_hooks=hooks)[:, -1].double().log_softmax(-1)
        torch.testing.assert_close(said[name], logits.detach(), atol=1e-5, rtol=0)


def test_g_knows_no_context_and_h_no_query(opened: Any) -> None:
    model, _, tokens = opened
    usual = tokens[10 * N :]
    mixed = tokens[:N].clone()
    mixed[:, :2] = tokens[:N, :2].roll(1, dims=0)
    mixed[:, 1] = (mixed[:, 1] + 3) % 10
    one, other = answers(model, tokens[:N], usual), answers(model, mixed, usual)
    torch.testing.assert_close(one["g"], other["g"], atol=1e-5, rtol=0)
    assert (one["f"] - other["f"]).abs().max() > 0.1, "the control: f does know its context"
    assert (one["neither"] - one["neither"][:1]).abs().max() < 1e-5
    assert (one["h"] - one["neither"]).abs().max() > 0.1


def test_what_a_later_token_would_see_changes_nothing(opened: Any) -> None:
    """The control that must fail: weights that the causal mask has already taken away."""
    model, _, tokens = opened
    batch = TokenBatch.of_ids(tokens[:N])
    first = torch.zeros(1, 1, 3)
    first[..., 0] = 1
    blind = tuple(Edit("pattern", layer, first, 0) for layer in (0, 1))
    (output,) = run(model, [Request(batch, cells=((), blind), readout=LastLogits())])
    torch.testing.assert_close(
        output.values["logits"][0], output.values["logits"][1], atol=1e-6, rtol=0
    )
    seen = observe(model, tokens[:N])
    label = cuts(seen, seen)["g: label zero"]
    (output,) = run(model, [Request(batch, cells=((), label), readout=LastLogits())])
    assert (output.values["logits"][0] - output.values["logits"][1]).abs().max() > 0.1


def test_exchanging_everything_is_the_other_run(opened: Any) -> None:
    model, _, tokens = opened
    base, flipped = tokens[rows("relevant low base")], tokens[rows("relevant low flipped")]
    effect, whole = moved_label(model, base, flipped)
    at = dict(zip(SITES, effect, strict=True))
    logits = [model(each)[:, -1].detach() for each in (base, flipped)]
    said = [
        (each.gather(1, base[:, 1:2]) - each.gather(1, flipped[:, 1:2]))[:, 0] for each in logits
    ]
    np.testing.assert_allclose(whole, (said[0] - said[1]).numpy(), atol=1e-4)
    np.testing.assert_allclose(at["resid_pre"][0, 0], whole, atol=1e-4)
    assert np.abs(at["resid_pre"][0, 1]).max() < 1e-5, "the query's embedding is the same in both"
    assert np.abs(at["attn_out"][1, 0]).max() < 1e-5, "nobody reads the label token after block 1"
    assert whole.mean() > 1


def test_parts_add_up(opened: Any) -> None:
    model, items, tokens = opened
    some = rows("relevant low flipped")
    shown, own = items.target[0, some], items.own[0, some]
    found = direct(model, tokens[some], shown=shown, own=own)
    logits = model(tokens[some])[:, -1].detach()
    said = logits.gather(1, shown[:, None]) - logits.gather(1, own[:, None])
    assert len(found) == len(PARTS)
    np.testing.assert_allclose(found.sum(axis=0), said[:, 0].numpy(), atol=1e-4)


def test_a_true_mixture_is_found() -> None:
    rng = np.random.default_rng(0)
    g, h, neither = (rng.dirichlet(np.ones(10), size=50) for _ in range(3))
    alpha = rng.uniform(size=50)
    alpha[:2] = 0, 1
    f = alpha[:, None] * g + (1 - alpha[:, None]) * h
    np.testing.assert_allclose(mixture_weight(f, g, h), alpha, atol=1e-6)
    found, left = (dict(zip(FITS, each, strict=True)) for each in fits(f, g, h, neither))
    np.testing.assert_allclose(found["least squares"], alpha, atol=1e-6)
    assert left["mixture"].max() < 1e-6 and left["least squares"].max() < 1e-6
    assert left["shuffled"].mean() > 0.2 and left["one of the two"].mean() > 0.1
    assert np.ptp(found["one alpha"]) == 0 and np.isnan(found["sum of logits"]).all()


def test_a_product_is_no_mixture() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 40, 10)) * 2
    g, h = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits)
    product = np.exp(0.3 * logits[0] + 0.7 * logits[1])
    f = product / product.sum(-1, keepdims=True)
    np.testing.assert_allclose(log_linear_weight(f, g, h), 0.3, atol=1e-6)
    uniform = np.full_like(f, 0.1)
    _, left = (dict(zip(FITS, each, strict=True)) for each in fits(f, g, h, uniform))
    assert left["log-linear"].max() < 1e-6 < 0.03 < left["mixture"].mean()
    added = g * h / (g * h).sum(-1, keepdims=True)
    _, left = (dict(zip(FITS, each, strict=True)) for each in fits(added, g, h, uniform))
    assert left["sum of logits"].max() < 1e-9 and distance(g, g).max() == 0
    assert mixture_weight(f, g, g).tolist() == [0.5] * 40


def test_verbs_work_where_labels_are_fewer_than_tokens(opened: Any) -> None:
    """The engine's timing and the check of answers know a context of three tokens and two vocabularies."""
    model, items, tokens = opened
    some, right = tokens[:N], items.target[0, :N].tolist()
    assert model.cfg.n_ctx == 3 and model.cfg.d_vocab_out == 10 < model.cfg.d_vocab
    for kind in ("zero", "mean", "resample"):
        result = tv.ablate(model, some, kind=kind, answers=right, by="layer")
        assert np.isfinite(result.data["value"]).all() and result.finding()
    with pytest.raises(ValueError, match="50 is no token id of this model: 0 to 9"):
        tv.attribute(model, some, answers=50)


def test_result(found: Inside, tmp_path: Any) -> None:
    assert get("inside") is inside and found.data["step"].values.tolist() == [30, 60]
    again = Result.load(found.save(tmp_path / "i.nc"))
    assert isinstance(again, Inside)
    xr.testing.assert_equal(again.data, found.data)
    assert found.finding().startswith(
        "After 60 steps, with moved labels of rare classes, f errs in"
    )
    summary = found.summary()
    assert summary["seeds"] == 2 and 0 <= summary["alpha"] <= 1
    assert summary["left_by_mixture"] <= summary["left_by_shuffled"]
    assert "2410.23042" in found.cite()
    errors: Any = found.errors()
    fitted = found.mixtures()
    assert len(errors) == 2 * 2 * len(RUNS) * 10 and (errors["low"] <= errors["error"]).all()
    assert set(fitted["fit"]) == {*FITS, "index"}
    row: Any = fitted.query("fit == 'mixture' and seed == 1 and step == 60").iloc[0]
    own = found.data["alpha"].sel(seed=1, step=60, probe=row["probe"], fit="mixture").mean()
    assert row["alpha"] == pytest.approx(float(own))
    assert row["alpha_low"] <= row["alpha"] <= row["alpha_high"]
    assert {"seed", "correlation", "gap"} <= set(found.agreement()) and len(found.cuts()) == 16


def test_figures(found: Inside) -> None:
    figures: Any = found.figures()
    assert list(figures) == [
        "Over steps",
        "Where a moved label acts",
        "Who says the context's label",
    ]
    lines = [t for t in figures["Over steps"].data if t.name == "f: the whole model"]
    errors = found.errors()
    own: Any = errors.query("run == 'f' and probe == 'relevant high flipped'")
    np.testing.assert_allclose(lines[0].y, own.groupby("step")["error"].mean())
    z = np.asarray(figures["Where a moved label acts"].data[0].z)
    np.testing.assert_allclose(
        z[0], found.data["whole"].sel(group="high").mean(("seed", "prompt")), rtol=1e-5
    )
    with pytest.raises(ValueError, match="the table lacks error"):
        inside_curves(errors.drop(columns="error"), found.mixtures())
    with pytest.raises(ValueError, match="the data lacks effect"):
        inside_effects(found.data.drop_vars("effect"))
    with pytest.raises(ValueError, match="the data lacks direct"):
        inside_parts(found.data.drop_vars("direct"))


def test_members_do_not_know_of_each_other_and_runs_resume(found: Inside, tmp_path: Any) -> None:
    alone = inside(
        seed=1, seeds=1, steps=60, checkpoints=(30, 60), n_prompts=8, progress=False, out=tmp_path
    )
    np.testing.assert_allclose(alone.data["alpha"], found.data["alpha"].sel(seed=[1]), atol=1e-3)
    again = inside(
        seed=1, seeds=1, steps=60, checkpoints=(30, 60), n_prompts=8, progress=False, out=tmp_path
    )
    xr.testing.assert_equal(again.data, alone.data)


def test_bad_input(opened: Any) -> None:
    with pytest.raises(ValueError, match="unknown preset 'quik'. Nearest: quick"):
        inside(preset="quik")
    with pytest.raises(ValueError, match="keep holds steps 0 to 10; 20 arrived"):
        inside(steps=10, checkpoints=(5, 20), progress=False)
    with pytest.raises(ValueError, match="n_prompts must be at least 3; 2 arrived"):
        inside(n_prompts=2)
    with pytest.raises(ValueError, match="checkpoints needs at least one value"):
        inside(checkpoints=())
    with pytest.raises(ValueError, match=r"noise must be at least 0; -1.0 arrived"):
        inside(noise=-1.0)
    model, _, tokens = opened
    seen = observe(model, tokens[:3])
    with pytest.raises(ValueError, match="prompts of 1 arrived"):
        cuts(seen, observe(model, tokens[:3, :1]))
