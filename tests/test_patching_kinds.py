"""Ablation, causal tracing and path patching against loops of plain forwards with hooks."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tvlens as tv
from tests import tiny
from tests.cases import make_batch
from tests.test_patching import ANSWERS, TOLERANCE, WRONG, difference, pair
from tvlens.metrics import METRICS
from tvlens.models.runner import runner
from tvlens.patching import ablation, paths, tracing
from tvlens.patching.pairs import as_batch, real_tokens
from tvlens.patching.tracing import embedding_spread, find_subject
from tvlens.sites import hook_name

SOME = ("gpt2", "llama", "gemma3")


def run_with(model: Any, tokens: Tensor, hooks: list[tuple[str, Any]]) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)


def cached(model: Any, tokens: Tensor) -> Any:
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]


def replacing(values: Tensor, at: Any) -> Any:
    """A hook that writes values at an index."""

    def hook(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[at] = values
        return activation

    return hook


# Ablation


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_ablation_is_a_forward_with_one_hook(name: str, kind: str) -> None:
    model = tiny.model(name)
    tokens, _ = pair(n=3)
    result = tv.ablate(
        model, tokens, kind=kind, metric="logit_difference", answers=[7, 11, 13], wrong=5, seed=3
    )
    assert result.value.dims == ("site", "layer", "head", "prompt")
    cache = cached(model, tokens)
    order = ablation._others(*[np.full(3, 7)] * 2, itself=True, seed=3)
    assert (order != np.arange(3)).all()
    for layer, head in ((0, 1), (2, 3), (3, 0)):
        z = cache[hook_name("z", layer)][:, :, head]
        values = {"zero": 0 * z, "mean": z.mean(0, keepdim=True), "resample": z[order]}[kind]
        at = (slice(None), slice(None), head)
        logits = run_with(model, tokens, [(hook_name("z", layer), replacing(values, at))])[:, -1]
        expected = logits[range(3), [7, 11, 13]] - logits[:, 5]
        assert np.abs(result.value[0, layer, head].values - expected.numpy()).max() < TOLERANCE


@pytest.mark.parametrize("per_position", [True, False])
def test_means_of_mixed_lengths(per_position: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    batch, reference = make_batch([5, 8]), make_batch([9, 6, 8], seed=4)
    rows = [reference.tokens[i : i + 1, -n:] for i, n in enumerate([9, 6, 8])]
    mlp = [cached(model, row)[hook_name("mlp_out", 1)][0] for row in rows]
    if per_position:
        mean = torch.stack(
            [torch.stack([each[p] for each in mlp if p < len(each)]).mean(0) for p in range(8)]
        )
    else:
        mean = torch.cat(mlp).mean(0).expand(8, -1)
    options: dict[str, Any] = {
        "kind": "mean", "sites": "mlp_out", "layers": 1, "positions": [0, 4, -1],
        "by": ("layer", "position"), "metric": "logit_difference", "answers": 7, "wrong": 9,
        "reference": reference, "per_position": per_position,
    }  # fmt: skip
    result = tv.ablate(model, batch, **options)
    for row, length in enumerate([5, 8]):
        tokens = batch.tokens[row : row + 1, -length:]
        for i, position in enumerate([0, 4, length - 1]):
            hook = replacing(mean[position], (0, position))
            logits = run_with(model, tokens, [(hook_name("mlp_out", 1), hook)])[0, -1]
            assert abs(float(result.value[0, 0, i, row]) - float(logits[7] - logits[9])) < TOLERANCE
    monkeypatch.setattr("tvlens.patching.sweep._KEPT", 1)  # means of several parts
    assert np.abs(tv.ablate(model, batch, **options).value - result.value).max() < TOLERANCE


def test_means_of_attention_weights() -> None:
    model = tiny.model("llama")
    tokens, _ = pair(n=3)
    result = tv.ablate(
        model, tokens, kind="mean", sites="pattern", metric="logit_difference", answers=7, wrong=9
    )
    pattern = cached(model, tokens)[hook_name("pattern", 2)][:, 1].mean(0)
    hook = replacing(pattern, (slice(None), 1))
    logits = run_with(model, tokens, [(hook_name("pattern", 2), hook)])[:, -1]
    expected = (logits[:, 7] - logits[:, 9]).numpy()
    assert np.abs(result.value[0, 2, 1].values - expected).max() < TOLERANCE


def test_resampling_takes_reference_prompts_of_equal_length() -> None:
    model = tiny.model("gpt2")
    batch, reference = make_batch([5, 8]), make_batch([8, 6, 5], seed=4)
    result = tv.ablate(
        model, batch, kind="resample", sites="attn_out", by="layer", reference=reference,
        metric="logit_difference", answers=7, wrong=9,
    )  # fmt: skip
    for row, other, length in ((0, 2, 5), (1, 0, 8)):
        values = cached(model, reference.tokens[other : other + 1, -length:])
        hook = replacing(values[hook_name("attn_out", 1)], slice(None))
        tokens = batch.tokens[row : row + 1, -length:]
        logits = run_with(model, tokens, [(hook_name("attn_out", 1), hook)])[0, -1]
        assert abs(float(result.value[0, 1, row]) - float(logits[7] - logits[9])) < TOLERANCE


def test_ablation_has_no_corrupted_run() -> None:
    result = tv.ablate(tiny.model("gpt2"), ["Paris is in", "Rome is in"])
    assert result.direction == "ablate" and "corrupted" not in result.data
    assert result.data["answer"].values.tolist() == [
        tokens[0] for tokens in result.data["clean_top_token"].values
    ]
    np.testing.assert_allclose(
        result.data["clean"], np.log(result.data["clean_top_probability"][:, 0]), atol=1e-5
    )
    assert "by" in result.finding() and list(result.to_dataframe()).count("normalized") == 0
    with pytest.raises(ValueError, match="an ablation has one untouched run only"):
        result.normalized  # noqa: B018
    with pytest.raises(ValueError, match="an ablation has one untouched run only"):
        result.mean("normalized")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "zeros"}, "unknown kind of ablation 'zeros'. Nearest: zero"),
        ({"kind": "resample"}, r"for prompt 1 of 2 tokens, another with as many; there is none"),
        (
            {"kind": "mean", "reference": "a"},
            r"needs reference prompts of \d tokens; the longest has 1",
        ),
        ({"kind": "mean", "sites": "pattern", "per_position": False}, "no common mean"),
    ],
)
def test_ablation_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tv.ablate(tiny.model("gpt2"), ["Paris is in", "Paris is"], **options)


# Causal tracing


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_tracing_is_noise_and_one_restored_state(name: str) -> None:
    """The noise itself is found by tracing with nothing to restore, through a metric that sees it."""
    model = tiny.model(name)
    tokens, _ = pair(n=2)
    options: dict[str, Any] = {
        "sites": ["resid_post", "mlp_out"], "answers": ANSWERS, "samples": 2, "window": 2, "seed": 5,
        "metric": "logit_difference", "wrong": WRONG,
    }  # fmt: skip
    result = tv.trace(model, tokens, [1, 2], **options)
    cache = cached(model, tokens)
    where = find_subject(model, as_batch(model, tokens), [1, 2])
    noises = tracing._noises(
        runner(model), as_batch(model, tokens), where, result.provenance["noise_scale"], 2, 5
    )
    assert result.provenance["noise_scale"] == 3 * embedding_spread(runner(model))

    def blurred(sample: int) -> tuple[str, Any]:
        def hook(activation: Tensor, hook: Any) -> Tensor:
            activation = activation.clone()
            for edit in noises[sample]:
                activation[:, edit.position] += edit.values
            return activation

        return hook_name("resid_pre", 0), hook

    base = [difference(run_with(model, tokens, [blurred(s)]), each=True) for s in range(2)]
    expected = torch.stack(base).mean(0).numpy()
    assert np.abs(result.data["corrupted"] - expected).max() < TOLERANCE
    for site, layer, position in (("resid_post", 1, 2), ("mlp_out", 0, 1), ("mlp_out", 2, 4)):
        # Meng et al.: a window of 2 around layer l is l - 1 and l.
        deep = [d for d in (layer - 1, layer) if d >= 0]
        found = []
        for s in range(2):
            hooks = [blurred(s)]
            for d in deep:
                at = (slice(None), position)
                hooks.append((hook_name(site, d), replacing(cache[hook_name(site, d)][at], at)))
            found.append(difference(run_with(model, tokens, hooks), each=True))
        cell = result.value.sel(site=site, layer=layer, position=position)
        assert np.abs(cell - torch.stack(found).mean(0).numpy()).max() < TOLERANCE


def test_no_noise_changes_nothing_and_all_restored_is_clean() -> None:
    model = tiny.model("llama")
    prompts = ["Paris is the capital of", "The city of Berlin is in"]
    still = tv.trace(model, prompts, ["Paris", "Berlin"], noise=0, samples=1)
    assert np.abs(still.effect).max() < 1e-6 and bool(still.normalized.isnull().all())
    whole = tv.trace(
        model, prompts, ["Paris", "Berlin"], samples=2, sites="resid_pre", layers=0, by="layer"
    )
    assert np.abs(whole.value.squeeze() - whole.data["clean"]).max() < TOLERANCE
    assert np.abs(whole.data["corrupted"] - whole.data["clean"]).max() > 10 * TOLERANCE


def test_noise_depends_on_seed_and_prompt_alone() -> None:
    model = tiny.model("gpt2")
    prompts, subjects = ["Paris is the capital of", "Rome is in"], ["Paris", "Rome"]
    together = tv.trace(model, prompts, subjects, samples=3, answers=" the")
    for i in range(2):
        alone = tv.trace(model, prompts[i], subjects[i], samples=3, answers=" the")
        assert abs(float(together.data["corrupted"][i] - alone.data["corrupted"][0])) < 1e-6
        row = together.value.isel(prompt=i).dropna("position")
        assert np.abs(row - alone.value.isel(prompt=0)).max() < 1e-5
    other = tv.trace(model, prompts, subjects, samples=3, answers=" the", seed=1)
    assert np.abs(other.data["corrupted"] - together.data["corrupted"]).max() > 1e-5


def test_the_subject_is_found_by_its_letters() -> None:
    model = tiny.model("gpt2")
    batch = as_batch(model, ["The capital of France is", "France is"])
    words = [[model.tokenizer.decode([i]) for i in row] for row in real_tokens(batch)]
    found = find_subject(model, batch, "France")
    for row, tokens in enumerate(words):
        assert "".join(t for t, f in zip(tokens, found[row], strict=False) if f).strip() == "France"
    assert find_subject(model, batch, [0, -1])[1].sum() == 2
    assert find_subject(model, batch, [[0], [1]]).tolist()[0][0]
    result = tv.trace(model, ["The capital of France is", "France is"], "France", samples=1)
    assert result.data["subject"].sum("position").min() >= 1


@pytest.mark.parametrize(
    ("subject", "options", "message"),
    [
        ("Rome", {}, "prompt 0 does not hold the subject 'Rome'; it is 'Paris is in'"),
        ("", {}, "does not hold the subject ''"),
        (["Paris"], {}, "needs one for each of 2 prompts, or one for all; 1 arrived"),
        ([0, 99], {}, r"position 99 asked for, but prompt 0 has \d+ tokens"),
        ([[], [0]], {}, "the subject of prompt 0 has no tokens"),
        ("Paris", {"noise": -1}, "noise must be at least 0; -1 arrived"),
        ("Paris", {"samples": 0}, "samples must be at least 1"),
        ("Paris", {"window": 0}, "window must be at least 1"),
    ],
)
def test_tracing_refuses(subject: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tv.trace(tiny.model("gpt2"), ["Paris is in", "Paris was"], subject, **options)


def test_a_text_is_not_looked_for_in_foreign_tokens() -> None:
    model = tiny.model("gpt2")
    batch = as_batch(model, "Paris is in")
    foreign = type(batch)(("Rome is",), batch.tokens, batch.mask, batch.roles)
    with pytest.raises(ValueError, match="the tokens of prompt 0 are not those of its text"):
        tv.trace(model, foreign, "Rome")


# Path patching


def path_by_hand(
    model: Any, tokens: Tensor, other: Tensor, sender: tuple[str, int, int | None],
    receivers: list[tuple[int, int]], inputs: list[str], at: int | None, freeze_mlps: bool,
) -> Tensor:  # fmt: skip
    """Wang et al.'s three forwards, with hooks and nothing of ours."""
    base, source = cached(model, tokens), cached(model, other)
    site, layer, head = sender
    name = hook_name(site, layer)
    index = (slice(None), slice(None), head) if head is not None else slice(None)
    sent = base[name].clone()
    sent[index] = source[name][index]
    hooks = [(name, lambda a, hook: sent)]
    last = max((r for r, _ in receivers), default=model.cfg.n_layers)
    for deep in range(layer, last):
        if deep > layer:
            z = hook_name("z", deep)
            hooks.append((z, lambda a, hook: base[hook.name]))
        if freeze_mlps and (deep > layer or site != "mlp_out"):
            hooks.append((hook_name("mlp_out", deep), lambda a, hook: base[hook.name]))
    if not receivers:
        return run_with(model, tokens, hooks)
    if layer >= last:
        return run_with(model, tokens, [])
    heard: dict[str, Tensor] = {}
    keep = [(hook_name(i, r), lambda a, hook: heard.update({hook.name: a.clone()}))
            for i in inputs for r, _ in receivers]  # fmt: skip
    run_with(model, tokens, [*hooks, *dict(keep).items()])

    def listen(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        for r, h in receivers:
            if f"blocks.{r}." in hook.name:
                where = (slice(None), slice(None) if at is None else at, h)
                activation[where] = heard[hook.name][where]
        return activation

    return run_with(model, tokens, [(n, listen) for n in heard])


@pytest.mark.parametrize("freeze_mlps", [False, True])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_paths_to_the_logits(name: str, freeze_mlps: bool) -> None:
    model = tiny.model(name)
    clean, corrupted = pair()
    result = tv.patch_paths(
        model, clean, corrupted, answers=ANSWERS, wrong=WRONG, freeze_mlps=freeze_mlps
    )
    for layer, head in ((0, 1), (1, 3), (3, 2)):
        logits = path_by_hand(
            model, clean, corrupted, ("z", layer, head), [], [], None, freeze_mlps
        )
        expected = difference(logits, each=True).numpy()
        assert np.abs(result.value[0, layer, head].values - expected).max() < TOLERANCE


@pytest.mark.parametrize("inputs, at", [(["q"], None), (["k", "v"], None), (["q", "v"], -1)])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_paths_to_heads(name: str, inputs: list[str], at: int | None) -> None:
    model = tiny.model(name)
    clean, corrupted = pair()
    receivers = [(3, 1), (2, 0)]
    result = tv.patch_paths(
        model, clean, corrupted, answers=ANSWERS, wrong=WRONG, receivers=receivers, inputs=inputs,
        receiver_positions=at,
    )  # fmt: skip
    moved = 0.0
    for layer, head in ((0, 1), (1, 3), (2, 2), (3, 1)):
        logits = path_by_hand(
            model, clean, corrupted, ("z", layer, head), receivers, inputs, at, False
        )
        expected = difference(logits, each=True).numpy()
        assert np.abs(result.value[0, layer, head].values - expected).max() < TOLERANCE
        moved = max(moved, float(np.abs(result.effect[0, layer, head]).max()))
    assert moved > 10 * TOLERANCE
    assert (result.effect.sel(layer=3) == 0).all()  # nobody listens after it


@pytest.mark.parametrize("freeze_mlps", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_paths_from_mlps_in_both_directions(name: str, freeze_mlps: bool) -> None:
    model = tiny.model(name)
    clean, corrupted = pair()
    for direction, base, other in (
        ("noise", clean, corrupted),
        ("denoise", corrupted, clean),
    ):
        result = tv.patch_paths(
            model, clean, corrupted, answers=ANSWERS, wrong=WRONG, senders=["mlp_out", "attn_out"],
            receivers=[(3, 0)], inputs="v", direction=direction, freeze_mlps=freeze_mlps,
        )  # fmt: skip
        assert result.value.dims == ("site", "layer", "prompt")
        for site, layer in (("mlp_out", 0), ("mlp_out", 2), ("attn_out", 1)):
            logits = path_by_hand(
                model, base, other, (site, layer, None), [(3, 0)], ["v"], None, freeze_mlps
            )
            found = result.value.sel(site=site, layer=layer)
            assert np.abs(found - difference(logits, each=True).numpy()).max() < TOLERANCE


def test_senders_in_pieces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    clean, corrupted = (make_batch([6, 9, 4], shared=3, seed=seed) for seed in (0, 1))
    options: dict[str, Any] = {"answers": [5, 6, 7], "wrong": 9, "top": 2}
    for receivers in ("final", [(3, 1)]):
        whole = tv.patch_paths(model, clean, corrupted, receivers=receivers, **options)
        monkeypatch.setattr(paths, "_AT_ONCE", 1)
        pieces = tv.patch_paths(model, clean, corrupted, receivers=receivers, **options)
        monkeypatch.undo()
        assert pieces.provenance["cells_run"] == whole.provenance["cells_run"]
        assert np.abs(whole.value - pieces.value).max() < TOLERANCE
        assert (whole.data["top_token"] == pieces.data["top_token"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"receivers": "finale"}, "unknown receiver 'finale'. Nearest: final"),
        ({"receivers": []}, "receivers is empty"),
        ({"receivers": [(1, 2, 3)]}, r"receivers are pairs, as in \[\(23, 3\)\]"),
        ({"receivers": [(1, 4)]}, "receiver head 4 asked for, but inputs q have 4 heads"),
        ({"receivers": [(9, 0)]}, "layer 9 asked for, but this model has 4 layers"),
        ({"receivers": [(1, 0)], "inputs": "z"}, "unknown input 'z'"),
        ({"receivers": [(1, 0)], "receiver_positions": 70}, "receiver position 70 asked for"),
        ({"senders": "resid_pre"}, "unknown sender 'resid_pre'"),
        ({"senders": "mlp_out", "by": "head"}, "mlp_out has no heads"),
        ({"direction": "both"}, "unknown direction 'both'"),
    ],
)
def test_paths_refuse(options: dict[str, Any], message: str) -> None:
    clean, corrupted = pair()
    with pytest.raises(ValueError, match=message):
        tv.patch_paths(tiny.model("gpt2"), clean, corrupted, **{"answers": 7, "wrong": 9} | options)


def test_all_metrics_have_a_name_and_a_list() -> None:
    assert set(METRICS) == {
        "logit_difference", "log_probability", "probability", "rank", "kl", "accuracy",
    }  # fmt: skip
