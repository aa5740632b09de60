"""Direct attribution adds up, on unmodified weights, and its parts are those of TransformerLens' cache."""

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import tvlens as tv
from tests import tiny
from tests.cases import GRID
from tvlens.attribution import attribute, writers
from tvlens.attribution.linear import pull, transpose
from tvlens.attribution.writers import demonstrations
from tvlens.encoding import TokenBatch
from tvlens.models.runner import runner
from tvlens.patching.pairs import as_batch
from tvlens.plots.theme import visible
from tvlens.sites import check_layer

PROMPTS = ["example:cat->CAT dog->", "one two three", "Paris is the capital of"]
ANSWERS, WRONG = [17, [30, 31], 40], [[18, 19], 50, 60]
BY = ("layer", "head", "position", ("head", "position"))


def expected_total(name: str, batch: TokenBatch, wrong: bool = True) -> list[float]:
    """The logit (difference) as Hugging Face computes it, one prompt at a time."""
    found = []
    for row, ids in enumerate(batch.tokens):
        with torch.no_grad():
            logits = tiny.hf(name)(ids[batch.mask[row]][None]).logits[0, -1].double()
        right, other = (np.atleast_1d(each[row]).tolist() for each in (ANSWERS, WRONG))
        found.append(float(logits[right].mean() - (logits[other].mean() if wrong else 0.0)))
    return found


@pytest.mark.parametrize("by", BY, ids=str)
@pytest.mark.parametrize(("name", "kind"), GRID)
def test_parts_add_up_to_what_hugging_face_says(name: str, kind: str, by: Any) -> None:
    model = tiny.model(name, kind)
    found = attribute(model, PROMPTS, answers=ANSWERS, wrong=WRONG, by=by)
    expected = expected_total(name, as_batch(model, PROMPTS))
    np.testing.assert_allclose(found.data["total"], expected, atol=1e-4)
    summed = found.parts().sum("part").values
    np.testing.assert_allclose(summed, expected, atol=1e-4)
    np.testing.assert_allclose(
        summed + found.data["residual"].values, found.data["total"], atol=1e-5
    )
    assert found.missed < 1e-4
    # No part may hide the others' mistakes.
    assert (np.abs(found.parts()).mean("prompt") > 1e-3).sum() >= 9


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_the_answer_alone_has_biases_of_its_own(name: str, kind: str) -> None:
    model = tiny.model(name, kind)
    found = attribute(model, PROMPTS, answers=ANSWERS)
    expected = expected_total(name, as_batch(model, PROMPTS), wrong=False)
    np.testing.assert_allclose(found.parts().sum("part"), expected, atol=1e-4)
    assert found.metric == "logit" and "wrong" not in found.data.coords
    has_norm_bias = name in ("gpt2", "pythia")
    assert bool(found.data["final_norm_bias"].any()) == has_norm_bias


