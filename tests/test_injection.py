"""Extract, inject and score: the same numbers by every road, and what they refuse."""

from functools import cache
from typing import Any

import pytest
import torch

import tvlens as tv
from tests import tiny
from tvlens.engine import Edit, LastLogits, Request, run
from tvlens.vectors import TaskVector


@cache
def prompts(model: object, n: int = 5, **settings: object) -> tv.Prompts:
    return tv.build_prompts(tv.load_task("antonyms"), model, shots=3, n=n, **settings)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_extract_equals_transformer_lens_own_cache(name: str) -> None:
    model = tiny.model(name)
    made = prompts(model)
    theta = tv.extract(model, made)
    for row in range(len(made)):
        each = []
        for dummy in made.dummies:
            ids = dummy.tokens[row][dummy.mask[row]][None]
            _, cache = model.run_with_cache(
                ids, names_filter=lambda n: n.endswith("hook_resid_post")
            )
            each.append(
                torch.stack([cache["resid_post", i][0, -1] for i in range(model.cfg.n_layers)])
            )
        torch.testing.assert_close(theta.values[row], torch.stack(each).mean(0), atol=1e-4, rtol=0)
    assert theta.made["task"] == "antonyms" and theta.made["shots"] == 3


def test_extract_takes_layers_sites_and_positions() -> None:
    model = tiny.model("llama")
    made = prompts(model)
    whole, some = tv.extract(model, made), tv.extract(model, made, layers=[3, 1])
    torch.testing.assert_close(some.at(3), whole.at(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(some.at(1), whole.at(1), atol=1e-5, rtol=0)
    attention = tv.extract(model, made, site="attn_out", position=-2)
    assert attention.site == "attn_out" and not torch.allclose(attention.values, whole.values)
    with pytest.raises(ValueError, match="no dummy|have none"):
        tv.extract(model, prompts(model, n_dummy=0))


@pytest.mark.parametrize(("mode", "scale", "position"), [("replace", 1.0, -1), ("add", 0.7, -2)])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_inject_score_and_engine_agree(mode: str, scale: float, position: int, kind: str) -> None:
    model = tiny.model("qwen2", kind)
    made = prompts(model)
    theta = tv.extract(model, made)
    how = {"layer": 1, "mode": mode, "scale": scale, "position": position}
    scores = tv.score(model, made, view="zero_shot", vector=theta, **how)
    edit = Edit("resid_post", 1, theta.at(1), position=position, mode=mode, scale=scale)
    request = Request(made.zero_shot, cells=((edit,),), readout=LastLogits())
    logits = run(model, [request])[0].values["logits"][0]
    assert torch.equal(logits.argmax(dim=-1), scores.predicted)
    with tv.inject(model, theta, **how) as same:
        assert same is model
        batch = made.zero_shot
        steered = model(batch.tokens, attention_mask=batch.mask.long())[:, -1]
        inside = tv.score(model, made, view="zero_shot")
    torch.testing.assert_close(steered, logits, atol=1e-4, rtol=0)
    assert torch.equal(inside.predicted, scores.predicted)
    plain = tv.score(model, made, view="zero_shot")
    assert not torch.equal(plain.answer_log_prob, scores.answer_log_prob)


def test_inject_leaves_no_hook_behind_even_after_an_error() -> None:
    model = tiny.model("llama")
    theta = tv.extract(model, prompts(model)).mean()
    with pytest.raises(RuntimeError, match="boom"), tv.inject(model, theta, layer=0):
        raise RuntimeError("boom")
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_generation_with_a_cache_is_steered_at_the_prompt_only(kind: str) -> None:
    model = tiny.model("llama", kind)
    theta = 3.0 * tv.extract(model, prompts(model)).mean()
    tokens = prompts(model).zero_shot.tokens[:1]
    options = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with tv.inject(model, theta, layer=2):
        cached = model.generate(tokens, use_past_kv_cache=True, **options)
    # By hand: steer the prompt's last token, whatever has been generated after it.
    ids, at = tokens, tokens.shape[1] - 1
    for _ in range(6):
        edit = Edit("resid_post", 2, theta.at(2), position=at)
        batch = prompts(model).zero_shot
        longer = type(batch)(
            ("",), ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids)
        )
        request = Request(longer, cells=((edit,),), readout=LastLogits())
        last = run(model, [request])[0].values["logits"][0].argmax(dim=-1)
        ids = torch.cat([ids, last[:, None]], dim=1)
    assert torch.equal(cached, ids)


def cached_but_last(model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """Run all but the last token, and give what makes the model continue from there."""
    if tv.facts(model).backend == "bridge":
        _, past = model(tokens[:, :-1], return_type="logits_and_cache", use_cache=True)
        return {"past_key_values": past}
    from transformer_lens import TransformerLensKeyValueCache

    cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, 1)
    model(tokens[:, :-1], past_kv_cache=cache)
    return {"past_kv_cache": cache}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_cache_from_before_the_block_is_steered_once(kind: str) -> None:
    model = tiny.model("llama", kind)
    theta = 3.0 * tv.extract(model, prompts(model)).mean()
    tokens = prompts(model).zero_shot.tokens[:1]
    past = cached_but_last(model, tokens)
    with tv.inject(model, theta, layer=1):
        late = model(tokens[:, -1:], **past)[0, -1]
        fresh = model(tokens)[0, -1]
    torch.testing.assert_close(late, fresh, atol=1e-4, rtol=0)


def test_self_injection_changes_nothing() -> None:
    """theta of the very same prompt, put back where it was read, is what was there."""
    model = tiny.model("pythia")
    made = prompts(model)
    clean = tv.score(model, made)
    request = Request(made.regular, reads=(tv.engine.Read("resid_post", (0, 1, 2, 3)),))
    values = run(model, [request])[0].activations[0][0]
    own = TaskVector(values, (0, 1, 2, 3))
    for layer in range(4):
        again = tv.score(model, made, vector=own, layer=layer)
        torch.testing.assert_close(again.answer_log_prob, clean.answer_log_prob, atol=1e-4, rtol=0)


def test_the_last_layer_is_blind_to_the_query() -> None:
    model = tiny.model("llama")
    made = prompts(model, n=8)
    theta = tv.extract(model, made).mean()
    scores = tv.score(model, made, view="zero_shot", vector=theta, layer=-1)
    assert scores.predicted.unique().numel() == 1


def test_scores_have_an_interval() -> None:
    model = tiny.model("llama")
    scores = tv.score(model, prompts(model, n=10))
    low, high = scores.interval()
    assert 0 <= low <= scores.accuracy <= high <= 1
    assert scores.text[0] == model.tokenizer.decode([int(scores.predicted[0])])
    few = tv.build_prompts(tv.load_task("to_upper"), tiny.model("gpt2"), n=26)
    many = tv.build_prompts(tv.load_task("to_upper"), tiny.model("gpt2"), n=130)
    one, other = (tv.score(tiny.model("gpt2"), p, view="zero_shot") for p in (few, many))
    assert one.interval() == pytest.approx(other.interval(), abs=1e-6)  # the same 13 queries


def test_says_what_is_wrong() -> None:
    model = tiny.model("llama")
    made = prompts(model)
    theta = tv.extract(model, made)
    with pytest.raises(ValueError, match="layer 9 asked for, but this model has 4 layers"):
        tv.score(model, made, vector=theta, layer=9)
    with pytest.raises(ValueError, match="unknown view 'zeroshot'. Nearest: zero_shot"):
        tv.score(model, made, view="zeroshot")
    with pytest.raises(ValueError, match="a vector needs a layer"):
        tv.score(model, made, vector=theta)
    with (
        pytest.raises(ValueError, match="unknown mode 'swap'"),
        tv.inject(model, theta, layer=0, mode="swap"),
    ):
        pass
    with (
        tv.inject(model, theta, layer=0),
        pytest.raises(ValueError, match="5 sets .* batch has 2 rows"),
    ):
        model(made.tokens[:2])
    with (
        tv.inject(model, theta.mean(), layer=0, position=-99),
        pytest.raises(ValueError, match="position -99 asked for"),
    ):
        model(made.tokens[:2])
    third = tv.extract(model, made, layers=[3])
    with (
        pytest.raises(ValueError, match="this vector has layers 3"),
        tv.inject(model, third, layer=0),
    ):
        pass
    with (
        tv.inject(model, theta.mean(), layer=0, position=1),
        pytest.raises(
            ValueError, match="position 1 counts from the start, where rows may be padded"
        ),
    ):
        model(made.tokens[:2])
    with pytest.raises(ValueError, match="no site 'resid_mid'"):
        tv.extract(tiny.model("pythia"), prompts(tiny.model("pythia")), site="resid_mid")
    with pytest.raises(ValueError, match="a site of width d_model: .*; not 'z'"):
        tv.extract(model, made, site="z")
    with pytest.raises(TypeError, match="a HookedTransformer or TransformerBridge is needed; str"):
        tv.extract("smollm2-135m", made)
    assert torch.equal(tv.extract(model, made, layers=[-1]).at(3), theta.at(3))
    early = TaskVector(theta.values[:, :1], (0,), site="resid_pre")
    with (
        pytest.raises(ValueError, match="layer 0's resid_pre is the embedding"),
        tv.inject(model, early, layer=0),
    ):
        pass
