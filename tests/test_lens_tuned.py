"""Tuned lenses: what they begin as, what training gains, files, and models they do not belong to."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.cases import GRID, ids_of, make_batch, model_of
from tvlens.lens import TunedLens, logit_lens, training
from tvlens.lens.training import corpus
from tvlens.models.runner import runner
from tvlens.sites import hook_name

FAST: dict[str, Any] = {"steps": 25, "batch": 32}


def text(n: int = 24, width: int = 32) -> torch.Tensor:
    return torch.randint(3, 300, (n, width), generator=torch.Generator().manual_seed(0))


def random_lens(model: Any, scale: float = 0.05) -> TunedLens:
    """A lens that is no identity, without training."""
    start, generator = TunedLens.identity(model), torch.Generator().manual_seed(1)
    weight, bias = (
        scale * torch.randn(each.shape, generator=generator) for each in (start.weight, start.bias)
    )
    return replace(start, weight=weight, bias=bias)


@pytest.fixture(scope="module")
def trained() -> TunedLens:
    return TunedLens.train(model_of("gpt2"), text(), **FAST)


@pytest.mark.parametrize("name, kind", GRID)
def test_at_the_identity_it_is_the_logit_lens(name: str, kind: str) -> None:
    model, batch = tiny.model(name, kind), make_batch([6, 4])
    both = logit_lens(model, batch, lens=TunedLens.identity(model), compare=True)
    assert both.lenses == ("logit", "tuned")
    plain = logit_lens(model, batch)
    for variable in ("kl", "entropy", "top_probability"):
        for lens in both.lenses:
            np.testing.assert_array_equal(
                both.data[variable].sel(lens=lens), plain.data[variable].sel(lens="logit")
            )


@pytest.mark.parametrize("name, kind", GRID)
def test_translators_stand_before_the_read_out(name: str, kind: str) -> None:
    model, lens = tiny.model(name, kind), random_lens(tiny.model(name, kind))
    tokens = torch.tensor([ids_of(make_batch([6]), 0)])
    found = logit_lens(model, tokens, lens=lens, layers=[1, 3]).data.isel(lens=0, prompt=0)
    for layer in (1, 3):
        at = hook_name("resid_post", layer)
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter=[at])
            h = cache[at][0].double()
            wide = h + torch.einsum("pi,io->po", h, lens.weight[layer].double())
            resid = (wide + lens.bias[layer].double()).float()[None]

            def write(there: torch.Tensor, hook: Any, resid: torch.Tensor = resid) -> torch.Tensor:
                return resid

            logits = model.run_with_hooks(
                tokens, prepend_bos=False, fwd_hooks=[(hook_name("resid_post", 3), write)]
            )[0]
        best = logits.softmax(-1).topk(5)
        here = found.sel(layer=layer)
        np.testing.assert_allclose(here["top_probability"], best.values, atol=1e-4)
        assert float(here["kl"].min()) > 0


@pytest.mark.parametrize("name, kind", GRID)
def test_training_comes_nearer_on_text_it_has_not_seen(name: str, kind: str) -> None:
    model = tiny.model(name, kind)
    lens = TunedLens.train(model, text(), **FAST)
    kl = lens.heldout["kl"]
    assert (kl.sel(lens="tuned", layer=[0, 1, 2]) < kl.sel(lens="logit", layer=[0, 1, 2])).all()
    assert float(kl.sel(layer=3).max()) == 0 and not lens.weight[3].any() and not lens.bias[3].any()
    np.testing.assert_allclose(lens.gain, kl.sel(lens="logit") - kl.sel(lens="tuned"))
    other = torch.randint(3, 300, (6, 24), generator=torch.Generator().manual_seed(99))
    found = logit_lens(model, other, lens=lens, compare=True).by_layer("kl")["mean"]
    assert (
        found.sel(lens="tuned", layer=[0, 1, 2]) < found.sel(lens="logit", layer=[0, 1, 2])
    ).all()
    assert all(weight.grad is None for weight in model.parameters())


def test_what_was_held_out_is_measured_over_the_whole_vocabulary(trained: TunedLens) -> None:
    """The gain that is reported is what the lens itself finds on the same prompts."""
    n = len(text())
    held = [int((i + 0.5) * n / 4) for i in range(4)]
    lens = TunedLens.train(model_of("gpt2"), text(), **FAST, n_heldout=10_000)
    assert torch.equal(lens.weight, trained.weight)
    assert lens.heldout.attrs["positions"] == 4 * 32
    found = logit_lens(model_of("gpt2"), text()[held], lens=lens, compare=True).by_layer("kl")[
        "mean"
    ]
    np.testing.assert_allclose(lens.heldout["kl"], found, atol=1e-5)


def test_the_divergence_improves_on_the_regression_and_the_regression_on_nothing() -> None:
    model = model_of("gpt2")
    only = {
        name: float(
            TunedLens.train(model, text(), **options).heldout["kl"].sel(lens="tuned").mean()
        )
        for name, options in {
            "nothing": {"steps": 0, "ridge": None},
            "regression": {"steps": 0},
            "both": {"steps": 60, "batch": 64, "lr": 3e-3},
            "descent": {"steps": 60, "batch": 64, "ridge": None},
        }.items()
    }
    assert only["both"] < only["regression"] < only["nothing"]
    assert only["descent"] < only["nothing"]


def test_a_sample_of_the_vocabulary_trains_like_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2")
    options = {"steps": 40, "batch": 64, "lr": 3e-3}
    whole = TunedLens.train(model, text(), **options).heldout["kl"].sel(lens="tuned")
    monkeypatch.setattr(training, "_COMMON", 100)
    monkeypatch.setattr(training, "_SAMPLED", 60)
    part = TunedLens.train(model, text(), **options).heldout["kl"].sel(lens="tuned")
    before = TunedLens.train(model, text(), steps=0).heldout["kl"].sel(lens="tuned")
    assert (abs(part - whole) < 0.4 * (before - whole) + 1e-6).all()
    assert float((part - whole).max()) > 0  # it is a sample


@pytest.mark.parametrize("name, kind", GRID)
def test_columns_are_those_of_the_models_own_read_out(name: str, kind: str) -> None:
    model = tiny.model(name, kind)
    drive = runner(model)
    rows = 3 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([3, 639, 0, 3])
    columns = training._Columns(drive, rows)
    assert not columns.whole
    with torch.no_grad():
        expected = drive.logits(rows)[:, ids]
    assert (columns(rows, ids).detach() - expected).abs().max() < 1e-4
    columns.whole = True
    assert (columns(rows, ids).detach() - expected).abs().max() < 1e-6
    with torch.enable_grad():
        wanted = rows.clone().requires_grad_()
        columns.whole = False
        (slope,) = torch.autograd.grad(columns(wanted, ids)[0, 0], wanted)
    step = 1e-2 * torch.nn.functional.one_hot(torch.tensor(7), 64)
    with torch.no_grad():
        change = drive.logits(rows + step)[0, 3] - drive.logits(rows - step)[0, 3]
    assert abs(float(change) / 2e-2 - float(slope[0, 7])) < 2e-2


def test_training_is_repeatable_and_its_seed_matters(trained: TunedLens) -> None:
    again = TunedLens.train(model_of("gpt2"), text(), **FAST)
    assert torch.equal(again.weight, trained.weight) and torch.equal(again.bias, trained.bias)
    other = TunedLens.train(model_of("gpt2"), text(), **FAST, seed=1)
    assert not torch.equal(other.weight, trained.weight)


def test_some_layers_and_another_site() -> None:
    model = model_of("llama")
    lens = TunedLens.train(model, text(), layers=[2, 0], site="resid_pre", **FAST)
    assert lens.layers == (2, 0) and (lens.gain > 0).all() and lens.heldout["layer"].values[0] == 2
    found = logit_lens(model, "Rome", lens=lens, layers=[0, 2], site="resid_pre")
    assert found.lenses == ("tuned",) and found.provenance["tuned"]["trained"]["steps"] == 25
    with pytest.raises(ValueError, match="layer 1 asked for; this tuned lens has layers 2, 0"):
        logit_lens(model, "Rome", lens=lens, site="resid_pre")
    with pytest.raises(ValueError, match="trained on resid_pre; resid_post was asked for"):
        logit_lens(model, "Rome", lens=lens, layers=[0])


# Text


def test_the_corpus_is_cut_into_equal_pieces() -> None:
    model = model_of("llama")
    windows = training._windows(model, corpus(), 64)
    assert windows.tokens.shape[1] == 64 and windows.mask.all()
    assert (windows.tokens[:, 0] == model.tokenizer.bos_token_id).all()
    assert len(corpus()) > 12_000 and corpus().isascii()
    assert training._windows(model, ["abc " * 60, "def " * 60], 128).tokens.shape[1] < 128


def test_memory_bounds_how_much_is_read() -> None:
    lens = TunedLens.train(model_of("gpt2"), text(), steps=0, memory=8 * 5 * 32 * 64 * 4)
    assert lens.made["trained"]["positions"] == 7 * 32


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("too short", {}, ValueError, "training a lens needs at least 32"),
        (torch.tensor([[4, 5, 6]]), {}, ValueError, "at least two pieces of text; 1 arrived"),
        (torch.tensor([[4, 700], [4, 5]]), {}, ValueError, "ids outside the model's 640 tokens"),
        ([1, 2], {}, TypeError, "texts must be a text or a list of texts"),
        (None, {"steps": -1}, ValueError, "steps must be at least 0; -1 arrived"),
        (None, {"batch": 0}, ValueError, "batch must be at least 1"),
        (None, {"heldout": 1.0}, ValueError, "heldout is a share between 0 and 1"),
        (None, {"lr": 0.0}, ValueError, "lr and ridge must be positive"),
        (None, {"ridge": -1.0}, ValueError, "lr and ridge must be positive"),
        (None, {"layers": 9}, ValueError, "layer 9 asked for"),
        (None, {"site": "z"}, ValueError, "not 'z'"),
    ],
)
def test_training_refuses(
    texts: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TunedLens.train(model_of("gpt2"), texts, **options)


# Files


def test_a_lens_is_saved_and_loaded(trained: TunedLens, tmp_path: Any) -> None:
    path = trained.save(tmp_path / "deeper" / "lens.safetensors")
    again = TunedLens.load(path, model_of("gpt2"))
    assert torch.equal(again.weight, trained.weight) and torch.equal(again.bias, trained.bias)
    assert again.layers == trained.layers and again.site == trained.site
    assert json.loads(json.dumps(dict(trained.made))) == again.made and repr(again) == repr(trained)
    assert "mean KL on held-out text" in repr(again)
    assert "mean KL" not in repr(TunedLens.identity(model_of("gpt2")))
    with pytest.raises(ValueError, match=r"saved as \.safetensors; 'lens.pt' was asked for"):
        trained.save(tmp_path / "lens.pt")
    with pytest.raises(ValueError, match="was not trained"):
        _ = TunedLens.identity(model_of("gpt2")).heldout


def test_both_kinds_of_model_share_a_lens(trained: TunedLens, tmp_path: Any) -> None:
    path = trained.save(tmp_path / "lens.safetensors")
    for kind in tiny.KINDS:
        TunedLens.load(path, tiny.model("gpt2", kind))


def test_a_lens_of_another_model_is_refused(trained: TunedLens, tmp_path: Any) -> None:
    from tvlens import load_model
    from tvlens.testing import tiny_model

    path = trained.save(tmp_path / "lens.safetensors")
    with pytest.raises(ValueError, match="belongs to .* with width 64; .* has 32"):
        TunedLens.load(path, tiny_model())
    # Of the same shape and name.
    same = load_model(
        tiny.hf("gpt2", seed=3), tokenizer=tiny.tokenizer("gpt2"), device="cpu", processing="none"
    )
    with pytest.raises(ValueError, match="with other weights than .*% of their spread"):
        TunedLens.load(path, same)
    with pytest.raises(ValueError, match="with other weights"):
        logit_lens(model_of("pythia"), "Rome", lens=trained)
    for what, value, message in (
        ("processing", "fold", "under weight processing 'fold'.* processing='fold'"),
        ("n_layers", 12, "with layers 12; .* has 4"),
        ("d_vocab", 50257, "with tokens 50257; .* has 640"),
    ):
        changed = replace(trained, made={**trained.made, what: value})
        with pytest.raises(ValueError, match=message):
            changed.check(model_of("gpt2"))


@tiny.needs_hooked
def test_a_model_with_hooks_on_it_keeps_its_lens(trained: TunedLens) -> None:
    model = tiny.model("gpt2", "hooked")

    def zero(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        return 0 * resid

    with model.hooks(fwd_hooks=[(hook_name("attn_out", layer), zero) for layer in range(4)]):
        hooked = logit_lens(model, "Rome is in", lens=trained)
    assert float(hooked.data["kl"].sel(layer=3).max()) == 0
    plain = logit_lens(model, "Rome is in", lens=trained)
    assert np.abs(hooked.data["entropy"] - plain.data["entropy"]).max() > 1e-3


def test_a_model_in_half_precision_keeps_its_lens(trained: TunedLens) -> None:
    from tvlens import load_model

    half = load_model(
        tiny.hf("gpt2"), tokenizer=tiny.tokenizer("gpt2"), device="cpu", dtype=torch.bfloat16
    )
    found = logit_lens(half, "Rome is in", lens=trained)
    assert float(found.data["kl"].sel(layer=3).max()) == 0


def test_files_that_are_no_lens(trained: TunedLens, tmp_path: Any) -> None:
    from safetensors.torch import save_file

    model, path = model_of("gpt2"), tmp_path / "lens.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        TunedLens.load(path, model)
    trained.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no readable safetensors file"):
        TunedLens.load(path, model)
    save_file({"values": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no tuned lens saved by tvlens"):
        TunedLens.load(path, model)
    meta = {"schema": 99, "kind": "tuned_lens", "site": "resid_post", "layers": [0]}
    tensors = {"weight": torch.zeros(1, 2, 2), "bias": torch.zeros(1, 2)}
    save_file(tensors, path, metadata={"tvlens": json.dumps(meta)})
    with pytest.raises(ValueError, match="has schema 99"):
        TunedLens.load(path, model)
    for weight, layers, message in (
        (torch.zeros(1, 3, 2), (0,), "square matrix"),
        (torch.zeros(1, 2, 2), (0, 1), "1, 2.* and 2 layers arrived"),
        (torch.full((1, 2, 2), torch.nan), (0,), "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            TunedLens(weight, torch.zeros(1, 2), layers)


def test_the_figure_switches_between_lenses(trained: TunedLens) -> None:
    found = logit_lens(model_of("gpt2"), "Rome is in", lens=trained, compare=True)
    figure = found.plot()
    assert [trace.visible for trace in figure.data] == [False, True]
    values, lenses = figure.layout.updatemenus
    assert [b.label for b in lenses.buttons] == ["logit lens", "tuned lens"] and lenses.active == 1
    assert lenses.buttons[0].args[0] == {"visible": [True, False]}
    assert [b.label for b in values.buttons] == ["probability", "entropy", "KL to the end"]
    for number, lens in enumerate(("logit", "tuned")):
        kl = found.data["kl"].sel(lens=lens).isel(prompt=0)
        np.testing.assert_allclose(values.buttons[2].args[0]["z"][number], kl)
    assert [t.visible for t in found.plot(lens="logit").data] == [True, False]
    assert "on through the tuned lens, and " in found.finding()
    assert found.finding().count(" nats") == 1 and "through the logit lens; " in found.finding()
    assert len(found.plot_by_layer().data) == 2
    assert found.summary()["tuned_kl"] < found.summary()["logit_kl"]


@pytest.mark.slow
def test_a_tuned_lens_of_smollm2_gains_nats(smollm2: Any) -> None:
    """Four layers and a short training; the whole takes minutes."""
    lens = TunedLens.train(smollm2, layers=[3, 10, 20, 25], steps=20, n_heldout=48)
    assert (lens.gain > 3).all() and float(lens.heldout["kl"].sel(lens="tuned").max()) < 5
    found = logit_lens(smollm2, "The capital of France is", layers=[-1], tokens=" Paris", k=1)
    assert found.data["target_rank"].values[0, 0, -1, 0, 0] == 1