@pytest.mark.parametrize("by", [("head", "position")])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
@tiny.needs_hooked
def test_heads_and_positions_are_those_of_the_cache(name: str, by: Any) -> None:
    model, row = tiny.model(name, "hooked"), 0
    found = attribute(model, PROMPTS[row], answers=17, wrong=18, by=by)
    tokens = as_batch(model, PROMPTS[row]).tokens
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, prepend_bos=False)
    cache = {key: value.double() for key, value in cache.items()}
    last = model.ln_final
    centred = not type(last).__name__.startswith("RMS")

    def along(written: torch.Tensor) -> torch.Tensor:
        """Through the last norm at its cached scale, with the formula written out."""
        written = written - written.mean(-1, keepdim=True) if centred else written
        normed = written / cache["ln_final.hook_scale"][0, -1] * last.w.double()
        return (normed @ (model.W_U[:, 17] - model.W_U[:, 18]).double()).detach()

    for layer, block in enumerate(model.blocks):
        attn = block.attn
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, :, -1]
        v = cache[f"blocks.{layer}.attn.hook_v"][0]
        v = v.repeat_interleave(attn.W_O.shape[0] // v.shape[1], dim=1)
        wrote = torch.einsum("hk,khd,hdm->hkm", pattern, v, attn.W_O.double())
        bias = attn.b_O.double()
        if model.cfg.use_normalization_before_and_after:
            after = block.ln1_post
            scale = cache[f"blocks.{layer}.ln1_post.hook_scale"][0, -1]
            wrote, bias = (each / scale * after.w.double() for each in (wrote, bias))
        mine = found.data.isel(layer=layer, prompt=0)
        torch.testing.assert_close(
            torch.tensor(mine["attention"].values).double(),
            along(wrote),
            rtol=1e-3,
            atol=1e-5,
        )
        assert float(mine["attention_bias"]) == pytest.approx(float(along(bias)), abs=1e-5)
        mlp = cache[f"blocks.{layer}.hook_mlp_out"][0, -1]
        assert float(mine["mlp"]) == pytest.approx(float(along(mlp)), abs=1e-5)
    embedded = along(cache["hook_embed"][0, -1])
    assert float(found.data["embedding"][0]) == pytest.approx(float(embedded), abs=1e-5)
    positional = along(cache["hook_pos_embed"][0, -1]) if name == "gpt2" else 0.0
    assert float(found.data["positional_embedding"][0]) == pytest.approx(
        float(positional), abs=1e-5
    )


@tiny.needs_hooked
def test_heads_are_what_transformer_lens_stacks() -> None:
    model = tv.load_model(
        tiny.hf("gpt2"), tokenizer=tiny.tokenizer("gpt2"), device="cpu", backend="hooked",
        processing="fold",
    )  # fmt: skip
    tokens = as_batch(model, PROMPTS[0]).tokens
    found = attribute(model, PROMPTS[0], answers=17, wrong=18, by="head")
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, prepend_bos=False)
        stack = cache.stack_head_results(layer=-1, pos_slice=-1, apply_ln=True)[:, 0]
        theirs = stack @ (model.W_U[:, 17] - model.W_U[:, 18])
    mine = found.to_tensor("attention").flatten()
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_splits_agree_with_each_other(kind: str) -> None:
    model = tiny.model("gemma3", kind)
    whole = attribute(model, PROMPTS, answers=ANSWERS, wrong=WRONG).data
    each = attribute(model, PROMPTS, answers=ANSWERS, wrong=WRONG, by=("head", "position")).data
    split = each["attention"].sum(["head", "position"]) + each["attention_bias"]
    np.testing.assert_allclose(split, whole["attention"], atol=1e-5)
    heads = attribute(model, PROMPTS, answers=ANSWERS, wrong=WRONG, by="head").data["attention"]
    np.testing.assert_allclose(each["attention"].sum("position"), heads, atol=1e-5)
    # A shorter prompt has no value at positions it does not have; each has its own at all others.
    lengths = as_batch(model, PROMPTS).lengths.numpy()
    there = ~np.isnan(each["attention"].isel(layer=0, head=0)).values
    assert (there.sum(axis=0) == lengths).all() and len(set(lengths)) == 3
    assert (each["prompt_token"].values != "").sum() == lengths.sum()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_mixed_lengths_are_as_one_at_a_time(kind: str) -> None:
    model = tiny.model("qwen2", kind)
    whole = attribute(model, PROMPTS, answers=ANSWERS, wrong=WRONG, by=("head", "position")).data
    for row, prompt in enumerate(PROMPTS):
        one = attribute(
            model, prompt, answers=[ANSWERS[row]], wrong=[WRONG[row]], by=("head", "position")
        ).data
        mine = whole["attention"].isel(prompt=row).dropna("position")
        np.testing.assert_allclose(mine, one["attention"].isel(prompt=0), atol=1e-5)
        assert float(whole["embedding"][row]) == pytest.approx(float(one["embedding"][0]), abs=1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_an_earlier_position(kind: str) -> None:
    model = tiny.model("gpt2", kind)
    batch = as_batch(model, PROMPTS[0])
    shorter = TokenBatch.of_ids(batch.tokens[:, :-2])
    early = attribute(model, batch, answers=17, wrong=18, by="position", position=-3)
    alone = attribute(model, shorter, answers=17, wrong=18, by="position")
    np.testing.assert_allclose(early.parts(), alone.parts(), atol=1e-5)
    assert float(np.abs(early.data["attention"][:, -2:]).max()) == 0
    with pytest.raises(ValueError, match="position"):
        attribute(model, batch, position=400)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_answers_go_on_at_the_position(name: str) -> None:
    model = tiny.model(name)
    words = as_batch(model, "a->").lengths.item()
    early = attribute(model, "a->A b", answers="A", position=words - 1)
    alone = attribute(model, "a->", answers="A")
    # After the "b" of the whole prompt a space would be put before the answer.
    assert early.data["answer"].values.tolist() == alone.data["answer"].values.tolist()
    assert float(early.data["total"][0]) == pytest.approx(float(alone.data["total"][0]), abs=1e-4)
    behind = words - as_batch(model, "a->A b").lengths.item() - 1
    same = attribute(model, "a->A b", answers="A", position=behind)
    assert float(same.data["total"][0]) == float(early.data["total"][0])


def test_the_prompt_whose_answers_are_the_same_is_named_in_every_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model("llama")
    with torch.no_grad():
        last = tiny.hf("llama")(as_batch(model, PROMPTS[2]).tokens).logits[0, -1].argmax()
    monkeypatch.setattr("tvlens.patching.sweep._KEPT", 1)
    with pytest.raises(ValueError, match="prompt 2: right and wrong"):
        attribute(model, PROMPTS, wrong=[0, 0, int(last)])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_chunks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama", kind)
    whole = attribute(model, PROMPTS, by="position").data
    monkeypatch.setattr("tvlens.patching.sweep._KEPT", 1)
    pieces = attribute(model, PROMPTS, by="position").data
    assert pieces["answer"].values.tolist() == whole["answer"].values.tolist()
    for name in ("attention", "mlp", "total"):
        np.testing.assert_allclose(pieces[name], whole[name], atol=1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_soft_cap_comes_after(kind: str) -> None:
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=640, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, final_logit_softcapping=0.5, attn_logit_softcapping=1.0,
        sliding_window=4, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = transformers.Gemma2ForCausalLM(config).eval()
        hf.lm_head.weight.data *= 10
    model = tv.load_model(hf, tokenizer=tiny.tokenizer("gemma3"), device="cpu", backend=kind)
    batch = as_batch(model, PROMPTS[:1])
    found = attribute(model, batch, answers=17, wrong=18, by="head")
    with torch.no_grad():
        capped = hf(batch.tokens).logits[0, -1].double()
    uncapped = 0.5 * torch.atanh(capped / 0.5)
    assert float(found.data["capped"][0]) == pytest.approx(float(capped[17] - capped[18]), abs=1e-4)
    assert abs(float(found.data["total"][0] - found.data["capped"][0])) > 1e-3
    assert float(found.data["total"][0]) == pytest.approx(
        float(uncapped[17] - uncapped[18]), abs=1e-3
    )
    assert found.missed < 1e-3 and "before the soft cap" in found.finding()


# What the runner gives


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_parts_of_the_read_out_and_of_the_embedding(name: str, kind: str) -> None:
    model = tiny.model(name, kind)
    drive, d = runner(model), model.cfg.d_model
    resid = torch.randn(3, d, generator=torch.Generator().manual_seed(0))
    columns = torch.tensor([[5, 6]] * 3)
    assert drive.soft_cap == 0
    with torch.no_grad():
        composed = drive.unembed(drive.last_norm(resid))
        torch.testing.assert_close(composed, drive.logits(resid))
        torch.testing.assert_close(
            drive.unembed(drive.last_norm(resid), columns),
            composed.gather(1, columns),
            rtol=1e-4,
            atol=1e-4,
        )
        z = torch.randn(3, *drive.site_shape("z"), generator=torch.Generator().manual_seed(1))
        block = drive.block(1)
        torch.testing.assert_close(block.norm_attn_out(block.project_out(z)), block.attn_out(z))
        tokens, place = torch.tensor([7, 7, 9]), torch.tensor([0, 4, 2])
        where = drive.embed_position(tokens, place)
        whole = drive.embed(tokens, place)
    assert where.shape == whole.shape
    if name == "gpt2":
        torch.testing.assert_close(where, tiny.hf(name).transformer.wpe.weight[place])
        words = tiny.hf(name).transformer.wte.weight[tokens]
        torch.testing.assert_close(whole - where, words)
    else:
        assert not where.any()


def _layer_norm(x: torch.Tensor) -> torch.Tensor:
    weight, bias = torch.linspace(0.5, 2, 6), torch.linspace(-1, 1, 6)
    return torch.nn.functional.layer_norm(x, (6,), weight, bias, 1e-3)


def _rms_norm(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (6,), torch.linspace(0.5, 2, 6), 1e-3)


def test_a_direction_comes_back_through_a_norm_at_its_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(4, 6, generator=generator) for _ in range(2))
    weight = torch.linspace(0.5, 2, 6)
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    turned = direction * weight / scale
    before, bias = pull(_layer_norm, x, direction)
    torch.testing.assert_close(before.float(), turned - turned.mean(-1, keepdim=True))
    torch.testing.assert_close(bias.float(), direction @ torch.linspace(-1, 1, 6))
    before, bias = pull(_rms_norm, x, direction)
    scale = (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(before.float(), direction * weight / scale)
    assert not bias.any()
    before, _ = pull(lambda x: x, x, direction)
    torch.testing.assert_close(before.float(), direction)


def test_a_direction_comes_back_through_a_matrix() -> None:
    matrix, bias = torch.arange(6.0).reshape(2, 3), torch.tensor([1.0, 2.0])
    before, extra = transpose(
        lambda x: x @ matrix.T + bias, torch.zeros(1, 3), torch.tensor([[1.0, -1.0]])
    )
    assert before.tolist() == [[-3.0, -3.0, -3.0]] and extra.tolist() == [-1.0]


# Who writes theta


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_writers_add_up_to_the_length_of_theta(name: str, kind: str) -> None:
    model = tiny.model(name, kind)
    prompts = tv.build_prompts(tv.load_task("to_upper"), model, shots=3, n=3)
    found = writers(model, prompts, layer=-2)
    theta = tv.extract(model, prompts, layers=[2]).values[:, 0]
    np.testing.assert_allclose(found.data["total"], theta.norm(dim=-1), rtol=1e-5)
    np.testing.assert_allclose(found.parts().sum("part"), theta.norm(dim=-1), rtol=1e-4)
    assert found.data["layer"].values.tolist() == [0, 1, 2]
    assert found.data["attention"].dims == ("layer", "head", "demonstration", "role", "prompt")
    assert found.data["demonstration"].values.tolist() == ["1", "2", "3", "query"]


@tiny.needs_hooked
def test_a_share_of_theta_comes_from_the_tokens_that_are_named() -> None:
    model = tiny.model("llama", "hooked")
    prompts = tv.build_prompts(tv.load_task("to_upper"), model, shots=3, n=1, n_dummy=1)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0))
    found = writers(model, prompts, layer=1, direction=direction).data
    dummy, unit = prompts.dummies[0], direction / direction.norm()
    with torch.no_grad():
        _, cache = model.run_with_cache(dummy.tokens, prepend_bos=False)
    v = cache["blocks.1.attn.hook_v"][0].repeat_interleave(2, dim=1)
    wrote = torch.einsum(
        "hk,khd,hdm,m->hk",
        cache["blocks.1.attn.hook_pattern"][0, :, -1],
        v,
        model.blocks[1].attn.W_O,
        unit,
    )
    outputs = (dummy.roles[0] == tv.prompts.Role.DEMO_OUTPUT).nonzero()[:, 0]
    mine = found["attention"].sel(layer=1, role="output").isel(prompt=0)
    assert len(outputs) == 3
    for number, at in enumerate(outputs.tolist()):
        np.testing.assert_allclose(
            mine.sel(demonstration=str(number + 1)), wrote[:, at].detach(), atol=1e-5
        )
    assert float(np.abs(mine.sel(demonstration="query")).max()) == 0
    theta = tv.extract(model, prompts, layers=[1]).values[0, 0]
    assert float(found["total"][0]) == pytest.approx(float(theta @ unit), abs=1e-4)


