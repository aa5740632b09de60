"""Attribution patching: exact where the map is linear, else what plain autograd says of the plain model."""

import inspect
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
import xarray as xr

import tvlens as tv
from tests import tiny
from tests.cases import GRID
from tests.test_patching import pair
from tvlens.metrics import METRICS
from tvlens.patching import Patching, patch
from tvlens.patching.agreement import Agreement, agreement
from tvlens.patching.gradients import attribution_patch
from tvlens.provenance import decode, encode

ANSWERS, WRONG = [7, 11], [13, 5]
ASKED: dict[str, Any] = {"answers": ANSWERS, "wrong": WRONG}


def both(model: Any, *pairs: Any, **options: Any) -> tuple[Patching, Patching]:
    return attribution_patch(model, *pairs, **ASKED | options), patch(
        model, *pairs, **ASKED | options
    )


def linear_model() -> Any:
    """Attention only and no norms: everything after the last layer's attention weights is linear."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=32, n_heads=4, d_head=8, d_vocab=60, attn_only=True,
        normalization_type=None, seed=0, device="cpu", initializer_range=0.4,
    )  # fmt: skip
    return HookedTransformer(cfg)


@tiny.needs_hooked
@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", ["resid_post", "attn_out", "z", "v", "pattern"])
def test_exact_where_the_map_is_linear(site: str, direction: str) -> None:
    model = linear_model()
    clean, corrupted = torch.randint(20, 60, (2, 2, 7), generator=torch.Generator().manual_seed(0))
    options = {"sites": site, "layers": -1, "by": ("layer", "position"), "direction": direction}
    estimated, true = both(model, clean, corrupted, **options)
    assert np.abs(true.effect).max() > 0.1
    np.testing.assert_allclose(estimated.value, true.value, atol=1e-4)


@tiny.needs_hooked
@pytest.mark.parametrize("site, layer", [("q", -1), ("k", -1), ("resid_pre", 0)])
def test_not_exact_where_it_is_not(site: str, layer: int) -> None:
    model = linear_model()
    clean, corrupted = torch.randint(20, 60, (2, 2, 7), generator=torch.Generator().manual_seed(0))
    estimated, true = both(model, clean, corrupted, sites=site, layers=layer)
    assert np.abs(estimated.value - true.value).max() > 1e-2


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_equals_autograd_of_the_plain_model(name: str, kind: str) -> None:
    clean, corrupted = pair()
    hf = tiny.hf(name)

    def states(tokens: torch.Tensor) -> Any:
        embedded = hf.get_input_embeddings()(tokens).detach().requires_grad_(True)
        out = hf(inputs_embeds=embedded, output_hidden_states=True)
        rows = torch.arange(len(tokens))
        last = out.logits[:, -1]
        metric = last[rows, torch.tensor(ANSWERS)] - last[rows, torch.tensor(WRONG)]
        return metric, out.hidden_states[: hf.config.num_hidden_layers]

    metric, changed = states(corrupted)
    gradients = torch.autograd.grad(metric.sum(), changed)
    _, written = states(clean)
    expected = [
        ((w - c) * g).sum(-1).T.detach()
        for w, c, g in zip(written, changed, gradients, strict=True)
    ]
    found = attribution_patch(tiny.model(name, kind), clean, corrupted, **ASKED)
    np.testing.assert_allclose(found.base, metric.detach(), atol=1e-4)
    np.testing.assert_allclose(found.effect[0], torch.stack(expected), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("site", ["q", "k", "z", "pattern"])
def test_cells_that_are_exchanged_together_add_up(site: str) -> None:
    model, (clean, corrupted) = tiny.model("llama"), pair()
    asked = {"sites": site, **ASKED}
    each = attribution_patch(model, clean, corrupted, by=("position", "head"), **asked).effect
    by_head = attribution_patch(model, clean, corrupted, by="head", **asked).effect
    by_layer = attribution_patch(model, clean, corrupted, by="layer", heads=[1], **asked).effect
    last = attribution_patch(model, clean, corrupted, by="head", positions=[-1, 6], **asked).effect
    np.testing.assert_allclose(each.sum("position"), by_head, atol=1e-5)
    np.testing.assert_allclose(by_head.sel(head=1), by_layer, atol=1e-5)
    # The last position is meant twice, and exchanged once.
    np.testing.assert_allclose(each.sel(position=6), last, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_prompts_of_several_lengths_are_as_each_by_itself(kind: str) -> None:
    model = tiny.model("qwen2", kind)
    clean, corrupted = ["a b c->", "one two"], ["a b d->", "one ten"]
    asked = {
        "answers": ["A", "B"],
        "wrong": ["x", "y"],
        "sites": ["v", "resid_mid"],
        "by": "position",
    }
    together = attribution_patch(model, clean, corrupted, memory=60_000, **asked)
    for i in range(2):
        alone = attribution_patch(
            model, clean[i], corrupted[i], **asked | {"answers": ["AB"[i]], "wrong": ["xy"[i]]}
        )
        n = alone.value.sizes["position"]
        ours = together.value.isel(prompt=i).transpose("site", "layer", "position")
        np.testing.assert_allclose(ours[:, :, :n], alone.value.isel(prompt=0), atol=1e-5)
        assert np.isnan(ours[:, :, n:]).all()


def test_equal_prompts_change_nothing() -> None:
    clean, _ = pair()
    found = attribution_patch(tiny.model("gpt2"), clean, clean, **ASKED)
    assert (found.effect == 0).all()


def test_both_runs_are_known_and_the_card_says_it_is_an_estimate() -> None:
    clean, corrupted = pair()
    model = tiny.model("gpt2")
    estimated, true = both(model, clean, corrupted)
    for run in ("clean", "corrupted"):
        np.testing.assert_allclose(estimated.data[run], true.data[run], atol=1e-4)
        names = f"{run}_top_token"
        assert estimated.data[names].values.tolist() == true.data[names].values.tolist()
    assert estimated.finding().startswith("By gradient, writing the clean")
    assert isinstance(estimated.plot(), go.Figure)
    # Without answers, what the runs say is measured, as in patching.
    assert attribution_patch(model, clean, corrupted).data["answer"].values.tolist() == (
        patch(model, clean, corrupted).data["answer"].values.tolist()
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"metric": "rank", "answers": 7, "wrong": None}, "'rank' has no gradient"),
        ({"metric": "accuracy", "answers": 7, "wrong": None}, "'accuracy' has no gradient"),
        ({"metric": "kl", "answers": None, "wrong": None, "direction": "noise"}, "direction='denoise'"),
        ({"metric": lambda logits, prompt: logits, "answers": None, "wrong": None}, "one number for each"),
        ({"sites": "resid"}, "unknown site 'resid'"),
        ({"layers": 9}, "layer 9 asked for"),
        ({"direction": "both"}, "unknown direction"),
    ],
)  # fmt: skip
def test_refuses(options: dict[str, Any], message: str) -> None:
    clean, corrupted = pair()
    with pytest.raises(ValueError, match=message):
        attribution_patch(tiny.model("gpt2"), clean, corrupted, **ASKED | options)


def test_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="positions do not correspond"):
        attribution_patch(tiny.model("gpt2"), "a b c", "a b c d e")


# --- agreement --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared() -> tuple[Patching, Patching]:
    return both(tiny.model("gpt2"), *pair(), sites=["z"], by=("layer", "position", "head"))


def changed(result: Patching, function: Any) -> Patching:
    """An estimate of other effects."""
    value = result.base + function(result.effect)
    note = encode(result.provenance | {"method": "attribution_patch"})
    data = result.data.assign(value=value.transpose(*result.value.dims))
    return Patching(data.assign_attrs(tvlens=note))


def test_agreement_of_known_estimates(compared: tuple[Patching, Patching]) -> None:
    _, true = compared
    same = agreement(changed(true, lambda effect: effect), true)
    assert same.correlation()["spearman"] == pytest.approx(1) and same.failures().empty
    assert "no cell is off" in same.finding()
    # Any rising function keeps ranks, of one prompt; its values are off.
    one = Patching(true.data.isel(prompt=[0]))
    cubed = agreement(changed(one, lambda effect: np.sinh(5 * effect)), one)
    found = cubed.correlation()
    assert found["spearman"] == pytest.approx(1) and found["pearson"] < 0.99
    assert np.isnan(found["spearman_low"])
    opposite = agreement(changed(true, lambda effect: -effect), true)
    assert opposite.correlation()["pearson"] == pytest.approx(-1)


def test_the_cell_that_fails_is_named(compared: tuple[Patching, Patching]) -> None:
    _, true = compared
    largest = float(np.abs(true.effect).max())

    def spoil(effect: xr.DataArray) -> xr.DataArray:
        here = (effect["layer"] == 1) & (effect["head"] == 2) & (effect["position"] == 5)
        return effect + xr.where(here, 3 * largest, 0.0)

    found = agreement(changed(true, spoil), true)
    worst = found.failures()
    assert len(worst) == 1
    assert worst.loc[0, ["layer", "head", "position"]].tolist() == [1, 2, 5]
    assert worst.loc[0, "error"] == pytest.approx(3 * largest, rel=1e-4)
    assert "1 is off" in found.finding() and "layer 1, position 5" in found.finding()
    figure = found.plot()
    failed = [trace for trace in figure.data if trace.name == "z, outside the band"]
    assert len(failed) == 1 and "layer 1, head 2, position 5" in failed[0].customdata[0]


def test_cells_that_cannot_change_do_not_count(compared: tuple[Patching, Patching]) -> None:
    found = agreement(*compared)
    # The pairs agree before position 3.
    assert found.cells["position"].min() == 3
    assert 0.5 < found.correlation()["spearman"] < 1


def test_equal_prompts_leave_nothing_to_compare() -> None:
    clean, _ = pair()
    found = agreement(*both(tiny.model("gpt2"), clean, clean))
    assert found.cells.empty and "nothing to compare" in found.finding()
    assert np.isnan(found.summary()["spearman"]) and found.plot().layout.title.text


@pytest.mark.slow
def test_agreement_is_saved_and_read(compared: tuple[Patching, Patching], tmp_path: Any) -> None:
    found = agreement(*compared)
    again = Agreement.load(found.save(tmp_path / "agreement.nc"))
    assert again.finding() == found.finding() and again.summary() == found.summary()
    assert "syed2023attribution" in again.cite()


def test_agreement_needs_the_same_cells(compared: tuple[Patching, Patching]) -> None:
    estimated, true = compared
    model, pairs = tiny.model("gpt2"), pair()
    other = patch(model, *pairs, sites="z", by=("layer", "head"), **ASKED)
    with pytest.raises(ValueError, match="give both the same arguments"):
        agreement(estimated, other)
    noise = attribution_patch(
        model, *pairs, sites="z", by=("layer", "position", "head"), direction="noise", **ASKED
    )
    with pytest.raises(ValueError, match="direction 'noise', true patching 'denoise'"):
        agreement(noise, true)
    note = decode(true.data.attrs["tvlens"])
    renamed = Patching(true.data.assign_attrs(tvlens=encode(note | {"model": "other"})))
    with pytest.raises(ValueError, match="has model"):
        agreement(estimated, renamed)
    swapped = Patching(true.data.assign_coords(answer=("prompt", ["x", "y"])))
    with pytest.raises(ValueError, match="different answers"):
        agreement(estimated, swapped)


@pytest.mark.slow
def test_finds_what_patching_finds_on_a_real_model(smollm2: Any) -> None:
    names = [("Mary", "John"), ("Tom", "Anna")]
    clean = [f"When {a} and {b} went to the park, {b} gave a book to" for a, b in names]
    corrupted = [f"When {a} and {b} went to the park, {a} gave a book to" for a, b in names]
    asked = {"answers": [a for a, _ in names], "wrong": [b for _, b in names]}
    asked |= {"sites": "z", "by": ("layer", "head")}
    estimated = attribution_patch(smollm2, clean, corrupted, **asked)
    found = agreement(estimated, tv.patch(smollm2, clean, corrupted, **asked))
    assert found.correlation()["spearman"] > 0.6


def test_agreement_wants_an_estimate_and_the_truth(compared: tuple[Patching, Patching]) -> None:
    estimated, true = compared
    with pytest.raises(ValueError, match=r"the two are swapped.*agreement\(estimated, true\)"):
        agreement(true, estimated)
    with pytest.raises(
        ValueError, match="estimated must be what tv.attribution_patch gives; a result of tv.patch"
    ):
        agreement(true, true)
    with pytest.raises(
        ValueError, match="true must be what tv.patch gives; a result of tv.attribution_patch"
    ):
        agreement(estimated, estimated)
    taken = tv.ablate(
        tiny.model("gpt2"), pair()[0], sites="z", by=("layer", "head"), answers=ANSWERS
    )
    with pytest.raises(ValueError, match="a result of tv.ablate arrived"):
        agreement(estimated, taken)
    plain = inspect.unwrap(agreement)
    with pytest.raises(TypeError, match=r"true must be what tv.patch gives; Dataset arrived"):
        plain(estimated, true.data)
    with pytest.raises(
        TypeError, match=r"estimated must be what tv.attribution_patch gives; str arrived"
    ):
        plain("z", true)


@pytest.mark.parametrize(
    "settings", [{}, {"answers": "A"}, {"answers": "A", "wrong": "B"}], ids=str
)
@pytest.mark.parametrize("metric", ["rank", "accuracy", METRICS["rank"]], ids=str)
def test_a_metric_that_jumps_is_refused_before_anything_else(metric: Any, settings: Any) -> None:
    with pytest.raises(ValueError, match="has no gradient: it jumps"):
        attribution_patch(tiny.model("gpt2"), *pair(), metric=metric, **settings)
