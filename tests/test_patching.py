"""Patching against TransformerLens' own loops, and what must hold of any exchange of activations."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens import patching as theirs

import tvlens as tv
from tests import tiny
from tests.cases import make_batch
from tvlens.models.runner import runner
from tvlens.patching import Patching, patch, sweep
from tvlens.sites import hook_name

TOLERANCE = 1e-4
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v")
ORACLES: list[tuple[str, tuple[str, ...], str]] = [
    ("resid_pre", ("layer", "position"), "resid_pre"),
    ("resid_mid", ("layer", "position"), "resid_mid"),
    ("attn_out", ("layer", "position"), "attn_out"),
    ("mlp_out", ("layer", "position"), "mlp_out"),
    ("z", ("layer", "position", "head"), "attn_head_out_by_pos"),
    ("z", ("layer", "head"), "attn_head_out_all_pos"),
    ("q", ("layer", "position", "head"), "attn_head_q_by_pos"),
    ("q", ("layer", "head"), "attn_head_q_all_pos"),
    ("k", ("layer", "position", "head"), "attn_head_k_by_pos"),
    ("k", ("layer", "head"), "attn_head_k_all_pos"),
    ("v", ("layer", "position", "head"), "attn_head_v_by_pos"),
    ("v", ("layer", "head"), "attn_head_v_all_pos"),
    ("pattern", ("layer", "head"), "attn_head_pattern_all_pos"),
    ("pattern", ("layer", "position", "head"), "attn_head_pattern_by_pos"),
]


def pair(n: int = 2, width: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids of prompts that agree at first, differ in the middle, and agree again."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(5, 300, (n, width), generator=generator)
    corrupted = clean.clone()
    corrupted[:, width // 2] = torch.randint(300, 360, (n,), generator=generator)
    corrupted[:, -2] = torch.randint(300, 360, (n,), generator=generator)
    return clean, corrupted


ANSWERS, WRONG = [7, 11], [13, 5]


def difference(logits: Tensor, *, each: bool = False) -> Tensor:
    """The metric by hand."""
    rows = torch.arange(len(logits))
    right, other = (logits[rows, -1, torch.tensor(ids)] for ids in (ANSWERS, WRONG))
    return (right - other) if each else (right - other).mean()


def ours(model: Any, clean: Any, corrupted: Any, **options: Any) -> Patching:
    return patch(model, clean, corrupted, **{"answers": ANSWERS, "wrong": WRONG} | options)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("site, by, oracle", ORACLES)
def test_equals_transformer_lens(
    name: str, site: str, by: tuple[str, ...], oracle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(name)
    if site == "resid_mid" and model.cfg.parallel_attn_mlp:
        pytest.skip("no resid_mid where attention and MLP are parallel")
    monkeypatch.setattr(theirs, "tqdm", lambda cells: cells)
    clean, corrupted = pair(width=5)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        expected = getattr(theirs, f"get_act_patch_{oracle}")(model, corrupted, cache, difference)
    result = ours(model, clean, corrupted, sites=site, by=by)
    found = result.value.mean("prompt").values[0]
    if oracle == "attn_head_pattern_by_pos":
        expected = expected.transpose(1, 2)  # theirs has heads before positions
    assert found.shape == tuple(expected.shape)
    assert np.abs(found - expected.numpy()).max() < TOLERANCE
    with torch.no_grad():
        for run, tokens in (("clean", clean), ("corrupted", corrupted)):
            by_hand = difference(model(tokens), each=True).numpy()
            assert np.abs(result.data[run].values - by_hand).max() < TOLERANCE


@pytest.mark.parametrize("plan", ["plain", "suffix", "growing"])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_a_batch_of_mixed_lengths_is_one_pair_at_a_time(name: str, plan: str) -> None:
    model = tiny.model(name)
    lengths = [6, 9, 4]
    clean, corrupted = make_batch(lengths, shared=3), make_batch(lengths, shared=3, seed=1)
    options: dict[str, Any] = {"sites": "resid_post", "positions": [0, 3, 8, -1, -5]}
    answers, wrong = [5, 6, 7], [8, 9, 10]
    together = patch(model, clean, corrupted, answers=answers, wrong=wrong, plan=plan, **options)
    assert together.provenance["plan"] == plan
    for i, length in enumerate(lengths):
        one, other = (b.tokens[i : i + 1, -length:] for b in (clean, corrupted))
        has = [p for p in options["positions"] if -length <= p < length]
        alone = patch(
            model, one, other, answers=answers[i], wrong=wrong[i], plan="plain",
            **options | {"positions": has},
        )  # fmt: skip
        row = together.value.isel(prompt=i)
        assert np.abs(row.sel(position=has) - alone.value.isel(prompt=0)).max() < TOLERANCE
        missing = [p for p in options["positions"] if p not in has]
        assert bool(row.sel(position=missing).isnull().all())
        assert abs(float(together.data["clean"][i] - alone.data["clean"][0])) < TOLERANCE


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_both_directions_are_one(name: str) -> None:
    """Denoising from a to b is noising from b to a."""
    model = tiny.model(name)
    clean, corrupted = pair()
    one = ours(model, clean, corrupted, sites="attn_out")
    other = patch(
        model, corrupted, clean, sites="attn_out", answers=ANSWERS, wrong=WRONG, direction="noise"
    )
    assert np.abs(one.value - other.value).max() < TOLERANCE
    assert np.abs(one.data["clean"] - other.data["corrupted"]).max() < TOLERANCE
    assert np.abs(one.normalized - (1 - other.normalized)).max() < 1e-2


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_identities(name: str) -> None:
    model = tiny.model(name)
    clean, corrupted = pair()
    sites = [s for s in SITES if s != "resid_mid" or not model.cfg.parallel_attn_mlp]
    itself = ours(model, clean, clean, sites=sites)
    assert (itself.effect == 0).all() and itself.provenance["cells_run"] == 0
    assert bool(itself.normalized.isnull().all())
    # Also where the engine is made to write what is there already.
    cells = tv.ablate(
        model, clean, kind="mean", reference=clean[:1].expand(2, -1), sites=sites, answers=ANSWERS,
        by=("layer", "position"), layers=[0, 1, 2],
    )  # fmt: skip
    assert cells.provenance["cells_run"] == cells.provenance["cells"]
    assert np.abs(cells.effect.isel(prompt=0)).max() < TOLERANCE
    assert np.abs(cells.effect.isel(prompt=1)).max() > 10 * TOLERANCE
    # All of the embedding, or all of the last block's output, is the clean run.
    for site, layer in (("resid_pre", 0), ("resid_post", -1)):
        whole = ours(model, clean, corrupted, sites=site, layers=layer, by="layer")
        assert whole.value.dims == ("site", "layer", "prompt")
        assert np.abs(whole.value.squeeze() - whole.data["clean"]).max() < TOLERANCE
    # What is in the way of the last position before the last block is not all: attention looks back.
    late = ours(model, clean, corrupted, sites="resid_pre", layers=-1, positions=-1)
    assert np.abs(late.value.squeeze() - late.data["clean"]).max() > 10 * TOLERANCE


@given(
    cells=st.lists(
        st.tuples(st.sampled_from(SITES), st.integers(0, 3), st.integers(-7, 6)),
        min_size=1,
        max_size=3,
    ),
    name=st.sampled_from(["gpt2", "gemma3"]),
    lengths=st.lists(st.integers(7, 11), min_size=2, max_size=3),
)
@settings(max_examples=12, deadline=None)
def test_any_cell_is_a_forward_with_one_hook(
    cells: list[tuple[str, int, int]], name: str, lengths: list[int]
) -> None:
    model = tiny.model(name)
    clean, corrupted = (make_batch(lengths, shared=2, seed=seed) for seed in (0, 1))
    for site, layer, position in cells:
        result = patch(
            model,
            clean,
            corrupted,
            sites=site,
            layers=layer,
            positions=position,
            answers=7,
            wrong=9,
        )
        for row, length in enumerate(lengths):
            one, other = (b.tokens[row : row + 1, -length:] for b in (clean, corrupted))
            hook = hook_name(site, layer)
            with torch.no_grad():
                _, cache = model.run_with_cache(one)
                logits = model.run_with_hooks(
                    other, fwd_hooks=[(hook, partial(_write, cache=cache, position=position))]
                )[0, -1]
            expected = float(logits[7] - logits[9])
            assert abs(float(result.value[0, 0, 0, row]) - expected) < TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_chosen_positions_and_heads_are_exchanged_at_once(name: str) -> None:
    model = tiny.model(name)
    clean, corrupted = pair(width=9)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)

    def write(activation: Tensor, hook: Any) -> Tensor:
        for position in (4, -2):
            for head in (0, 3):
                activation[:, position, head] = cache[hook.name][:, position, head]
        return activation

    result = ours(model, clean, corrupted, sites="z", by="layer", positions=[4, -2], heads=[0, 3])
    for layer in range(4):
        with torch.no_grad():
            logits = model.run_with_hooks(corrupted, fwd_hooks=[(hook_name("z", layer), write)])
        expected = difference(logits, each=True).numpy()
        assert np.abs(result.value[0, layer].values - expected).max() < TOLERANCE


def test_heads_that_a_site_lacks_are_missing() -> None:
    model = tiny.model("llama")
    clean, corrupted = pair()
    result = ours(model, clean, corrupted, sites=["q", "k"], by=("layer", "head"))
    assert result.value.sizes["head"] == 4
    missing = result.value.isnull().all(["layer", "prompt"])
    assert missing.sel(site="k").values.tolist() == [False, False, True, True]
    assert not missing.sel(site="q").any()
    alone = ours(model, clean, corrupted, sites="k", by=("layer", "head"))
    assert (
        np.abs(result.value.sel(site="k", head=[0, 1]) - alone.value.squeeze("site")).max() < 1e-5
    )


def test_prompts_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    lengths = [6, 9, 4, 6]
    clean, corrupted = (make_batch(lengths, shared=3, seed=seed) for seed in (0, 1))
    options: dict[str, Any] = {
        "sites": ["resid_pre", "pattern"], "answers": [5, 6, 7, 8], "wrong": 9, "top": 2,
    }  # fmt: skip
    whole = patch(model, clean, corrupted, **options)
    monkeypatch.setattr(sweep, "_KEPT", 1)
    parts = patch(model, clean, corrupted, **options)
    assert len(list(sweep.parts(runner(model), clean, ("z",), 4))) == 4
    for name in ("value", "clean", "corrupted", "top_probability"):
        np.testing.assert_allclose(whole.data[name], parts.data[name], atol=TOLERANCE)
    assert (whole.data["top_token"] == parts.data["top_token"]).all()


def test_splitting_an_edit_of_all_positions_changes_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model("qwen2")
    clean, corrupted = (make_batch([9, 12], shared=6, seed=seed) for seed in (0, 1))
    found = []
    for worth in (1, 99):
        monkeypatch.setattr(sweep, "_WORTH_SPLITTING", worth)
        found.append(ours(model, clean, corrupted, sites="z", by=("layer", "head")).value)
    assert np.abs(found[0] - found[1]).max() < TOLERANCE


def test_cells_that_cannot_matter_are_not_run_and_are_exact() -> None:
    model = tiny.model("gpt2")
    clean, corrupted = pair(width=8)
    result = ours(model, clean, corrupted, sites=["resid_pre", "mlp_out", "q"], top=2)
    untouched = result.effect.sel(position=slice(0, 3))
    assert (untouched == 0).all()
    # Layer 0: the embedding differs at two positions; the last block: one position is read out.
    run = (result.effect != 0).any("prompt").sum("position")
    assert run.sel(site="resid_pre", layer=0) == 2 and run.sel(site="resid_pre", layer=1) == 4
    assert run.sel(site="mlp_out", layer=3) == 1 and run.sel(site="q", layer=0) == 2
    assert run.sel(site="q", layer=3) == 1
    assert result.provenance["cells_run"] == int(run.sum())
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
    for layer, position in ((0, 1), (0, 5), (3, 4)):
        hooks = [(f"blocks.{layer}.hook_mlp_out", partial(_write, cache=cache, position=position))]
        with torch.no_grad():
            logits = model.run_with_hooks(corrupted, fwd_hooks=hooks)
        found = result.value.sel(site="mlp_out", layer=layer, position=position)
        assert np.abs(found - difference(logits, each=True).numpy()).max() < TOLERANCE


def _write(activation: Tensor, hook: Any, *, cache: Any, position: int) -> Tensor:
    activation[:, position] = cache[hook.name][:, position]
    return activation


@pytest.mark.skipif(len(tiny.KINDS) < 2, reason="one class of models is installed")
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_both_kinds_of_models_give_the_same(name: str) -> None:
    clean, corrupted = pair()
    sites = [s for s in SITES if s != "resid_mid" or name != "pythia"]
    found = [
        ours(tiny.model(name, kind), clean, corrupted, sites=[*sites, "pattern"]).value
        for kind in tiny.KINDS
    ]
    assert np.abs(found[0] - found[1]).max() < TOLERANCE


@pytest.mark.parametrize("work", ["trace", "patch_paths", "patch"])
def test_a_function_knows_its_prompts_also_in_parts(
    work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvlens.patching import sweep

    model = tiny.model("llama")
    clean = ["a->A b->", "c->C d->", "e->E f->", "g->G h->"]
    corrupted = ["a->a b->", "c->c d->", "e->e f->", "g->g h->"]
    gold = torch.tensor([5, 17, 40, 80])

    def metric(logits: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return logits.gather(1, gold[prompt, None])[:, 0]

    def values() -> Any:
        if work == "trace":
            return tv.trace(model, clean, "->", metric=metric, samples=2).data
        if work == "patch_paths":
            return tv.patch_paths(model, clean, corrupted, metric=metric).data
        return tv.patch(
            model, clean, corrupted, metric=metric, sites="pattern", by=("layer", "head")
        ).data

    whole = values()
    monkeypatch.setattr(sweep, "_KEPT", 1)
    parts = values()
    for name in ("value", "clean", "corrupted"):
        assert abs(parts[name] - whole[name]).max() < 1e-4