def test_demonstrations_are_counted_by_their_outputs() -> None:
    model = tiny.model("gpt2")
    prompts = tv.build_prompts(tv.load_task("to_upper"), model, shots=2, n=1)
    dummy = prompts.dummies[0]
    numbers = demonstrations(dummy.roles[0][dummy.mask[0]].numpy(), 2)
    ids = dummy.tokens[0][dummy.mask[0]]
    said = ["".join(model.tokenizer.decode(ids[numbers == n])) for n in range(3)]
    lines = dummy.text[0].split("\n")
    assert [text.strip() for text in said] == [line.strip() for line in lines]


# Results


@pytest.fixture(scope="module")
def result() -> Any:
    return attribute(
        tiny.model("gpt2"), PROMPTS, answers=ANSWERS, wrong=WRONG, by=("head", "position")
    )


def test_top_mean_and_finding(result: Any) -> None:
    top = result.top(4)
    assert list(top["mean"].abs()) == sorted(top["mean"].abs(), reverse=True)
    expected = np.abs(result.parts().mean("prompt"))
    assert float(expected.max()) == pytest.approx(abs(top["mean"][0]))
    assert (top["low"] <= top["mean"]).all() and (top["mean"] <= top["high"]).all()
    assert top["part"][0] in result.finding() and "parts miss at most" in result.finding()
    assert "right against wrong answer, mean of 3 prompts" in result.finding()
    whole = result.mean("mlp")["mean"]
    np.testing.assert_allclose(whole, result.data["mlp"].mean("prompt"), rtol=1e-5)
    assert result.summary()["missed"] == result.missed
    assert "elhage2021mathematical" in result.cite()
    layers = result.parts(heads=False)
    assert set(layers["kind"].values) >= {"embedding", "attention", "mlp", "final_norm_bias"}
    np.testing.assert_allclose(layers.sum("part"), result.parts().sum("part"), atol=1e-5)
    frame = result.to_dataframe()
    assert {"layer", "head", "position", "prompt", "attention"} <= set(frame.columns)


