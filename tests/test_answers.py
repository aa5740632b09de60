"""Whole answers: against plain Hugging Face, one prompt at a time, one forward for every new token."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import tvlens as tv
from tests import tiny
from tests.cases import GRID
from tvlens.answers import AnswerScores, score_answers
from tvlens.encoding import Encoder
from tvlens.templates import Template

LAYER = 1


@cache
def prompts(model: Any, task: str = "country_capital", n: int = 6, **settings: Any) -> tv.Prompts:
    return tv.build_prompts(task, model, shots=2, n=n, answers="any", **settings)


def following(hf: Any, ids: list[int], at: int, vector: torch.Tensor | None) -> torch.Tensor:
    """Log probabilities after every token, with the block's output at one position replaced."""
    path = {"GPT2LMHeadModel": "transformer.h", "GPTNeoXForCausalLM": "gpt_neox.layers"}
    block = hf.get_submodule(path.get(type(hf).__name__, "model.layers"))[LAYER]

    def write(module: object, args: object, out: Any) -> Any:
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden[0, at] = vector
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = block.register_forward_hook(write) if vector is not None else None
    try:
        with torch.no_grad():
            return hf(torch.tensor([ids])).logits[0].log_softmax(-1)
    finally:
        if handle:
            handle.remove()


def reference(
    hf: Any,
    model: Any,
    made: tv.Prompts,
    i: int,
    view: str,
    vector: torch.Tensor | None,
    limit: int,
) -> dict[str, Any]:
    """One prompt, by hand."""
    batch = getattr(made, view)
    start = batch.tokens[i][batch.mask[i]].tolist()
    last, ids = len(start) - 1, list(start)
    while len(ids) < len(start) + limit:
        ids.append(int(following(hf, ids, last, vector)[-1].argmax()))
        if ids[-1] == model.tokenizer.eos_token_id:
            ids.pop()
            break
        if "\n" in model.tokenizer.decode(ids[len(start) :]):
            break
    facts, encoder = made.facts, Encoder.of(model)
    template = Template(facts["template"], spacing=facts["spacing"], lead=facts["lead"])
    prompt, lead = template.query(made.queries[i])
    totals = {}
    for answer in made.answers[i]:
        for space in (lead, "" if lead else " "):
            own = encoder.continuation(prompt, space + answer)
            after = following(hf, [*start, *own], last, vector)
            each = [float(after[last + k, token]) for k, token in enumerate(own)]
            stop = encoder.continuation(prompt + space + answer, "\nexample:")[0]
            totals[tuple(own)] = (sum(each), float(after[-1, stop]), len(own))
    text = model.tokenizer.decode(ids[len(start) :]).partition("\n")[0].strip()
    return {"text": text, "log_prob": max(totals.values()), "written": ids[len(start) :]}


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_answers_equal_plain_hugging_face_one_prompt_at_a_time(name: str, kind: str) -> None:
    model, hf = tiny.model(name, kind), tiny.hf(name)
    made = prompts(model, n=4)
    theta = tv.extract(model, made)
    for view, vector in (("regular", None), ("zero_shot", theta)):
        found = score_answers(model, made, view=view, vector=vector, layer=LAYER, max_new_tokens=6)
        for i in range(len(made)):
            value = None if vector is None else vector.at(LAYER)[i]
            expected = reference(hf, model, made, i, view, value, 6)
            assert found.text[i] == expected["text"], (view, i)
            best = (found.log_prob[i], found.stop_log_prob[i], found.n_tokens[i])
            assert tuple(map(float, best)) == pytest.approx(expected["log_prob"], abs=1e-4)
    assert len(set(found.text)) > 1 and int(found.n_tokens.max()) > 1


