"""Exercises of the notebook on lenses and attribution: right answers pass, usual mistakes are named."""

import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch

import tvlens as tv
from tvlens.exercises import Verdict, check_lens_layer, check_share

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "04_lenses_and_attribution.ipynb"
PROMPT = "example:a->A\nexample:b->B\nexample:c->"
FRANCE = "The capital of France is"
HEAD = {"answers": " Paris", "wrong": " Rome", "layer": 23, "head": 4}


def solutions() -> list[str]:
    """The hidden solutions of the notebook, in the order of its exercises."""
    cells = nbformat.read(NOTEBOOK, 4).cells
    hidden = r"<summary>Solution</summary>\s*```python\n(.*?)```"
    return [code for cell in cells for code in re.findall(hidden, cell.source, re.S)]


@pytest.fixture(scope="module")
def toy() -> Any:
    return tv.load_model("toy")


def said(verdict: Verdict, part: str) -> bool:
    return not verdict and part in verdict.says


def rms(stream: torch.Tensor) -> torch.Tensor:
    return stream.pow(2).mean().sqrt()


def test_the_layer_from_which_on_the_answer_stands(toy: Any) -> None:
    # By hand, with the norm spelled out.
    with torch.no_grad():
        logits, cache = toy.run_with_cache(PROMPT)
        final = logits[0, -1].argmax()
        stream = [cache[f"blocks.{layer}.hook_resid_post"][0, -1] for layer in range(6)]
        normed = [each / rms(each) * toy.ln_final.w @ toy.W_U for each in stream]
        bare = [each @ toy.W_U for each in stream]
    says, plain = ([bool(each.argmax() == final) for each in row] for row in (normed, bare))
    chance = [float(each.softmax(-1)[final]) for each in normed]
    layer = says.index(True)
    assert all(says[layer:]) and plain.index(True) < layer and np.argmax(chance) > layer + 1

    def check(answer: object) -> Verdict:
        return check_lens_layer(answer, toy, PROMPT)

    assert check(layer) and check(torch.tensor(layer)) and check(float(layer))
    assert said(check(layer + 1), "One too many")
    assert said(check(plain.index(True)), "without the final norm")
    assert said(check(int(np.argmax(chance))), "probability is highest")
    assert said(check(0), "another token comes first")
    for answer in (None, "3", 2.5, -1, 7, True):
        assert said(check(answer), "from 0 to 5")


def test_what_a_head_adds(toy: Any) -> None:
    asked: dict[str, Any] = {"answers": "C", "wrong": "D", "layer": 3, "head": 1}
    right, wrong = (toy.to_single_token(answer) for answer in "CD")
    with torch.no_grad():
        _, cache = toy.run_with_cache(PROMPT)
        z = cache["blocks.3.attn.hook_z"][0, -1]
        writes = [z[head] @ toy.W_O[3, head] for head in range(4)]
        scales = [rms(cache[f"blocks.{layer}.hook_resid_post"][0, -1]) for layer in (5, 3)]
        weight, read = toy.ln_final.w, toy.W_U[:, right] - toy.W_U[:, wrong]
        share = (writes[1] * weight / scales[0]) @ read
        total = toy(PROMPT)[0, -1, [right, wrong]]

    def check(answer: Any, **other: Any) -> Verdict:
        return check_share(answer, toy, PROMPT, **asked | other)

    assert check(share) and check(round(share.item(), 2))
    assert said(check(-share), "sign")
    alone = (writes[1] * weight / scales[0]) @ toy.W_U[:, right]
    assert said(check(alone), "right answer's logit alone")
    everyone = (sum(writes) * weight / scales[0]) @ read
    assert said(check(everyone), "all heads of the layer")
    assert said(check(share / (total[0] - total[1])), "fraction")
    assert said(check(writes[1] @ read), "without the final norm")
    assert said(check((writes[1] * weight) @ read), "its scale is not")
    assert said(check(writes[1] @ read / scales[0]), "its weights are not")
    assert said(check((writes[1] * weight) @ read / scales[1]), "the head's own layer")
    assert said(check(share, head=0), "Not one of the usual slips")
    for answer in (None, "2.25", [1, 2], True):
        assert said(check(answer), "Put one number there")


@pytest.mark.slow
def test_solutions_are_right(smollm2: Any) -> None:
    answers = []
    for code in solutions():
        scope: dict[str, Any] = {"tv": tv, "model": smollm2}
        exec(code, scope)
        answers.append(scope["answer"])
    first, second = answers
    assert check_lens_layer(first, smollm2, "I would like")
    assert check_share(second, smollm2, FRANCE, **HEAD)


@pytest.mark.slow
def test_a_layer_at_which_the_answer_is_on_top_by_chance(smollm2: Any) -> None:
    verdict = check_lens_layer(8, smollm2, "I would like")
    assert said(verdict, "falls back later") and str(17) not in verdict.says