def test_the_finding_has_parts_for_and_against() -> None:
    found = attribute(
        tiny.model("gpt2"), "Paris is the capital of", answers=17, wrong=18, by="head"
    )
    shares = found.parts().mean("prompt")
    order = shares["part"].values[np.argsort(shares.values)]
    said, least, most = found.finding(), float(shares.min()), float(shares.max())
    ahead, _, behind = said.partition("most against it ")
    assert f"most for the answer {order[-1]} {most:+.2f} and {order[-2]} +" in ahead
    assert behind.startswith(f"{order[0]} {least:.2f} and {order[1]} -")
    assert "at most" not in said and "mean of" not in said and len(said) < 390


def test_the_finding_says_which_tokens_are_meant() -> None:
    model, prompt = tiny.model("llama"), "Paris is the capital of"
    encoded = [
        tv.encoding.Encoder.of(model).continuation(prompt, each) for each in (" France", " zebras")
    ]
    first = [visible(model.tokenizer.decode(ids[:1])) for ids in encoded]
    assert len(encoded[1]) > 1
    found = attribute(model, [prompt, prompt], answers=" France", wrong=" zebras")
    whole = "" if len(encoded[0]) == 1 else " of ␣France"
    assert (
        f"({first[0]}{whole} against {first[1]} of ␣zebras, mean of 2 prompts)" in found.finding()
    )
    each = attribute(model, [prompt, prompt], answers=[" France", " Italy"], wrong=" zebras")
    assert "(right against wrong answer, first tokens, mean of 2 prompts)" in each.finding()
    alone = attribute(model, [prompt, "one two"], answers=[5, 6])
    assert "(each prompt's own answer, mean of 2 prompts)" in alone.finding()
    guessed = attribute(model, prompt)
    assert f"({visible(str(guessed.data['answer'].values[0]))}):" in guessed.finding()


