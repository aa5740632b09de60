"""Data, transformer, trainer and export: exact, seeded, and nothing lost when a run is killed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from einops import rearrange

from tests import tiny
from tvlens.icl import (
    PROBES,
    Data,
    Plan,
    Probe,
    Setting,
    Transformer,
    as_tokens,
    export,
    measure,
    train,
)
from tvlens.icl import training as module
from tvlens.icl.draws import keys, normals, number, uniforms
from tvlens.icl.gated import Gated
from tvlens.icl.training import on_grid

GRID = [
    Setting(n_sequences=2**n, seed=s, p_relevant=p)
    for n in (6, 8)
    for s in (0, 1)
    for p in (0.0, 0.9)
]
CUDA = torch.cuda.is_available()
FAST = Plan(
    steps=6, at=(2, 4), n_items=20, probes=(Probe(True, "low", flipped=True), Probe(False, "high"))
)
CPU = {"device": "cpu", "progress": False}


def rows(n: int, members: int = 1) -> torch.Tensor:
    return torch.arange(n).expand(members, -1)


# Draws


def test_draws_are_uniform_normal_and_uncorrelated() -> None:
    key = keys(torch.tensor(3), number("x"), torch.arange(20_000))
    u, z = uniforms(key, 3), normals(key, 4)
    assert u.min() > 0 and u.max() < 1
    assert torch.allclose(u.mean(0), torch.tensor(0.5), atol=0.01)
    assert torch.allclose(u.var(0), torch.tensor(1 / 12), atol=0.005)
    assert torch.allclose(z.mean(0), torch.tensor(0.0), atol=0.03)
    assert torch.allclose(torch.cov(z.T), torch.eye(4), atol=0.04)
    # Sequences that follow one another are no more alike than others.
    assert abs(np.corrcoef(z[:-1, 0], z[1:, 0])[0, 1]) < 0.03


def test_keys_tell_every_part_apart() -> None:
    index = torch.arange(1000)
    found = torch.cat(
        [keys(torch.tensor(s), number(split), index) for s in (0, 1) for split in ("train", "test")]
    )
    assert len(found.unique()) == 4000


# Data


def test_a_sequence_depends_on_its_number_alone() -> None:
    small = Data([Setting(n_sequences=64)]).items("train", rows(64))
    large = Data([Setting(n_sequences=4096), Setting(seed=1)]).items("train", rows(64, 2))
    assert torch.equal(small.inputs[0], large.inputs[0])
    assert torch.equal(small.target[0], large.target[0])
    assert not torch.equal(small.inputs[0], large.inputs[1])


def test_no_evaluation_sequence_repeats_a_training_sequence() -> None:
    data = Data([Setting(n_sequences=512)])
    seen = data.items("train", rows(512)).inputs
    for name in PROBES:
        asked = data.items(f"test {name}", rows(200), relevant=True, group="high").inputs
        near = torch.cdist(asked[0].flatten(1), seen[0].flatten(1)).min()
        assert near > 0.5


@pytest.mark.parametrize("length", [1, 2, 4])
def test_relevance_and_frequencies_are_what_was_asked(length: int) -> None:
    data = Data([Setting(length=length, p_relevant=0.7, noise=0.0)])
    items = data.items("train", 100 + rows(20_000))
    inside = (items.labels == rearrange(items.target, "m i -> m i 1")).any(-1).float().mean()
    assert abs(inside - 0.7) < 0.015
    share = torch.bincount(items.target[0], minlength=10) / 20_000
    assert torch.allclose(share, torch.tensor([0.18] * 5 + [0.02] * 5), atol=0.01)
    # Every input is its label's prototype.
    drawn = items.inputs[0, :, :-1]
    assert torch.allclose(drawn, data.prototypes[0][items.labels[0]])


def test_relevant_contexts_hold_as_many_pairs_as_rejection_would_leave() -> None:
    data = Data([Setting(length=4, p_relevant=1.0)])
    items = data.items("train", 100 + rows(40_000))
    count = (items.labels == rearrange(items.target, "m i -> m i 1")).sum(-1)[0]
    common = count[items.target[0] < 5].float()
    p = torch.tensor(0.18)
    expected = 4 * p / (1 - (1 - p) ** 4)  # the mean of a binomial number that is not 0
    assert abs(common.mean() - expected) < 0.02
    fixed = Data([Setting(length=4, n_relevant=3, p_relevant=1.0)]).items("train", rows(500))
    assert ((fixed.labels == rearrange(fixed.target, "m i -> m i 1")).sum(-1) == 3).all()


def test_forced_classes_are_all_asked_for() -> None:
    setting = Setting(n_sequences=10, p_high=0.99)
    assert sorted(Data([setting]).items("train", rows(10)).target[0].tolist()) == list(range(10))
    free = Data([replace(setting, forced=False)]).items("train", rows(10)).target[0]
    assert len(set(free.tolist())) < 10


def test_flipped_labels_stay_in_their_group_and_disagree_with_the_weights() -> None:
    data = Data([Setting()])
    for group, labels in (("high", range(5)), ("low", range(5, 10))):
        items = data.items("t", rows(300), relevant=True, group=group, flipped=True)
        assert set(items.target[0].tolist()) == set(items.own[0].tolist()) == set(labels)
        assert (items.target != items.own).all()
        assert (items.labels[..., 0] == items.target).all()


def test_novel_classes_have_no_label_but_the_contexts() -> None:
    data = Data([Setting(noise=0.0)])
    items = data.items("t", rows(500), relevant=True, group="novel")
    away = torch.cdist(items.inputs[0, :, -1], data.prototypes[0]).min()
    assert away > 0.3
    # The same input bears every label.
    same = (items.inputs[0, :, -1] - data.novel[0, 0]).norm(dim=-1) < 1e-5
    assert len(set(items.target[0, same].tolist())) == 10


def test_label_noise_moves_training_labels_only() -> None:
    data = Data([Setting(label_noise=0.3, noise=0.0)])
    moved = data.items("train", 100 + rows(5000))
    assert abs((moved.target != moved.own).float().mean() - 0.3) < 0.03
    assert (
        data.items("t", rows(500), relevant=True).target
        == data.items("t", rows(500), relevant=True).own
    ).all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"n_relevant": 2}, "length 1 holds 1 to 1 relevant pairs; n_relevant = 2"),
        ({"p_high": 1.2}, "p_high lies between 0 and 1; 1.2 arrived"),
        ({"p_relevant": float("nan")}, "p_relevant lies between"),
        ({"noise": -0.1}, "must not be negative; -0.1"),
        ({"n_sequences": 9}, "each of 10 classes once: at least 10, or forced=False"),
        ({"n_low": 0}, "n_low must be at least 1; 0"),
        (
            {"n_high": 1, "p_high": 1.0, "p_relevant": 0.0},
            r"one class has all draws \(p_high = 1.0, n_high",
        ),
        ({"n_low": 1, "p_high": 0.0}, "so no other class can stand in a context"),
        # Too rare for a float32 to know of.
        ({"n_low": 1, "p_high": 1e-12}, "one class has all draws"),
        (
            {"n_high": 1, "p_high": 1.0, "p_relevant": 1.0, "length": 2, "n_relevant": 1},
            "ask for p_relevant = 1, without n_relevant",
        ),
    ],
)
def test_impossible_settings(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Setting(**wrong)


def test_contexts_hold_classes_that_are_drawn() -> None:
    """Two classes with all draws are enough, and one where every context is of the query's class."""
    two = {"n_high": 2, "n_low": 3, "noise": 0.0}
    for given in (two | {"p_high": 1.0}, two | {"n_high": 3, "n_low": 2, "p_high": 0.0}):
        data = Data([Setting(**given, p_relevant=0.0, forced=False)])
        items = data.items("train", rows(500))
        drawn = (data.weights[0] > 0).nonzero().flatten().tolist()
        assert set(items.labels.unique().tolist()) == set(drawn) and len(drawn) == 2
        assert (items.labels[..., 0] != items.target).all()
    for given in ({"n_high": 1, "p_high": 1.0}, {"n_low": 1, "p_high": 0.0}):
        only = Data([Setting(**given, p_relevant=1.0, length=3, forced=False)])
        items = only.items("train", rows(50))
        assert (items.labels == rearrange(items.target, "m i -> m i 1")).all()