@pytest.mark.parametrize("template", ["example", "qa", "{x} = {y}, ", "{x}:{y};"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_an_answer_is_right_when_the_model_writes_it_and_stops(name: str, template: str) -> None:
    """What the model writes is put among the accepted answers: forced and free must then agree."""
    model = tiny.model(name)
    made = prompts(model, template=template)
    free = score_answers(model, made, max_new_tokens=5)
    written = [text or "?" for text in free.text]
    own = replace(made, answers=tuple((text,) for text in written))
    again = score_answers(model, own, max_new_tokens=5)
    assert again.text == free.text
    assert again.exact.tolist() == [bool(text) for text in free.text]
    assert not free.exact.any() and again.begins[again.exact].all()


def test_one_token_answers_and_a_limit_of_one_are_first_token_scoring() -> None:
    model = tiny.model("gpt2")
    made = prompts(model, "next_letter", n=12)
    theta = tv.extract(model, made)
    how = {"view": "zero_shot", "vector": theta, "layer": 2}
    scores, answers = tv.score(model, made, **how), score_answers(model, made, **how)
    assert torch.equal(scores.correct, answers.first)
    torch.testing.assert_close(scores.answer_log_prob, answers.log_prob, atol=1e-4, rtol=0)
    assert answers.n_tokens.tolist() == [1] * 12
    assert torch.equal(answers.mean_log_prob, answers.log_prob)
    # Whatever it predicts is made right: then exact with one token is exactly what is counted.
    told = replace(
        made,
        answers=tuple((text.strip() or "?",) for text in scores.text),
        answer_ids=tuple((i,) for i in scores.predicted.tolist()),
    )
    one = score_answers(model, told, **how, max_new_tokens=1)
    assert one.first.all() and one.text == tuple(text.strip() for text in scores.text)


@pytest.mark.slow
def test_prompts_alone_in_parts_and_together_give_the_same() -> None:
    model = tiny.model("llama")
    made = prompts(model, n=5)
    theta = tv.extract(model, made)
    how: dict[str, Any] = {"vector": theta, "layer": 2, "mode": "add", "scale": 0.5}
    together = score_answers(model, made, **how)
    chunked = score_answers(model, made, **how, memory=500_000)
    queries, numbers = made.queries, []
    assert chunked.text == together.text
    torch.testing.assert_close(chunked.log_prob, together.log_prob, atol=1e-4, rtol=0)
    for i, query in enumerate(queries):
        one = replace(
            made,
            regular=made.regular.rows(slice(i, i + 1)),
            dummies=tuple(dummy.rows(slice(i, i + 1)) for dummy in made.dummies),
            zero_shot=made.zero_shot.rows(slice(i, i + 1)),
            queries=(query,),
            answers=made.answers[i : i + 1],
            answer_ids=made.answer_ids[i : i + 1],
        )
        alone = score_answers(model, one, **how | {"vector": row(theta, i)})
        assert alone.text == together.text[i : i + 1] and alone.stopped[0] == together.stopped[i]
        numbers.append(alone.log_prob)
    torch.testing.assert_close(torch.cat(numbers), together.log_prob, atol=1e-4, rtol=0)


def row(theta: tv.TaskVector, i: int) -> tv.TaskVector:
    return replace(theta, values=theta.values[i : i + 1])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_someones_own_hooks_are_honoured(kind: str) -> None:
    model = tiny.model("qwen2", kind)
    made = prompts(model, n=3)
    clean = score_answers(model, made)
    point = tv.models.runner.runner(model).hook_name("resid_post", 0)
    with model.hooks(fwd_hooks=[(point, lambda value, hook: value * -1.0)]):
        hooked = score_answers(model, made)
    assert not torch.allclose(clean.log_prob, hooked.log_prob, atol=1e-2)
    torch.testing.assert_close(score_answers(model, made).log_prob, clean.log_prob)


def test_it_stops_at_what_follows_an_answer_and_says_so() -> None:
    model = tiny.model("llama")
    made = prompts(model, n=4)
    long = score_answers(model, made, max_new_tokens=40)
    short = score_answers(model, made, max_new_tokens=2)
    assert all(b.startswith(a) or not a for a, b in zip(short.text, long.text, strict=True))
    assert not any("\n" in text for text in long.text)
    assert int(long.stopped.sum()) >= int(short.stopped.sum())
    low, high = long.interval()
    assert low <= long.accuracy <= high


def test_it_refuses_what_makes_no_sense() -> None:
    model = tiny.model("llama")
    made = prompts(model)
    for settings, message in (
        ({"view": "both"}, "unknown view"),
        ({"vector": tv.extract(model, made)}, "needs a layer"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 5000}, "context is"),
    ):
        with pytest.raises(ValueError, match=message):
            score_answers(model, made, **settings)
    with pytest.raises(TypeError, match="max_new_tokens"):
        score_answers(model, made, max_new_tokens=1.5)
    with pytest.raises(ValueError, match="nothing follows an answer"):
        score_answers(model, prompts(model, template="{x}->{y}"))


@pytest.mark.slow
def test_smollm2_writes_what_it_generates_by_itself(smollm2: Any) -> None:
    """`tvlens.inject` and TransformerLens' own generate, with its key-value cache."""
    made = tv.build_prompts("en_fr", smollm2, n=6, split="test", answers="any")
    theta = tv.extract(smollm2, made).mean()
    found: AnswerScores = score_answers(
        smollm2, made, view="zero_shot", vector=theta, layer=16, max_new_tokens=4
    )
    for i in range(len(made)):
        ids = made.zero_shot.tokens[i][made.zero_shot.mask[i]][None]
        with tv.inject(smollm2, theta, layer=16), torch.no_grad():
            out = smollm2.generate(
                ids, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False
            )
        text = smollm2.tokenizer.decode(out[0, ids.shape[1] :].tolist())
        assert text.partition("\n")[0].strip() == found.text[i]