@pytest.mark.parametrize("by", ["position", ("head", "position")], ids=str)
def test_the_finding_says_which_tokens_attention_read(by: Any) -> None:
    found = attribute(tiny.model("gpt2"), "one two three", answers=17, wrong=18, by=by)
    over = [d for d in found.data["attention"].dims if d != "position"]
    sums = found.data["attention"].sum(over).values
    at = int(np.abs(sums).argmax())
    token = visible(str(found.data["prompt_token"].values[0, at]))
    assert (
        f"attention read most from position {at} ({token}) {sums[at]:+.2f} and " in found.finding()
    )
    without = attribute(tiny.model("gpt2"), "one two three", answers=17, wrong=18, by="head")
    assert "read most" not in without.finding()


def test_the_finding_of_writers_names_demonstrations() -> None:
    model = tiny.model("llama")
    prompts = tv.build_prompts(tv.load_task("to_upper"), model, shots=2, n=3)
    found = writers(model, prompts, layer=2)
    sums = found.data["attention"].sum(["layer", "head"]).mean("prompt")
    sums = sums.stack(cell=["demonstration", "role"])
    best = sums[int(np.abs(sums.values).argmax())]
    said = found.finding()
    assert said.startswith("Theta after layer 2, ") and "most along it " in said
    role, demonstration = str(best["role"].values), str(best["demonstration"].values)
    where = "the query" if demonstration == "query" else f"demonstration {demonstration}"
    named = {"last": "the last token", "bos": "the first token", "query": "the query"}
    named |= {"other": f"the words around {where}"}
    place = named.get(role, f"the {role} of {where}")
    assert f"attention read most from {place} {float(best):+.2f}" in said