def test_shapes_must_agree_and_groups_of_one_cannot_be_flipped() -> None:
    with pytest.raises(ValueError, match="2 settings of 2 shapes"):
        Data([Setting(), Setting(length=2)])
    data = Data([Setting(n_low=1)])
    model = Transformer()
    with pytest.raises(ValueError, match="at least 2 are needed, there is 1"):
        measure(model, model.initial(data), data, [Probe(True, "low", flipped=True)], n_items=3)
    with pytest.raises(ValueError, match="no label of their own"):
        Probe(True, "novel", flipped=True)
    with pytest.raises(ValueError, match="unknown probe"):
        Probe.of("relevant lou flipped")


# Training


@pytest.mark.slow
def test_an_ensemble_learns_what_each_member_learns_alone() -> None:
    plan = replace(FAST, steps=100, at=(1, 10, 30, 60))
    together = train(GRID[:4], plan, **CPU)
    for i, setting in enumerate(GRID[:4]):
        alone = train([setting], plan, **CPU)
        gap = abs(together.measures["train_loss"][i] - alone.measures["train_loss"][0]).max()
        assert float(gap) < 1e-4
    other = train([replace(GRID[0], seed=5)], plan, **CPU)
    assert (
        float(abs(together.measures["train_loss"][0] - other.measures["train_loss"][0]).max())
        > 1e-2
    )


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="needs a GPU"))],
)
def test_a_run_killed_half_way_ends_with_the_same_numbers(
    device: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU too, where a step is compiled: gradients are summed in a fixed order there."""
    how = {**CPU, "device": device}
    whole = train(GRID, FAST, **how)
    path, calls = tmp_path / "state.safetensors", []
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(module, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        train(GRID, FAST, out=path, **how)
    monkeypatch.setattr(module, "measure", measure)
    resumed = train(GRID, FAST, out=path, **how)
    assert resumed.measures.equals(whole.measures)
    for name in whole.weights:
        assert torch.equal(resumed.weights[name], whole.weights[name])
    # A finished run is read back, not run again.
    monkeypatch.setattr(module.Stepper, "advance", lambda *a: pytest.fail("trained again"))
    assert train(GRID, FAST, out=path, **how).measures.equals(whole.measures)


def test_a_run_killed_between_two_measuring_points_ends_with_the_same_losses(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(FAST, steps=10, at=(2,), keep=(6,))
    whole = train(GRID[:2], plan, **CPU)
    path, save = tmp_path / "state.safetensors", module.save_state
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)

    def killed(where, state, mark):
        save(where, state, mark)
        if state.step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        train(GRID[:2], plan, out=path, **CPU)
    monkeypatch.setattr(module, "save_state", save)
    assert train(GRID[:2], plan, out=path, **CPU).measures.equals(whole.measures)


def test_a_state_of_another_run_is_refused(tmp_path) -> None:
    path = tmp_path / "state.safetensors"
    train(GRID[:1], FAST, out=path, **CPU)
    with pytest.raises(
        ValueError, match=r"another training: lr differ; its lr is 0.0003, asked for is 0.1"
    ):
        train(GRID[:1], replace(FAST, lr=0.1), out=path, **CPU)
    with pytest.raises(ValueError, match="settings differ"):
        train([replace(GRID[0], seed=9)], FAST, out=path, **CPU)
    other = Transformer().initial(Data([replace(GRID[0], seed=7)]))
    with pytest.raises(ValueError, match="another training: start differ"):
        train(GRID[:1], FAST, out=path, start=other, **CPU)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="no readable safetensors file of a state of a training"):
        train(GRID[:1], FAST, out=path, **CPU)


def test_a_training_need_not_be_probed() -> None:
    done = train(GRID[:1], Plan(steps=2, probes=()), **CPU)
    assert done.measures.sizes["probe"] == 0 and done.measures["train_loss"].notnull().all()


def test_plans_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="at holds steps 0 to 5; 6 arrived"):
        Plan(steps=5, at=(6,))
    with pytest.raises(ValueError, match="steps must be at least 1; 0"):
        Plan(steps=0)


def test_measures_of_known_models() -> None:
    class Copier:
        """Says the context's label, or with ``own`` the label of the query's class."""

        def __init__(self, own: bool) -> None:
            self.own = own

        def log_probs(self, w, items):
            said = items.own if self.own else items.labels[..., 0]
            logits = 20.0 * torch.nn.functional.one_hot(said, 10).float()
            return logits.log_softmax(-1)

    data = Data([Setting(), Setting(seed=1)])
    probes = [
        PROBES[n] for n in ("relevant low flipped", "irrelevant low base", "relevant novel base")
    ]
    copies = measure(Copier(own=False), {}, data, probes, n_items=50)
    recalls = measure(Copier(own=True), {}, data, probes[:2], n_items=50)
    assert copies[0].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert recalls[0].tolist() == [[1, 1], [0, 0]]
    alpha = module.MEASURES.index("alpha")
    assert float(copies[alpha, 0].max()) < 1e-6 and float(recalls[alpha, 0].min()) > 1 - 1e-6
    assert copies[alpha, 1:].isnan().all()
    assert torch.allclose(copies[module.MEASURES.index("copying"), 0], torch.tensor(20.0))


@pytest.mark.slow
def test_training_lowers_the_loss_and_copying_is_learnt() -> None:
    plan = Plan(steps=120, n_items=100, probes=(Probe(True, "high", flipped=True),))
    model = Transformer(label_scale=3.0)
    done = train([Setting(p_relevant=1.0)], plan, model=model, **CPU)
    assert float(done.measures["error"][0, -1, 0]) < 0.3
    control = train([Setting(p_relevant=0.0)], plan, model=model, **CPU)
    assert float(control.measures["error"][0, -1, 0]) > 0.7


# The architecture


def test_the_last_block_at_the_query_alone_is_exact() -> None:
    """Against a plain transformer over all positions, built from torch's own modules."""
    torch.manual_seed(0)
    data = Data([Setting(length=3)])
    model = Transformer(n_heads=2)
    w = model.initial(data)
    w = {k: v + 0.05 * torch.randn_like(v) for k, v in w.items()}
    items = data.items("t", rows(5))
    x = model._tokens(w, items.inputs, items.labels)[0]
    for layer in range(2):
        p = {k.removeprefix(f"{layer}."): v[0] for k, v in w.items() if k.startswith(f"{layer}.")}
        normed = torch.nn.functional.layer_norm(x, (64,), p["ln1.w"], p["ln1.b"])
        q, k, v = (
            rearrange(normed @ p[f"{n}.w"] + p[f"{n}.b"], "i p (h d) -> i h p d", h=2)
            for n in "qkv"
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + rearrange(mixed, "i h p d -> i p (h d)") @ p["o.w"] + p["o.b"]
        normed = torch.nn.functional.layer_norm(x, (64,), p["ln2.w"], p["ln2.b"])
        wide = torch.nn.functional.gelu(normed @ p["in.w"] + p["in.b"], approximate="tanh")
        x = x + wide @ p["out.w"] + p["out.b"]
    last = torch.nn.functional.layer_norm(x, (64,), w["ln_final.w"][0], w["ln_final.b"][0])[:, -1]
    expected = last @ w["unembed.w"][0] + w["unembed.b"][0]
    assert torch.allclose(model.logits(w, items.inputs, items.labels)[0], expected, atol=1e-5)


@tiny.needs_hooked
@pytest.mark.parametrize(("length", "heads"), [(1, 1), (3, 2)])
def test_an_exported_member_is_the_member(length: int, heads: int) -> None:
    grid = [Setting(length=length, seed=s) for s in (0, 1)]
    plan = replace(FAST, keep=(2,))
    done = train(grid, plan, model=Transformer(n_heads=heads), **CPU)
    items = done.data.items("t", rows(7, 2))
    for member, step in ((0, None), (1, None), (1, 2)):
        inputs, tokens = as_tokens(items, member=member, n_classes=10)
        logits = export(done, inputs, member=member, step=step)(tokens)[:, -1].detach()
        w = done.weights if step is None else done.kept[step]
        own = done.model.logits(w, items.inputs, items.labels)[member]
        assert float((logits - own).abs().max()) < 1e-5
    with pytest.raises(ValueError, match=r"step 3 was not kept; there are: 2\."):
        export(done, inputs, step=3)
    with pytest.raises(ValueError, match="members 0 to 1; 2 arrived"):
        export(done, inputs, member=2)


def test_the_stylised_model_is_its_parts() -> None:
    data = Data([Setting(length=2), Setting(length=2, seed=1)])
    model = Gated()
    w = model.initial(data)
    items = data.items("t", rows(40, 2), relevant=True)
    parts = model.parts(w, items)
    gate = rearrange(parts.gate, "m i -> m i 1")
    mixed = gate * parts.g.exp() + (1 - gate) * parts.h.exp()
    assert torch.allclose(model.log_probs(w, items).exp(), mixed, atol=1e-6)
    # A sharp h copies the label of the nearest input; the authors' temperature, above 1, could not.
    sharp = {**w, "h.theta": torch.full((2,), -5.0)}
    wrong = (model.parts(sharp, items).h.argmax(-1) != items.target).float().mean()
    assert float(wrong) < 0.2


def test_what_is_no_group_member_or_list_is_refused() -> None:
    data = Data([Setting(), Setting(seed=1)])
    assert repr(data) == "Data(2 members, 10 classes, length 1)"
    items = data.items("t", rows(30, 2))
    assert repr(items) == "Items(2 members, 30 sequences each, length 1)"
    with pytest.raises(ValueError, match="unknown group of classes 'lo'. Nearest: low"):
        data.items("t", rows(8, 2), group="lo")
    with pytest.raises(ValueError, match="members 0 to 1; 5 arrived"):
        as_tokens(items, member=5, n_classes=10)
    with pytest.raises(ValueError, match="which n_classes = 5 leaves no token for"):
        as_tokens(items, member=0, n_classes=5)
    with pytest.raises(ValueError, match="a list of settings, one for each model; none arrived"):
        train([], FAST, **CPU)


@pytest.mark.skipif(CUDA, reason="asks for a GPU where there is none")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="device 'cuda' is not on this machine; there are: .*cpu"):
        train(GRID[:1], FAST, device="cuda", progress=False)
    with pytest.raises(ValueError, match="unknown device 'tpu'. Nearest: cpu"):
        train(GRID[:1], FAST, device="tpu", progress=False)


def test_members_become_a_grid_even_of_one_seed() -> None:
    flat = xr.Dataset({"error": ("member", [1.0, 2.0])})
    found = on_grid(flat, {"n_sequences": (64, 256), "seed": (7,)})
    assert found["error"].sel(n_sequences=256, seed=7) == 2
    assert found["seed"].dtype.kind == found["n_sequences"].dtype.kind == "i"


def test_each_stage_trains_its_own_parameters() -> None:
    done = train(GRID[:1], FAST, model=Gated(stage="parts"), **CPU)
    first = Gated().initial(done.data)
    assert not torch.equal(done.weights["g.0.w"], first["g.0.w"])
    assert torch.equal(done.weights["gate.0.w"], first["gate.0.w"])
    second = train(GRID[:1], FAST, model=Gated(stage="gate"), start=done.weights, **CPU)
    assert torch.equal(second.weights["g.0.w"], done.weights["g.0.w"])
    assert not torch.equal(second.weights["gate.0.w"], done.weights["gate.0.w"])
    together = train(GRID[:1], FAST, model=Gated(), **CPU)
    # With one pair in the context h copies it at any temperature.
    same = [name for name in first if torch.equal(together.weights[name], first[name])]
    assert same == ["h.theta"]
    with pytest.raises(ValueError, match="unknown stage 'gates'. Nearest: gate"):
        Gated(stage="gates")