def test_writers_take_a_task_vector_as_direction() -> None:
    model = tiny.model("llama")
    prompts, other = (
        tv.build_prompts(tv.load_task(task), model, shots=2, n=2)
        for task in ("to_upper", "antonyms")
    )
    theta = tv.extract(model, prompts) - tv.extract(model, other).mean()
    expected = writers(model, prompts, layer=2, direction=theta.at(2))
    for layer in (2, -2):
        found = writers(model, prompts, layer=layer, direction=theta)
        xr.testing.assert_allclose(found.data, expected.data)
    mean = theta.mean()
    one = writers(model, prompts, layer=2, direction=mean.at(2)[0])
    for given in (mean, mean.at(2)):
        found = writers(model, prompts, layer=2, direction=given)
        xr.testing.assert_allclose(found.data, one.data)
    early = tv.extract(model, prompts, site="resid_pre")
    with pytest.raises(ValueError, match="direction was read at 'resid_pre'"):
        writers(model, prompts, layer=2, direction=early)
    with pytest.raises(ValueError, match="layer 2 asked for; this vector has layers 1"):
        writers(model, prompts, layer=2, direction=tv.extract(model, prompts, layers=[1]))
    wide = tv.TaskVector(torch.ones(1, 4, 3), (0, 1, 2, 3))
    with pytest.raises(ValueError, match="width 3"):
        writers(model, prompts, layer=2, direction=wide)


@pytest.mark.parametrize("wrong", ["1", 1.0, [1], None, True], ids=str)
def test_layers_and_positions_are_whole_numbers(wrong: Any) -> None:
    model = tiny.model("llama")
    prompts = tv.build_prompts(tv.load_task("to_upper"), model, shots=2, n=2)
    message = re.escape(f"must be a whole number; {wrong!r} ({type(wrong).__name__}) arrived")
    with pytest.raises(TypeError, match=f"position {message}"):
        inspect.unwrap(attribute)(model, PROMPTS, position=wrong)
    with pytest.raises(TypeError, match=f"layer {message}"):
        inspect.unwrap(writers)(model, prompts, layer=wrong)
    with pytest.raises(TypeError, match=f"layer {message}"):
        inspect.unwrap(check_layer)(wrong, 4)
    assert inspect.unwrap(check_layer)(np.int64(-1), 4) == 3


def test_writers_want_prompts_with_demonstrations() -> None:
    with pytest.raises(TypeError, match=r"tv.build_prompts.*str arrived.*tv.attribute"):
        inspect.unwrap(writers)(tiny.model("llama"), "a->A b->", layer=1)


def test_results_come_back_from_files(result: Any, tmp_path: Any) -> None:
    back = tv.load(result.save(tmp_path / "a.nc"))
    assert type(back).__name__ == "Attribution" and back.finding() == result.finding()
    np.testing.assert_array_equal(back.data["attention"], result.data["attention"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "heads"}, r"unknown by 'heads'.*head"),
        ({"answers": 17, "wrong": 17}, "both begin with the token"),
        ({"answers": [17, 18], "wrong": 19}, "one for each of 3 prompts"),
        ({"answers": 10**6}, "no token id of this model"),
    ],
)
def test_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute(tiny.model("llama"), PROMPTS, **settings)


def test_errors_of_writers_and_results(result: Any) -> None:
    model = tiny.model("llama")
    prompts = tv.build_prompts(tv.load_task("to_upper"), model, shots=2, n=2)
    with pytest.raises(ValueError, match=r"layer 4 asked for.*0 to 3"):
        writers(model, prompts, layer=4)
    with pytest.raises(
        ValueError, match=r"direction must be of shape \(64,\) or \(2, 64\).*\(3,\)"
    ):
        writers(model, prompts, layer=1, direction=torch.ones(3))
    with pytest.raises(ValueError, match="has no length"):
        writers(model, prompts, layer=1, direction=torch.zeros(64))
    without = tv.build_prompts(tv.load_task("to_upper"), model, shots=2, n=2, n_dummy=0)
    with pytest.raises(ValueError, match="dummy"):
        writers(model, without, layer=1)
    with pytest.raises(ValueError, match="unknown variable 'mpl'"):
        result.mean("mpl")
    with pytest.raises(ValueError, match="n must be at least 1"):
        result.top(0)
    with pytest.raises(ValueError, match="not split into heads"):
        attribute(model, PROMPTS).parts(heads=True)
    with pytest.raises(ValueError, match="unknown figure 'waterfal'"):
        result.plot("waterfal")


@pytest.mark.slow
@pytest.mark.parametrize("by", ["head", "position"])
def test_smollm2_adds_up(smollm2: Any, by: str) -> None:
    prompts = [
        "The capital of France is",
        "The opposite of hot is",
        "One, two, three, four,",
        "When Mary and John went to the store, John gave a drink to",
    ]
    found = attribute(
        smollm2, prompts, answers=[" Paris", " cold", " five", " Mary"],
        wrong=[" London", " hot", " two", " John"], by=by,
    )  # fmt: skip
    tokens = [smollm2.tokenizer(text, return_tensors="pt").input_ids for text in prompts]
    assert found.missed < 1e-3
    assert (np.abs(found.data["total"]) > 0.5).all()
    summed = found.parts().sum("part").values
    for row, ids in enumerate(tokens):
        with torch.no_grad():
            logits = smollm2(ids, prepend_bos=False)[0, -1]
        right, wrong = (
            smollm2.tokenizer(str(found.data[name].values[row])).input_ids[0]
            for name in ("answer", "wrong")
        )
        assert summed[row] == pytest.approx(float(logits[right] - logits[wrong]), rel=1e-3)
